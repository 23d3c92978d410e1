"""The backward of the tail in plain PyTorch, which can be differentiated again."""

import torch
from torch import Tensor, nn

from ecanet.nn.tail.maths import GateMaths, NormMaths, ScaleAndShift, Statistics
from ecanet.ops import coefficients, reference
from ecanet.ops.backward import Saved
from ecanet.ops.statistics import merge_moments

OTHER_PROCESSES = "its norm shares statistics with other processes"


def no_second_derivative(what: str, why: str) -> RuntimeError:
    """An error: ``what`` (a gate or a tail) cannot be differentiated twice, why, and what to do."""
    return RuntimeError(
        f"this fused {what} cannot be differentiated twice (create_graph=True), because {why}: run its forward pass "
        "under ecanet.backend('reference')"
    )


def differentiable_backward(
    saved: Saved,
    parameters: list[Tensor],
    norm: NormMaths | None,
    gate: GateMaths | None,
    act: int,
    grad: Tensor,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of x, residual, weight, bias and the gate's parameters, with a graph.

    Args:
        saved: What the forward pass saved.
        parameters: The gate's parameters in the forward pass.
        norm: The norm of the forward pass.
        gate: The gate of the forward pass.
        act: Index in :data:`ecanet.ops.reference.ACTS`.
        grad: Gradient of out.
        needed: Whether each of the gradients is needed.

    Raises:
        RuntimeError: the tail shares its statistics with other processes, or its gate cannot be called once more.
    """
    what = "gate" if norm is None else "tail"
    if norm is not None and norm.group is not None:
        raise no_second_derivative("tail", OTHER_PROCESSES)
    grad, residual, code = _through_act(saved.for_act, act, grad)
    # Aliases, because one of these may be computed from another, and no gradient may flow from one to another.
    x = saved.x.view_as(saved.x)
    residual, weight, bias = (None if t is None else t.view_as(t) for t in (residual, saved.weight, saved.bias))
    parameters = [t.view_as(t) for t in parameters]
    with torch.autocast(x.device.type, enabled=False):
        map_means, m2 = reference.moments(x)
        mean, var = saved.norm_mean, saved.norm_var
        if norm is not None and norm.takes_batch_statistics:
            mean, var = merge_moments(map_means, m2, x.shape[2:].numel())
        s, a, b = coefficients.normalise(map_means, mean, var, weight, bias, 0.0 if norm is None else norm.eps)
        shift = None if norm is None else b.expand_as(s)
        if gate is not None:
            assert saved.gate is not None
            positions = reference.positions(x)
            statistics = Statistics(s, a.square() * m2 / positions if gate.needs_variances else None, positions)
            g, gate_shift = call_gate_again(gate, statistics, parameters, saved.gate, what)
            a, shift = g * a, None if norm is None else g * b
            if gate_shift is not None:
                shift = gate_shift if shift is None else shift + gate_shift
        out = reference.apply(x, a.expand_as(s), shift, residual, code)
    inputs = [x, residual, weight, bias, *parameters]
    wanted = [t for t, needs in zip(inputs, needed, strict=True) if needs and t is not None]
    gradients = iter(torch.autograd.grad(out, wanted, grad, create_graph=True, allow_unused=True) if wanted else ())
    grads = [next(gradients) if needs and t is not None else None for t, needs in zip(inputs, needed, strict=True)]
    if any(needs and g is None for needs, g in zip(needed[4:], grads[4:], strict=True)):
        raise no_second_derivative(what, "its gate computes with weights that are not its own")
    if residual is None:
        grads[1] = grad if needed[1] else None
    return grads


def _through_act(for_act: Tensor | None, act: int, grad: Tensor) -> tuple[Tensor, Tensor | None, int]:
    """Go back through ReLU or ReLU6, whose slope is known. Returns gradient, residual and activation that are left."""
    if act == 0:
        return grad, None, 0
    name = reference.ACTS[act]
    if name not in ("relu", "relu6"):
        return grad, for_act, act
    assert for_act is not None
    blocked = for_act <= 0 if name == "relu" else (for_act <= 0) | (for_act >= 6)
    return grad.masked_fill(blocked, 0), None, 0


def call_gate_again(
    gate: GateMaths, statistics: Statistics, parameters: list[Tensor], before: Tensor, what: str
) -> ScaleAndShift:
    """Call the gate once more, in a graph that reaches the statistics and the parameters of the forward pass.

    Args:
        gate: A gate, a band or not.
        statistics: What it sees.
        parameters: Those of the forward pass.
        before: ``(N, C)``, the scale in the forward pass.
        what: ``"gate"`` or ``"tail"``, for the error.

    Raises:
        RuntimeError: the gate returns something other than in the forward pass, or calling it has other effects.
    """
    s = statistics.means
    if gate.is_band:
        return torch.sigmoid(reference.band(s, parameters[0], gate.circular)) * gate.factor, None
    owner = getattr(gate.function, "__self__", None)
    modules = list(owner.modules()) if isinstance(owner, nn.Module) else []
    slots = [(m._parameters, key, p) for m in modules for key, p in m._parameters.items() if p is not None]
    own = dict.fromkeys(id(p) for _, _, p in slots)
    if owner is None or len(own) != len(parameters) or any(key != "scale" for key, _ in owner.named_buffers()):
        raise no_second_derivative(what, f"its {type(owner).__name__} gate keeps more than weights")
    replacements = dict(zip(own, parameters, strict=True))
    random_state = _random_state(s)
    try:
        for held, key, p in slots:
            held[key] = replacements[id(p)]  # type: ignore[assignment]
        again, shift = gate.function(statistics)
    finally:
        for held, key, p in slots:
            held[key] = p
    if not torch.equal(random_state, _random_state(s)):  # a neutral gate returns the same whatever it draws
        raise no_second_derivative(what, f"its {type(owner).__name__} gate draws random numbers")
    close = 1e-9 if before.dtype is torch.float64 else 1e-4
    if not torch.allclose(again.detach().to(before.dtype), before, rtol=close, atol=close, equal_nan=True):
        raise no_second_derivative(what, f"its {type(owner).__name__} gate returns something else when called again")
    return again.to(s.dtype), None if shift is None else shift.to(s.dtype)


def _random_state(s: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(s.device) if s.is_cuda else torch.get_rng_state()
