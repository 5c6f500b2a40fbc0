"""The ``zeroth_order`` block: what is read, and how every mistake is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from zo_offload.config import (
    AioConfig,
    OffloadConfig,
    ZOConfig,
    load_json,
    parse_bytes,
    parse_config,
)
from zo_offload.errors import ConfigError


def block(**keys: Any) -> dict[str, Any]:
    return {"zeroth_order": keys}


def offload_beside(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 0, "offload_param": keys}}


def refusal(config: dict[Any, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(config)
    message = str(caught.value)
    assert message.isprintable(), "one line"
    return message


UNITS = "expected 'block', 'sublayer', 'linear' or a list of class names"

# What is wrong, and the message in full.
MISTAKES = [
    (block(probs=4), "zeroth_order.probs: unknown key; did you mean 'probes'?"),
    (block(Seed=4), "zeroth_order.Seed: unknown key; did you mean 'seed'?"),
    (
        block(offload_param={"devcie": "cpu"}),
        "zeroth_order.offload_param.devcie: unknown key; did you mean 'device'?",
    ),
    (
        block(replica={"xyz": 1}),
        "zeroth_order.replica.xyz: unknown key; valid keys: probe_parallel, check_interval, "
        "on_mismatch, timeout_seconds",
    ),
    (block(eps="1e-3"), 'zeroth_order.eps: expected a number, found "1e-3"'),
    (block(eps=True), "zeroth_order.eps: expected a number, found true"),
    (block(eps=0), "zeroth_order.eps: expected more than 0.0, found 0"),
    (block(eps=float("nan")), "zeroth_order.eps: expected a finite number, found NaN"),
    (block(probes=2.0), "zeroth_order.probes: expected a whole number, found 2.0"),
    (block(probes=0), "zeroth_order.probes: expected at least 1, found 0"),
    (block(head_chunk=0), "zeroth_order.head_chunk: expected at least 1, found 0"),
    (block(head_chunk=-8), "zeroth_order.head_chunk: expected at least 1, found -8"),
    (block(head_chunk="8k"), 'zeroth_order.head_chunk: expected a whole number, found "8k"'),
    (block(head_chunks=8), "zeroth_order.head_chunks: unknown key; did you mean 'head_chunk'?"),
    (block(probes=40000), "zeroth_order.probes: expected at most 16384, found 40000"),
    (block(seed=-1), "zeroth_order.seed: expected at least 0, found -1"),
    (
        block(seed=2**64),
        f"zeroth_order.seed: expected less than {2**64}, found {2**64}",
    ),
    (block(enabled="yes"), 'zeroth_order.enabled: expected true or false, found "yes"'),
    (
        block(direction="normal"),
        "zeroth_order.direction: expected 'rademacher' or 'gaussian', found \"normal\"",
    ),
    (
        block(trainable="full"),
        'zeroth_order.trainable: expected an object, found "full"',
    ),
    (block(update=[]), "zeroth_order.update: expected an object, found []"),
    (block(journal={"path": 3}), "zeroth_order.journal.path: expected text, found 3"),
    (
        block(device_budget="8GB"),
        "zeroth_order.device_budget: expected bytes or text such as '8GiB', found \"8GB\"",
    ),
    (
        block(host_budget=1.5),
        "zeroth_order.host_budget: expected bytes or text such as '8GiB', found 1.5",
    ),
    (block(host_budget="0B"), 'zeroth_order.host_budget: expected more than 0, found "0B"'),
    (
        block(unit="Block"),
        f'zeroth_order.unit: {UNITS}, found "Block"',
    ),
    (
        block(unit=[]),
        f"zeroth_order.unit: {UNITS}, found []",
    ),
    (
        block(unit=["A", 1]),
        f'zeroth_order.unit: {UNITS}, found ["A", 1]',
    ),
    (
        block(journal={"path": "auto"}),
        'zeroth_order.journal.path: "auto" belongs to the Trainer\'s integration; '
        'write null for "decide for me"',
    ),
    (
        block(unit=["auto"]),
        'zeroth_order.unit: "auto" belongs to the Trainer\'s integration; '
        'write null for "decide for me"',
    ),
    ({"zeroth_order": [1]}, "zeroth_order: expected an object, found [1]"),
    ({"zeroth_order": None}, "zeroth_order: expected an object, found null"),
    (
        {"zero_optimization": {"stage": 2}},
        "zero_optimization.stage: expected 0, found 2; stages 1 to 3 shard gradients and "
        "optimizer states, which do not exist here; weights move by "
        '"zeroth_order": {"offload_param": {"device": "cpu"}}',
    ),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        "zero_optimization.offload_optimizer: there is no optimizer state to move; remove the key "
        '(weights move by "zeroth_order": {"offload_param": {"device": "cpu"}})',
    ),
    ({"zero_optimization": 2}, "zero_optimization: expected an object, found 2"),
    (
        {"zero_optimization": {"offload_param": "cpu"}},
        'zero_optimization.offload_param: expected an object, found "cpu"',
    ),
    (
        offload_beside(device="gpu"),
        "zero_optimization.offload_param.device: expected 'none', 'cpu' or 'nvme', found \"gpu\"",
    ),
    (
        offload_beside(device="cpu", pin_memry=True),
        "zero_optimization.offload_param.pin_memry: unknown key; did you mean 'pin_memory'?",
    ),
    (
        block(offload_param={"device": "cpu"}) | offload_beside(device="cpu"),
        "offload_param stands both in zeroth_order and in zero_optimization; keep one",
    ),
    ({"bf16": True}, "bf16: expected an object, found true"),
    (
        {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
        "bf16.enabled and fp16.enabled are both true; keep one",
    ),
]


@pytest.mark.parametrize(("config", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_named_in_one_line(config: dict[str, Any], message: str):
    assert refusal(config) == message


@pytest.mark.parametrize("key", ZOConfig.model_fields)
def test_null_means_the_default(key: str):
    assert parse_config(block(**{key: None})) == ZOConfig()


@pytest.mark.parametrize("key", OffloadConfig.model_fields)
def test_null_inside_a_block_means_the_default(key: str):
    assert parse_config(block(offload_param={key: None})) == ZOConfig()


def test_an_unknown_key_is_refused_even_if_null():
    assert refusal(block(probs=None)).endswith("did you mean 'probes'?")


@pytest.mark.parametrize("stage", [1, 2, 3, True, "0", "auto", [0]])
def test_every_stage_but_zero_is_refused(stage: Any):
    message = refusal({"zero_optimization": {"stage": stage}})
    assert message.startswith(f"zero_optimization.stage: expected 0, found {json.dumps(stage)};")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"zero_optimization": None},
        {"zero_optimization": {"stage": 0, "overlap_comm": True}},
        {"zero_optimization": {"stage": None, "offload_param": None, "offload_optimizer": None}},
        {"zero_optimization": {"offload_optimizer": {"device": "none"}}},
        {"bf16": {"enabled": True}, "fp16": {"enabled": False}},
        {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}},
        {"train_batch_size": "auto", "optimizer": {"type": "AdamW"}},
    ],
    ids=str,
)
def test_keys_of_deepspeed_beside_the_block_are_left_to_it(config: dict[str, Any]):
    assert parse_config(config) == ZOConfig()


def test_offload_param_is_honoured_where_deepspeed_has_it():
    theirs = offload_beside(
        device="cpu",
        pin_memory=False,
        buffer_count=5,
        buffer_size=1e8,
        max_in_cpu=1e9,
        nvme_path="/local",
    )
    expected = OffloadConfig(device="cpu", pin_memory=False, buffer_count=5, nvme_path=("/local",))
    assert parse_config(theirs).offload_param == expected
    assert parse_config(theirs | block(offload_param=None)).offload_param == expected


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (7, 7),
        ("7", 7),
        ("7B", 7),
        (" 1.5 KiB ", 1536),
        ("512MiB", 512 << 20),
        ("8GiB", 8 << 30),
        ("2TiB", 2 << 40),
        ("8191.999999999999GiB", 8796093022207),
    ],
)
def test_sizes_are_powers_of_1024(text: Any, count: int):
    assert parse_bytes(text) == count
    assert parse_config(block(device_budget=text)).device_budget == count


@pytest.mark.parametrize("text", ["8G", "8gb", "-1", "1e9", "", "KiB", "9" * 400, "inf", [8], {}])
def test_other_sizes_are_refused(text: Any):
    assert refusal(block(device_budget=text)).startswith("zeroth_order.device_budget: expected ")


def test_unit_is_a_list_of_class_names():
    config = parse_config(block(unit=["OPTDecoderLayer", "Other"]))
    assert config.unit == ("OPTDecoderLayer", "Other")


@pytest.mark.parametrize("unit", ["block", "sublayer", "linear", None])
def test_unit_is_how_far_blocks_are_divided(unit: str | None):
    assert parse_config(block(unit=unit)).unit == unit


def test_the_config_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        ZOConfig().eps = 1.0  # type: ignore[misc]


def test_a_long_value_is_cut():
    assert len(refusal(block(master="x" * 10_000))) < 200


keys = st.sampled_from(
    [*ZOConfig.model_fields, *OffloadConfig.model_fields, "stage", "offload_param"]
) | st.text(max_size=5)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "cpu", "none", "8GiB", "block", "rademacher", 10**400])
)
json_like = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=10,
)
beside = st.sampled_from(["zero_optimization", "bf16", "fp16", "optimizer"])


@settings(max_examples=300)
@given(
    block=st.dictionaries(keys, json_like, max_size=6) | json_like,
    others=st.dictionaries(beside, json_like, max_size=3),
)
@example(block={"unit": [[[]]]}, others={})
@example(block={"a\nb": 1}, others={})
@example(block={"eps": 10**5000}, others={})
@example(block={1: 2}, others={"zero_optimization": {"offload_param": {2: 3}}})
def test_any_json_is_read_or_refused_in_one_line(block: Any, others: dict[str, Any]):
    message = ""
    try:
        parse_config({"zeroth_order": block} | others)
    except ConfigError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 500


def test_a_deeply_nested_block_is_refused():
    deep: Any = 0
    for _ in range(5000):
        deep = {"seed": deep}
    assert refusal({"zeroth_order": deep}).startswith("zeroth_order.seed: expected a whole number")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,}', "ds.json:1:9: malformed JSON: "),
        ("", "ds.json:1:1: malformed JSON: Expecting value"),
        ("[1]", "ds.json: expected a JSON object, found list"),
        ('{"a": 1, "a": 2}', "ds.json: key 'a' stands twice in one object; keep one"),
        ('{"b": {"a": 1, "a": 1}}', "ds.json: key 'a' stands twice in one object; keep one"),
        ('{"a": ' + "9" * 5000 + "}", "ds.json: "),
        ('{"a": ' * 100_000, "ds.json: "),
    ],
    ids=["comma", "empty", "list", "twice", "twice inside", "digits", "depth"],
)
def test_a_malformed_file_is_named(tmp_path: Path, text: str, message: str):
    path = write(tmp_path / "ds.json", text)
    with pytest.raises(ConfigError) as caught:
        load_json(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    missing = tmp_path / "none.json"
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, reason in (
        (missing, "No such file or directory"),
        (tmp_path, "Is a directory"),
        (binary, "not UTF-8"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_json(path)
        what, _, mend = str(caught.value).partition("; ")
        assert what == f"{path}: cannot read the config: {reason}"
        assert mend == "give a DeepSpeed JSON that this user may read"


def test_a_file_is_read_as_it_is(tmp_path: Path):
    config = {"zeroth_order": {"eps": 1e-2}, "bf16": {"enabled": True}}
    assert load_json(write(tmp_path / "ds.json", json.dumps(config))) == config


def test_the_whole_block_may_be_written_out():
    """Every key of the documented block at its default."""
    written = {
        "enabled": True, "seed": 0, "eps": 1e-3, "probes": 1, "estimator": "spsa",
        "direction": "rademacher", "direction_scale": "none", "trainable": {"mode": "full"},
        "update": {"type": "sgd", "where": None, "lag": 0},
        "offload_param": {
            "device": "none", "nvme_path": None, "pin_memory": True, "buffer_count": None,
        },
        "device_budget": None, "host_budget": None, "unit": None, "wire": None, "master": "fp32",
        "replica": {"probe_parallel": 1, "check_interval": 100, "on_mismatch": "repair"},
        "journal": {"path": None, "snapshot_interval": 1000},
    }  # fmt: skip
    assert parse_config({"zeroth_order": written}) == ZOConfig()


def test_updates_on_the_host_are_for_weights_that_rest_there():
    block = {"update": {"where": "host"}}
    with pytest.raises(ConfigError, match=r'update\.where: "host" is for weights that rest there'):
        parse_config({"zeroth_order": block})
    on_host = {**block, "offload_param": {"device": "cpu"}}
    assert parse_config({"zeroth_order": on_host}).update.where == "host"


def test_aio_is_deepspeeds_own_block():
    beside = {"aio": {"block_size": "1MiB", "queue_depth": 16, "single_submit": False}}
    expected = AioConfig(block_size=1 << 20, queue_depth=16, single_submit=False)
    assert parse_config(beside).aio == expected
    assert refusal({"aio": {"queue_depth": 0}}) == "aio.queue_depth: expected at least 1, found 0"
    assert (
        refusal(beside | block(aio={})) == "aio stands both in zeroth_order and beside it; keep one"
    )


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"update": {"where": "disk"}}, "update.where: expected 'host' or 'device'"),
        ({"offload_param": {"nvme_path": [""]}}, "offload_param.nvme_path: expected directories"),
        ({"offload_param": {"nvme_path": 7}}, "offload_param.nvme_path: expected a directory"),
        ({"offload_param": {"nvme_path": ["/x", "/x"]}}, "nvme_path: expected directories that"),
        ({"replica": {"check_interval": -7}}, "check_interval: expected at least 0, found -7"),
        ({"replica": {"on_mismatch": "x"}}, "on_mismatch: expected 'repair' or 'stop'"),
        ({"replica": {"probe_parallel": 3}}, "probe_parallel: 3 ranks cannot share the 2 lanes"),
        ({"replica": {"probe_parallel": 2}, "joined_rows": 8}, "joined_rows: .* probe_parallel 2"),
        ({"offload_param": {"device": "nvme"}}, "offload_param.nvme_path: .* needs a directory"),
        ({"offload_param": {"device": "disk"}}, "offload_param.device: expected .*'nvme'"),
        (
            {"offload_param": {"device": "nvme", "nvme_path": "/x"}, "update": {"where": "device"}},
            "update.where: weights that rest on NVMe",
        ),
        ({"aio": {"block_size": 17}}, "zeroth_order.aio.block_size: expected at least 4096"),
        ({"update": {"type": "adamw"}}, "update.type: expected .sgd., .momentum. or .adam."),
        ({"estimator": "one_sided"}, "probes: .*compares.*write at least 2, found 1"),
        ({"fitness": "rank"}, "fitness: expected 'raw', 'standardized' or 'ranks'"),
        ({"natural": 0.1}, "natural: weighs .* write probes from 2 to 64, found 1"),
        ({"natural": 0.1, "probes": 65}, "natural: .* from 2 to 64, found 65"),
        ({"natural": 0.1, "probes": 4, "fitness": "ranks"}, 'natural: .*"raw", found "ranks"'),
        (
            {"natural": 0.1, "probes": 4, "replica": {"probe_parallel": 2}},
            "natural: .*probe_parallel 2 puts them on different ones; write 1",
        ),
        ({"natural": 0, "probes": 4}, "natural: expected at least 1e-06, found 0"),
        ({"natural": "much", "probes": 4}, 'natural: expected a number, found "much"'),
        ({"guard": {"nonfinite": "go on"}}, "nonfinite: expected 'stop', 'skip' or 'rollback'"),
        (
            {"guard": {"divergence": "rollback", "most_rollbacks": 64}, "probes": 1024},
            "most_rollbacks: .*1024 directions.*65,536; write at most 63, found 64",
        ),
        (
            {"estimator": "one_sided", "probes": 5, "replica": {"probe_parallel": 2}},
            r"2 ranks cannot share the 5 lanes of a micro-batch \(5 probes, one sign\)",
        ),
        ({"trainable": {"mode": "scales"}}, 'wire: mode "scales" moves the group scales.*null'),
        ({"trainable": {"mode": "scales"}, "wire": "nf4"}, 'int4" or "int8".*found "nf4"'),
        ({"clip": 0}, "clip: expected a positive number, or 'none', found 0"),
        ({"trainable": {"mode": "sparse"}}, 'trainable.mask: mode "sparse" needs a mask'),
        ({"wire": "nf5"}, r"wire: expected a codec \(did you mean 'nf4'\?\), found \"nf5\""),
        ({"wire": "nf4:32"}, "wire: 'nf4:32': a group is 64 or 128 elements"),
        ({"wire": 4}, "wire: expected text, found 4"),
        ({"update": {"lag": -1}}, "update.lag: expected"),
        ({"update": {"lag": 1025}}, "update.lag: expected at most 1024"),
    ],
)
def test_what_is_not_there_yet_is_refused(written: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        parse_config({"zeroth_order": written})
