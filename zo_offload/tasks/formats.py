"""From each data set's rows to examples: its own files, and the rows that `datasets` exports.

Fields are named as the templates in `suite` name them. What MeZO does to a text before it is put
into a template (Malladi et al. 2023, arXiv 2305.17333, appendix E.2) is done here.
"""

from collections.abc import Callable, Iterator, Sequence

from zo_offload.tasks.node import BOOLEANS, Node
from zo_offload.tasks.spec import Item

Items = Iterator[Item]
PLACEHOLDER = "@placeholder"


def classes(fields: Sequence[str], names: Sequence[str]) -> Callable[[Node], Items]:
    """Rows whose texts are taken as they stand, and whose label is one of the names."""

    def items(row: Node) -> Items:
        texts = {name: row[name].text() for name in fields}
        yield Item(texts, row.where, (row["label"].index_of(names),))

    return items


def sst2(row: Node) -> Items:
    """GLUE's `sentence<TAB>label`."""
    sentence = row["sentence"].text().strip()
    label = row["label"].index_of(("negative", "positive"))
    yield Item({"sentence": sentence}, row.where, (label,))


def rte(row: Node) -> Items:
    """SuperGLUE's JSONL, or GLUE's TSV, whose columns are named otherwise."""
    texts = {
        "premise": row.first_of("premise", "sentence1").text(),
        "hypothesis": row.first_of("hypothesis", "sentence2").text(),
    }
    label = row["label"].index_of(("entailment", "not_entailment"))
    yield Item(texts, row.where, (label,))


def boolq(row: Node) -> Items:
    """SuperGLUE's JSONL (`label`), or the original one (`answer`); a question mark is put."""
    question = row["question"].text().strip()
    question = question[0].upper() + question[1:] + "?" * (not question.endswith("?"))
    texts = {"passage": row["passage"].text(), "question": question}
    yes = row.first_of("label", "answer").index_of(BOOLEANS)
    yield Item(texts, row.where, (1 - yes,))  # the words are Yes, No


def wsc(row: Node) -> Items:
    """SuperGLUE's JSONL, which nests the spans, or flat rows."""
    nested = "target" in row
    spans, text = row["target"] if nested else row, row["text"].text()
    texts = {
        "text": text,
        "noun": _in_text(spans, "span1", text),
        "pronoun": _in_text(spans, "span2", text).lower(),
    }
    yield Item(texts, row.where, (row["label"].index_of(BOOLEANS),))


def multirc(row: Node) -> Items:
    """SuperGLUE's JSONL, a passage a line with questions and answers in it, or flat rows."""
    if "passage" not in row:
        fields = ("paragraph", "question", "answer")
        texts = {name: row[name].text() for name in fields}
        yield Item(texts, row.where, (row["label"].index_of(BOOLEANS),))
        return
    paragraph = row["passage"]["text"].text()
    for question in row["passage"]["questions"].items(least=1):
        asked = question["question"].text()
        for answer in question["answers"].items(least=1):
            texts = {"paragraph": paragraph, "question": asked, "answer": answer["text"].text()}
            yield Item(texts, answer.where, (answer["label"].index_of(BOOLEANS),))


def copa(row: Node) -> Items:
    """SuperGLUE's JSONL: the premise goes on with `so` or `because`, in lower case."""
    kind = row["question"].index_of(("effect", "cause"))
    premise = row["premise"].text().rstrip()
    texts = {"premise": premise.removesuffix("."), "conjunction": ("so", "because")[kind]}
    choices = tuple(_lowered(row[name].text()) for name in ("choice1", "choice2"))
    yield Item(texts, row.where, (row["label"].index_of(("choice1", "choice2")),), choices)


def record(row: Node) -> Items:
    """SuperGLUE's JSONL, whose entities are places in the passage, or flat rows.

    A choice is the query with an entity in place of `@placeholder`.
    """
    if "qas" not in row:
        entities = [each.text() for each in row["entities"].items(least=2)]
        answers = [each.text() for each in row["answers"].items(least=1)]
        yield _cloze(row, row["passage"].text(), row["query"], entities, answers)
        return
    passage = row["passage"]["text"].text()
    spans = row["passage"]["entities"].items(least=2)
    entities = sorted({_span(passage, each) for each in spans})
    for asked in row["qas"].items(least=1):
        answers = sorted({each["text"].text() for each in asked["answers"].items(least=1)})
        yield _cloze(asked, passage, asked["query"], entities, answers)


def squad(row: Node) -> Items:
    """SQuAD's JSON, an article an object with paragraphs and questions in it, or flat rows."""
    if "data" not in row:
        answers = tuple(each.text() for each in row["answers"]["text"].items(least=1))
        yield asked_item(row.where, row["title"], row["context"], row["question"], answers)
        return
    for article in row["data"].items(least=1):
        for paragraph in article["paragraphs"].items():
            for asked in paragraph["qas"].items():
                found = asked["answers"].items(least=1)
                answers = tuple(each["text"].text() for each in found)
                title, context = article["title"], paragraph["context"]
                yield asked_item(asked.where, title, context, asked["question"], answers)


def asked_item(
    where: str, title: Node | None, context: Node, question: Node, answers: tuple[str, ...]
) -> Item:
    """A question on a text; the first answer is learnt from."""
    texts = {"context": context.text(), "question": question.text().strip()}
    if title is not None:
        texts["title"] = title.text()
    return Item(texts, where, answers=answers)


def _in_text(spans: Node, name: str, text: str) -> str:
    """A span, mended where it is no part of the text, as `wsc.fixed` of `datasets` mends it.

    Its first letter takes the case of the word at its index, a final full stop goes, a line end is
    a blank. What is no part of the text even so (it has words between) stays as it is.
    """
    span = spans[f"{name}_text"].text()
    if span in text:
        return span
    mended, index = span.rstrip(".").replace("\n", " "), f"{name}_index"
    if index in spans:
        words = text.split()
        first = words[spans[index].integer(0, len(words) - 1)][0]
        mended = (mended[:1].lower() if first.islower() else mended[:1].upper()) + mended[1:]
    return mended if mended and mended in text else span


def _lowered(choice: str) -> str:
    first, blank, rest = choice.partition(" ")
    return choice if first == "I" else first.lower() + blank + rest


def _span(passage: str, place: Node) -> str:
    """Its `end` is the last character's place, not the one after it."""
    start = place["start"].integer(0, len(passage) - 1)
    return passage[start : place["end"].integer(start, len(passage) - 1) + 1]


def _cloze(
    row: Node, passage: str, query: Node, entities: Sequence[str], answers: Sequence[str]
) -> Item:
    asked = query.text()
    if PLACEHOLDER not in asked:
        query.refuse(f"no {PLACEHOLDER}", "expected it where the entity is missing")
    right = tuple(entities.index(answer) for answer in answers if answer in entities)
    if not right:
        row.refuse(f"no answer among the {len(entities)} entities", "expected one of them")
    choices = tuple(asked.replace(PLACEHOLDER, entity) for entity in entities)
    return Item({"passage": passage.replace("@highlight\n", "- ")}, row.where, right, choices)
