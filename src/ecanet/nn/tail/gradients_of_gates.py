"""The gradient of a gate other than ECA's band: the forward pass makes a small graph with tensors ``(N, C)``."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ecanet.nn.tail.maths import GateMaths, ScaleAndShift, Statistics, check_scale_and_shift
from ecanet.ops import reference


class GateGraph(NamedTuple):
    """The graph of a gate that autograd can go back through.

    Attributes:
        inputs: Where it begins: means ``(N, C)``, and variances ``(N, C)`` if the gate sees them.
        outputs: Where it ends: scale ``(N, C)``, and shift ``(N, C)`` if there is one.
        leaves: The leaf for each parameter. It is an alias, since hooks on the parameter run in the graph outside and
            must not run twice; or the parameter itself, if the gate does not read it from a module.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]


def run_gate(
    gate: GateMaths, statistics: Statistics, differentiate: bool
) -> tuple[Tensor, Tensor | None, GateGraph | None]:
    """Call the gate once, outside autocast; if ``differentiate``, with a graph. Hooks on saved tensors do not reach it.

    Args:
        gate: A gate other than ECA's band.
        statistics: What it sees.
        differentiate: Whether :func:`gate_backward` will be called.

    Returns:
        The gate's scale and shift, detached, and the graph for :func:`gate_backward`.

    Raises:
        RuntimeError: the gate depends on a tensor that requires a gradient and is not one of its parameters, or it
            returns another shape.
    """
    means, variances, positions = statistics
    with reference.no_autocast(means.device.type):
        if gate.backward is not None or not differentiate:
            outputs = _expand_to_maps(gate.function(statistics), means)
            if gate.backward is None and any(t.requires_grad for t in outputs):
                _leaves_reached(outputs, gate.parameters)
            return *_detached(outputs, means), None
        inputs = tuple(t.detach().requires_grad_() for t in (means, variances) if t is not None)
        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(_pack_with_version, _unpack_and_check),
            _aliases(gate) as aliases,
        ):
            seen = [t.clone() for t in inputs]  # clones, because the gate may write into them
            seen_variances = None if variances is None else seen[1]
            outputs = _expand_to_maps(gate.function(Statistics(seen[0], seen_variances, positions)), means)
    reached = _leaves_reached(outputs, (*inputs, *gate.parameters, *aliases.values()))
    leaves = tuple(p if id(p) in reached else aliases.get(id(p), p) for p in gate.parameters)
    return *_detached(outputs, means), GateGraph(inputs, outputs, leaves)


def _detached(outputs: tuple[Tensor, ...], like: Tensor) -> ScaleAndShift:
    scale, *shift = (t.detach().to(like.dtype) if t.requires_grad or t.dtype != like.dtype else t for t in outputs)
    return scale, shift[0] if shift else None


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
        grad_shift: ``(N, C)``, even if the gate has no shift.
    """
    if gate.backward is not None:
        with reference.no_autocast(grad_scale.device.type):
            scaled = grad_scale if gate.factor == 1 else grad_scale * gate.factor
            means, variances, grads = gate.backward(statistics, parameters, scaled, grad_shift)
        return means, variances, list(grads)
    assert graph is not None
    leaves = graph.leaves
    pairs = [(t, g) for t, g in zip(graph.outputs, (grad_scale, grad_shift), strict=False) if t.requires_grad]
    if not pairs:
        return None, None, [None] * len(leaves)
    wanted = [*graph.inputs, *(leaf for leaf in leaves if leaf.requires_grad)]
    outputs, grads_of_outputs = [t for t, _ in pairs], [g.to(t.dtype) for t, g in pairs]
    gradients = torch.autograd.grad(outputs, wanted, grads_of_outputs, retain_graph=True, allow_unused=True)
    grads_inputs = [None if g is None else g.to(grad_scale.dtype) for g in gradients[: len(graph.inputs)]]
    remaining = iter(gradients[len(graph.inputs) :])
    grads_leaves = [next(remaining) if leaf.requires_grad else None for leaf in leaves]
    return grads_inputs[0], grads_inputs[1] if len(grads_inputs) > 1 else None, grads_leaves


def _expand_to_maps(outputs: ScaleAndShift, s: Tensor) -> tuple[Tensor, ...]:
    """Scale, and shift if there is one; expanded to ``(N, C)`` where they are the same for all samples or channels."""
    scale, shift = check_scale_and_shift(outputs)
    if scale.shape == s.shape and (shift is None or shift.shape == s.shape):
        return (scale,) if shift is None else (scale, shift)
    expanded = []
    for what, t in zip(("scale", "shift"), outputs, strict=True):
        if t is None:
            continue
        if t.shape != s.shape:
            try:
                t = t.expand_as(s).contiguous()
            except RuntimeError as error:
                wanted, got = f"the shape {tuple(s.shape)} or what expands to it", f"got {tuple(t.shape)}"
                raise RuntimeError(f"a gate must return {wanted}, as its {what}; {got}") from error
        expanded.append(t)
    return tuple(expanded)


@contextlib.contextmanager
def _aliases(gate: GateMaths) -> Iterator[dict[int, Tensor]]:
    """Replace the gate's parameters by aliases inside ``with``. Yields the aliases, by the ids of the parameters."""
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


def _pack_with_version(t: Tensor) -> tuple[Tensor, int]:
    # Detached: sigmoid saves its output, and with its graph the output would keep itself alive.
    return t.detach(), t._version


def _unpack_and_check(saved: tuple[Tensor, int]) -> Tensor:
    t, version = saved
    if t._version != version:
        raise RuntimeError(
            f"a tensor of shape {tuple(t.shape)} that a gate needs for its gradient has been modified by an inplace "
            "operation"
        )
    return t


def _leaves_reached(outputs: tuple[Tensor, ...], known: tuple[Tensor, ...]) -> set[int]:
    """Ids of the leaves of a gate's graph. Raises if one is not in ``known``: its gradient would be lost."""
    ids = {id(t) for t in known}
    seen: set[Any] = {t.grad_fn for t in known}  # parameters may be computed from others: the search ends there
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
