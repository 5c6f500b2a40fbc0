r"""Answers in words: decoded greedily after the prompt, up to a stop text, and what they are worth.

A token that holds the stop text ends an answer, whether or not it is the stop text alone (`.\n` is
one token to many tokenizers); what stands before it there is kept.

An objective on answers takes three of the functions here:

    decoding = Decoding(tokenizer, max_new_tokens=20)
    batch = decoding.collate(encoded)
    ids = decoding.generate(model, batch)  # forward
    rewards = decoding.rewards(batch, ids, exact_match_of)  # from 0 to 1, an example each
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from zo_offload.tasks.encode import PAD, Encoded, left_padded
from zo_offload.tasks.scores import exact_match_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Reward = Callable[[str, Sequence[str]], float]


@dataclass(frozen=True)
class Decoding:
    """Greedy decoding by one tokenizer.

    Attributes:
        tokenizer: Any Hugging Face tokenizer with an end token.
        max_new_tokens: Of an answer.
        stop: What ends it, beside the end token.
        ends: Tokens that do.
    """

    tokenizer: "PreTrainedTokenizerBase"
    max_new_tokens: int = 50
    stop: str = "\n"
    ends: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends", _ends(self.tokenizer, self.stop))

    def collate(self, encoded: Sequence[Encoded]) -> dict[str, Any]:
        """Prompts, padded on the left, int64 [examples, T]; and the references, strings."""
        prompts = [example.prompt for example in encoded]
        return {
            "input_ids": left_padded(prompts, PAD),
            "attention_mask": left_padded([(1,) * len(prompt) for prompt in prompts], 0),
            "references": [example.references for example in encoded],
        }

    def generate(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """The new tokens, int64 [examples, at most `max_new_tokens`], filled up with an end."""
        ids = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=list(self.ends),
            pad_token_id=self.ends[0],
        )
        return ids[:, batch["input_ids"].shape[1] :]

    def texts(self, ids: torch.Tensor) -> list[str]:
        """The answers, without white space around them."""
        texts = self.tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True)
        return [text.split(self.stop)[0].strip() for text in texts]

    def rewards(
        self, batch: dict[str, Any], ids: torch.Tensor, reward: Reward = exact_match_of
    ) -> torch.Tensor:
        """What each answer is worth, fp32 [examples], on the CPU."""
        pairs = zip(self.texts(ids), batch["references"], strict=True)
        return torch.tensor([reward(text, references) for text, references in pairs])


def _ends(tokenizer: "PreTrainedTokenizerBase", stop: str) -> tuple[int, ...]:
    """The end token, and every token whose text holds the stop text."""
    end = tokenizer.eos_token_id
    every = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    stops = [token for token, text in enumerate(every) if stop in text]
    first = [end] if isinstance(end, int) else []
    return tuple(dict.fromkeys([*first, *stops]))
