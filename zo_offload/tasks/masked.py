"""Examples for masked LMs: one row each, and the label words compared where the mask stands.

An example is what stands before the mask, the tokenizer's mask, and what stands after it, tokenized
whole with all that the tokenizer puts around a text. A label word is one token. Loss, prediction
and metrics are those of options of one token (`objective.py`): a row's logits are its mask's alone,
and the head computes no others.

Rows are padded on the right, with the tokenizer's padding: RoBERTa counts its positions by it.

Reference: Gao et al. 2021, arXiv 2012.15723, section 4.1, equation 1.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from zo_offload.errors import ModelError
from zo_offload.tasks.encode import Batch, Encoded, Tokens, leading_specials
from zo_offload.tasks.rendered import Rendered
from zo_offload.tasks.wording import listed, quote, refuse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INPUTS = ("input_ids", "attention_mask")


class MaskLogits(NamedTuple):
    """What a masked LM says at its masks: logits [examples, 1, vocabulary]."""

    logits: torch.Tensor


def encode_masked(
    posed: Sequence[Rendered],
    max_length: int | None,
    truncate: bool,
    tokenizer: "PreTrainedTokenizerBase",
) -> list[Encoded]:
    """Tokenizes every example around its mask.

    Args:
        posed: With `rest`, and label words.
        max_length: Tokens that the model takes; None for no limit.
        truncate: Cut a text that is too long, farthest from the mask and where there is most.
        tokenizer: One with a mask token.

    Raises:
        TaskError: A label word is not one token, a text holds the mask, or is too long.
    """
    if not posed:
        return []
    words = _word_ids(posed[0], tokenizer)
    mask, mask_id = str(tokenizer.mask_token), tokenizer.mask_token_id
    texts = [f"{one.prompt}{mask}{one.rest}" for one in posed]
    rows = tokenizer(texts, verbose=False)["input_ids"]
    start = len(leading_specials(tokenizer, texts[0]))
    end = len(rows[0]) - start - len(tokenizer(texts[0], add_special_tokens=False)["input_ids"])
    encoded = []
    for one, row in zip(posed, rows, strict=True):
        if row.count(mask_id) != 1:
            fault = f"the text holds {quote(mask)}, which is the tokenizer's mask"
            refuse(one.where, fault, "remove it there")
        found = Encoded(tuple(row), words, one.right[0], one.right, mask_at=row.index(mask_id))
        encoded.append(_fit(found, one.where, max_length, (start, end) if truncate else None))
    return encoded


def collate_masked(encoded: Sequence[Encoded], pad: Any) -> Batch:
    """One micro-batch, padded on the right to its own longest row.

    Args:
        encoded: At least one.
        pad: The tokenizer's padding token.

    Returns:
        Int64, for E examples of O label words each and T positions:
            input_ids, attention_mask: [E, T], for the model
            mask_at: [E], where each row's mask is
            option_ids: [E, O]; targets: [E], the word to learn from
    """
    width = max(one.num_tokens for one in encoded)
    rows = [one.context + (pad,) * (width - one.num_tokens) for one in encoded]
    masks = [[1] * one.num_tokens + [0] * (width - one.num_tokens) for one in encoded]
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.tensor(masks),
        "mask_at": torch.tensor([one.mask_at for one in encoded]),
        "option_ids": torch.tensor([[word for (word,) in one.options] for one in encoded]),
        "targets": torch.tensor([one.target for one in encoded]),
    }


def mask_forward(model: nn.Module, batch: Batch) -> MaskLogits:
    """The model's logits at each row's mask, for `option_loss` and `predict`.

    Raises:
        ModelError: They are of more positions than the rows have.
    """
    inner: Any = getattr(model, "get_base_model", lambda: model)()
    accepted = inspect.signature(inner.forward).parameters
    inputs = {name: batch[name] for name in INPUTS if name in accepted}
    width = batch["input_ids"].shape[1]
    with _only_at(inner.get_output_embeddings(), batch["mask_at"], width):
        logits = model(**inputs).logits  # [E, 1, V]; [E, T, V] where no head has seen [E, T, H]
    if logits.shape[1] not in (1, width):
        raise ModelError(
            f"{type(model).__name__}: logits of {logits.shape[1]} positions for rows of {width} "
            "tokens, so that no mask can be found in them; is something put before the text?"
        )
    return MaskLogits(_at(logits, batch["mask_at"]) if logits.shape[1] == width else logits)


@contextmanager
def _only_at(head: nn.Module | None, places: torch.Tensor, width: int) -> Iterator[None]:
    """Let a head that is called by this thread see these positions of [E, T, H] alone.

    Forwards of other batches run in other threads, each with a hook of its own.
    """
    if head is None:
        yield
        return
    thread = get_ident()

    def narrow(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = inputs[0] if inputs else None
        if get_ident() != thread or not isinstance(hidden, torch.Tensor):
            return None
        whole = hidden.dim() == 3 and hidden.shape[:2] == (len(places), width)
        return (_at(hidden, places), *inputs[1:]) if whole else None

    hook = head.register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        hook.remove()


def _at(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Of [E, T, ...] one position each: [E, 1, ...]."""
    rows = torch.arange(len(places), device=values.device)
    return values[rows, places.to(values.device)][:, None]


def _word_ids(one: Rendered, tokenizer: "PreTrainedTokenizerBase") -> tuple[Tokens, ...]:
    """The label words' tokens, each of them one."""
    found: list[Tokens] = []
    for word in one.options:
        token = (_word_id(word, tokenizer),)
        if token in found:
            other = quote(one.options[found.index(token)])
            refuse(f"label word {quote(word)}", f"the same token as {other}", "change one")
        found.append(token)
    return tuple(found)


def _word_id(word: str, tokenizer: "PreTrainedTokenizerBase") -> int:
    ids, unknown = _plain(tokenizer, word), tokenizer.unk_token_id
    if len(ids) == 1 and ids[0] != unknown:
        return ids[0]
    parts = listed(tokenizer.convert_ids_to_tokens(ids))
    fault = f"{len(ids)} tokens ({parts})" if len(ids) > 1 else "no token of this tokenizer's"
    spaced = f" {word.strip()}"
    again = _plain(tokenizer, spaced)
    mend = "choose a word that is one token"
    if word != spaced and len(again) == 1 and again[0] != unknown:
        mend = f"write it with a space in front: {quote(spaced)}"
    return refuse(f"label word {quote(word)}", fault, mend)


def _plain(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _fit(
    encoded: Encoded, where: str, max_length: int | None, kept: tuple[int, int] | None
) -> Encoded:
    """The row within `max_length`, the `kept` first and last tokens in it; None refuses to cut."""
    row, at = encoded.context, encoded.mask_at
    excess = len(row) - max_length if max_length is not None else 0
    if excess <= 0:
        return encoded
    fault = f"{len(row)} tokens, and the model takes {max_length}"
    if kept is None:
        refuse(where, fault, "shorten the text, or pass --truncate to cut it far from the mask")
    start, end = kept
    before, after = at - start, len(row) - at - 1 - end  # that may go
    if excess >= before + after:
        refuse(where, f"{fault}, too few for any text", "use another model")
    # The longer side loses first; what is left to lose is lost of both alike.
    more = min(excess, abs(before - after))
    of_before = (more if before > after else 0) + (excess - more + 1) // 2
    of_after = excess - of_before
    row = row[:start] + row[start + of_before : len(row) - end - of_after] + row[len(row) - end :]
    return replace(encoded, context=row, mask_at=at - of_before)
