"""What the site takes from outside docs/: the README as its first page, and files that pages name.

A link to a script, a config or a source becomes a page that shows the file; one to a folder becomes
plain text. So the same page reads well in the repository and on the site.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
DOCS, EXAMPLES = ROOT / "docs", ROOT / "docs" / "examples"
PAGES = {
    ROOT / "README.md": "index.md",
    ROOT / "CONTRIBUTING.md": "contributing.md",
    ROOT / "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"\[(?P<text>[^\[\]]*)\]\((?P<target>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".json": "json", ".toml": "toml"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are no files of docs/."""
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, content=path.read_text(encoding="utf-8")))
    named = {
        target
        for file in files
        if file.src_uri.endswith(".md")
        for link in LINK.finditer(file.content_string)
        if (target := _target(link["target"], _source(file.src_uri))).is_file()
    }
    for path in sorted(named):
        if _uri(path).startswith("files/"):
            files.append(File.generated(config, _uri(path), content=_as_page(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to where the site has what they name."""
    uri = page.file.src_uri
    if uri.startswith("files/"):
        return markdown
    source, folder = _source(uri), posixpath.dirname(uri) or "."

    def led(link: re.Match[str]) -> str:
        path = _target(link["target"], source)
        if path.is_dir():
            return link["text"]
        if not path.is_file():
            return link[0]
        return f"[{link['text']}]({posixpath.relpath(_uri(path), folder)}{link['anchor'] or ''})"

    return LINK.sub(led, markdown)


def _source(uri: str) -> Path:
    """The file that a page is made of."""
    return next((path for path, own in PAGES.items() if own == uri), DOCS / uri)


def _target(target: str, source: Path) -> Path:
    path = (source.parent / target).resolve()
    return path if path.is_relative_to(ROOT) else ROOT / "nothing"


def _uri(path: Path) -> str:
    """Where the site has a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    if path.is_relative_to(DOCS) and not path.is_relative_to(EXAMPLES):
        return str(path.relative_to(DOCS))
    return f"files/{path.relative_to(ROOT)}.md"


def _as_page(path: Path) -> str:
    language = LANGUAGES.get(path.suffix, "text")
    text = path.read_text(encoding="utf-8")
    return f"# {path.relative_to(ROOT)}\n\n````{language}\n{text.rstrip()}\n````\n"
