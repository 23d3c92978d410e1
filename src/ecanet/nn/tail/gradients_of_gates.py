"""The gradient of a gate that is no band of ECA: the forward pass makes a small graph, whose tensors are ``(N, C)``."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ecanet.nn.tail.maths import GateMaths


class GateGraph(NamedTuple):
    """The graph of a gate that autograd can go back through.

    Attributes:
        s: ``(N, C)``, what it begins with.
        gate: ``(N, C)``, what it ends with.
        leaves: The leaf for each parameter. It is an alias, since hooks on the parameter run in the graph outside and
            must not run twice; or the parameter itself, if the gate does not read it from a module.
    """

    s: Tensor
    gate: Tensor
    leaves: tuple[Tensor, ...]


def run_gate(gate: GateMaths, s: Tensor, differentiate: bool) -> GateGraph:
    """Call the gate once, outside autocast; if ``differentiate``, with a graph. Hooks on saved tensors do not reach it.

    Args:
        gate: A gate that is no band.
        s: ``(N, C)``, channel means.
        differentiate: Whether :func:`gate_backward` will be asked.

    Raises:
        RuntimeError: the gate depends on a tensor that requires a gradient and is none of its parameters, or it returns
            another shape.
    """
    with torch.autocast(s.device.type, enabled=False):
        if not differentiate:
            g = _for_every_map(gate.function(s), s)
            if g.requires_grad:
                _leaves_reached(g, gate.parameters)
            return GateGraph(s, g, ())
        leaf = s.detach().requires_grad_()
        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(_with_version, _of_that_version),
            _aliases(gate) as aliases,
        ):
            g = _for_every_map(gate.function(leaf.clone()), s)  # a clone, for the gate may write into it
    reached = _leaves_reached(g, (leaf, *gate.parameters, *aliases.values()))
    leaves = tuple(p if id(p) in reached else aliases.get(id(p), p) for p in gate.parameters)
    return GateGraph(leaf, g, leaves)


def gate_backward(graph: GateGraph, grad_gate: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of s and of the gate's parameters, through the graph that :func:`run_gate` made.

    Args:
        graph: Of the forward pass.
        grad_gate: ``(N, C)``.
    """
    s, gate, leaves = graph
    if not gate.requires_grad:
        return None, [None] * len(leaves)
    wanted = [s, *(leaf for leaf in leaves if leaf.requires_grad)]
    grad_s, *found = torch.autograd.grad(gate, wanted, grad_gate.to(gate.dtype), retain_graph=True, allow_unused=True)
    remaining = iter(found)
    grads = [next(remaining) if leaf.requires_grad else None for leaf in leaves]
    return None if grad_s is None else grad_s.to(grad_gate.dtype), grads


def _for_every_map(g: Tensor, s: Tensor) -> Tensor:
    """Expand a gate that is the same for all samples or channels to ``(N, C)``."""
    if g.shape == s.shape:
        return g
    try:
        return g.expand_as(s).contiguous()
    except RuntimeError as error:
        got = f"got {tuple(g.shape)}"
        raise RuntimeError(f"a gate must return the shape {tuple(s.shape)} or what expands to it, {got}") from error


@contextlib.contextmanager
def _aliases(gate: GateMaths) -> Iterator[dict[int, Tensor]]:
    """Lend the gate's modules aliases of their parameters. Gives the aliases, by the ids of the parameters."""
    owner = getattr(gate.function, "__self__", None)
    modules = owner.modules() if isinstance(owner, nn.Module) else ()
    slots: list[tuple[dict[str, Any], str, Tensor]] = [
        (m._parameters, key, p) for m in modules for key, p in m._parameters.items() if p is not None
    ]
    aliases = {id(p): p.detach().requires_grad_() for _, _, p in slots if p.requires_grad}
    try:
        for held, key, p in slots:
            held[key] = aliases.get(id(p), p)
        yield aliases
    finally:
        for held, key, p in slots:
            held[key] = p


def _with_version(t: Tensor) -> tuple[Tensor, int]:
    # Detached: sigmoid saves its output, and with its graph the output would keep itself alive.
    return t.detach(), t._version


def _of_that_version(saved: tuple[Tensor, int]) -> Tensor:
    t, version = saved
    if t._version != version:
        raise RuntimeError(
            f"a tensor of shape {tuple(t.shape)} that a gate needs for its gradient has been modified by an inplace "
            "operation"
        )
    return t


def _leaves_reached(gate: Tensor, known: tuple[Tensor, ...]) -> set[int]:
    """Ids of the leaves of a gate's graph. Raises if one is not known: nobody would get its gradient."""
    ids = {id(t) for t in known}
    seen: set[Any] = {t.grad_fn for t in known}  # parameters may be computed from others: the search ends there
    reached = set()
    to_do = [gate.grad_fn]
    while to_do:
        node = to_do.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in ids:
            raise RuntimeError(
                f"the gate depends on a tensor of shape {tuple(variable.shape)} that requires a gradient and is not "
                "among its parameters(): register it as one, or run under ecanet.backend('reference')"
            )
        reached.add(id(variable))
        to_do.extend(function for function, _ in node.next_functions)
    return reached
