"""Tokenizes prompts with their label words, and collates them to what a model and its loss need.

As in MeZO, an option (a label word) is scored by the mean log-probability of its tokens after the
prompt. Two things make that exact and cheap:

- Tokens merge across the boundary, so that a prompt's tokens need not begin the tokens of prompt +
  option. Each full text is tokenized whole; the context is the common prefix of the prompt and all
  full texts, and an option's tokens are what follows it.
- The model never needs an option's last token as input. A row is context + option[:-1], padded on
  the left, and the logits of its last positions are all that is read. Options of one token (nearly
  always) share one row, the context itself; else there is one row for each (example, option).

Examples may have options of their own, in any number: those that are not there take no row.

Reference: Malladi et al. 2023, arXiv 2305.17333, section 3 and appendix E.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from zo_offload.tasks.prompt import Prompt
from zo_offload.tasks.reader import Example
from zo_offload.tasks.rendered import Rendered
from zo_offload.tasks.wording import quote, refuse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = tuple[int, ...]
Batch = dict[str, torch.Tensor]
NO_TOKEN = -1  # in option_ids, left of an option that is shorter than the longest
PAD = 0  # masked wherever it stands, so any token does


@dataclass(frozen=True)
class Encoded:
    """One example in tokens: what all options share, what each adds, and which is right.

    Attributes:
        context: What all options share.
        options: What each adds.
        target: The option to learn from.
        right: Every right option; left out, the target.
        prompt: All of the prompt, where an answer is generated after it.
        references: Accepted answers, where they are generated.
        mask_at: Where the mask is in the context, of a masked LM.
    """

    context: Tokens
    options: tuple[Tokens, ...]
    target: int
    right: tuple[int, ...] = ()
    prompt: Tokens = ()
    references: tuple[str, ...] = ()
    mask_at: int = 0

    def __post_init__(self) -> None:
        if not self.right:
            object.__setattr__(self, "right", (self.target,))

    @property
    def num_tokens(self) -> int:
        """The positions that its longest row takes in the model."""
        return len(self.context) + max(map(len, self.options)) - 1

    def num_positions(self, max_new_tokens: int) -> int:
        """That the model must have, to score it and to generate after its prompt."""
        return max(self.num_tokens, len(self.prompt) + max_new_tokens if self.prompt else 0)

    @property
    def answer_alone(self) -> "Encoded":
        """With the option to learn from and no other."""
        return replace(self, options=(self.options[self.target],), target=0, right=(0,))


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
    posed = [prompt.pose(example) for example in examples]
    return encode_rendered(posed, tokenizer, max_length, truncate=truncate)


def encode_rendered(
    posed: Sequence[Rendered],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None,
    *,
    truncate: bool = False,
    max_new_tokens: int = 0,
) -> list[Encoded]:
    """As `encode`, of examples that are text already, each with options of its own.

    Args:
        posed: In the order of what is returned.
        tokenizer: As for `encode`.
        max_length: As for `encode`.
        truncate: As for `encode`.
        max_new_tokens: Room that is left after a prompt whose answer is generated.
    """
    if not posed:
        return []
    start = leading_specials(tokenizer, posed[0].prompt + posed[0].options[0])
    prompts = _tokenize(tokenizer, [one.prompt for one in posed])
    fulls = iter(_tokenize(tokenizer, [one.prompt + each for one in posed for each in one.options]))
    encoded = []
    for one, tokens in zip(posed, prompts, strict=True):
        full = [next(fulls) for _ in one.options]
        shared = _shared_length([tokens, *full])
        found = Encoded(
            start + tokens[:shared],
            tuple(text[shared:] for text in full),
            one.right[0],
            one.right,
            start + tokens if one.references else (),
            one.references,
        )
        _check_options(found, one)
        kept = len(start) if truncate else None
        encoded.append(_fit(found, one.where, max_length, kept, max_new_tokens))
    return encoded


def collate(encoded: Sequence[Encoded]) -> Batch:
    """One micro-batch, padded on the left to its own longest row.

    Returns:
        For the model (`model_inputs` picks what it takes), int64, R rows, T positions:
            input_ids, attention_mask, position_ids: [R, T]
        For the loss, under names that no model takes, with E examples and at most O options each:
            option_ids: [E, O] and R = E when every option is one token, else [E, O, K], a row for
                each option that is there, and K tokens in the longest one, padded on the left;
                NO_TOKEN stands wherever there is none
            targets: [E], the option to learn from
            right: [E, O], 1 for right options, only where an example has several
    """
    return (_collate_shared_rows if _one_token(encoded) else _collate_option_rows)(encoded)


def num_rows(encoded: Sequence[Encoded]) -> int:
    """The rows of a batch of them."""
    return len(encoded) if _one_token(encoded) else sum(len(one.options) for one in encoded)


def _one_token(encoded: Sequence[Encoded]) -> bool:
    return all(len(option) == 1 for example in encoded for option in example.options)


def _collate_shared_rows(encoded: Sequence[Encoded]) -> Batch:
    most = max(len(example.options) for example in encoded)
    option_ids = [
        [*(token for (token,) in example.options), *[NO_TOKEN] * (most - len(example.options))]
        for example in encoded
    ]  # [E, O]
    return _batch([example.context for example in encoded], torch.tensor(option_ids), encoded)


def _collate_option_rows(encoded: Sequence[Encoded]) -> Batch:
    most = max(len(example.options) for example in encoded)
    options = [
        option
        for example in encoded
        for option in (*example.options, *[()] * (most - len(example.options)))
    ]
    rows = [example.context + option[:-1] for example in encoded for option in example.options]
    option_ids = left_padded(options, NO_TOKEN).unflatten(0, (len(encoded), most))  # [E, O, K]
    return _batch(rows, option_ids, encoded)


def _batch(rows: Sequence[Tokens], option_ids: torch.Tensor, encoded: Sequence[Encoded]) -> Batch:
    mask = left_padded([(1,) * len(row) for row in rows], 0)  # [R, T]
    batch = {
        "input_ids": left_padded(rows, PAD),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),  # a row's first token is at 0
        "option_ids": option_ids,
        "targets": torch.tensor([example.target for example in encoded]),
    }
    if any(len(example.right) > 1 for example in encoded):
        every = range(option_ids.shape[1])
        batch["right"] = torch.tensor([[int(o in one.right) for o in every] for one in encoded])
    return batch


def left_padded(rows: Sequence[Tokens], filler: int) -> torch.Tensor:
    """Int64 [rows, length of the longest]."""
    width = max(map(len, rows))
    return torch.tensor([(filler,) * (width - len(row)) + row for row in rows])


def _tokenize(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[Tokens]:
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [tuple(row) for row in rows]


def leading_specials(tokenizer: "PreTrainedTokenizerBase", text: str) -> Tokens:
    """What the tokenizer puts before a text (BOS), without what it appends (EOS)."""
    (plain,) = _tokenize(tokenizer, [text])
    whole = tuple(tokenizer(text, verbose=False)["input_ids"])
    starts = (at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
    return whole[: next(starts, 0)]


def _shared_length(sequences: Sequence[Tokens]) -> int:
    columns = zip(*sequences, strict=False)
    shortest = min(map(len, sequences))
    return next((at for at, column in enumerate(columns) if len(set(column)) > 1), shortest)


def _check_options(encoded: Encoded, posed: Rendered) -> None:
    noun = "label word" if posed.fixed else "option"
    if not encoded.context:
        refuse(posed.where, f"no token before the {noun}", "begin the template with text")
    for index, option in enumerate(encoded.options):
        word = quote(posed.options[index])
        if not option:
            refuse(posed.where, f"{noun} {word} adds no token", f"choose another {noun}")
        if posed.fixed and option in encoded.options[:index]:
            words = f"{quote(posed.options[encoded.options.index(option)])} and {word}"
            refuse(posed.where, f"label words {words} are the same tokens", "change one")


def _fit(
    encoded: Encoded, where: str, max_length: int | None, kept: int | None, max_new_tokens: int
) -> Encoded:
    """The example within `max_length`, cut after its `kept` first tokens; None refuses to cut."""
    needed = encoded.num_positions(max_new_tokens)
    excess = needed - max_length if max_length is not None else 0
    if excess <= 0:
        return encoded
    fault = f"{needed} tokens, and the model has {max_length} positions"
    if encoded.prompt and max_new_tokens:
        fault = f"{needed} tokens with the {max_new_tokens} to generate, and the model has "
        fault += f"{max_length} positions"
    if kept is None:
        refuse(where, fault, "shorten the text, or pass --truncate to cut its beginning")
    if excess >= len(encoded.context) - kept:
        refuse(where, f"{fault}, too few for any text", "shorten the label words")
    cut = kept + excess
    prompt = encoded.prompt[:kept] + encoded.prompt[cut:]
    return replace(encoded, context=encoded.context[:kept] + encoded.context[cut:], prompt=prompt)
