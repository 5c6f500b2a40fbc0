"""What holds for every plan, whatever is asked and whatever there is."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import XLMConfig

from plan.smaller import config_like
from zo_offload.errors import ConfigError
from zo_offload.offload.aio import Aio
from zo_offload.ops.layout import HEADER_BYTES
from zo_offload.plan.advice import nearest, quicker
from zo_offload.plan.budget import SUMS_BYTES, place
from zo_offload.plan.rates import OVERHEAD, Rates, flops_of
from zo_offload.plan.request import TRAINABLES, Budgets, Request, read_json
from zo_offload.plan.search import Layouts, Planned, plan

RATES = Rates()
WIRES = (
    "identity", "bf16", "fp16", "lossless12", "fp8_e4m3", "int8", "int4", "nf4",
    "fp8_e4m3:64", "int8:64", "int4:64", "nf4:64",
)  # fmt: skip
SHORT = Request(length=16)
ON_HOST = replace(SHORT, unit="block", where="host", lowest="host", only=True)


@cache
def layouts() -> Layouts:
    return Layouts(config_like("opt-175b"), torch.bfloat16)


def _allowed(request: Request) -> bool:
    """Whether training takes what is asked for together."""
    integers = request.wire.partition(":")[0] in ("int4", "int8")
    if request.trainable == "low_rank" and request.lag:
        return False
    if request.trainable == "scales" and not integers:
        return False
    return request.trainable == "full" or request.master == "fp32"


requests = st.builds(
    Request,
    unit=st.sampled_from([None, "block", "sublayer", "linear"]),
    wire=st.sampled_from(WIRES),
    master=st.sampled_from(["fp32", "bf16+8", "bf16_sr"]),
    trainable=st.sampled_from(TRAINABLES),
    where=st.sampled_from([None, "host", "device"]),
    lag=st.integers(0, 5),
    probes=st.integers(1, 3),
    micro_batches=st.integers(1, 3),
    batch_size=st.integers(1, 3),
    length=st.sampled_from([4, 16, 64]),
    live_lanes=st.sampled_from([None, 1, 2]),
    head_chunk=st.sampled_from([None, 100, 400]),
    num_slots=st.integers(1, 3),
    lowest=st.sampled_from(["device", "host", "nvme"]),
).filter(_allowed)
sizes = st.one_of(st.none(), st.integers(1, 2_000_000))
# Beside the weights of these models there are the buffers of the head.
device_sizes = st.one_of(st.none(), st.integers(66_000_000, 70_000_000))
budgets = st.builds(Budgets, device=device_sizes, host=sizes, nvme=sizes)


def made(request: Request, given_budgets: Budgets) -> Planned:
    return plan(layouts(), request, given_budgets, RATES)


@settings(max_examples=60)
@given(request=requests, given_budgets=budgets)
def test_what_fits_is_within_its_budgets_and_adds_up(request: Request, given_budgets: Budgets):
    found = made(request, given_budgets)
    tiers = found.tiers
    for held, budget in (
        (tiers.device_bytes, given_budgets.device),
        (tiers.host_bytes, given_budgets.host),
        (tiers.nvme_bytes, given_budgets.nvme),
    ):
        if found.fits and budget is not None:
            assert held <= budget
    if not found.fits:
        assert all(count > 0 for count in tiers.short.values())
    assert len(tiers.residency()) == sum(tiers.residents) == len(found.layout.names)
    furthest = {"device": 1, "host": 2, "nvme": 3}[request.lowest]
    assert not any(tiers.residents[furthest:])
    assert found.step.step_seconds >= OVERHEAD * flops_of(found.layout, found.request) / 1e14


@settings(max_examples=60)
@given(
    request=requests,
    given_budgets=budgets,
    more=st.sampled_from(["device", "host", "nvme"]),
    added=st.one_of(st.none(), st.integers(1, 3_000_000)),
)
def test_more_memory_never_harms(
    request: Request, given_budgets: Budgets, more: str, added: int | None
):
    before = getattr(given_budgets, more)
    after = None if before is None or added is None else before + added
    first = made(request, given_budgets)
    second = made(request, replace(given_budgets, **{more: after}))
    if first.fits:
        assert second.fits
        assert second.step.step_seconds <= first.step.step_seconds


@pytest.mark.parametrize("granularity", ["block", "sublayer", "linear"])
def test_bytes_are_those_of_all_parameters(granularity: str):
    request = replace(SHORT, unit=granularity)
    layout = layouts().at(request)
    found = layout.sizes("identity")
    whole = layout.num_parameters - layout.model_map.ambient.num_parameters
    padding = 128 * 2 * len(layout.names) * 8
    assert 0 <= int(found.wire.sum()) - 2 * whole < padding
    assert 0 <= int((found.wire + found.rest).sum()) - 4 * whole < 2 * padding
    frozen = layouts().at(replace(request, trainable="sparse"))
    plain, packed = frozen.sizes("identity"), frozen.sizes("nf4")
    spans = frozen.spans
    matrices = int(spans.elements[spans.is_packed].sum())
    saved = int((plain.wire - packed.wire).sum())
    assert saved == pytest.approx(matrices * (2 - 0.516), rel=0.002)
    assert not packed.rest.any()


@pytest.mark.parametrize("wire", WIRES[1:])
def test_a_wire_packs_what_travels_and_not_the_scratch(wire: str):
    layout = layouts().at(ON_HOST)
    plain = place(layout, ON_HOST, Budgets())
    packed = place(layout, replace(ON_HOST, wire=wire), Budgets())
    assert packed.device["scratch"] == plain.device["scratch"]
    headers = ON_HOST.num_slots * HEADER_BYTES  # of lossless12, which has room for the worst
    assert packed.device["slots"] <= plain.device["slots"] + headers
    assert packed.host["units"] == plain.host["units"]  # which rest as they are
    assert packed.host["packing"] == (0 if wire in ("bf16", "fp16") else packed.device["slots"])


def test_a_chunk_of_the_head_takes_its_share():
    layout = layouts().at(ON_HOST)
    whole = place(layout, ON_HOST, Budgets()).device
    last = whole["ambient_copies"], whole["logits"]
    for rows in (512, 256, 64):
        device = place(layout, replace(ON_HOST, head_chunk=rows), Budgets()).device
        copies, logits = device["ambient_copies"], device["logits"]
        assert whole["ambient_copies"] - copies == (512 - rows) * 96 * 2
        assert (copies, logits) <= last
        last = copies, logits
    assert logits == 16 * (2 * 64 * 4 + 96 * 4 + 96 * 2 + SUMS_BYTES) + 64 * 96 * 4


def test_a_head_that_the_model_does_not_name_has_no_chunks():
    small = {"vocab_size": 512, "emb_dim": 64, "n_layers": 2, "n_heads": 4}
    cutoffs = {"asm_cutoffs": [100, 200], "asm_div_value": 4.0}  # of a head without a matrix
    adaptive: Any = XLMConfig(asm=True, tie_word_embeddings=False, **small, **cutoffs)
    request = replace(ON_HOST, head_chunk=256)
    words = (
        r"^zeroth_order\.head_chunk: 256 rows of the head at a time, and the model names no output "
        'embedding; write "head_chunk": null$'
    )
    with pytest.raises(ConfigError, match=words):
        plan(Layouts(adaptive, torch.float32), request, Budgets(), RATES)


def test_a_head_in_chunks_is_the_way_out_where_it_alone_is_too_much():
    large = Layouts(config_like("llama-3-8b", vocab_size=40_000), torch.bfloat16)
    request = replace(ON_HOST, length=64)
    needed = plan(large, request, Budgets(), RATES).tiers.device_bytes
    words, planned = nearest(large, request, Budgets(device=needed - 10**7), RATES) or ("", None)
    assert (words, planned and planned.request.head_chunk) == ("head_chunk 16384", 16384)


def test_a_frozen_base_has_no_masters_and_no_perturbed_head():
    request = replace(ON_HOST, trainable="sparse", share=0.05)
    layout = layouts().at(request)
    tiers = place(layout, request, Budgets())
    assert tiers.device["ambient_copies"] == 0
    spans = layout.spans
    matrices = spans.elements * spans.is_packed
    chosen, in_one = (
        int(count * 0.05) for count in (matrices.sum(), spans.summed(matrices, 99).max())
    )
    assert tiers.device["sparse"] == pytest.approx(8 * chosen + 4 * in_one, rel=0.05)
    ambient = tiers.device["ambient"] + 4 * chosen
    assert tiers.host_bytes == pytest.approx(ambient + tiers.sizes.wire.sum(), rel=0.01)
    step = made(request, Budgets()).step
    assert step.bus_down == 0
    assert step.host_kernel == pytest.approx(2 * 4 * chosen, rel=0.1)


def test_masters_on_disk_are_read_and_written_once_in_lag_steps():
    request = replace(ON_HOST, lowest="nvme")
    now, lagging = (made(replace(request, lag=lag), Budgets()) for lag in (0, 4))
    sizes = now.tiers.sizes
    masters, wire = int((sizes.wire + sizes.rest).sum()), int(sizes.wire.sum())
    assert now.tiers.residents == (0, 0, len(now.layout.names))
    assert (now.step.disk_read, now.step.disk_written) == (masters, masters)
    assert lagging.step.disk_read == wire + (masters - wire) / 4
    assert lagging.step.disk_written == masters / 4
    units = len(now.layout.names)
    slots = (units + 4) * (masters / units + 4096)
    assert slots < now.tiers.nvme_bytes < slots + (units + 4) * 2 * 4096 + Aio.block_size


def test_lanes_that_are_not_alive_at_once_move_the_weights_again():
    request = replace(ON_HOST, micro_batches=4)
    once = made(replace(request, live_lanes=8), Budgets())
    often = made(replace(request, live_lanes=2), Budgets())
    assert (once.step.visits, often.step.visits) == (1, 4)
    assert often.step.bus_up == 4 * once.step.bus_up
    assert often.tiers.device_bytes < once.tiers.device_bytes


def test_lanes_that_share_products_are_inside_a_block_together():
    request = replace(ON_HOST, trainable="peft", probes=32, batch_size=64 * ON_HOST.batch_size)
    apart = made(request, Budgets())
    joined = made(replace(request, joined_rows=request.tokens), Budgets())
    larger = made(replace(request, joined_rows=request.tokens - 1), Budgets())
    dims, size = joined.layout.dims, joined.layout.dtype.itemsize
    inside = (dims.inner - dims.hidden) * request.tokens * size
    held = [planned.tiers.device["activations"] for planned in (apart, joined, larger)]
    assert held[1] - held[0] == 64 * inside - max(inside, apart.tiers.device["logits"])
    assert held[2] == held[0]
    assert joined.request.live_lanes == request.lanes


def test_what_helps_is_what_is_slow():
    def best(rates: Rates) -> str:
        planned = plan(layouts(), ON_HOST, Budgets(), rates)
        found = quicker(layouts(), ON_HOST, planned, rates)
        return found[0].change if found else f"nothing, {planned.step.bound_by}"

    slow = {"pcie_gbps": 1e6, "host_gbps": 1e6, "nvme_gbps": 1e6, "tflops": 1e6}
    assert best(Rates(**slow | {"host_gbps": 0.01})) in (
        "update.lag 8", "trainable sparse on a frozen base",
    )  # fmt: skip
    assert best(Rates(**slow | {"pcie_gbps": 0.01})).startswith("wire nf4")
    assert best(Rates(**slow | {"tflops": 0.001})) == "nothing, compute"


def test_the_nearest_plan_changes_no_more_than_it_must():
    request = Request(unit="block", lowest="host", length=64)
    least = made(replace(request, unit=None), Budgets(device=1)).tiers.device_bytes
    found = nearest(layouts(), request, Budgets(device=least), RATES)
    assert found is not None
    words, planned = found
    assert words == "--unit left open"
    assert planned.fits
    words, planned = nearest(layouts(), request, Budgets(device=least - 30_000), RATES) or (
        "",
        None,
    )
    assert planned is not None
    assert planned.fits
    assert words
    assert nearest(layouts(), request, Budgets(device=1), RATES) is None


@pytest.mark.parametrize(
    ("dtype", "changes", "message"),
    [
        (torch.float16, {"master": "bf16_sr"}, "zeroth_order.master"),
        (torch.float32, {"wire": "lossless12"}, "zeroth_order.wire"),
        (torch.float32, {"length": 65}, "--length 65: the model's context is 64 tokens"),
    ],
)
def test_what_training_refuses_is_refused(dtype: torch.dtype, changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        plan(
            Layouts(config_like("opt-175b"), dtype),
            Request(**changes | {"length": changes.get("length", 16)}),
            Budgets(),
            RATES,
        )


@pytest.mark.parametrize("value", [0, 1.5, True, "8"])
def test_sizes_of_a_batch_are_counts(tmp_path: Path, value: Any):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_batch_size": value, "zeroth_order": {}}))
    with pytest.raises(
        ConfigError, match="train_batch_size: expected a whole number of at least 1"
    ):
        read_json(path)
