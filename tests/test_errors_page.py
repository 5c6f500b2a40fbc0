"""docs/errors.md is what the code says; every message has its mend."""

import doctest

import pytest
from error_sites import page, template, unreached
from error_sites.collect import sites
from error_sites.source import Source


@pytest.fixture(scope="module")
def source() -> Source:
    return Source()


def test_the_page_is_what_the_code_says(source: Source):
    written = page.PAGE.read_text(encoding="utf-8")
    assert page.page(source) == written, f"stale: {page.COMMAND}"


def test_every_message_says_what_to_do(source: Source):
    """The mend behind a semicolon, or what was expected; what is quoted may lack it."""
    lacking = [
        f"{site.path}:{site.first}: {text}"
        for site in sites(source)
        for text in page.choices(site.template)
        if site.kind != "ValueError" and page.has_words(text)
        if text not in page.WITHOUT and not page.split(text)[1]
    ]
    assert not lacking, "\n".join(["no '; mend' and no 'expected ...' in", *lacking])


@pytest.mark.parametrize("module", [page, template, unreached])
def test_examples_hold(module):
    assert doctest.testmod(module).failed == 0
