"""What every test stands on: a fixed environment, two threads, and the acceptance folder."""

import os
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

# Set before torch, transformers or a child process can read them. Nothing of the user's accounts,
# caches or cluster may reach a test, and no test may reach the network.
os.environ.update(
    HF_HOME=str(REPOSITORY / ".pytest_cache" / "huggingface"),
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    TQDM_DISABLE="1",
    WANDB_MODE="disabled",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="2",
    # Threads that wait for each other in a loop wait for a core where another process has it: with
    # ten of them on two cores a second of training took a minute of processor time, five of wall.
    OMP_WAIT_POLICY="PASSIVE",
)
RANKS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what makes a process one of several
for name in (*RANKS, "LOCAL_RANK"):
    os.environ.pop(name, None)

import pytest
import pytest_randomly
import sampling
import torch
from hypothesis import settings

from zo_offload.errors import KernelError
from zo_offload.ops import native

torch.set_num_threads(2)

# Where there are no native kernels every run says so; here that would be in the way.
try:
    native.library()
except KernelError:
    os.environ["ZO_OFFLOAD_KERNELS"] = "torch"

# Seeds torch before each test, as `random` and NumPy are. DeepSpeed offers a seeder that does it
# too, at the price of importing DeepSpeed in every run.
pytest_randomly.entrypoint_reseeds = [torch.manual_seed]

# A busy machine is not a failure: examples have no deadline of their own, tests have a timeout.
settings.register_profile("repository", deadline=None, print_blob=True)
settings.load_profile("repository")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Files with long tests first, so that no process is left with one at the end.

    What needs a GPU is skipped where there is none.
    """
    sampling.mark(items)  # before ``-m`` selects
    yield  # after it the order is random
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)
    if torch.cuda.is_available() or os.environ.get("ZO_GPU_TESTS_ON") == "cpu":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="module", autouse=True)
def no_ranks_left() -> Iterator[None]:
    """A process that a later test starts would take itself for a rank, and wait at a used port."""
    yield
    assert not os.environ.keys() & set(RANKS), "a test of this file has left a rank's variables"


@pytest.fixture(scope="session")
def acceptance() -> Path:
    """The folder with a small pretrained model and a real task."""
    folder = Path(os.environ.get("ZO_ACCEPTANCE", REPOSITORY.parent / "shared" / "acceptance"))
    missing = [part for part in ("opt-mini", "subj") if not (folder / part).is_dir()]
    if missing:
        pytest.skip(f"acceptance folder {folder} lacks {' and '.join(missing)}")
    return folder
