"""How a task's examples go through a kind of model: what a run needs to know of both.

A `Way` is made of functions, so that another kind of model is another function like `causal_way`
and `masked_way`, and nothing else.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from zo_offload.objective import Objective
from zo_offload.tasks.aims import LOSS, Aim, aims_of_answers, aims_of_options
from zo_offload.tasks.encode import Batch, Encoded, collate, encode_rendered, num_rows
from zo_offload.tasks.generate import Decoding
from zo_offload.tasks.judge import Verdict, judge_answers, judge_options
from zo_offload.tasks.masked import collate_masked, encode_masked, mask_forward
from zo_offload.tasks.objective import answer_loss, option_forward, option_loss
from zo_offload.tasks.rendered import Rendered
from zo_offload.tasks.spec import Manner
from zo_offload.tasks.wording import refuse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Way:
    """Through a model, for training and for measuring.

    Attributes:
        encode: Text to what the model takes; refuses or cuts what is too long.
        collate: A micro-batch to train on.
        objective: What is minimised on it.
        judge: `(stepper, examples)` to a verdict on each, for a batch.
        metrics: Of all verdicts; the first is the task's score.
        num_rows: That a batch of examples takes in the model.
        aims: What else can be minimised, by name, with the micro-batches for it.
    """

    encode: Callable[..., list[Any]]
    collate: Callable[[Sequence[Any]], Batch]
    objective: Objective
    judge: Callable[[Any, Sequence[Any]], list[Verdict]]
    metrics: tuple[str, ...]
    num_rows: Callable[[Sequence[Any]], int] = num_rows
    aims: Mapping[str, Aim] = field(default_factory=dict)

    def minimising(self, name: str) -> "Way":
        """The same way, with another objective.

        Args:
            name: `loss`, or one of `aims`.
        """
        if name == LOSS:
            return self
        return replace(self, collate=self.aims[name].collate, objective=self.aims[name].objective)


def causal_way(manner: Manner, tokenizer: "PreTrainedTokenizerBase") -> Way:
    """Through a causal LM: options, or an answer, are what it may write next."""
    loss = answer_loss if manner.train_on == "answer" else option_loss
    room = manner.max_new_tokens if manner.generates else 0
    if manner.generates:
        decoding = Decoding(tokenizer, manner.max_new_tokens, manner.stop)
        judge = partial(judge_answers, decoding=decoding)
        aims = aims_of_answers(decoding)
    else:
        judge = partial(judge_options, train_on=manner.train_on)
        aims = aims_of_options(option_forward, collate)
    return Way(
        encode=partial(_encode, tokenizer=tokenizer, max_new_tokens=room),
        collate=collate_answers if manner.train_on == "answer" else collate,
        objective=Objective(loss=loss, forward=option_forward),
        judge=judge,
        metrics=manner.metrics,
        aims=aims,
    )


def masked_way(manner: Manner, tokenizer: "PreTrainedTokenizerBase") -> Way:
    """Through a masked LM: a label word is what it may fill in.

    Raises:
        TaskError: The tokenizer has no mask.
    """
    if tokenizer.mask_token_id is None:
        mend = "set its mask_token, or say the model's --kind"
        refuse("the tokenizer", "no mask token, which a masked LM needs", mend)
    loss = answer_loss if manner.train_on == "answer" else option_loss
    collated = partial(collate_masked, pad=tokenizer.pad_token_id)
    return Way(
        encode=partial(encode_masked, tokenizer=tokenizer),
        collate=collated,
        objective=Objective(loss=loss, forward=mask_forward),
        judge=partial(judge_options, train_on=manner.train_on, collate=collated),
        metrics=manner.metrics,
        aims=aims_of_options(mask_forward, collated),
    )


def collate_answers(examples: Sequence[Encoded]) -> Batch:
    """A row an example: the option to learn from and no other."""
    return collate([example.answer_alone for example in examples])


def _encode(
    posed: Sequence[Rendered],
    max_length: int | None,
    truncate: bool,
    tokenizer: "PreTrainedTokenizerBase",
    max_new_tokens: int,
) -> list[Encoded]:
    return encode_rendered(
        posed, tokenizer, max_length, truncate=truncate, max_new_tokens=max_new_tokens
    )
