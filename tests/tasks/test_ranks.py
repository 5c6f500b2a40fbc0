"""Any number of ranks finds the same numbers."""

from types import SimpleNamespace
from typing import Any

import pytest

from zo_offload.reporter import Reporter
from zo_offload.run_evaluation import evaluate_on_ranks
from zo_offload.tasks import Encoded, Verdict

EXAMPLES = [Encoded((5,) * (1 + 7 * at % 5), ((1,), (2,)), at % 2) for at in range(11)]


class Sent(Exception):
    """What a rank has to say."""


def judge(stepper: Any, examples: list[Encoded]) -> list[Verdict]:
    """By the example alone."""
    return [Verdict(0.1 * len(one.context), 1.0 + one.target, 0) for one in examples]


def evaluate(rank: int, num_ranks: int, everyone: list[bytes] | None = None):
    def gather(packed: bytes) -> list[bytes]:
        if everyone is None:
            raise Sent(packed)
        return everyone

    replica = SimpleNamespace(
        rank=rank, world_size=num_ranks, gather=gather, share=lambda make: make()
    )
    engine = SimpleNamespace(
        stepper=SimpleNamespace(replica=replica), train_micro_batch_size_per_gpu=lambda: 1
    )
    way = SimpleNamespace(judge=judge, metrics=("accuracy", "macro_f1"), num_rows=len)
    task: Any = SimpleNamespace(dev=EXAMPLES, way=way)
    return evaluate_on_ranks(engine, task, Reporter())


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 9])
def test_the_numbers_do_not_depend_on_the_ranks(num_ranks: int):
    everyone = []
    for rank in range(num_ranks):
        with pytest.raises(Sent) as sent:
            evaluate(rank, num_ranks)
        everyone.append(sent.value.args[0])
    found = {repr(evaluate(rank, num_ranks, everyone)) for rank in range(num_ranks)}
    (alone,) = found
    with pytest.raises(Sent) as sent:
        evaluate(0, 1)
    assert alone == repr(evaluate(0, 1, [sent.value.args[0]]))
    one = evaluate(0, 1, [sent.value.args[0]])
    assert (one.accuracy, one.metric, one.num_examples) == (6 / 11, "accuracy", 11)
    weights = [1.0 + each.target for each in EXAMPLES]
    losses = sum(0.1 * len(each.context) for each in EXAMPLES)
    assert one.loss == pytest.approx(losses / sum(weights))
