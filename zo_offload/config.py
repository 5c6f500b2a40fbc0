"""The ``zeroth_order`` block of a DeepSpeed JSON, as frozen typed objects.

Read once; nothing below reads a dict. Every mistake is a :class:`ConfigError` that names the path
in the JSON, the value, what is allowed and the nearest valid key, before a model is touched. Null
means "decide for me".
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, cast, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
)

from zo_offload.config_fields import (
    BLOCK,
    Bytes,
    Limit,
    Paths,
    Positive,
    Strict,
    UnitChoice,
    Wire,
    bytes_shown,
    parse_bytes,
)
from zo_offload.config_guard import ROLLBACK, GuardConfig
from zo_offload.config_trainable import TrainableConfig, check_trainable
from zo_offload.config_update import UpdateConfig, momentum_of
from zo_offload.errors import ConfigError
from zo_offload.estimator import LEAST_PROBES, SIGNS
from zo_offload.journal.record import MAX_PROBES
from zo_offload.natural import LEAST_DAMPING, MOST_PROBES
from zo_offload.offload.aio import BLOCK_BYTES
from zo_offload.wording import hint

DEEPSPEED_ONLY = ("buffer_size", "max_in_cpu")  # of its offload_param; no effect here


class OffloadConfig(Strict):
    """Where weights rest; DeepSpeed's ``offload_param`` with its own keys."""

    device: Literal["none", "cpu", "nvme"] = "none"
    """Where blocks rest that no budget keeps nearer: `"none"` (on the device), `"cpu"` (host
    memory, streamed) or `"nvme"` (a disk, staged through host memory)."""
    nvme_path: Paths | None = None
    """For `"nvme"`: a directory of this run's own on the disk, or a list of directories on
    several disks, over which bytes are striped. Unit files there are described in
    [formats](format.md): a whole version of every block exists at every instant, every byte
    that comes back is checked, and what was killed continues from each block's newest version.
    A run whose journal is in memory leaves nothing there."""
    pin_memory: bool = True
    """Page-lock host memory, where an accelerator copies from it. `false` where the system's
    limit on locked memory cannot be raised."""
    buffer_count: Annotated[int, Field(ge=1)] | None = None
    """Blocks in flight on the device; `null`: 2. With `"nvme"`, two more are staged in host
    memory."""


class AioConfig(Strict):
    """How a disk is asked; DeepSpeed's ``aio``, of which the first three act."""

    block_size: Annotated[
        int,
        BeforeValidator(parse_bytes),
        Field(ge=4096, le=2**30, multiple_of=4096),
        bytes_shown(minimum=4096, maximum=2**30, multipleOf=4096),
    ] = BLOCK_BYTES
    """Bytes of a transfer, 4 KiB to 1 GiB in whole 4 KiB; also of a stripe, over several disks."""
    queue_depth: Annotated[int, Field(ge=1, le=256)] = 8
    """Transfers that are under way at once, times `intra_op_parallelism`. More for a disk that
    wants a longer queue."""
    intra_op_parallelism: Annotated[int, Field(ge=1, le=256)] = 1
    """Factor on `queue_depth`; 64 transfers at once are the most."""
    thread_count: int | None = None
    """DeepSpeed's; without effect."""
    single_submit: bool | None = None
    """DeepSpeed's; without effect."""
    overlap_events: bool | None = None
    """DeepSpeed's; without effect."""
    use_gds: Literal[False] | None = None
    """DeepSpeed's; disks are read through host memory, `true` is refused."""


class ReplicaConfig(Strict):
    """The other ranks."""

    probe_parallel: Annotated[int, Field(ge=1)] = 1
    """So many neighbouring ranks share each micro-batch and run a part of its lanes each (a
    sign, or probes); must divide the lanes of a micro-batch (`2 * probes`, or `probes` with
    `"one_sided"`) and the number of ranks. `train_batch_size` counts groups, the bits are those
    of one rank. For `train_batch()` and the command line, not under the Trainer."""
    check_interval: Annotated[int, Field(ge=0)] = 100
    """Steps between two comparisons of the ranks' weights: after each step one unit is
    digested, in turn; `0`: none."""
    on_mismatch: Literal["repair", "stop"] = "repair"
    """What then: the wrong copy is named and put right, or `"stop"`. Of two copies the right
    one is that in which a replay ends, from a snapshot or the model's directory; where there is
    neither, the run stops."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 7200.0
    """So long may a rank be silent, computing or writing, before it counts as lost; the log says
    who is waited for. A rank that dies is noticed at once."""


class JournalConfig(Strict):
    """The record of steps."""

    path: str | None = None
    """File that records every step; a script started again on the same base weights goes on
    from its end; `null`: in memory. `zo-offload train` chooses it itself."""
    snapshot_interval: Annotated[int, Field(ge=0)] = 1000
    """Steps between snapshots of the weights beside that file, which save the replay at a
    restart; `0` for none."""
    keep_snapshots: Annotated[int, Field(ge=1)] = 2
    """Snapshots that stay."""
    checkpoint: Literal["weights", "scalars"] = "weights"
    """What `save_checkpoint` writes: `"weights"` and journal, or `"scalars"`: the journal
    alone, kilobytes, from which the base weights are replayed."""


class ZOConfig(Strict):
    """The whole block. Every key is optional.

    Example:
        >>> ZOConfig(eps=1e-2).probes
        1
        >>> parse_config({"zeroth_order": {"probs": 4}})
        Traceback (most recent call last):
        ...
        zo_offload.errors.ConfigError: zeroth_order.probs: unknown key; did you mean 'probes'?
    """

    enabled: bool = True
    """`false` is refused by `zo_offload.initialize`: a run without the block is
    `deepspeed.initialize`'s."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Of all directions, 64 bits; also of the order of examples."""
    eps: Positive = 1e-3
    """Distance of the two evaluations along z. In bf16 not below 1e-3: rounding drowns the
    difference. Training [says](training.md#an-eps-that-is-too-small) when it is too small to be
    seen."""
    probes: Annotated[int, Field(ge=1, le=2**14)] = 1
    """Directions a step; a step costs two forwards a probe, but weights move once.
    [More](choosing.md#probes) where the bus or a disk bounds a step."""
    estimator: Literal["spsa", "one_sided"] = "spsa"
    """`"spsa"`: two forwards a probe, the difference of both signs. `"one_sided"`: one forward
    a probe, each against the mean of the others' (FZOO without the forward at W); needs
    `probes` of 2 or more."""
    fitness: Literal["raw", "standardized", "ranks"] = "raw"
    """What of the losses counts: `"raw"` themselves; `"standardized"` less the step's mean,
    over its standard deviation; `"ranks"` their places, from -1/2 to 1/2 (evolution strategies;
    for rewards, and losses with outliers). The latter two have no unit and are not divided by
    `eps`: steps are as long as `lr` says."""
    natural: Annotated[float, Field(ge=LEAST_DAMPING, allow_inf_nan=False)] | None = None
    """Damping of a [natural gradient among the step's
    probes](training.md#natural-gradient-among-the-probes), 0.1 say; `null`: none. Needs 2 to 64
    `probes`, `"fitness": "raw"`, `probe_parallel` 1, an objective that returns a loss an
    example, and `train_batch()` or the command line, not the Trainer. Learning rates are then
    larger: search again."""
    clip: Limit | None = None
    """Most that the magnitude of a projected gradient counts; `null`: no limit (100 with
    `"mode": "scales"`). `"none"`: all of it."""
    guard: GuardConfig = GuardConfig()
    """[Losses that go wrong](training.md#losses-that-go-wrong), and what is done then."""
    direction: Literal["rademacher", "gaussian"] = "rademacher"
    """Distribution of z: `"rademacher"` (signs) or `"gaussian"`."""
    direction_scale: Literal["none", "rms", "relative"] = "none"
    """`"rms"`: z of each tensor in proportion to the RMS of its values, normalized over what
    moves; `"relative"`: times that RMS itself, so that `eps` is a share of the weights' size,
    whatever the model's."""
    trainable: TrainableConfig = TrainableConfig()
    """What [moves](trainable.md)."""
    update: UpdateConfig = UpdateConfig()
    """How losses become an update, and where weights take it."""
    offload_param: OffloadConfig = OffloadConfig()
    """Where weights rest; may stand under `zero_optimization` instead."""
    aio: AioConfig = AioConfig()
    """DeepSpeed's own block, beside this one or inside it: how a disk is asked."""
    device_budget: Bytes | None = None
    """Most bytes of weights on the device. What cannot fit is refused before it is allocated;
    what room is left over beside the pipeline is filled with blocks that stay there, masters
    and all, spread evenly over the model."""
    host_budget: Bytes | None = None
    """The same of host memory; with `"nvme"`, what room is left over beside the staging is
    filled with blocks that stay in it."""
    unit: UnitChoice | None = None
    """What moves together: `"block"` (repeated blocks are found by themselves), `"sublayer"` (a
    block's children that hold a matrix: attention, MLP), `"linear"` (its innermost layers;
    [experts](plan.md#what-is-decided) that lie in one parameter are divided too), or a list of
    class names. Norms and other small parts outside the finer units stay on the device. `null`:
    blocks, or the coarsest of the three that `device_budget` holds. Without lag the bits are
    the same, but where experts are divided: then losses are rounded as by transformers'
    `"eager"` experts."""
    live_lanes: Annotated[int, Field(ge=1)] | None = None
    """Most forwards alive at once; `null`: 64. `train_batch` runs both signs of every probe on
    every micro-batch in one visit, so that weights move once; each forward holds its
    activations. Lower it where those do not fit: weights then move more than once a step,
    losses stay the same."""
    head_chunk: Annotated[int, Field(ge=1)] | None = None
    """Rows of the vocabulary that the head (`get_output_embeddings()`) computes at a time,
    `8192` say; `null`: all. Then neither the logits of a forward nor a perturbed copy of the
    head is ever whole: cross-entropy, log-sum-exp and gathers over the vocabulary are computed
    in chunks, to fp32 rounding, and a tied embedding's rows are perturbed as gathered. Whatever
    else reads logits gets them whole, to the bits that it gets without the key; a warning names
    it, once. It costs a pass over the head in every forward, where a whole copy serves all
    micro-batches. A training `forward` whose output has a loss gives no logits: reading them is
    refused; `forward` without labels, evaluation and `generate` give them whole."""
    joined_rows: Annotated[int, Field(ge=1)] | None = None
    """Lanes of one micro-batch [share a product](trainable.md#products-that-lanes-share) with a
    matrix that is the same along every draw, up to so many rows (tokens) a lane; `null`: they
    do not."""
    wire: Wire | None = None
    """How blocks' matrices cross the bus: `"identity"` (the forward's dtype; so does `null`),
    `"bf16"`, `"fp16"`, `"lossless12"` (bfloat16 exactly, in 1.51 bytes), `"fp8_e4m3"`,
    `"int8"`, `"int4"`, `"nf4"`; the last four may name their group, `"nf4:64"`
    ([formats](codecs.md)). The forward sees the decoded weights wherever they rest, so that a
    tier never changes a bit; masters are never packed, and export is of them. Frozen matrices
    (`requires_grad` False) rest packed too, in every tier, are moved once a step for all
    forwards, and never written back."""
    master: Literal["fp32", "bf16+8", "bf16_sr"] = "fp32"
    """What updates of bfloat16 weights accumulate in: `"fp32"` (4 bytes a parameter),
    `"bf16+8"` (3) or `"bf16_sr"` (2: the bfloat16 itself). The smaller two round by chance once
    a step, without bias: `"bf16+8"` adds noise far below a bfloat16 step, `"bf16_sr"` a random
    walk of whole ones."""
    replica: ReplicaConfig = ReplicaConfig()
    """The other ranks: what they share, and how they are compared."""
    journal: JournalConfig = JournalConfig()
    """The record of steps: where it is, and what is kept beside it."""

    @property
    def signs(self) -> tuple[int, ...]:
        """Of the lanes of a direction."""
        return SIGNS[self.estimator]

    @property
    def num_lanes(self) -> int:
        """Directions and signs of a step: forwards of a micro-batch."""
        return len(self.signs) * self.probes


def is_object(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether a value of a JSON is an object; the keys of JSON's objects are text."""
    return isinstance(value, Mapping)


def parse_config(config: Mapping[str, Any]) -> ZOConfig:
    """Our block of a DeepSpeed JSON, checked together with the keys beside it.

    Raises:
        ConfigError: On the first mistake.
    """
    block = config.get(BLOCK, {})
    if not is_object(block):
        raise ConfigError(f"{BLOCK}: expected an object, found {_show(block)}")
    _refuse_auto(block)
    theirs = _offload_param_beside(config)
    if theirs is not None and block.get("offload_param") is not None:
        raise ConfigError(
            f"offload_param stands both in {BLOCK} and in zero_optimization; keep one"
        )
    beside: dict[str, Any] = {} if theirs is None else {"offload_param": theirs}
    if config.get("aio") is not None:
        if block.get("aio") is not None:
            raise ConfigError(f"aio stands both in {BLOCK} and beside it; keep one")
        beside["aio"] = config["aio"]
    try:
        parsed = ZOConfig.model_validate({**block, **beside})
    except ValidationError as error:
        first, *others = error.errors()
        raise ConfigError(
            _explain(first, beside), tuple(_explain(each, beside) for each in others)
        ) from None
    _check_tier(parsed)
    _check_estimator(parsed)
    _check_guard(parsed)
    if parsed.natural is not None:
        _check_natural(parsed)
    _check_replica(parsed)
    check_trainable(parsed.trainable, parsed.wire, parsed.update.lag, parsed.master)
    momentum_of(parsed.update, parsed.trainable.mode)
    check_beside(config)
    return parsed


def _check_tier(parsed: ZOConfig) -> None:
    device, where = parsed.offload_param.device, parsed.update.where
    if where == "host" and device == "none":
        raise ConfigError(
            f'{BLOCK}.update.where: "host" is for weights that rest there; write "offload_param": '
            '{"device": "cpu"} too, or leave update.where out'
        )
    if where == "device" and device == "nvme":
        raise ConfigError(
            f"{BLOCK}.update.where: weights that rest on NVMe pass through host memory and are "
            'updated there; write "host", or null'
        )
    if device == "nvme" and parsed.offload_param.nvme_path is None:
        raise ConfigError(
            f'{BLOCK}.offload_param.nvme_path: "device": "nvme" needs a directory on the disk, '
            "found null"
            "; write its path"
        )


def _check_replica(parsed: ZOConfig) -> None:
    parallel, lanes = parsed.replica.probe_parallel, parsed.num_lanes
    if lanes % parallel:
        raise ConfigError(
            f"{BLOCK}.replica.probe_parallel: {parallel} ranks cannot share the {lanes} lanes of a "
            f"micro-batch ({parsed.probes} probes, {_signs(parsed)}) evenly; write a divisor of "
            f"{lanes}"
        )
    if parallel > 1 and parsed.joined_rows is not None:
        raise ConfigError(
            f"{BLOCK}.joined_rows: lanes share products within a rank, and probe_parallel "
            f"{parallel} puts them on different ones, which would change bits; keep one of the two"
        )


def _signs(parsed: ZOConfig) -> str:
    return "two signs" if len(parsed.signs) == 2 else "one sign"


def _check_estimator(parsed: ZOConfig) -> None:
    least = LEAST_PROBES[parsed.estimator]
    if parsed.probes < least:
        raise ConfigError(
            f'{BLOCK}.probes: "estimator": "{parsed.estimator}" compares a step\'s probes with '
            f"each other; write at least {least}, found {parsed.probes}"
        )


def _check_guard(parsed: ZOConfig) -> None:
    guard, most = parsed.guard, MAX_PROBES // parsed.probes - 1
    rolls = ROLLBACK in (guard.nonfinite, guard.explosion, guard.divergence)
    if rolls and guard.most_rollbacks > most:
        raise ConfigError(
            f"{BLOCK}.guard.most_rollbacks: each goes on along {parsed.probes} directions of its "
            f"own a step, of which there are {MAX_PROBES:,}; write at most {most}, found "
            f"{guard.most_rollbacks}"
        )


def _check_natural(parsed: ZOConfig) -> None:
    if not 2 <= parsed.probes <= MOST_PROBES:
        raise ConfigError(
            f"{BLOCK}.natural: weighs a step's probes against each other; write probes from 2 to "
            f"{MOST_PROBES}, found {parsed.probes}"
        )
    if parsed.fitness != "raw":
        raise ConfigError(
            f'{BLOCK}.natural: compares the losses of single examples as they are; write "fitness":'
            f' "raw", found "{parsed.fitness}"'
        )
    if parsed.replica.probe_parallel > 1:
        raise ConfigError(
            f"{BLOCK}.natural: compares a micro-batch's probes on one rank, and "
            f"replica.probe_parallel {parsed.replica.probe_parallel} puts them on different ones; "
            "write 1"
        )


def load_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConfigError: The file is missing, unreadable, malformed, or no object.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(
            f"{path}: cannot read the config: {reason}"
            "; give a DeepSpeed JSON that this user may read"
        ) from error
    try:
        config: Any = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}:{error.lineno}:{error.colno}: malformed JSON: {error.msg}; mend it there"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return cast(dict[str, Any], config)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"key {key!r} stands twice in one object; keep one")
        seen[key] = value
    return seen


def _refuse_auto(block: Mapping[str, Any]) -> None:
    """The Trainer's integration fails on any "auto" inside our block; so do we, by name."""
    for key, value in block.items():
        inside: Mapping[str | None, Any] = {**value} if is_object(value) else {None: value}
        for inner, item in inside.items():
            if item == "auto" or (isinstance(item, list) and "auto" in item):
                path = _dotted([key] if inner is None else [key, inner])
                raise ConfigError(
                    f'{path}: "auto" belongs to the Trainer\'s integration; '
                    'write null for "decide for me"'
                )


def _offload_param_beside(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """``offload_param`` where a DeepSpeed user already has it, less what has no effect here."""
    zero = config.get("zero_optimization")
    if zero is not None and not is_object(zero):
        raise ConfigError(f"zero_optimization: expected an object, found {_show(zero)}")
    theirs = zero.get("offload_param") if is_object(zero) else None
    if theirs is None:
        return None
    if not is_object(theirs):
        raise ConfigError(
            f"zero_optimization.offload_param: expected an object, found {_show(theirs)}"
        )
    return {key: value for key, value in theirs.items() if key not in DEEPSPEED_ONLY}


def check_beside(config: Mapping[str, Any]) -> None:
    """What ``zero_optimization`` and the precisions say beside our block.

    Raises:
        ConfigError: Something that is not to be had here.
    """
    zero: Mapping[str, Any] = config.get("zero_optimization") or {}
    stage: Any = zero.get("stage")
    if stage is not None and (isinstance(stage, bool) or stage != 0):
        raise ConfigError(
            f"zero_optimization.stage: expected 0, found {_show(stage)}; stages 1 to 3 shard "
            "gradients and optimizer states, which do not exist here; weights move by "
            f'"{BLOCK}": {{"offload_param": {{"device": "cpu"}}}}'
        )
    optimizer: Any = zero.get("offload_optimizer")
    if optimizer is not None and optimizer != {"device": "none"}:
        raise ConfigError(
            "zero_optimization.offload_optimizer: there is no optimizer state to move; remove "
            f'the key (weights move by "{BLOCK}": {{"offload_param": {{"device": "cpu"}}}})'
        )
    for precision in ("bf16", "fp16"):
        if not isinstance(config.get(precision, {}), Mapping):
            raise ConfigError(f"{precision}: expected an object, found {_show(config[precision])}")
    if all(config.get(precision, {}).get("enabled") is True for precision in ("bf16", "fp16")):
        raise ConfigError("bf16.enabled and fp16.enabled are both true; keep one")


_EXPECTED = {  # pydantic's names of mistakes
    "literal_error": "{expected}",
    "model_type": "an object",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "multiple_of": "a multiple of {multiple_of}",
    "less_than_equal": "at most {le}",
}


_ROOTS = {"offload_param": "zero_optimization", "aio": ""}  # where DeepSpeed has them


def _explain(first: Mapping[str, Any], beside: Mapping[str, Any]) -> str:
    """A mistake in one line: path, what is allowed, what is found, the nearest key."""
    *parents, key = where = list(first["loc"])
    path = _dotted(where, _ROOTS.get(str(where[0]), BLOCK) if where[0] in beside else BLOCK)
    if first["type"] in ("extra_forbidden", "invalid_key"):
        return f"{path}: unknown key; {hint(key, _keys_at(parents))}"
    if first["type"] in _EXPECTED:
        message = "expected " + _EXPECTED[first["type"]].format(**first.get("ctx", {}))
    else:
        message = first["msg"].removeprefix("Value error, ")
    return f"{path}: {message}, found {_show(first['input'])}"


def _dotted(parts: list[Any], root: str = BLOCK) -> str:
    roots = [root] if root else []
    return ".".join([*roots, *(p if str(p).isidentifier() else _show(p) for p in map(str, parts))])


def _show(value: Any) -> str:
    """A value as JSON, on one line, cut where it is long."""
    try:
        text = json.dumps(value, default=repr)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _keys_at(parents: list[Any]) -> list[str]:
    model: type[BaseModel] = ZOConfig
    for part in parents:
        annotation = model.model_fields[part].annotation
        kinds = [annotation, *get_args(annotation)]  # itself, or where it may be null
        (model,) = (k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    return list(model.model_fields)
