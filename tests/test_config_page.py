"""docs/config.md is what the types say; every key is described."""

import doctest
import re

import config_page

from zo_offload.config_schema import block_schema

DOCS = config_page.PAGE.parent


def test_the_page_is_what_the_types_say():
    written = config_page.PAGE.read_text(encoding="utf-8")
    assert config_page.page(written) == written, f"stale: {config_page.COMMAND}"


def test_every_key_is_described():
    schema = block_schema()
    objects = {"ZOConfig": schema, **schema["$defs"]}
    lacking = [
        f"{name}.{key}"
        for name, each in objects.items()
        for key, value in each["properties"].items()
        if not value.get("description")
    ]
    assert lacking == []


def test_links_lead_somewhere():
    table = "".join(config_page.rows())
    for name, anchor in re.findall(r"\]\(([\w.]+)(?:#([^)]*))?\)", table):
        headings = re.findall(r"^#+ (.*)$", (DOCS / name).read_text(encoding="utf-8"), re.M)
        anchors = {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
        assert not anchor or anchor in anchors, f"{name}#{anchor}"


def test_examples_hold():
    assert doctest.testmod(config_page).failed == 0
