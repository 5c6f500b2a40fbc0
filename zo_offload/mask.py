"""Which weights of a model may move: their places in each matrix, and the scores that chose them.

A mask is a safetensors file. Of each matrix that has chosen weights it holds ``NAME.indices``
(int64, rising, into the flattened matrix) and ``NAME.scores`` (fp32); its metadata say how it was
made. A mask that was made on one corpus serves any task.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from zo_offload import files
from zo_offload.errors import CheckpointError, ModelError

FORMAT = "zo_offload mask 1"
INDICES, SCORES = ".indices", ".scores"


class Chosen(NamedTuple):
    """Of one matrix.

    Attributes:
        indices: int64, rising.
        scores: fp32.
    """

    indices: torch.Tensor
    scores: torch.Tensor


@dataclass(frozen=True)
class Origin:
    """How a mask was made.

    Attributes:
        method: ``gradient``, ``magnitude`` or ``random``.
        scope: ``global``: the largest of all matrices together; ``matrix``: of each.
        share: Of the weights that could be chosen.
        candidates: How many could be.
    """

    method: str
    scope: str
    share: float
    candidates: int

    def check(self) -> None:
        """That a file says what can be.

        Raises:
            ValueError: Of what.
        """
        words = isinstance(self.method, str) and isinstance(self.scope, str)
        share, count = self.share, self.candidates
        if not words or type(share) not in (int, float) or not 0 <= share <= 1:
            raise ValueError("its metadata name no method, scope and share")
        if type(count) is not int or not 0 <= count < 2**63:
            raise ValueError(f"its metadata count {count!r} candidates")


@dataclass(frozen=True)
class Mask:
    """Chosen weights by the name of their matrix."""

    origin: Origin
    chosen: Mapping[str, Chosen]

    @property
    def num_chosen(self) -> int:
        """In all matrices."""
        return sum(len(each.indices) for each in self.chosen.values())


class Selection:
    """The largest scores of all that are added, in the memory of three times those that are kept.

    Of equal scores those that came first are kept.

    Args:
        count: How many to keep.

    Example:
        >>> selection = Selection(2)
        >>> selection.add("a", torch.tensor([[1.0, 5.0], [3.0, 0.0]]))
        >>> selection.add("b", torch.tensor([[4.0, 3.0]]))
        >>> {name: chosen.indices.tolist() for name, chosen in selection.chosen().items()}
        {'a': [1], 'b': [0]}
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._names: list[str] = []
        self._owners = torch.empty(0, dtype=torch.int32)
        self._indices = torch.empty(0, dtype=torch.int64)
        self._scores = torch.empty(0)
        self._least: float | None = None  # of those that are kept, once there are enough

    def add(self, name: str, scores: torch.Tensor) -> None:
        """Consider a matrix.

        Raises:
            ModelError: A score is no number.
        """
        flat = scores.detach().reshape(-1).float().cpu()
        if flat.isnan().any():
            raise ModelError(f"{name}: scores are not numbers; are the weights or the loss?")
        if self._least is None:
            new = largest(flat, self._count)
        else:  # of equal scores the earlier ones are kept
            new = (flat > self._least).nonzero()[:, 0]
            new = new[largest(flat[new], self._count)]
        owners = torch.full(new.shape, len(self._names), dtype=torch.int32)
        self._names.append(name)
        self._owners = torch.cat([self._owners, owners])
        self._indices = torch.cat([self._indices, new])
        self._scores = torch.cat([self._scores, flat[new]])
        if len(self._scores) > 2 * self._count:  # not at each matrix: it costs a sort
            self._keep()

    def chosen(self) -> dict[str, Chosen]:
        """What was kept, of matrices that have any."""
        self._keep()
        found = {}
        for number, name in enumerate(self._names):
            own = self._owners == number
            if own.any():
                found[name] = Chosen(self._indices[own], self._scores[own])
        return found

    def _keep(self) -> None:
        kept = largest(self._scores, self._count)
        self._owners, self._indices = self._owners[kept], self._indices[kept]
        self._scores = self._scores[kept]
        if self._count and len(self._scores) == self._count:
            self._least = float(self._scores.min())


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the ``count`` largest, rising; of equal ones the first.

    Example:
        >>> largest(torch.tensor([2.0, 7.0, 2.0, 9.0]), 3).tolist()
        [0, 1, 3]
    """
    if count >= len(scores):
        return torch.arange(len(scores))
    if not count:
        return torch.empty(0, dtype=torch.int64)
    least = torch.topk(scores, count, sorted=True).values[-1]
    above = (scores > least).nonzero()[:, 0]
    equal = (scores == least).nonzero()[:, 0]
    return torch.cat([above, equal[: count - len(above)]]).sort().values


def write_mask(path: Path, mask: Mask) -> None:
    """Write a mask aside, sync, rename.

    Raises:
        CheckpointError: The system refuses; what stood at ``path`` stays.
    """
    tensors = {
        name + suffix: part
        for name, chosen in mask.chosen.items()
        for suffix, part in ((INDICES, chosen.indices), (SCORES, chosen.scores))
    }
    try:
        files.make_directory(path.parent, 0o777)
        with files.new_file(path) as aside:
            save_file(
                tensors, aside, {FORMAT: json.dumps(asdict(mask.origin))}
            )  # keys have no order
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot write the mask: {error}; make room there, or let this user write"
        ) from error


def read_mask(path: Path) -> Mask:
    """Read a mask; that it fits a model is for :func:`check_mask`.

    Raises:
        CheckpointError: It is missing, damaged, or no mask.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if FORMAT not in metadata:
            raise ValueError(f"its metadata lack {FORMAT!r}")
        origin = Origin(**json.loads(metadata[FORMAT]))
        origin.check()
        names = sorted(name.removesuffix(INDICES) for name in tensors if name.endswith(INDICES))
        chosen = {name: Chosen(tensors.pop(name + INDICES), tensors.pop(name + SCORES))
                  for name in names}  # fmt: skip
        if tensors:
            raise ValueError(f"{next(iter(tensors))} belongs to no matrix")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: no mask of this zo_offload: {error}"
            "; give one that zo-offload sensitivity wrote"
        ) from error
    for name, each in chosen.items():
        _check(path, name, each)
    return Mask(origin, chosen)


def check_mask(path: Path, mask: Mask, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """That every matrix is the model's, and every place in it.

    Raises:
        CheckpointError: Names the first that is not.
    """
    for name, chosen in mask.chosen.items():
        if name not in shapes:
            raise CheckpointError(
                f"{path}: {name} is no parameter of this model's units"
                "; give a mask of this model, and the unit it was made with"
            )
        count = torch.Size(shapes[name]).numel()
        if int(chosen.indices[-1]) >= count:
            raise CheckpointError(
                f"{path}: {name} has {count:,} weights, and weight {int(chosen.indices[-1]):,} was "
                "chosen; the mask is of another model"
            )


def _check(path: Path, name: str, chosen: Chosen) -> None:
    indices, scores = chosen
    whole = indices.dtype == torch.int64 and indices.ndim == 1 and len(indices) > 0
    fits = scores.dtype == torch.float32 and scores.shape == indices.shape
    if not whole or not fits or int(indices[0]) < 0 or bool((indices.diff() <= 0).any()):
        raise CheckpointError(
            f"{path}: damaged: {name} has no rising indices with a score each"
            "; make it again with zo-offload sensitivity"
        )
