"""Every place in the package that makes an error for a user, with its message.

A message may be made where it is raised, or by a function that is given its clauses: then each call
that gives one is a place of its own.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from error_sites.source import Function, Module, Source, called_name
from error_sites.template import Scope, arguments, template

# Raised as ValueError by what reads a part of a file, and quoted in the error that names the file.
QUOTED = ("config.py", "config_fields.py", "mask.py", "tasks/lines.py")
BY_CLICK = "ClickException"
UNTESTED = re.compile(r"# untested: (.+)")


@dataclass(frozen=True)
class Site:
    """A place that makes an error.

    Args:
        kind: The error's class; ``ValueError`` where another message quotes this one.
        path: Below the package.
        first, last: Its lines.
        template: Its message, values as ``{names}``.
        untested: Why no test gets there, as a comment beside it says; else empty.
    """

    kind: str
    path: str
    first: int
    last: int
    template: str
    untested: str = ""


def sites(source: Source) -> list[Site]:
    """All of them, in the order of files and lines, each line once."""
    kinds = error_classes(source)
    found: dict[tuple[str, int], Site] = {}
    for module in source.modules.values():
        for call in module.calls:
            kind = called_name(call)
            quoted = kind == "ValueError" and module.path in QUOTED
            if not (quoted or kind in kinds or kind == BY_CLICK) or not call.args:
                continue
            for site in _expanded(kind, source, module, call):
                found.setdefault((site.path, site.first), site)
    return sorted(found.values(), key=lambda site: (site.path, site.first))


def error_classes(source: Source) -> dict[str, str]:
    """The classes of ``errors.py`` and those derived from them or click's, with docstrings."""
    found: dict[str, str] = {}
    modules = [source.modules["errors.py"], *source.modules.values()]
    for module in modules:
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef) and (
                module.path == "errors.py" or _bases(node) & {*found, BY_CLICK}
            ):
                found[node.name] = ast.get_docstring(node) or ""
    return found


def _bases(node: ast.ClassDef) -> set[str]:
    return {ast.unparse(each).rpartition(".")[2] for each in node.bases}


def _expanded(kind: str, source: Source, module: Module, call: ast.Call) -> Iterator[Site]:
    """The call itself, or those of the function around it that give clauses of the message."""
    function = module.inside.get(call)
    message = call.args[0]
    plain = Scope(source, module, function)
    givers = _givers(source, function, template(message, plain)) if function else []
    if not givers:
        yield _site(kind, module, call, template(message, plain))
    for where, giver, given in givers:
        text = template(message, Scope(source, module, function, given))
        yield _site(kind, where, giver, text)


def _givers(
    source: Source, function: Function, message: str
) -> list[tuple[Module, ast.Call, dict[str, str]]]:
    """Calls of a function that put a clause, several words, where its message has a parameter."""
    names = [
        each.arg for each in (*function.args.args, *function.args.kwonlyargs)
        if isinstance(each.annotation, ast.Name) and each.annotation.id == "str"
        and "{" + each.arg.replace("_", " ") + "}" in message
    ]  # fmt: skip
    found = []
    for where, call in source.calls.get(function, ()):
        scope = Scope(source, where, where.inside.get(call))
        given = arguments(call, function, scope)
        found.append((where, call, {name: given[name] for name in names if name in given}))
    clauses = [text for *_, given in found for text in given.values()]
    return found if any(len(re.sub(r"\{[^}]*\}", "", text).split()) > 2 for text in clauses) else []


def _site(kind: str, module: Module, call: ast.Call, text: str) -> Site:
    last = call.end_lineno or call.lineno
    lines = module.text.splitlines()[max(call.lineno - 2, 0) : last]
    reason = next((match[1] for line in lines if (match := UNTESTED.search(line))), "")
    return Site(kind, module.path, call.lineno, last, " ".join(text.split()), reason)
