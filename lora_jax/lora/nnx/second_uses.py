"""Weights that the code of a Flax NNX model reads itself, beside the layer that holds them.

An adapter changes what a layer computes, and a merge changes its weight. They agree only if nothing
else reads the weight. A model cannot be traced without an input, so this reads the source of its
modules: each `__call__` and the methods that it calls, in the branches that their settings take.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Collection, Iterator
from typing import Any

from flax import nnx

from lora_jax import errors
from lora_jax.layers import registry
from lora_jax.lora.nnx import saved, sites

_METADATA = {"shape", "dtype", "ndim", "size", "sharding", "nbytes"}
_UNKNOWN = object()


def refuse(
    model: nnx.Module, adapted: Collection[sites.Site], wholes: Collection[saved.Saved]
) -> None:
    """Raises: UserError that names each weight that is read in a second place, and both places."""
    reader = _Reader(
        {id(site.module): site for site in adapted}, {id(whole.module): whole for whole in wholes}
    )
    inside = [whole.path for whole in wholes]
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module) and not any(path[: len(own)] == own for own in inside):
            reader.visit(node, "__call__")
        if isinstance(node, nnx.WeightNorm | nnx.SpectralNorm):
            scaled = (site for site in adapted if site.path[: len(path)] == path)
            kind = type(node).__name__
            reader.found += [f"{site.names[0]} is in a {kind}, which scales it" for site in scaled]
    if reader.found:
        raise errors.UserError(
            expected="adapted layers whose weights nothing else reads, so that merging changes "
            "nothing",
            found=reader.found,
            do="leave these layers out of the targets and modules_to_save; or call the layer where "
            "its weight is read, an embedding with its method attend",
        )


class _Reader:
    """Follows the calls of a model. found: what reads a weight, in words."""

    def __init__(self, adapted: dict[int, sites.Site], wholes: dict[int, saved.Saved]):
        self._adapted, self._wholes = adapted, wholes
        self._seen: set[tuple[int, str]] = set()
        self.found: list[str] = []

    def visit(self, module: Any, method: str) -> None:
        """Reads a method of a module, and those that it calls."""
        if (id(module), method) in self._seen or id(module) in self._wholes:
            return
        self._seen.add((id(module), method))
        if id(module) in self._adapted and method in ("__call__", "attend"):
            return  # what an adapter adapts
        if (parsed := _source(type(module), method)) is None:
            return
        tree, where = parsed
        values = {tree.args.args[0].arg: [module]} if tree.args.args else {}
        for node in _taken(tree.body, values):
            self._read(node, values, f"{type(module).__qualname__}.{method}, {where}")

    def _read(self, node: ast.AST, values: dict[str, list], where: str) -> None:
        if isinstance(node, ast.Call):
            for called in _resolve(node.func, values):
                if isinstance(called, nnx.Module):
                    self.visit(called, "__call__")
        if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
            return
        for holder in _resolve(node.value, values):
            if not isinstance(holder, nnx.Module):
                continue
            if inspect.ismethod(getattr(holder, node.attr, None)):
                self.visit(holder, node.attr)
            elif name := self._weight(holder, node.attr):
                line = f"{name} is also read by {where}:{node.lineno}"
                self.found += [line] if line not in self.found else []

    def _weight(self, holder: nnx.Module, name: str) -> str:
        """The name of the adapted weight that is the holder's attribute; "" if it is none."""
        if site := self._adapted.get(id(holder)):
            known = registry.registration_of(type(holder))
            return f"{site.names[0]}.{name}" if name == known.weight else ""
        if whole := self._wholes.get(id(holder)):
            part = getattr(holder, name, None)
            held = isinstance(part, nnx.Variable | nnx.Pytree)
            return f"{sites.dotted(whole.path)}.{name}" if held else ""
        return ""


@functools.cache
def _source(cls: type, method: str) -> tuple[ast.FunctionDef, str] | None:
    """(the method's syntax tree, its file); None for Flax's and our own, and without source."""
    function = inspect.unwrap(getattr(cls, method, None))
    function = getattr(function, "__wrapped__", function)
    if not inspect.isfunction(function):
        return None
    if function.__module__.split(".")[0] in ("flax", "jax", __name__.split(".")[0]):
        return None
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    ast.increment_lineno(tree, first - 1)
    where = inspect.getsourcefile(function)
    return (tree, where) if isinstance(tree, ast.FunctionDef) else None


def _taken(body: list[ast.stmt] | list[ast.AST], values: dict[str, list]) -> Iterator[ast.AST]:
    """The nodes that may run, in order. Notes in `values` what local names stand for."""
    for node in body:
        if isinstance(node, ast.If | ast.IfExp):
            yield from _taken([node.test], values)
            test = _constant(node.test, values)
            branches = [] if test is False else [node.body]
            branches += [] if test not in (_UNKNOWN, False) and test else [node.orelse]
            for branch in branches:
                yield from _taken(branch if isinstance(branch, list) else [branch], values)
            continue
        if isinstance(node, ast.Attribute) and node.attr in _METADATA:
            continue  # the sizes of a weight are not its values
        if isinstance(node, ast.For) and isinstance(node.target, ast.Name):
            each = [part for own in _resolve(node.iter, values) for part in _items(own)]
            values[node.target.id] = each
        yield node
        yield from _taken(list(ast.iter_child_nodes(node)), values)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = _resolve(node.value, values)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            names, parts = node.targets[0].elts, getattr(node.value, "elts", [])
            for name, part in zip(names, parts, strict=False):
                if isinstance(name, ast.Name):
                    values[name.id] = _resolve(part, values)


def _resolve(node: ast.AST, values: dict[str, list]) -> list[Any]:
    """What an expression may stand for, as far as it names parts of the model."""
    if isinstance(node, ast.Name):
        return values.get(node.id, [])
    if isinstance(node, ast.Attribute):
        found = (getattr(own, node.attr, _UNKNOWN) for own in _resolve(node.value, values)
                 if isinstance(own, nnx.Module) or not callable(own))  # fmt: skip
        return [own for own in found if own is not _UNKNOWN]
    if isinstance(node, ast.Subscript):
        return [part for own in _resolve(node.value, values) for part in _items(own)]
    return []


def _items(own: Any) -> list[Any]:
    """The parts of a list or dict of modules."""
    if isinstance(own, nnx.List | list | tuple):
        return list(own)
    if isinstance(own, nnx.Dict | dict):
        return list(own.values()) if isinstance(own, dict) else list(vars(own).values())
    return []


def _constant(test: ast.AST, values: dict[str, list]) -> Any:
    """The truth of a test that depends on the model's settings alone; else _UNKNOWN."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        value = _constant(test.operand, values)
        return value if value is _UNKNOWN else not value
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        found, other = _resolve(test.left, values), test.comparators[0]
        if len(found) != 1 or not isinstance(other, ast.Constant):
            return _UNKNOWN
        same = found[0] is other.value or (
            isinstance(found[0], int | str) and found[0] == other.value
        )
        kinds = {ast.Is: same, ast.Eq: same, ast.IsNot: not same, ast.NotEq: not same}
        return kinds.get(type(test.ops[0]), _UNKNOWN)
    found = _resolve(test, values)
    plain = len(found) == 1 and isinstance(found[0], bool | int | str | None)
    return bool(found[0]) if plain else _UNKNOWN
