"""A class of this package with all it needs, as one file of Python that imports installed packages only."""

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from flowmo_diffusers import __version__


PACKAGE = "flowmo_diffusers"

# Methods that stay behind (no class begins with one): they read files of another format, whose code would have to
# travel too.
LEFT_OUT = {"from_published"}

WIDTH = 119

HEADER = f"""\
# Part of {PACKAGE} {__version__}, under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
# Joined from several of its modules by {PACKAGE}.hub.remote_code, so that diffusers can load it by itself.
"""


@dataclass(frozen=True, order=True)
class Import:
    """`from module import name as alias`, or `import module as alias` where there is no `name`."""

    module: str
    name: str | None = None
    alias: str | None = None

    @property
    def bound(self) -> str:
        return self.alias or self.name or self.module.partition(".")[0]

    @property
    def is_ours(self) -> bool:
        return self.module.partition(".")[0] == PACKAGE


@dataclass(frozen=True)
class Statement:
    """
    Args:
        source: Its lines, with the comments before it.
        binds: Names it defines.
        uses: Names it mentions; local ones among them do no harm.
        attached_to: Of a statement that defines nothing, the names it does something to, say registers a function for.
    """

    source: str
    binds: frozenset[str]
    uses: frozenset[str]
    attached_to: frozenset[str]


class Module:
    """A module of this package, in pieces."""

    def __init__(self, name: str):
        self.name = name
        source = Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8")
        self._lines = source.splitlines()
        self._tree = ast.parse(source)
        self.docstring = ast.get_docstring(self._tree)

    @cached_property
    def imports(self) -> list[Import]:
        return [imported for node in self._tree.body for imported in _imports(node)]

    @cached_property
    def statements(self) -> list[Statement]:
        found, end = [], 0
        for node in self._tree.body:
            start, end = end, node.end_lineno
            if not list(_imports(node)) and not _is_docstring(node):
                found.append(self._statement(node, start))
        return found

    def _statement(self, node: ast.stmt, start: int) -> Statement:
        body = getattr(node, "body", [])
        left_out = [part for part in body if getattr(part, "name", None) in LEFT_OUT]
        gone = {
            number
            for before, part in pairwise(body)
            for number in range(before.end_lineno + 1, part.end_lineno + 1)
            if part in left_out
        }
        lines = [
            line for number, line in enumerate(self._lines[start : node.end_lineno], start + 1) if number not in gone
        ]
        binds = _bound(node)
        heads = getattr(node, "decorator_list", None) or [node]
        return Statement(
            source="\n".join(lines).strip("\n"),
            binds=binds,
            uses=_names(node, left_out),
            attached_to=frozenset() if binds else frozenset().union(*map(_names, heads)),
        )


@dataclass
class Joined:
    """What a class needs, found by following names from its definition through the modules."""

    stand_ins: Mapping[str, Import]
    modules: dict[str, Module] = field(default_factory=dict)
    kept: dict[str, set[int]] = field(default_factory=dict)
    imports: set[Import] = field(default_factory=set)

    def module(self, name: str) -> Module:
        """As read before; those that it imports stand before it in `modules`, as when Python imports them."""
        if name not in self.modules:
            module = Module(name)
            for imported in module.imports:
                if imported.is_ours:
                    self.module(imported.module)
            self.modules[name] = module
        return self.modules[name]

    def need(self, module: Module, name: str) -> None:
        """Keeps what `name` is in this module; a name that the module does not define is local or Python's own."""
        if name in self.stand_ins:
            self.imports.add(self.stand_ins[name])
            return
        for imported in module.imports:
            if imported.bound != name:
                continue
            if not imported.is_ours:
                self.imports.add(imported)
            elif imported.name is None or imported.alias is not None:
                raise ValueError(f"{module.name}: only `from {imported.module} import name` can be joined to one file")
            else:
                self.need(self.module(imported.module), imported.name)
        for number, statement in enumerate(module.statements):
            if name in statement.binds:
                self._keep(module, number)

    def _keep(self, module: Module, number: int) -> None:
        kept = self.kept.setdefault(module.name, set())
        if number in kept:
            return
        kept.add(number)
        statement = module.statements[number]
        for name in sorted(statement.uses):
            self.need(module, name)
        for other, attached in enumerate(module.statements):
            if statement.binds & attached.attached_to:
                self._keep(module, other)

    def check_names(self) -> None:
        """Raises `ValueError` if two modules use one name for different things."""
        homes: dict[str, str] = {}
        places = [(imported.bound, _line(imported)) for imported in sorted(self.imports, key=_line)]
        for name, module in self.modules.items():
            bound = {one for number in self.kept.get(name, ()) for one in module.statements[number].binds}
            places += [(one, name) for one in sorted(bound)]
        for name, place in places:
            known = homes.setdefault(name, place)
            if known != place and not (known.startswith("import ") and place.startswith("import ")):
                raise ValueError(f"{name} is defined in {known} and in {place}: one file cannot have both, rename one")


def single_file(cls: type, stand_ins: Mapping[str, Import] | None = None) -> str:
    """
    Source of one file that defines `cls`, and of what this package defines only that which it needs. Definitions
    travel as they are written, with their comments; of imports those remain that are used.

    Args:
        cls: A class of this package.
        stand_ins: What to import under the names of classes that are to stay out, because they stand in annotations
            only.

    Raises:
        ValueError: If modules cannot be joined, because two use one name for different things.
    """
    home = cls.__module__
    joined = Joined(stand_ins or {})
    joined.need(joined.module(home), cls.__name__)
    joined.check_names()
    parts = [HEADER + f'\n"""{joined.modules[home].docstring}"""\n\n{_import_block(joined.imports)}']
    for name, module in joined.modules.items():
        numbers = sorted(joined.kept.get(name, ()))
        if numbers:
            parts.append(_heading(module))
            parts += [module.statements[number].source for number in numbers]
    # Operators of PyTorch are the process's: those of an installed package are not to be replaced by these.
    source = "\n\n\n".join(parts) + "\n"
    return re.sub(rf'("|torch\.ops\.){PACKAGE}(::|\.\w+\.default)', rf"\1{PACKAGE}_remote\2", source)


def _heading(module: Module) -> str:
    return f"# {module.name}\n# {module.docstring.splitlines()[0]}"


def _imports(node: ast.stmt) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(name.name, alias=name.asname) for name in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (Import(node.module, name.name, name.asname) for name in node.names)


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _bound(node: ast.stmt) -> frozenset[str]:
    """Names a statement of a module defines; `_` is the name of what has none."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return frozenset({node.name} - {"_"})
    stored = (part for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store))
    return frozenset(part.id for part in stored)


def _names(node: ast.AST, without: Sequence[ast.AST] = ()) -> frozenset[str]:
    """Names that a piece of code mentions, but for some of its parts."""
    if any(node is part for part in without):
        return frozenset()
    own = {node.id} if isinstance(node, ast.Name) else set()
    return frozenset(own).union(*(_names(part, without) for part in ast.iter_child_nodes(node)))


def _line(imported: Import) -> str:
    alias = f" as {imported.alias}" if imported.alias else ""
    if imported.name is None:
        return f"import {imported.module}{alias}"
    return f"from {imported.module} import {imported.name}{alias}"


def _import_block(imports: set[Import]) -> str:
    """Python's own first, then others; whole modules before names from modules, constants before classes."""
    lines: dict[bool, list[str]] = {True: [], False: []}
    names: dict[str, list[str]] = {}
    for one in sorted(imports, key=lambda one: (one.name is not None, one.module.lower(), _line(one))):
        known = lines[one.module.partition(".")[0] in sys.stdlib_module_names]
        if one.name is None or one.alias is not None:
            known.append(_line(one))
        elif one.module in names:
            names[one.module].append(one.name)
        else:
            names[one.module] = [one.name]
            known.append(one.module)
    for known in lines.values():
        known[:] = [_from_line(line, names[line]) if line in names else line for line in known]
    return "\n\n".join("\n".join(known) for known in lines.values() if known)


def _from_line(module: str, names: list[str]) -> str:
    names = sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    line = f"from {module} import {', '.join(names)}"
    return line if len(line) <= WIDTH else f"from {module} import (\n    " + ",\n    ".join(names) + ",\n)"
