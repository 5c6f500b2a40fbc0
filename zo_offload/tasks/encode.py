"""Tokenizes prompts with their label words, and collates them to what a model and its loss need.

As in MeZO, an option (a label word) is scored by the mean log-probability of its tokens after the
prompt. Two things make that exact and cheap:

- Tokens merge across the boundary, so that a prompt's tokens need not begin the tokens of prompt +
  option. Each full text is tokenized whole; the context is the common prefix of the prompt and all
  full texts, and an option's tokens are what follows it.
- The model never needs an option's last token as input. A row is context + option[:-1], padded on
  the left, and the logits of its last positions are all that is read. Options of one token (nearly
  always) share one row, the context itself; else there is one row for each (example, option).

Reference: Malladi et al. 2023, arXiv 2305.17333, section 3 and appendix E.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from zo_offload.tasks.prompt import Prompt
from zo_offload.tasks.reader import Example
from zo_offload.tasks.wording import quote, refuse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = tuple[int, ...]
Batch = dict[str, torch.Tensor]
NO_TOKEN = -1  # in option_ids, left of an option that is shorter than the longest
PAD = 0  # masked wherever it stands, so any token does


@dataclass(frozen=True)
class Encoded:
    """One example in tokens: what all options share, what each adds, and which is right."""

    context: Tokens
    options: tuple[Tokens, ...]
    target: int

    @property
    def num_tokens(self) -> int:
        """The positions that its longest row takes in the model."""
        return len(self.context) + max(map(len, self.options)) - 1


def encode(
    examples: Sequence[Example],
    prompt: Prompt,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None,
    *,
    truncate: bool = False,
) -> list[Encoded]:
    """Tokenizes every example with every label word.

    Args:
        examples: What `read_examples` returned.
        prompt: The template and its label words.
        tokenizer: Any Hugging Face tokenizer; what it puts before a text (BOS) is kept, what it
            appends is not.
        max_length: The positions that the model has; None for no limit.
        truncate: Cut the beginning of a text that is too long, and keep the BOS.

    Returns:
        One `Encoded` for each example, in order.

    Raises:
        TaskError: A field or label is unknown, a text is too long, or label words are no use.
    """
    if not examples:
        return []
    targets = [prompt.label_index(example) for example in examples]
    texts = [prompt.render(example) for example in examples]
    start = _leading_specials(tokenizer, texts[0] + prompt.words[0])
    prompts = _tokenize(tokenizer, texts)
    fulls = [_tokenize(tokenizer, [text + word for text in texts]) for word in prompt.words]
    encoded = []
    for example, target, tokens, *full in zip(examples, targets, prompts, *fulls, strict=True):
        shared = _shared_length([tokens, *full])
        one = Encoded(start + tokens[:shared], tuple(text[shared:] for text in full), target)
        _check_options(one, example, prompt)
        encoded.append(_fit(one, example, max_length, len(start) if truncate else None))
    return encoded


def collate(encoded: Sequence[Encoded]) -> Batch:
    """One micro-batch, padded on the left to its own longest row.

    Returns:
        For the model (`model_inputs` picks what it takes), int64, R rows, T positions:
            input_ids, attention_mask, position_ids: [R, T]
        For the loss, under names that no model takes, with E examples and O options:
            option_ids: [E, O] and R = E when every option is one token, else [E, O, K] and
                R = E * O, K tokens in the longest option, padded on the left with NO_TOKEN
            targets: [E], the right option
    """
    one_token = all(len(option) == 1 for example in encoded for option in example.options)
    return _collate_shared_rows(encoded) if one_token else _collate_option_rows(encoded)


def _collate_shared_rows(encoded: Sequence[Encoded]) -> Batch:
    option_ids = [[token for (token,) in example.options] for example in encoded]  # [E, O]
    return _batch([example.context for example in encoded], torch.tensor(option_ids), encoded)


def _collate_option_rows(encoded: Sequence[Encoded]) -> Batch:
    options = [option for example in encoded for option in example.options]
    rows = [example.context + option[:-1] for example in encoded for option in example.options]
    option_ids = _left_padded(options, NO_TOKEN).unflatten(0, (len(encoded), -1))  # [E, O, K]
    return _batch(rows, option_ids, encoded)


def _batch(rows: Sequence[Tokens], option_ids: torch.Tensor, encoded: Sequence[Encoded]) -> Batch:
    mask = _left_padded([(1,) * len(row) for row in rows], 0)  # [R, T]
    return {
        "input_ids": _left_padded(rows, PAD),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),  # a row's first token is at 0
        "option_ids": option_ids,
        "targets": torch.tensor([example.target for example in encoded]),
    }


def _left_padded(rows: Sequence[Tokens], filler: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([(filler,) * (width - len(row)) + row for row in rows])


def _tokenize(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[Tokens]:
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [tuple(row) for row in rows]


def _leading_specials(tokenizer: "PreTrainedTokenizerBase", text: str) -> Tokens:
    """What the tokenizer puts before a text (BOS), without what it appends (EOS)."""
    (plain,) = _tokenize(tokenizer, [text])
    whole = tuple(tokenizer(text, verbose=False)["input_ids"])
    starts = (at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
    return whole[: next(starts, 0)]


def _shared_length(sequences: Sequence[Tokens]) -> int:
    columns = zip(*sequences, strict=False)
    shortest = min(map(len, sequences))
    return next((at for at, column in enumerate(columns) if len(set(column)) > 1), shortest)


def _check_options(encoded: Encoded, example: Example, prompt: Prompt) -> None:
    if not encoded.context:
        refuse(example.where, "no token before the label word", "begin the template with text")
    for index, option in enumerate(encoded.options):
        word = quote(prompt.words[index])
        if not option:
            refuse(example.where, f"label word {word} adds no token", "choose another word")
        if option in encoded.options[:index]:
            words = f"{quote(prompt.words[encoded.options.index(option)])} and {word}"
            refuse(example.where, f"label words {words} are the same tokens", "change one")


def _fit(encoded: Encoded, example: Example, max_length: int | None, kept: int | None) -> Encoded:
    """The example within `max_length`, cut after its `kept` first tokens; None refuses to cut."""
    excess = encoded.num_tokens - max_length if max_length is not None else 0
    if excess <= 0:
        return encoded
    fault = f"{encoded.num_tokens} tokens, and the model has {max_length} positions"
    if kept is None:
        refuse(example.where, fault, "shorten the text, or pass --truncate to cut its beginning")
    if excess >= len(encoded.context) - kept:
        refuse(example.where, f"{fault}, too few for any text", "shorten the label words")
    return replace(encoded, context=encoded.context[:kept] + encoded.context[kept + excess :])
