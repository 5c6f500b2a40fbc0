"""The task that methods are compared on: a small pretrained OPT, and the Cornell subjectivity set.

Of the 8,000 training rows the first 4,500 are learnt from and the next 500 choose learning rates;
the other 3,000, with the 2,000 development rows, are measured on and decide nothing.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from zo_offload.integrations.hf import load_causal_lm, load_tokenizer
from zo_offload.tasks import Encoded, Prompt, encode, read_examples

PROMPT = Prompt("{sentence} This is a", " review, story")
LEARNT, HELD_OUT = 4500, 5000


@dataclass(frozen=True)
class Data:
    """Encoded rows.

    Attributes:
        train: To learn from.
        held_out: To choose by.
        measured: To report.
    """

    train: list[Encoded]
    held_out: list[Encoded]
    measured: list[Encoded]

    @cached_property
    def classes(self) -> tuple[int, ...]:
        """Of what is learnt."""
        return tuple(one.target for one in self.train)


@cache
def data(folder: Path) -> Data:
    """Read and encoded once a process."""
    tokenizer: Any = load_tokenizer(str(folder / "opt-mini"))
    train, dev = (
        encode(read_examples(str(folder / "subj" / f"{part}.tsv")), PROMPT, tokenizer, 512)
        for part in ("train", "dev")
    )
    return Data(train[:LEARNT], train[LEARNT:HELD_OUT], train[HELD_OUT:] + dev)


def model(folder: Path) -> Any:
    """As it was pretrained, fp32, in evaluation mode."""
    return load_causal_lm(str(folder / "opt-mini")).float().eval()
