"""Memory has run out: the numbers, and what would fit."""

import re
from typing import Any

import pytest

from zo_offload.errors import StoreError
from zo_offload.plan.request import GIB
from zo_offload.plan.shortage import Machine, explained, explanation, this_machine

MODEL = "opt-1.3b"


def config(**block: Any) -> dict[str, Any]:
    return {"train_batch_size": 16, "bf16": {"enabled": True}, "zeroth_order": block}


def test_what_cannot_fit_is_told_with_what_would():
    in_memory = config(offload_param={"device": "none"})
    said = explanation(MODEL, in_memory, 512, Machine(4 * GIB, 32 * GIB))
    assert re.match(r"opt-1\.3b does not fit .*: device needs \d.* more than there are", said)
    assert "it would fit with weights in host memory" in said


def test_what_should_have_fitted_is_told_with_what_there_is():
    offloaded = config(offload_param={"device": "cpu"})
    said = explanation(MODEL, offloaded, 128, Machine(24 * GIB, 64 * GIB))
    assert re.match(r"the plan counts device \d.* for 16 x 128 tokens a forward, and ", said)
    assert "there is a device of 24.0 GiB" in said
    assert "64.0 GiB (68,719,476,736 bytes) of host memory" in said


def test_where_forwards_run_in_host_memory_all_has_to_fit_into_it():
    offloaded = config(offload_param={"device": "cpu"})
    assert "of host memory: something else" in explanation(
        MODEL, offloaded, 128, Machine(None, 16 * GIB)
    )
    said = explanation(MODEL, offloaded, 128, Machine(None, 6 * GIB))
    assert "does not fit" in said


def test_a_run_that_no_plan_counts_says_so():
    classes = config(unit=["OPTDecoderLayer"])
    said = explanation(MODEL, classes, 128, Machine(None, GIB))
    assert "a plan cannot count this run" in said
    assert "OPTDecoderLayer" in said


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory.\n Tried")])
def test_it_is_said_once_in_one_line(error: Exception):
    told = pytest.raises(StoreError, match=r"^out of memory.*; ")
    with told as caught, explained(MODEL, config(), lambda: 16):
        raise error
    assert "\n" not in str(caught.value)


def test_other_errors_stay_as_they_are():
    with pytest.raises(RuntimeError, match=r"^shapes$"), explained(MODEL, config(), lambda: 16):
        raise RuntimeError("shapes")


def test_this_machine_has_memory():
    found = this_machine()
    assert found.host > 2**28
