"""The difference between a trained model and its base, in safetensors, exact to the bit.

A float's difference is not exact, and adding it again rounds; so the bits are combined by
exclusive or, which undoes itself: ``trained = base ^ delta``, ``base = trained ^ delta``. ::

    DIR/delta.json                 the tensors of the model, their dtypes, digests of both models
    DIR/delta-00001.safetensors    what moved: NAME, the bits of all elements; or, where that is
                                   smaller, NAME:indices and NAME:bits of those that differ

The base's values are converted to the trained model's dtype first, as torch converts. Names are
those of the loaded model, a tied parameter's once. What is equal is in no file.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from zo_offload.errors import CheckpointError, ModelError
from zo_offload.integrations.spill import LEAST_BYTES, in_file

FORMAT = 1
INDEX = "delta.json"
AT_ONCE = 1 << 23  # elements
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Form = Literal["equal", "dense", "sparse"]


@dataclass(frozen=True)
class Entry:
    """A tensor of the trained model.

    Attributes:
        dtype: As torch names it.
        shape: Its shape.
        form: Equal to the base's, or what a file holds of it.
        file: Which; None of one that is equal.
    """

    dtype: str
    shape: list[int]
    form: Form
    file: str | None = None


@dataclass(frozen=True)
class Delta:
    """What ``delta.json`` says.

    Attributes:
        base: The model that the run began with, as it was named there.
        base_sha256: Of its tensors, in the trained model's dtypes.
        sha256: Of the trained model's.
        tensors: By name.
    """

    base: str
    base_sha256: str
    sha256: str
    tensors: Mapping[str, Entry]


def write_delta(
    directory: Path, base: nn.Module, trained: nn.Module, named: str, most_bytes: int
) -> Delta:
    """Write what turns a base into a trained model.

    At most the tensors of one file are in memory.

    Args:
        directory: To fill.
        base: The model that was trained.
        trained: What became of it.
        named: The base, as it is to be found again.
        most_bytes: Of a file, but for a single tensor's.

    Raises:
        ModelError: The two are of other shapes.
        CheckpointError: The system refuses.
    """
    ours, theirs = saved_tensors(trained), saved_tensors(base)
    _check_shapes(named, {name: list(tensor.shape) for name, tensor in ours.items()}, theirs)
    entries: dict[str, Entry] = {}
    files = _Files(directory, most_bytes)
    for name, tensor in ours.items():
        form, parts = _difference(tensor, theirs[name])
        file = files.add({name + suffix: part for suffix, part in parts.items()})
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries[name] = Entry(dtype, list(tensor.shape), form, file)
    files.flush()
    dtypes = {name: tensor.dtype for name, tensor in ours.items()}
    made = Delta(named, digest(theirs, dtypes), digest(ours, dtypes), entries)
    try:
        text = json.dumps({"format": FORMAT, **asdict(made)}, indent=1)
        (directory / INDEX).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise _cannot_write(directory, error) from error
    return made


def read_delta(directory: Path) -> Delta:
    """What a delta's directory holds.

    Raises:
        CheckpointError: It cannot be read.
    """
    path = directory / INDEX
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        version = held.pop("format")
        if version == FORMAT:
            held["tensors"] = {name: _entry(one) for name, one in held["tensors"].items()}
            made = Delta(**held)
            if all(isinstance(each, str) for each in (made.base, made.base_sha256, made.sha256)):
                return made
            raise TypeError("base and digests are to be text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); export it again, or "
            "restore it from a copy"
        ) from error
    raise CheckpointError(
        f"{path}: format {version}, but this zo_offload reads format {FORMAT}; use the version "
        "that wrote it"
    )


def apply_delta(directory: Path, delta: Delta, model: nn.Module, spill: Path) -> None:
    """Turn a loaded base into the trained model, tensor by tensor.

    Args:
        directory: Of the delta.
        delta: What :func:`read_delta` found there.
        model: The base; its tensors take the trained model's dtypes.
        spill: A folder for unlinked files, in which new values rest.

    Raises:
        ModelError: It is another model than the delta was made of.
        CheckpointError: The delta is damaged.
    """
    tensors = saved_tensors(model)
    shapes = {name: entry.shape for name, entry in delta.tensors.items()}
    _check_shapes(delta.base, shapes, tensors)
    dtypes = {name: getattr(torch, entry.dtype) for name, entry in delta.tensors.items()}
    found = digest(tensors, dtypes)
    if found != delta.base_sha256:
        raise ModelError(
            f"{directory}: made of a base whose weights have sha256 {delta.base_sha256[:12]}..., "
            f"these have {found[:12]}...; give that base ({delta.base}): --base"
        )
    for name, tensor in tensors.items():
        entry = delta.tensors[name]
        value = tensor.detach().to(dtypes[name])
        if entry.file is not None:
            value = _moved(directory / entry.file, name, entry, value)
        is_new = value.data_ptr() != tensor.data_ptr()
        tensor.data = in_file(value, spill) if is_new and value.nbytes >= LEAST_BYTES else value
    found = digest(saved_tensors(model), dtypes)
    if found != delta.sha256:
        raise CheckpointError(
            f"{directory}: gives weights of sha256 {found[:12]}..., {INDEX} says "
            f"{delta.sha256[:12]}...; it is damaged: restore it from a copy"
        )


def saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, a tied one once, and those buffers that a checkpoint holds.

    Example:
        >>> list(saved_tensors(nn.BatchNorm1d(2)))
        ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    saved = set(model.state_dict(keep_vars=True))
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return {**dict(model.named_parameters()), **buffers}


def digest(tensors: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype]) -> str:
    """SHA-256 of names, dtypes, shapes and bits, in order of the names."""
    total = hashlib.sha256()
    for name in sorted(dtypes):
        tensor = tensors[name]
        total.update(f"{name} {dtypes[name]} {list(tensor.shape)}\n".encode())
        for part in _pieces(tensor, dtypes[name]):
            total.update(part.numpy().data)
    return total.hexdigest()


def _pieces(tensor: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The bits of a tensor in a dtype, flat, some millions of elements at a time."""
    flat = tensor.detach().reshape(-1)
    for first in range(0, flat.numel(), AT_ONCE):
        yield flat[first : first + AT_ONCE].to(dtype).view(BITS[dtype.itemsize])


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[Form, dict[str, torch.Tensor]]:
    """What a file holds of a tensor: the smaller of all bits, and of those that differ."""
    count = sum(int(torch.count_nonzero(part)) for part in _combined(ours, theirs))
    if not count:
        return "equal", {}
    index = torch.int32 if ours.numel() < 2**31 else torch.int64
    bits = BITS[ours.itemsize]
    if count * (index.itemsize + bits.itemsize) >= ours.nbytes:
        dense = torch.empty(ours.numel(), dtype=bits)
        for at, part in enumerate(_combined(ours, theirs)):
            dense[at * AT_ONCE : at * AT_ONCE + part.numel()] = part
        return "dense", {"": dense.view(ours.shape)}
    indices, values, end = torch.empty(count, dtype=index), torch.empty(count, dtype=bits), 0
    for at, part in enumerate(_combined(ours, theirs)):
        moved = part.nonzero().view(-1)
        first, end = end, end + moved.numel()
        indices[first:end] = moved + at * AT_ONCE
        values[first:end] = part[moved]
    return "sparse", {":indices": indices, ":bits": values}


def _combined(ours: torch.Tensor, theirs: torch.Tensor) -> Iterator[torch.Tensor]:
    pairs = zip(_pieces(ours, ours.dtype), _pieces(theirs, ours.dtype), strict=True)
    return (one ^ other for one, other in pairs)


def _moved(path: Path, name: str, entry: Entry, value: torch.Tensor) -> torch.Tensor:
    """A tensor with its difference in it; the given one stays as it is."""
    bits = BITS[value.itemsize]
    try:
        with safe_open(path, framework="pt") as file:
            if entry.form == "dense":
                held = file.get_tensor(name).reshape(-1)
                return (value.reshape(-1).view(bits) ^ held).view(value.dtype).view(value.shape)
            indices = file.get_tensor(f"{name}:indices").long()
            flat = value.reshape(-1).view(bits).clone()
            flat[indices] ^= file.get_tensor(f"{name}:bits")
    except (OSError, SafetensorError, RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"{path}: {name} cannot be read: {error}; restore it from a copy"
        ) from error
    return flat.view(value.dtype).view(value.shape)


class _Files:
    """Gathers tensors, and writes a file whenever one is full."""

    def __init__(self, directory: Path, most_bytes: int) -> None:
        self._directory, self._most_bytes = directory, most_bytes
        self._held: dict[str, torch.Tensor] = {}
        self._count = 1

    def add(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        """The name of the file that they go to; None where there are none."""
        if not tensors:
            return None
        together = sum(each.nbytes for each in [*self._held.values(), *tensors.values()])
        if self._held and together > self._most_bytes:
            self.flush()
        self._held |= tensors
        return self._name

    def flush(self) -> None:
        """Write what is held, if there is anything."""
        if not self._held:
            return
        try:
            save_file(self._held, self._directory / self._name, {"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise _cannot_write(self._directory, error) from error
        self._held, self._count = {}, self._count + 1

    @property
    def _name(self) -> str:
        return f"delta-{self._count:05}.safetensors"


def _entry(held: Mapping[str, Any]) -> Entry:
    entry = Entry(**held)
    file, form = entry.file, entry.form
    named = file is None or (isinstance(file, str) and Path(file).name == file)
    known = form in ("equal", "dense", "sparse") and (form == "equal") == (file is None)
    if not (named and known and _is_dtype(entry.dtype) and isinstance(entry.shape, list)):
        raise ValueError(f"no entry of a tensor: {held!r:.200}")
    return entry


def _is_dtype(name: Any) -> bool:
    """Whether weights may be made of it: torch has more than weights have."""
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype) or found.itemsize not in BITS:
        return False
    try:
        torch.zeros(1).to(found).view(BITS[found.itemsize])
    except RuntimeError:
        return False
    return True


def _check_shapes(
    base: str, wanted: Mapping[str, list[int]], found: Mapping[str, torch.Tensor]
) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in found.items()}
    if shapes == wanted:
        return
    name = next(n for n in {**wanted, **shapes} if wanted.get(n) != shapes.get(n))
    raise ModelError(
        f"{base}: {name} is {shapes.get(name, 'missing')}, the trained model has "
        f"{wanted.get(name, 'none')}; give the model that the run began with: --base"
    )


def _cannot_write(directory: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{directory}: cannot write the delta: {error}; make room there")
