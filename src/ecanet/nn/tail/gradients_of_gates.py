"""A gate that is no band of ECA has a small graph of its own: ``(N, C)``-sized, made in the forward pass."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ecanet.nn.tail.maths import GateMaths, Statistics


class GateGraph(NamedTuple):
    """The graph of a gate that autograd can go back through.

    Attributes:
        inputs: Means ``(N, C)``, and variances ``(N, C)`` if the gate sees them: what it begins with.
        outputs: Scale ``(N, C)``, and shift ``(N, C)`` if there is one: what it ends with.
        leaves: What stands in it for each parameter: an alias, so that hooks on the parameter do not run here as well
            as in the graph outside; or the parameter, where the gate does not read it from a module.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]


def run_gate(gate: GateMaths, statistics: Statistics, differentiate: bool) -> tuple[Tensor, Tensor | None, Any]:
    """Call the gate once; if ``differentiate``, with a graph that no hook on saved tensors takes away.

    Args:
        gate: Not ECA's.
        statistics: What it sees.
        differentiate: Whether :func:`gate_backward` will be asked.

    Returns:
        Scale and shift, as the gate returns them and detached, and what :func:`gate_backward` wants.

    Raises:
        RuntimeError: the gate depends on a tensor whose gradient nobody would get.
    """
    means, variances, positions = statistics
    with torch.autocast(means.device.type, enabled=False):
        if gate.backward is not None or not differentiate:
            scale, shift = gate.function(statistics)
            if scale.requires_grad and gate.backward is None:
                _leaves_reached((scale,) if shift is None else (scale, shift), gate.parameters)
            return _detached(scale, means), _detached(shift, means), None
        inputs = tuple(t.detach().requires_grad_() for t in (means, variances) if t is not None)
        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(_with_version, _of_that_version),
            _aliases(gate) as aliases,
        ):
            copies = [t.clone() for t in inputs]  # the gate may write into what it gets
            scale, shift = gate.function(Statistics(copies[0], copies[1] if variances is not None else None, positions))
    outputs = (scale,) if shift is None else (scale, shift)
    reached = _leaves_reached(outputs, (*inputs, *gate.parameters, *aliases.values()))
    leaves = tuple(p if id(p) in reached else aliases.get(id(p), p) for p in gate.parameters)
    return _detached(scale, means), _detached(shift, means), GateGraph(inputs, outputs, leaves)


def _detached(t: Any, like: Tensor) -> Any:
    return None if t is None else t.detach().to(like.dtype)


def gate_backward(
    gate: GateMaths,
    graph: GateGraph | None,
    statistics: Statistics,
    parameters: tuple[Tensor, ...],
    grad_scale: Tensor,
    grad_shift: Tensor,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of means, variances and the gate's parameters: in closed form, or through the graph.

    Args:
        gate: Not ECA's.
        graph: Of the forward pass.
        statistics: Of the forward pass.
        parameters: Of the forward pass.
        grad_scale: ``(N, C)``.
        grad_shift: ``(N, C)``, whether the gate has a shift or not.
    """
    if gate.backward is not None:
        with torch.autocast(grad_scale.device.type, enabled=False):
            scaled = grad_scale if gate.factor == 1 else grad_scale * gate.factor
            means, variances, of_parameters = gate.backward(statistics, parameters, scaled, grad_shift)
        return means, variances, list(of_parameters)
    assert graph is not None
    leaves = graph.leaves
    pairs = [(t, g) for t, g in zip(graph.outputs, (grad_scale, grad_shift), strict=False) if t.requires_grad]
    if not pairs:
        return None, None, [None] * len(leaves)
    wanted = [*graph.inputs, *(leaf for leaf in leaves if leaf.requires_grad)]
    outputs, grads_of_outputs = [t for t, _ in pairs], [g.to(t.dtype) for t, g in pairs]
    found = torch.autograd.grad(outputs, wanted, grads_of_outputs, retain_graph=True, allow_unused=True)
    of_inputs = [None if g is None else g.to(grad_scale.dtype) for g in found[: len(graph.inputs)]]
    remaining = iter(found[len(graph.inputs) :])
    grads = [next(remaining) if leaf.requires_grad else None for leaf in leaves]
    return of_inputs[0], of_inputs[1] if len(of_inputs) > 1 else None, grads


@contextlib.contextmanager
def _aliases(gate: GateMaths) -> Iterator[dict[int, Tensor]]:
    """While it lasts, the gate's modules hold aliases of their parameters; by the ids of these."""
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


def _leaves_reached(outputs: tuple[Tensor, ...], known: tuple[Tensor, ...]) -> set[int]:
    """Ids of the leaves of a gate's graph; raises where one is not known, whose gradient nobody would get."""
    ids = {id(t) for t in known}
    seen: set[Any] = {t.grad_fn for t in known}  # those may be computed from others
    reached = set()
    to_do = [t.grad_fn for t in outputs]
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
