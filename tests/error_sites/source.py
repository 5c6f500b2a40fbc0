"""The package's source as trees, and what its names mean: functions, constants, who calls whom."""

import ast
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent.parent / "zo_offload"
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(eq=False)
class Module:
    """One file, with what its names stand for."""

    path: str  # below the package
    text: str
    tree: ast.Module
    functions: dict[str, Function] = field(default_factory=dict)  # methods too, by bare name
    constants: dict[str, ast.expr] = field(default_factory=dict)
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)  # name: module, name there
    calls: list[ast.Call] = field(default_factory=list)
    inside: dict[ast.Call, Function] = field(default_factory=dict)  # the innermost one

    @property
    def idea(self) -> str:
        """The first line of its docstring."""
        return (ast.get_docstring(self.tree) or "").partition("\n")[0]


class Source:
    """All modules of the package."""

    def __init__(self, root: Path = PACKAGE) -> None:
        self.modules = {
            str(path.relative_to(root)): _module(path, root) for path in sorted(root.rglob("*.py"))
        }
        self._names = {_dotted(path, root.name): path for path in self.modules}

    def function(self, module: Module, called: ast.expr) -> tuple[Module, Function] | None:
        """What of the package a call's name stands for."""
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            if called.value.id in ("self", "cls"):
                name, where = called.attr, module
            else:
                where = self.target(module, called.value.id)
                name = called.attr
        elif isinstance(called, ast.Name):
            name, where = called.id, module
            if name in module.imported:
                origin, name = module.imported[name]
                where = self._at(origin)
        else:
            return None
        found = where.functions.get(name) if where else None
        return (where, found) if where and found else None

    def constant(self, module: Module, name: str) -> tuple[Module, ast.expr] | None:
        """What a name stands for that a module gives one value."""
        if name in module.imported:
            origin, there = module.imported[name]
            where = self._at(origin)
            return self.constant(where, there) if where else None
        found = module.constants.get(name)
        return (module, found) if found is not None else None

    def target(self, module: Module, name: str) -> Module | None:
        """The module that an imported name stands for."""
        origin, there = module.imported.get(name, ("", ""))
        return self._at(f"{origin}.{there}")

    @cached_property
    def calls(self) -> dict[Function, list[tuple[Module, ast.Call]]]:
        """Of each function, where it is called."""
        found: dict[Function, list[tuple[Module, ast.Call]]] = {}
        for module in self.modules.values():
            for call in module.calls:
                called = self.function(module, call.func)
                if called is not None:
                    found.setdefault(called[1], []).append((module, call))
        return found

    def _at(self, dotted: str) -> Module | None:
        path = self._names.get(dotted)
        return self.modules[path] if path else None


def called_name(call: ast.Call) -> str:
    """The last part of a called name."""
    match call.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def _dotted(path: str, package: str) -> str:
    return f"{package}.{path.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__")


def _module(path: Path, root: Path) -> Module:
    text = path.read_text(encoding="utf-8")
    module = Module(str(path.relative_to(root)), text, ast.parse(text))
    for node in module.tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                module.constants[name] = value
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                module.constants[name] = value
    _look(module, module.tree, None)
    return module


def _look(module: Module, tree: ast.AST, function: Function | None) -> None:
    """Note what lies below a node, and in which function."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.ImportFrom(module=str(origin), names=names):
                for each in names:
                    module.imported[each.asname or each.name] = (origin, each.name)
            case ast.Call():
                module.calls.append(node)
                if function:
                    module.inside[node] = function
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                module.functions[name] = node
        _look(module, node, node if isinstance(node, Function) else function)
