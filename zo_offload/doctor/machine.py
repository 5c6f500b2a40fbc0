"""What is installed, what there is of memory and cores, and what the system allows."""

import importlib
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from zo_offload.doctor.row import Row
from zo_offload.errors import KernelError
from zo_offload.ops import kernels, native
from zo_offload.plan.shortage import this_machine
from zo_offload.wording import one_line

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "zo_offload")
LAUNCHERS = ("deepspeed", "torchrun", "mpirun", "srun", "pdsh")
LEAST_FILES = 1024
GIB = 2**30


def installed() -> Iterator[Row]:
    """Versions; what is imported by a run is imported here."""
    yield Row("versions", "python", platform.python_version())
    for name in PACKAGES:
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Row("versions", name, None, "not installed", f"pip install {name}", True)
            continue
        try:
            if name != "peft":  # imported by runs that ask for it
                importlib.import_module(name)
        except Exception as error:
            said = f"{found}, cannot be imported: {one_line(error)[:160]}"
            mend = f"install {name} again, and what it names"
            yield Row("versions", name, found, said, mend, True)
        else:
            yield Row("versions", name, found)


def devices() -> Iterator[Row]:
    """Accelerators and host memory."""
    for index in range(torch.cuda.device_count()):  # untested: needs CUDA
        found = torch.cuda.get_device_properties(index)
        shown = f"{found.name}, {found.total_memory / GIB:.1f} GiB"
        yield Row("memory", f"cuda:{index}", found.total_memory, shown)
    if not torch.cuda.is_available():
        yield Row("memory", "accelerator", None, "none: forwards run on the CPU")
    total, free = this_machine().host, psutil.virtual_memory().available
    yield Row("memory", "host", total, f"{total / GIB:.1f} GiB")
    yield Row("memory", "host available", free, f"{free / GIB:.1f} GiB")


def limits() -> Iterator[Row]:
    """What the system lets a process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    few = (
        torch.cuda.is_available() and soft != resource.RLIM_INFINITY and soft < this_machine().host
    )
    mend = "ulimit -l unlimited, or memlock in limits.conf" if few else ""
    yield Row("limits", "memlock", _finite(soft), f"{_bytes(soft)} (most {_bytes(hard)})", mend)
    yield _pinned()
    yield _shared()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= LEAST_FILES
    mend = "" if enough else f"ulimit -n {LEAST_FILES}, as far as {_count(hard)} allows"
    yield Row("limits", "open files", _finite(soft), f"{_count(soft)} (most {_count(hard)})", mend)


def processor() -> Iterator[Row]:
    """Cores, and the kernels that serve tensors in host memory."""
    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    mend = ""
    if threads < cores:
        mend = f"OMP_NUM_THREADS={cores}, where a host has one rank; so the kernels use {threads}"
    yield Row("processor", "cores", cores, f"{cores}, of which {threads} by a process", mend)
    sets: list[str] = []
    try:
        sets = native.available()
    except KernelError as error:
        yield Row("processor", "instruction sets", sets, "none", one_line(error))
    else:
        yield Row("processor", "instruction sets", sets, ", ".join(sets))
    try:
        serving = kernels.name()
    except KernelError as error:
        said = one_line(error)
        mend = f"unset {kernels.VARIABLE}, or name what is there"
        yield Row("processor", "kernels", None, said, mend, prevents=True)
        return
    mend = ""
    if serving == kernels.TORCH:
        mend = "updates take many times as long: install zo_offload again where there is g++"
    yield Row("processor", "kernels", serving, mend=mend)


def launchers() -> Iterator[Row]:
    """What starts ranks."""
    beside = str(Path(sys.executable).parent)
    for name in LAUNCHERS:
        path = shutil.which(name)
        hidden = shutil.which(name, path=beside) if path is None else None
        mend = f"export PATH={beside}:$PATH" if hidden else ""
        shown = path or (f"{hidden}, not on the PATH" if hidden else "not found")
        yield Row("launchers", name, path or hidden, shown, mend)


def _pinned() -> Row:
    if not torch.cuda.is_available():
        return Row("limits", "pinned memory", None, "no accelerator copies from it")
    try:  # untested: needs CUDA
        torch.zeros(64 << 20, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:  # untested: needs CUDA
        mend = 'ulimit -l unlimited, or "pin_memory": false, which is slower'
        return Row("limits", "pinned memory", False, one_line(error)[:160], mend)
    return Row("limits", "pinned memory", True, "yes")


def _shared() -> Row:
    """Of ranks on one machine."""
    try:
        os.close(os.memfd_create("zo-offload-doctor"))
    except OSError as error:
        mend = "ranks on one machine cannot share weights: allow memfd_create, or start one rank"
        return Row("limits", "memfd", False, f"refused: {error.strerror}", mend)
    return Row("limits", "memfd", True, "yes: ranks of a machine share its weights")


def _finite(limit: int) -> int | None:
    return None if limit == resource.RLIM_INFINITY else limit


def _bytes(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,} bytes"


def _count(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"
