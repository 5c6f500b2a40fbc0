"""Prompts and label words in tokens: where the prompt ends, what is cut, what is padded."""

import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from zo_offload.errors import TaskError
from zo_offload.tasks import Encoded, Example, Prompt, collate, encode, read_examples


def _examples(*texts: str) -> list[Example]:
    return [Example({"a": text}, "0", line, "dev.tsv") for line, text in enumerate(texts, start=2)]


def _letters(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """One token a lower-case letter, but for the merges."""
    tokens = [*"abcdefgh ", *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_prompt_its_options_and_its_target(tokenizer):
    prompt = Prompt("{a} it was", " terrible, great")
    (one,) = encode([Example({"a": "a film"}, "great", 2)], prompt, tokenizer, None)
    assert tokenizer.decode(one.context) == "<s>a film it was"
    assert [tokenizer.decode(option) for option in one.options] == [" terrible", " great"]
    assert one.target == 1


@pytest.mark.parametrize("frame", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_what_precedes_stays_and_what_follows_goes(make_tokenizer, sentences, frame):
    prompt = Prompt("{a} it was", " terrible, great")
    plain = encode(_examples(*sentences), prompt, make_tokenizer("$A"), None)
    framed = encode(_examples(*sentences), prompt, make_tokenizer(frame), None)
    start = (0,) if frame.startswith("<s>") else ()
    assert [one.context for one in framed] == [start + one.context for one in plain]
    assert [one.options for one in framed] == [one.options for one in plain]


def test_a_merge_over_the_boundary_shortens_the_context():
    """`c a` + `b` is `c ab`: the prompt's last token is no longer there."""
    (one,) = encode(_examples("c"), Prompt("{a}a", "b,d"), _letters(("a", "b")), None)
    assert (one.context, one.options) == ((2,), ((9,), (0, 3)))


def test_options_with_a_common_start_keep_it():
    (one,) = encode(_examples("c"), Prompt("{a}", "ab,ad"), _letters(), None)
    assert (one.context, one.options) == ((2,), ((0, 1), (0, 3)))


@pytest.mark.parametrize(
    ("template", "labels", "message"),
    [
        ("{a}", "b,B", "label words 'b' and 'B' are the same tokens"),
        ("{a}", "b,xyz", "label word 'xyz' adds no token"),
        ("xyz{a}", "b,d", "no token before the label word"),
    ],
)
def test_label_words_that_tokens_cannot_tell(template, labels, message):
    text = "" if template.startswith("x") else "c"
    with pytest.raises(TaskError, match=rf"^dev.tsv:2: {message}; "):
        encode(_examples(text), Prompt(template, labels), _letters(), None)


def test_a_text_that_is_too_long_is_refused():
    examples = _examples("cc", "c" * 9)
    prompt = Prompt("{a}", "b,da")
    assert encode(examples, prompt, _letters(), max_length=10)[1].num_tokens == 10
    message = r"^dev.tsv:3: 10 tokens, and the model has 9 positions; .*--truncate"
    with pytest.raises(TaskError, match=message):
        encode(examples, prompt, _letters(), max_length=9)


def test_truncation_cuts_the_beginning_and_keeps_bos(make_tokenizer):
    prompt, examples = Prompt("{a} it was", " terrible, great"), _examples("a film " * 9)
    (whole,) = encode(examples, prompt, make_tokenizer("<s> $A"), None)
    (cut,) = encode(examples, prompt, make_tokenizer("<s> $A"), 8, truncate=True)
    assert cut.num_tokens == 8
    assert cut.context == (0, *whole.context[-(len(cut.context) - 1) :])
    assert cut.options == whole.options


def test_truncation_leaves_some_text():
    with pytest.raises(TaskError, match="too few for any text; shorten the label words"):
        encode(_examples("cc"), Prompt("{a}", "bb,dada"), _letters(), 3, truncate=True)
    (one,) = encode(_examples("cc"), Prompt("{a}", "bb,dada"), _letters(), 4, truncate=True)
    assert one.context == (2,)


def test_no_example_is_no_work(tokenizer):
    assert encode([], Prompt("{a}", "b,c"), tokenizer, None) == []


def test_one_token_options_share_a_row():
    batch = collate([Encoded((5, 6, 7), ((1,), (2,)), 1), Encoded((8,), ((1,), (2,)), 0)])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert batch["option_ids"].tolist() == [[1, 2], [1, 2]]
    assert batch["targets"].tolist() == [1, 0]


def test_longer_options_take_a_row_each():
    batch = collate([Encoded((5, 6), ((1, 2, 3), (4,)), 1)])
    assert batch["input_ids"].tolist() == [[5, 6, 1, 2], [0, 0, 5, 6]]
    assert batch["option_ids"].tolist() == [[[1, 2, 3], [-1, -1, 4]]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_acceptance_options_are_one_token(acceptance):
    tokenizer = AutoTokenizer.from_pretrained(acceptance / "opt-mini")
    examples = read_examples(acceptance / "subj" / "dev.tsv")
    prompt = Prompt("{sentence} This is a", " review, story")
    encoded = encode(examples, prompt, tokenizer, max_length=512)
    assert len(encoded) == 2_000
    assert {len(option) for one in encoded for option in one.options} == {1}
    assert tokenizer.decode(encoded[0].context).endswith(" This is a")


def test_the_import_is_light():
    code = "import sys, zo_offload.tasks; print({'transformers', 'deepspeed'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
