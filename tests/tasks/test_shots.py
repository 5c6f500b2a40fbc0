"""Demonstrations: whole, in their order, as many as fit."""

from collections.abc import Sequence

from zo_offload.tasks import Rendered, encode_rendered
from zo_offload.tasks.shots import told, with_demonstrations

POSED = [
    Rendered(text, (" great", " terrible"), (0,), "dev.tsv:2")
    for text in ("it was", "the film is a great joy and it was", "a " * 30 + "film")
]
SOLVED = [f"{text} it was great" for text in ("the film", "a joy", "wise and warm , nobody")]


def demonstrated(tokenizer, limit: int | None) -> tuple[list[Rendered], list[int]]:
    def measure(posed: Sequence[Rendered]) -> list[int]:
        return [one.num_tokens for one in encode_rendered(posed, tokenizer, None)]

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]

    return with_demonstrations(POSED, SOLVED, "\n\n", limit, measure=measure, count=count)


def test_all_of_them_before_each_question(tokenizer):
    found, counts = demonstrated(tokenizer, None)
    assert counts == [3, 3, 3]
    assert found[0].prompt == "\n\n".join([*SOLVED, "it was"])
    assert [one.options for one in found] == [one.options for one in POSED]
    assert told(counts, 3) is None


def test_as_many_as_fit_and_not_one_fewer(tokenizer):
    def size(posed: Rendered, shots: int) -> int:
        prompt = "\n\n".join([*SOLVED[3 - shots :], posed.prompt])
        one = Rendered(prompt, posed.options, posed.right, posed.where)
        return encode_rendered([one], tokenizer, None)[0].num_tokens

    for limit in range(size(POSED[2], 0), size(POSED[2], 3) + 2):
        found, counts = demonstrated(tokenizer, limit)
        fitting = [max(n for n in range(4) if size(one, n) <= limit or n == 0) for one in POSED]
        assert counts == fitting
        for one, posed, count in zip(found, POSED, counts, strict=True):
            assert one.prompt == "\n\n".join([*SOLVED[3 - count :], posed.prompt])
        encode_rendered(found, tokenizer, limit)


def test_what_does_not_fit_is_said(tokenizer):
    line = told([3, 2, 0, 3], 3)
    assert line == (
        "--shots: 3 demonstrations fit before 2 of 4 examples; the others have as many as fit, 0 "
        "at the least"
    )
