"""A gate that is no band of ECA has a small graph of its own: ``(N, C)``-sized, made in the forward pass."""

from typing import Any

import torch
from torch import Tensor

from ecanet.nn.tail.maths import GateMaths


def run_gate(gate: GateMaths, s: Tensor, differentiate: bool) -> tuple[Tensor, Tensor]:
    """Call the gate once; if ``differentiate``, with a graph that no hook on saved tensors takes away.

    Args:
        gate: No band.
        s: ``(N, C)``, channel means.
        differentiate: Whether :func:`gate_backward` will be asked.

    Returns:
        What its graph begins with, and the gate.

    Raises:
        RuntimeError: the gate depends on a tensor whose gradient nobody would get.
    """
    with torch.autocast(s.device.type, enabled=False):
        if not differentiate:
            g = gate.function(s)
            if g.requires_grad:
                _check_leaves(None, g, gate.parameters)
            return s, g
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_with_version, _of_that_version):
            leaf = s.detach().requires_grad_()
            g = gate.function(leaf.clone())  # which may write into what it gets
    _check_leaves(leaf, g, gate.parameters)
    return leaf, g


def gate_backward(
    s: Tensor, gate: Tensor, parameters: tuple[Tensor, ...], grad_gate: Tensor
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of s and of the gate's parameters, through the graph that :func:`run_gate` made.

    Args:
        s: What it begins with.
        gate: ``(N, C)``.
        parameters: Of the gate.
        grad_gate: ``(N, C)``.
    """
    if not gate.requires_grad:
        return None, [None] * len(parameters)
    wanted = [s, *(parameter for parameter in parameters if parameter.requires_grad)]
    grad_s, *found = torch.autograd.grad(gate, wanted, grad_gate.to(gate.dtype), retain_graph=True, allow_unused=True)
    remaining = iter(found)
    grads = [next(remaining) if parameter.requires_grad else None for parameter in parameters]
    return None if grad_s is None else grad_s.to(grad_gate.dtype), grads


def _with_version(t: Tensor) -> tuple[Tensor, int]:
    # Detached: an output that an operation saves, as sigmoid does, would keep the graph that keeps it.
    return t.detach(), t._version


def _of_that_version(saved: tuple[Tensor, int]) -> Tensor:
    t, version = saved
    if t._version != version:
        raise RuntimeError(
            f"a tensor of shape {tuple(t.shape)} that a gate needs for its gradient has been modified by an inplace "
            "operation"
        )
    return t


def _check_leaves(leaf: Tensor | None, gate: Tensor, parameters: tuple[Tensor, ...]) -> None:
    """Raise where a gate depends on a tensor whose gradient nobody would get."""
    known = {id(leaf), *map(id, parameters)}
    seen: set[Any] = {parameter.grad_fn for parameter in parameters}  # those may be computed from others
    to_do = [gate.grad_fn]
    while to_do:
        node = to_do.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            raise RuntimeError(
                f"the gate depends on a tensor of shape {tuple(variable.shape)} that requires a gradient and is not "
                "among its parameters(): register it as one, or run under ecanet.backend('reference')"
            )
        to_do.extend(function for function, _ in node.next_functions)
