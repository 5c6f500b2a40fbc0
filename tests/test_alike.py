"""What ranks compare before the first step: what decides it, and not what is a machine's own."""

from typing import Any

import pytest
from replica.world import Run, on_ranks

from zo_offload import alike
from zo_offload.config import ZOConfig
from zo_offload.errors import ReplicaError
from zo_offload.replica import Replica

__all__ = ["on_ranks"]

ASKED = {"model": "/a", "steps": 10, "config": {"optimizer": 1}, "train_sha256": "ab"}


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"steps": 20}, "steps: 20, rank 0 has 10"),
        ({"train_sha256": "cd"}, 'train_sha256: "cd", rank 0 has "ab"'),
        ({"dev_limit": 5}, "dev_limit: 5, rank 0 has nothing"),
    ],
)
def test_another_command_is_refused_on_every_rank(on_ranks: Run, other: dict, told: str):
    def start(replica: Replica) -> str:
        asked: dict[str, Any] = ASKED | (other if replica.rank == 1 else {})
        with pytest.raises(ReplicaError) as caught:
            alike.refuse_other_options(replica, asked)
        return str(caught.value)

    (message,) = set(on_ranks(2, start))
    assert message.startswith(f"the options of rank 1 differ from rank 0's ({told}); give the same")


def test_names_of_files_are_a_machine_s_own(on_ranks: Run):
    def start(replica: Replica) -> None:
        alike.refuse_other_options(replica, ASKED | {"model": f"/models/{replica.rank}"})

    assert on_ranks(2, start) == [None, None]


def test_the_version_is_compared_first():
    assert next(iter(alike.of_block(ZOConfig()))) == "version of zo_offload"


def test_where_units_rest_is_a_machine_s_own_and_what_moves_is_not():
    disk = ZOConfig.model_validate({"offload_param": {"device": "nvme", "nvme_path": "/x"}})
    assert alike.of_block(disk) == alike.of_block(ZOConfig())
    other = ZOConfig.model_validate({"guard": {"window": 40}})
    assert alike.of_block(other) != alike.of_block(ZOConfig())
