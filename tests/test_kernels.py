"""Which kernels serve, and that it never shows in the numbers."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from zo_offload import Stepper
from zo_offload.config import ZOConfig
from zo_offload.errors import ConfigError, KernelError
from zo_offload.ops import kernels, native


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(100, 24)
        self.blocks = nn.ModuleList(nn.Linear(24, 24) for _ in range(3))
        self.norm = nn.LayerNorm(24)
        self.to(dtype)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        x = self.table(rows)
        for block in self.blocks:
            x = block(x)
        return self.norm(x).float().square().mean()


def built() -> list[str]:
    try:
        return native.available()
    except KernelError:
        return []


def trained(kernel: str, dtype: torch.dtype, **options) -> str:
    config = ZOConfig.model_validate({"probes": 2, "direction_scale": "rms", **options})
    with (
        kernels.using(kernel),
        Stepper(Net(dtype), config) as stepper,
    ):
        for step in range(5):
            batch = torch.arange(step, step + 8)
            stepper.train_step([batch], lr=1e-2, weight_decay=0.1)
        return stepper.weights.digest()


@pytest.mark.parametrize("master", ["bf16+8", "bf16_sr"])
@pytest.mark.parametrize("direction", ["rademacher", "gaussian"])
def test_smaller_masters_train_to_the_same_bits_in_every_tier(master: str, direction: str):
    found = {
        trained(name, torch.bfloat16, direction=direction, master=master, offload_param=offload)
        for name in (kernels.TORCH, *built())
        for offload in ({"device": "none"}, {"device": "cpu"})
    }
    assert len(found) == 1
    assert found != {trained(kernels.TORCH, torch.bfloat16, direction=direction)}


@pytest.mark.parametrize(("master", "rest"), [("fp32", 2), ("bf16+8", 1), ("bf16_sr", 0)])
def test_a_smaller_master_takes_less_memory(master: str, rest: int):
    with Stepper(Net(torch.bfloat16), ZOConfig.model_validate({"master": master})) as stepper:
        for unit in stepper.weights.map.everything:
            assert unit.rest_bytes == sum(span.elements for span in unit.spans) * rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_smaller_master_is_for_bfloat16(dtype: torch.dtype):
    with pytest.raises(ConfigError, match=r'master: "bf16_sr" is for forwards in bf'):
        Stepper(Net(dtype), ZOConfig(master="bf16_sr"))


@pytest.mark.sampled(10)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("direction", ["rademacher", "gaussian"])
@pytest.mark.parametrize("device", ["none", "cpu"])
@pytest.mark.parametrize("lag", [0, 2])
def test_every_implementation_trains_to_the_same_bits(
    dtype: torch.dtype, direction: str, device: str, lag: int
):
    offload = {"offload_param": {"device": device}, "update": {"lag": lag}}
    options = {"direction": direction, **offload}
    expected = trained(kernels.TORCH, dtype, **options)
    for name in built():
        assert trained(name, dtype, **options) == expected


def test_a_compiler_means_kernels():
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler")
    assert "scalar" in built()


def test_without_the_library_torch_serves_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(native, "LIBRARY", Path("/nowhere/_kernels.so"))
    monkeypatch.setattr(kernels, "_serving", None)  # restored with the other
    monkeypatch.setattr(kernels, "_chosen", False)
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    native.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "zo_offload"):
            assert kernels.name() == kernels.TORCH
            assert kernels.name() == kernels.TORCH
    finally:
        native.library.cache_clear()
    (record,) = caplog.records
    assert "was not built; install zo_offload again where there is a C" in record.getMessage()
    assert "; torch serves instead, with the same bits" in record.getMessage()
    assert "apt install g++" in record.getMessage()


def test_a_library_of_another_version_is_not_used(monkeypatch):
    if not built():
        pytest.skip("the native kernels are not built")
    built_as = native.VERSION
    monkeypatch.setattr(native, "VERSION", 99)
    native.library.cache_clear()
    try:
        with pytest.raises(KernelError, match=f"is of version {built_as}, expected 99; reinstall"):
            native.library()
    finally:
        native.library.cache_clear()


def test_a_file_that_is_no_library_is_not_used(monkeypatch, tmp_path):
    (tmp_path / "_kernels.so").write_bytes(b"\x7fELF")
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_kernels.so")
    native.library.cache_clear()
    try:
        with pytest.raises(KernelError, match=r"_kernels\.so cannot be loaded: "):
            native.library()
    finally:
        native.library.cache_clear()


def test_the_environment_names_the_implementation(monkeypatch):
    monkeypatch.setattr(kernels, "_serving", None)  # restored with the other
    monkeypatch.setattr(kernels, "_chosen", False)
    monkeypatch.setenv(kernels.VARIABLE, "torch")
    assert kernels.name() == "torch"
    monkeypatch.setattr(kernels, "_serving", None)  # restored with the other
    monkeypatch.setattr(kernels, "_chosen", False)
    monkeypatch.setenv(kernels.VARIABLE, "fast")
    with pytest.raises(KernelError, match="expected one of torch, triton, scalar"):
        kernels.name()


def test_an_instruction_set_of_another_machine_is_refused():
    other = "avx512" if "neon" in built() else "neon"
    if not built():
        pytest.skip("the native kernels are not built")
    with pytest.raises(KernelError, match=f"has no {other}"), kernels.using(other):
        pass


class Wrong:
    """Compiles, and does nothing."""

    def perturb(self, *args: object) -> None:
        pass


@pytest.mark.parametrize("failing", ["cannot find a C compiler\nat all", None])
def test_device_kernels_that_do_not_work_serve_nothing(
    failing: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def make() -> Wrong:
        if failing:
            raise RuntimeError(failing)
        return Wrong()

    monkeypatch.setattr(kernels, "TritonKernels", make)
    kernels.triton_on.cache_clear()
    try:
        assert kernels.triton_on(torch.device("cpu")) is None
        assert kernels.triton_on(torch.device("cpu")) is None
    finally:
        kernels.triton_on.cache_clear()
    (warning,) = caplog.messages
    reason = "cannot find a C compiler" if failing else "their bits are wrong"
    assert warning.startswith(f"triton kernels do not work on cpu ({reason}); torch serves instead")


def test_device_kernels_that_work_serve(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels.triton_on.cache_clear()
    try:
        serving = kernels.triton_on(torch.device("cpu"))
    finally:
        kernels.triton_on.cache_clear()
    assert serving is not None
    assert serving.name == kernels.TRITON
