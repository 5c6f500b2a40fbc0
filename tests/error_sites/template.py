"""A message as a user may see it, from the expression that makes it: values become ``{names}``."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from error_sites.source import Function, Module, Source

# What only changes how a value is shown.
SHOWS = (
    "str", "repr", "list", "sorted", "next", "iter", "set", "int", "max", "min", "map", "one_line",
    "_show", "_said", "_shown", "quote", "printable", "listed",
)  # fmt: skip
DEPTH = 6


@dataclass(frozen=True)
class Scope:
    """Where an expression stands, and what has been put for the parameters there."""

    source: Source
    module: Module
    function: Function | None
    given: dict[str, str] = field(default_factory=dict)
    depth: int = 0

    def at(self, module: Module, function: Function | None, given: dict[str, str]) -> "Scope":
        return Scope(self.source, module, function, given, self.depth + 1)


def template(expr: ast.expr, scope: Scope) -> str:
    """The text of a string expression.

    Example:
        >>> from pathlib import Path
        >>> scope = Scope(Source(Path("none")), Module("", "", ast.parse("")), None)
        >>> template(ast.parse("f'{self.path}: {len(rows):,} rows'", mode="eval").body, scope)
        '{path}: {number of rows} rows'
    """
    match expr:
        case ast.Constant(value=value):
            return str(value)
        case ast.JoinedStr(values=values):
            return "".join(template(each, scope) for each in values)
        case ast.FormattedValue(value=value, conversion=conversion):
            text = template(value, scope)
            return repr(text) if conversion == ord("r") and not set("{|") & set(text) else text
        case ast.BinOp(left=left, op=ast.Add(), right=right) if _is_text(left) or _is_text(right):
            return template(left, scope) + template(right, scope)
        case ast.IfExp(body=body, orelse=orelse):
            return _one_of([template(body, scope), template(orelse, scope)])
        case ast.BoolOp(values=[first, *_]):
            return template(first, scope)
        case ast.Name(id=name):
            return _name(name, scope)
        case ast.Call():
            return _call(expr, scope)
        case ast.Attribute(value=ast.Call(func=ast.Name(id="type"), args=[of]), attr="__name__"):
            return f"{{type of {_bare(template(of, scope))}}}"
        case ast.Attribute(value=value, attr="strerror" | "name" | "stem"):
            return template(value, scope)
        case ast.Attribute(value=ast.Name(id=of), attr=name) if scope.source.target(
            scope.module, of
        ):
            return _name(name, scope.at(_found(scope.source.target(scope.module, of)), None, {}))
        case ast.Attribute(attr=name):
            return _value(name)
        case ast.Subscript(value=value, slice=ast.Constant(value=str(key))):
            return _value(key)
        case ast.Subscript(value=ast.Name(id=name), slice=key) if held := _held(name, key, scope):
            return held
        case ast.Subscript(value=value) | ast.Starred(value=value):
            return _value(_bare(template(value, scope)))
        case ast.BinOp(left=ast.Constant(value=str(text)), op=ast.Mult()):
            return f"[{text}]"
        case ast.UnaryOp(operand=operand):
            return template(operand, scope)
        case ast.Tuple(elts=elts):
            return ", ".join(template(each, scope) for each in elts)
        case ast.BinOp(left=left, right=right):
            number = _number(expr, scope)
            if number is not None:
                return f"{number:,}"
            return template(right if isinstance(left, ast.Constant) else left, scope)
        case ast.GeneratorExp(elt=elt) | ast.ListComp(elt=elt):
            return template(elt, scope)
    return "{...}"


def _found(module: Module | None) -> Module:
    assert module is not None
    return module


def _name(name: str, scope: Scope) -> str:
    if name in scope.given:
        return scope.given[name]
    if scope.depth > DEPTH:
        return _value(name)
    deeper = scope.at(scope.module, scope.function, scope.given)
    values = _assigned(name, scope.function)
    if len(values) == 1 and _is_text(values[0]):
        return template(values[0], deeper)
    constant = None if values or _is_parameter(name, scope) else _constant(name, scope)
    if constant is not None:
        return constant
    return _value(name)


def _constant(name: str, scope: Scope) -> str | None:
    found = scope.source.constant(scope.module, name)
    if found is None:
        return None
    number = _number(found[1], scope.at(found[0], None, {}))
    if number is not None:
        return f"{number:,}"
    return template(found[1], scope.at(found[0], None, {})) if _is_text(found[1]) else None


def _held(name: str, key: ast.expr, scope: Scope) -> str | None:
    """What a constant tuple or dictionary holds: at a key, else any of its texts."""
    found = scope.source.constant(scope.module, name)
    if found is None or _assigned(name, scope.function):
        return None
    there = scope.at(found[0], None, {})
    match found[1], key:
        case ast.Tuple(elts=elts), ast.Constant(value=int(index)):
            return template(elts[index], there)
        case ast.Dict(keys=keys, values=values), _ if all(map(_is_text, values)):
            at = [each and ast.dump(each) == ast.dump(key) for each in keys]
            chosen = [value for value, is_it in zip(values, at, strict=True) if is_it] or values
            return _one_of([template(value, there) for value in chosen])
    return None


def _call(call: ast.Call, scope: Scope) -> str:
    if isinstance(call.func, ast.Name) and call.func.id in SHOWS and call.args:
        return template(call.args[-1 if call.func.id == "map" else 0], scope)
    called = scope.source.function(scope.module, call.func)
    if called is not None and scope.depth <= DEPTH:
        returns = _returns(called[1])
        if returns and all(map(_is_text, returns)):
            deeper = scope.at(*called, arguments(call, called[1], scope))
            return _one_of([template(each, deeper) for each in returns])
    match call:
        case ast.Call(func=ast.Name(id="len"), args=[of]):
            return f"{{number of {_bare(template(of, scope))}}}"
        case ast.Call(func=ast.Name(id="getattr"), args=[of, *_]):
            return template(of, scope)
        case ast.Call(func=ast.Attribute(attr="join", value=ast.Constant()), args=[of]):
            return _value(_bare(template(of, scope)))
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="get"), args=[key, *_]) if (
            held := _held(name, key, scope)
        ):
            return held
        case ast.Call(func=ast.Attribute(value=of)) if called is None:
            return template(of, scope)
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return _value(name)
    return "{...}"


def arguments(call: ast.Call, function: Function, scope: Scope) -> dict[str, str]:
    """The text that a call puts for each parameter."""
    names = [each.arg for each in function.args.args]
    if names[:1] in (["self"], ["cls"]):
        names = names[1:]
    pairs = [*zip(names, call.args, strict=False)]
    pairs += [(each.arg, each.value) for each in call.keywords if each.arg]
    return {name: template(value, scope) for name, value in pairs}


def _assigned(name: str, function: Function | None) -> list[ast.expr]:
    """All values that a function gives a name of its own."""
    return _all_assigned(function).get(name, []) if function else []


@cache
def _all_assigned(function: Function) -> dict[str, list[ast.expr]]:
    found: dict[str, list[ast.expr]] = {}
    unknown: list[ast.expr] = [ast.Constant(value=None)] * 2
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    for name, part in _parts(target, value):
                        found.setdefault(name, []).append(part)
            case (
                ast.AugAssign(target=target)
                | ast.For(target=target)
                | ast.comprehension(target=target)
                | ast.withitem(optional_vars=ast.expr() as target)
            ):
                for name, _ in _parts(target, unknown[0]):
                    found.setdefault(name, []).extend(unknown)
    return found


def _parts(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """The names of a target, with what each gets."""
    match target, value:
        case ast.Name(id=name), _:
            yield name, value
        case ast.Tuple(elts=names), ast.Tuple(elts=values) if len(names) == len(values):
            for each, given in zip(names, values, strict=True):
                yield from _parts(each, given)
        case ast.Tuple(elts=names) | ast.List(elts=names), _:
            for each in names:
                yield from _parts(each, ast.Constant(value=None))
        case ast.Starred(value=inner), _:
            yield from _parts(inner, ast.Constant(value=None))


def _is_parameter(name: str, scope: Scope) -> bool:
    return scope.function is not None and any(
        isinstance(node, ast.arg) and node.arg == name for node in ast.walk(scope.function.args)
    )


def _is_text(expr: ast.expr) -> bool:
    match expr:
        case ast.Constant(value=str()) | ast.JoinedStr():
            return True
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _is_text(left) or _is_text(right)
        case ast.IfExp(body=body, orelse=orelse):
            return _is_text(body) or _is_text(orelse)
    return False


def _returns(function: Function) -> list[ast.expr]:
    nodes = [node for node in ast.walk(function) if isinstance(node, ast.Return)]
    return [node.value or ast.Constant(value=None) for node in nodes]


def _number(expr: ast.expr, scope: Scope) -> Any:
    match expr:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.Name(id=name):
            found = scope.source.constant(scope.module, name)
            return _number(found[1], scope.at(found[0], None, {})) if found else None
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _number(left, scope), _number(right, scope)
            if a is None or b is None:
                return None
            match op:
                case ast.LShift():
                    return a << b
                case ast.Pow():
                    return a**b
                case ast.Mult():
                    return a * b
                case ast.Sub():
                    return a - b
                case ast.Add():
                    return a + b
    return None


def _one_of(texts: list[str]) -> str:
    said = [text for text in dict.fromkeys(texts) if text]
    choice = said[0] if len(said) == 1 else f"({' | '.join(said)})"
    return choice if "" not in texts else f"[{choice}]"


def _bare(text: str) -> str:
    whole = re.fullmatch(r"\{([^{}]*)\}", text)
    return whole[1] if whole else text


def _value(name: str) -> str:
    return "{" + name.strip("_").replace("_", " ") + "}" if "{" not in name else name
