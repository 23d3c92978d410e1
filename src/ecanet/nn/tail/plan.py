"""A call of the tail makes one plan: what computes it, and from what. The rest of the call follows the plan."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ecanet.nn.attached import attached_gate
from ecanet.nn.tail.maths import GateMaths, NormMaths
from ecanet.nn.tail.reading import check_arguments, read_act, read_gate, read_norm, same_kind
from ecanet.nn.tail.shared_norm import needs_our_forward
from ecanet.ops.backend import Decision, decide, decide_in_graph, is_operation_in_graph
from ecanet.private_torch import is_exporting

Executor = Literal["modules", "kernels", "operation", "formula"]

_TORCH_KEEPS_LESS = "without norm and gate, torch's own operations keep less for the backward"


class Plan(NamedTuple):
    """What computes a tail, and from what.

    Attributes:
        executor: The ``modules``, called one after another; the ``kernels``, now; one ``operation`` in a compiler's
            graph; the ``formula`` in plain PyTorch, which a compiler fuses.
        why: The reason, in a few words.
        backend: Which kernels run: a key of :data:`ecanet.ops.kernels.KERNELS`.
        norm: The norm that is computed inside; None if there is none, or if it is called.
        gate: The gate, likewise.
        calls_norm: Whether the norm is called first. A gate that is attached to it then runs with it.
        calls_gate: Whether the gate is called, after the norm.
        adds: Whether the residual is added inside. Otherwise it is added afterwards.
        act: Index in :data:`ecanet.ops.reference.ACTS` of the activation inside; None if it comes afterwards.
        norm_is_ours: Whether a SyncBatchNorm that is called has our ``forward``.
        takes_means: Whether the formula takes means of x that are computed from the input of a convolution.
    """

    executor: Executor
    why: str
    backend: str = ""
    norm: NormMaths | None = None
    gate: GateMaths | None = None
    calls_norm: bool = False
    calls_gate: bool = False
    adds: bool = True
    act: int | None = None
    norm_is_ours: bool = False
    takes_means: bool = False


def plan(
    x: Tensor,
    norm: nn.Module | None,
    gate: nn.Module | None,
    residual: Tensor | None,
    act: str | nn.Module | None,
    has_means: bool = False,
) -> Plan:
    """Decide what computes ``act(gate(norm(x)) + residual)``.

    Args:
        x: As :func:`ecanet.nn.norm_gate_add_act` takes it.
        norm: As above.
        gate: As above.
        residual: As above.
        act: As above.
        has_means: Whether the channel means of x can be computed without reading x.

    Raises:
        ValueError: the norm's own error, for a map of a rank that it does not take.
        RuntimeError: the backend asked for by :func:`ecanet.backend` cannot run.
    """
    return _plan(decide(x), x, norm, gate, residual, act, has_means)


def _plan(
    decision: Decision,
    x: Tensor,
    norm: nn.Module | None,
    gate: nn.Module | None,
    residual: Tensor | None,
    act: str | nn.Module | None,
    has_means: bool,
) -> Plan:
    if decision.name == "reference":
        result = Plan("modules", decision.why)
    elif decision.name == "compiler":
        result = _in_graph(x, norm, gate, residual, act, has_means)
    else:
        result = _with_kernels(decision, x, norm, gate, residual, act)
    is_called = result.calls_norm or result.executor == "modules"
    if is_called and isinstance(norm, nn.SyncBatchNorm) and not decision.is_watched:
        return result._replace(norm_is_ours=needs_our_forward(norm, x))
    return result


def _with_kernels(
    decision: Decision,
    x: Tensor,
    norm: nn.Module | None,
    gate: nn.Module | None,
    residual: Tensor | None,
    act: str | nn.Module | None,
) -> Plan:
    """The plan in eager code, where kernels can run."""
    norm_maths, gate_maths = _read(norm, gate, x)
    why, calls_norm, calls_gate = decision.why, isinstance(norm_maths, str), isinstance(gate_maths, str)
    if calls_norm or calls_gate:
        why = _why_called(norm_maths, gate_maths)
    norm_inside = None if isinstance(norm_maths, str) else norm_maths
    gate_inside = None if isinstance(gate_maths, str) else gate_maths
    adds = residual is None or same_kind(residual, x)
    code = read_act(act) if adds else None
    if gate_inside is None and (norm_inside is None or calls_gate) and torch.is_grad_enabled():
        if norm_inside is None:
            return Plan("modules", why if calls_norm or calls_gate else _TORCH_KEEPS_LESS)
        adds, code = residual is None, None
    return Plan("kernels", why, decision.name, norm_inside, gate_inside, calls_norm, calls_gate, adds, code)


def _read(
    norm: nn.Module | None, gate: nn.Module | None, x: Tensor
) -> tuple[NormMaths | str | None, GateMaths | str | None]:
    """What norm and gate compute; for one that has to be called, the reason.

    A gate that is attached to the norm counts as the gate, unless one of the two has to be called.
    """
    if gate is None and norm is not None and (attached := attached_gate(norm)) is not None:
        gate_maths = read_gate(attached, x)
        if isinstance(gate_maths, str):
            return f"has a gate that {gate_maths}", None
        norm_maths = read_norm(norm, x, known_hooks=1)
        return (norm_maths, None) if isinstance(norm_maths, str) else (norm_maths, gate_maths)
    return None if norm is None else read_norm(norm, x), None if gate is None else read_gate(gate, x)


def _why_called(norm_maths: NormMaths | str | None, gate_maths: GateMaths | str | None) -> str:
    named = (("norm", norm_maths), ("gate", gate_maths))
    return ", and ".join(f"the {name} is called: it {why}" for name, why in named if isinstance(why, str))


def _in_graph(
    x: Tensor,
    norm: nn.Module | None,
    gate: nn.Module | None,
    residual: Tensor | None,
    act: str | nn.Module | None,
    has_means: bool,
) -> Plan:
    """The plan in a compiler's graph."""
    if isinstance(norm, nn.SyncBatchNorm):
        return Plan("modules", "the norm is called: torch.compile gets torch's SyncBatchNorm with its collectives")
    norm_maths, gate_maths = _read(norm, gate, x)
    if isinstance(norm_maths, str) or isinstance(gate_maths, str):
        return Plan("modules", _why_called(norm_maths, gate_maths))
    if x.numel() == 0:
        return Plan("modules", "x is empty")
    if gate_maths is None:
        return Plan("modules", "there is no gate: a compiler fuses the rest as well")
    adds = residual is None or same_kind(residual, x)
    code = read_act(act) if adds else None
    training = norm_maths is not None and norm_maths.takes_batch_statistics
    if norm_maths is not None and _is_operation(x, gate_maths, training):
        why = "the kernels are faster than what Inductor makes"
        return Plan("operation", why, norm=norm_maths, gate=gate_maths, adds=adds, act=code)
    if training:
        why = "Inductor fuses it: statistics of the batch give the gate's means"
        return Plan("formula", why, norm=norm_maths, gate=gate_maths, adds=adds)
    takes_means = has_means and not gate_maths.needs_variances and not (x.is_cpu and is_operation_in_graph(x, training))
    if (takes_means or x.is_cuda) and not is_exporting():
        known = "means"
        if gate_maths.needs_variances:
            known = "means and variances, which the convolution's input does not give"
        why = f"Inductor fuses it: one pass over x after its {known}"
        return Plan("formula", why, norm=norm_maths, gate=gate_maths, adds=adds, act=code, takes_means=takes_means)
    return Plan("modules", "a compiler fuses them as well, and what is exported must run without this library")


def _is_operation(x: Tensor, gate: GateMaths, training: bool) -> bool:
    """Whether a graph gets norm and gate as one operation. With given statistics it has no backward in the graph."""
    differentiable = training or not torch.is_grad_enabled()
    return gate.is_band and differentiable and not is_exporting() and is_operation_in_graph(x, training)


def explain(
    x: Tensor,
    norm: nn.Module | None = None,
    gate: nn.Module | None = None,
    residual: Tensor | None = None,
    act: str | nn.Module | None = None,
    *,
    compiled: bool = False,
) -> str:
    """Say in one line what would compute :func:`ecanet.nn.norm_gate_add_act` of these arguments now, and why.

    Args:
        x: As that function takes it. Nothing is computed on it.
        norm: As above.
        gate: As above.
        residual: As above.
        act: As above.
        compiled: Say what :func:`torch.compile` would get.

    Raises:
        TypeError, ValueError, RuntimeError: as that function.

    Example:
        >>> from ecanet.nn import ECA, explain
        >>> x = torch.randn(8, 64, 7, 7)
        >>> print(explain(x, nn.GroupNorm(8, 64), ECA(64), x, "relu", compiled=True))
        the modules (norm, gate, residual, relu): the norm is called: it is a GroupNorm, not a BatchNorm of torch
    """
    check_arguments(x, norm, gate, act)
    decision = decide_in_graph(x) if compiled else decide(x)
    result = _plan(decision, x, norm, gate, residual, act, has_means=False)
    is_attached = gate is None and norm is not None and attached_gate(norm) is not None
    called = result.calls_gate or (is_attached and result.calls_norm)
    places = {
        "norm": _place(norm is not None, called=result.calls_norm),
        "gate": _place(gate is not None or is_attached, called=called),
        "residual": _place(residual is not None, afterwards=not result.adds),
        type(act).__name__ if isinstance(act, nn.Module) else str(act): _place(
            act is not None, afterwards=result.act is None
        ),
    }
    if result.executor == "modules":
        places = {part: place and "inside" for part, place in places.items()}
    inside, *others = (
        ", ".join(part for part, place in places.items() if place == where)
        for where in ("inside", "called", "afterwards")
    )
    rest = "".join(
        f"; {where}: {parts}" for where, parts in zip(("called", "afterwards"), others, strict=True) if parts
    )
    return f"{_NAMES[result.executor, result.backend]} ({inside}){rest}: {result.why}"


def _place(is_there: bool, called: bool = False, afterwards: bool = False) -> str:
    return "" if not is_there else "called" if called else "afterwards" if afterwards else "inside"


_NAMES = {
    ("modules", ""): "the modules",
    ("kernels", "cpu"): "the C++ kernels",
    ("kernels", "triton"): "the Triton kernels",
    ("operation", ""): "one operation in a compiler's graph",
    ("formula", ""): "a formula in a compiler's graph",
}
