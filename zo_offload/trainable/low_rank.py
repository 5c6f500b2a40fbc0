"""``low_rank``: matrices move along products of two small factors, vectors as ever.

One copy of a block then serves every probe and sign, and the base is only read between merges,
which come every ``interval`` steps. Vectors stay on the device, so that what travels is matrices.
"""

from typing import Any

from torch import nn

from zo_offload.config import ZOConfig
from zo_offload.config_trainable import check_low_rank
from zo_offload.converted import converted_of
from zo_offload.errors import ModelError
from zo_offload.trainable.full import Full
from zo_offload.trainable.moving import LowRank, Moving
from zo_offload.units import block_map

RANK, INTERVAL, MOMENTUM = 2, 50, 0.0  # where the JSON says nothing


class LowRankMatrices(Full):
    """What ``full`` would choose, moved otherwise.

    Args:
        config: The ``zeroth_order`` block.

    Reference:
        Chen et al. (2024), arXiv 2410.07698; see :class:`LowRank`.
    """

    mode = "low_rank"

    def __init__(self, config: ZOConfig) -> None:
        check_low_rank(config.trainable, config.update.lag, config.master)
        super().__init__(config)
        said = config.trainable
        self._low_rank = LowRank(
            said.rank or RANK,
            said.interval or INTERVAL,
            MOMENTUM if said.momentum is None else said.momentum,
        )

    def prepare(self, model: nn.Module) -> nn.Module:
        """See :class:`Trainable`: the model itself."""
        if converted_of(model) is not None:
            raise ModelError(
                "a converted model's blocks are laid out to move by dense directions; give the "
                "model that was converted"
            )
        self._refuse_compiled(model)
        prepared = super().prepare(model)
        dense = {
            name
            for name, p in model.named_parameters()
            if p.requires_grad and p.is_floating_point() and self._low_rank.sides(p.shape) is None
        }
        self.moving = Moving(resident=frozenset(dense), low_rank=self._low_rank)
        return prepared

    def header(self, model: nn.Module) -> dict[str, Any]:
        """See :class:`Trainable`; with what decides factors and merges."""
        said = super().header(model).get("trainable", {"mode": self.mode})
        low_rank = self._low_rank
        return {
            "trainable": {
                **said,
                "rank": low_rank.rank,
                "interval": low_rank.interval,
                "momentum": low_rank.momentum,
            }
        }

    def _refuse_compiled(self, model: nn.Module) -> None:
        """Products are told by the function that is called, which compiled code does not call."""
        for path in block_map(model, self._unit).paths:
            for name, module in model.get_submodule(path).named_modules(prefix=path):
                compiled = getattr(module, "_compiled_call_impl", None) is not None
                if compiled or type(module).__name__ == "OptimizedModule":
                    raise ModelError(
                        f"{name} is compiled, and low-rank directions enter its products from "
                        "outside, which compiled code does not let them; leave it as it is, or "
                        'write "trainable": {"mode": "full"}'
                    )
