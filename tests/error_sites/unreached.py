"""Lists the errors that no test has made, from what a run of the tests has noted.

    python tests/error_sites/unreached.py NOTES

NOTES is what `hook/sitecustomize.py` writes (`make errors` does both). An error that a test on this
machine cannot make says so beside itself: `# untested: needs CUDA`.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

if __name__ == "__main__":  # else pytest finds them
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from error_sites.collect import BY_CLICK, Site, sites
from error_sites.source import Source


def unreached(found: Iterable[Site], notes: Iterable[str]) -> list[Site]:
    """Sites at none of whose lines an error was made.

    Example:
        >>> site = Site("ConfigError", "run.py", first=7, last=9, template="no")
        >>> unreached([site], ['[[["run.py", 8]], "no"]']), unreached([site], [])[0].path
        ([], 'run.py')
    """
    lines: set[tuple[str, int]] = set()
    messages: set[str] = set()
    for note in notes:
        places, message = json.loads(note)
        lines.update(map(tuple, places))
        messages.add(message)
    said = "\n".join(messages)
    return [site for site in found if not site.untested and not _is_reached(site, lines, said)]


def _is_reached(site: Site, lines: set[tuple[str, int]], said: str) -> bool:
    if site.kind == "ValueError":  # not ours to note: the message that quotes it was
        return re.search(_pattern(site.template), said) is not None
    return any((site.path, line) in lines for line in range(site.first, site.last + 1))


def _pattern(template: str) -> str:
    return ".*".join(re.escape(part) for part in re.split(r"\{[^{}]*\}|\([^()]*\|.*\)", template))


def _by_us(found: Iterable[Site]) -> Iterator[Site]:
    """Without click's, which are made of ours."""
    return (site for site in found if site.kind not in (BY_CLICK, "Interrupted"))


if __name__ == "__main__":
    notes = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    every = list(_by_us(sites(Source())))
    left = unreached(every, notes)
    for site in left:
        print(f"{site.path}:{site.first}: no test makes this {site.kind}: {site.template}")
    excused = sum(bool(site.untested) for site in every)
    print(f"{len(every)} errors: {len(left)} made by no test, {excused} that cannot be made here")
    sys.exit(bool(left))
