"""Templates and label words are hostile until parsed."""

import pytest
from hypothesis import example as case
from hypothesis import given
from hypothesis import strategies as st

from zo_offload.errors import TaskError
from zo_offload.tasks import Example, Prompt

LABELS = " terrible, great"


def _example(label: int | str = 0, **fields: str) -> Example:
    return Example(fields, label, line=7, path="dev.tsv")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{sentence} It was", "A joy. It was"),
        ("{{{sentence}}}: {other}{sentence}", "{A joy.}: 1A joy."),
        ("is it {{good}}? {sentence}", "is it {good}? A joy."),
    ],
)
def test_render(template, text):
    assert Prompt(template, LABELS).render(_example(sentence="A joy.", other="1")) == text


def test_a_field_is_never_taken_for_a_template():
    assert Prompt("{a}", LABELS).render(_example(a="{b} {a.__class__}")) == "{b} {a.__class__}"


@pytest.mark.parametrize(
    "template",
    [
        *("{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{a:{b}}", "{a.__class__.__mro__}"),
        *("{}", "{", "}", "{a}}", "{" * 10_000),
        *("", "no field", "{{a}}"),
        *("{a}\0", "{a}\ud800", "{a\nb.c}"),
    ],
)
def test_template_refused(template):
    with pytest.raises(TaskError, match=r"^template '.*; ") as error:
        Prompt(template, LABELS)
    assert str(error.value).isprintable()


def test_unknown_field_names_the_available_and_the_nearest():
    message = r"dev.tsv:7: no field 'sentense'.* has 'sentence', 'idx'; did you mean 'sentence'\?"
    with pytest.raises(TaskError, match=message):
        Prompt("{sentense} It was", LABELS).render(_example(sentence="", idx=""))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (" terrible, great", (" terrible", " great")),
        ("terrible,great", ("terrible", "great")),
        (" terrible,   great ", (" terrible", " great")),
        (" very bad, very good", (" very bad", " very good")),
        ('[" yes, it is", "no "]', (" yes, it is", "no ")),
    ],
)
def test_label_words(labels, words):
    assert Prompt("{a}", labels).words == words


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("", "1 label word; expected at least 2"),
        ("great", "1 label word; expected at least 2"),
        ("[]", "0 label word; expected at least 2"),
        (" good, bad,good", "'good' stands 2 times"),
        (" good,, bad", "label word 1 is empty"),
        ('[" good", 1]', "an item is no string"),
        ("[good], [bad]", "malformed JSON"),
        (r'["\ud800", "a"]', "half of a surrogate pair"),
    ],
)
def test_labels_refused(labels, message):
    with pytest.raises(TaskError, match=r"^labels '.*" + message):
        Prompt("{a}", labels)


@pytest.mark.parametrize("label", [1, "1", "great", " great", "great "])
def test_label_by_index_or_name(label):
    assert Prompt("{a}", LABELS).label_index(_example(label)) == 1


@pytest.mark.parametrize("label", [2, -1, "2", "", "Great", "01"])
def test_label_outside_the_set(label):
    message = r"dev.tsv:7: the label is .*one of 'terrible', 'great' or an index from 0 to 1"
    with pytest.raises(TaskError, match=message):
        Prompt("{a}", LABELS).label_index(_example(label))


def test_label_outside_the_set_names_the_nearest():
    with pytest.raises(TaskError, match=r"the label is 'graet'.*did you mean 'great'\?"):
        Prompt("{a}", LABELS).label_index(_example("graet"))


def test_words_that_are_numbers_are_names_only():
    prompt = Prompt("{a}", " 1, 2, 3")
    assert [prompt.label_index(_example(label)) for label in (1, "2", 3)] == [0, 1, 2]
    with pytest.raises(TaskError, match=r"label is '0'; expected one of '1', '2', '3'$"):
        prompt.label_index(_example(0))


def _parse(template: str, labels: str) -> Prompt | None:
    try:
        return Prompt(template, labels)
    except TaskError as error:
        message = str(error)
    assert message.isprintable()
    return None


@given(st.text() | st.text(alphabet="{}ab.[]!: "))
@case("{a}{{b}}")
def test_any_template_formats_as_python_would_or_is_refused(template):
    if prompt := _parse(template, LABELS):
        fields = {name: f"<{name}>" for name in prompt.names}
        if not any(name.isdigit() for name in fields):  # a position to str.format, a name here
            assert prompt.render(Example(fields, 0, 1)) == template.format(**fields)


@given(st.text() | st.text(alphabet='[]", ab1'))
def test_any_labels_are_words_that_name_themselves_or_are_refused(labels):
    if prompt := _parse("{a}", labels):
        indices = [prompt.label_index(_example(word)) for word in prompt.words]
        assert indices == list(range(len(prompt.words)))
        assert len(indices) >= 2


@pytest.mark.parametrize("labels", ["review, story", " review,story"])
def test_words_with_and_without_a_leading_space_are_refused(labels: str):
    with pytest.raises(
        TaskError, match=r'expected all or none; or a list: \[" review", " story"\]'
    ):
        Prompt("{sentence}", labels)
    assert Prompt("{sentence}", '["review", " story"]').words == ("review", " story")
