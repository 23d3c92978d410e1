"""Who imports whom, read from the sources: imports at the top, in functions and for type checkers alike."""

import ast
import math
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

Graph = Mapping[str, set[str]]


def modules(folder: Path) -> dict[str, Path]:
    """Every module of a package by its full name; a package is its ``__init__``."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(known: Mapping[str, Path]) -> Graph:
    """For each module those that its code names in an import.

    That importing ``a.b`` runs ``a/__init__.py`` first is no arrow to ``a``: a package may import its own files.
    """
    return {
        name: {target for wanted in _names(path, name) for target in [_longest(wanted, known)] if target is not None}
        for name, path in known.items()
    }


def _names(path: Path, module: str) -> Iterator[str]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(), path)
    local = _imported_as(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute):  # a package imports its modules at their first use
            first, _, rest = ast.unparse(node).partition(".")
            if first in local:
                yield f"{local[first]}.{rest}"
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _imports_by_name(ast.unparse(node.func), local):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def _imported_as(tree: ast.AST) -> dict[str, str]:
    """What each name stands for that an import binds; relative imports are left out."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                found[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _imports_by_name(function: str, local: Mapping[str, str]) -> bool:
    return local.get(function, function).endswith(("import_module", "__import__"))


def _longest(name: str, known: Mapping[str, Path]) -> str | None:
    """The module that a dotted name leads to: ``a.b.f`` is of ``a.b`` where that has no file ``f``."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def circle(graph: Graph) -> list[str]:
    """Modules that import one another in a ring, each imported by the next; none is an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def ranks(contributing: str) -> dict[str, int]:
    """Height of each layer, as the paragraph "Layers" puts them in order: lowest first, equals between commas."""
    paragraph = contributing.partition("## Layers\n")[2].partition("Nothing imports upwards")[0]
    order = re.sub(r"\([^)]*\)", "", paragraph).split("<")
    return {name: rank for rank, names in enumerate(order) for name in re.findall(r"`(\w+)`", names)}


def layer(module: str) -> str:
    """``nn`` of ``ecanet.nn.gate``; the package itself is ``ecanet``."""
    return module.split(".")[1] if "." in module else module


def arrows_up(graph: Graph, height: Mapping[str, int]) -> list[str]:
    """Imports of what is higher, or in no layer. The package itself is as high as the highest of what it imports."""

    def of(module: str) -> float:
        return height.get(layer(module), math.inf)

    root = max(map(of, graph["ecanet"]), default=0)
    return [
        f"{source} -> {target}"
        for source, targets in graph.items()
        for target in sorted(targets)
        if (root if target == "ecanet" else of(target)) > (root if source == "ecanet" else of(source))
    ]


def between_layers(graph: Graph) -> Graph:
    """The same arrows from layer to layer, without those inside one."""
    found: dict[str, set[str]] = {}
    for source, targets in graph.items():
        found.setdefault(layer(source), set()).update(layer(target) for target in targets)
    return {source: targets - {source} for source, targets in found.items()}
