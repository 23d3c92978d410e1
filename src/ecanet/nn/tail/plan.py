"""One plan for each call of the tail: who computes, and with what. Everything after follows it."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ecanet.nn.attached import attached_gate
from ecanet.nn.tail.maths import GateMaths, NormMaths
from ecanet.nn.tail.reading import check_arguments, read_act, read_gate, read_norm, same_kind
from ecanet.ops.backend import COMPILER, Decision, decide, is_operation_in_graph
from ecanet.private_torch import is_exporting

Who = Literal["modules", "kernels", "operation", "formula"]


class Plan(NamedTuple):
    """Who computes a tail, and with what.

    Attributes:
        who: The ``modules``, called one after another; the ``kernels``, now; one ``operation`` in a compiler's graph;
            the ``formula`` in plain PyTorch, which a compiler fuses.
        why: In a few words.
        backend: Whose kernels: a key of :data:`ecanet.ops.kernels.KERNELS`.
        norm: What is inside, or None for no norm, or one that is called.
        gate: Likewise.
        calls_norm: Whether the norm is called before, with a gate that is attached to it.
        calls_gate: Whether the gate is called, after the norm.
        adds: Whether the residual is added inside; otherwise afterwards.
        act: Index of the activation inside, in :data:`ecanet.ops.reference.ACTS`; None where it comes afterwards.
    """

    who: Who
    why: str
    backend: str = ""
    norm: NormMaths | None = None
    gate: GateMaths | None = None
    calls_norm: bool = False
    calls_gate: bool = False
    adds: bool = True
    act: int | None = None


def plan(
    x: Tensor,
    norm: nn.Module | None,
    gate: nn.Module | None,
    residual: Tensor | None,
    act: str | nn.Module | None,
    knows_means: bool = False,
) -> Plan:
    """Decide who computes ``act(gate(norm(x)) + residual)``.

    Args:
        x: As :func:`ecanet.nn.norm_gate_add_act` takes it.
        norm: As above.
        gate: As above.
        residual: As above.
        act: As above.
        knows_means: Whether the channel means of x were found already.

    Raises:
        ValueError: as the norm itself, for a map of another rank than it takes.
        RuntimeError: the backend asked for by :func:`ecanet.backend` cannot run.
    """
    return _plan(decide(x), x, norm, gate, residual, act, knows_means)


def _plan(
    decision: Decision,
    x: Tensor,
    norm: nn.Module | None,
    gate: nn.Module | None,
    residual: Tensor | None,
    act: str | nn.Module | None,
    knows_means: bool,
) -> Plan:
    if decision.name == "reference" or (decision.name == "compiler" and isinstance(norm, nn.SyncBatchNorm)):
        return Plan("modules", decision.why)
    of_norm, of_gate = _read(norm, gate, x)
    if norm is None and gate is None and torch.is_grad_enabled():
        return Plan("modules", "without norm and gate, torch's own operations keep less for the backward")
    adds = residual is None or same_kind(residual, x)
    code = read_act(act) if adds else None
    if decision.name == "compiler":
        return _in_graph(x, of_norm, of_gate, adds, code, knows_means)
    why = decision.why
    calls_norm, calls_gate = isinstance(of_norm, str), isinstance(of_gate, str)
    if calls_norm or calls_gate:
        why = _why_called(of_norm, of_gate)
    return Plan(
        "kernels", why, decision.name,
        None if isinstance(of_norm, str) else of_norm, None if isinstance(of_gate, str) else of_gate,
        calls_norm, calls_gate, adds, code,
    )  # fmt: skip


def _read(
    norm: nn.Module | None, gate: nn.Module | None, x: Tensor
) -> tuple[NormMaths | str | None, GateMaths | str | None]:
    """Both, or why one is called; of a gate that is attached to the norm, if the kernels can take the two."""
    if gate is None and norm is not None and (attached := attached_gate(norm)) is not None:
        of_gate = read_gate(attached, x)
        if isinstance(of_gate, str):
            return f"has a gate that {of_gate}", None
        of_norm = read_norm(norm, x, known_hooks=1)
        return (of_norm, None) if isinstance(of_norm, str) else (of_norm, of_gate)
    return None if norm is None else read_norm(norm, x), None if gate is None else read_gate(gate, x)


def _why_called(of_norm: NormMaths | str | None, of_gate: GateMaths | str | None) -> str:
    named = (("norm", of_norm), ("gate", of_gate))
    return ", and ".join(f"the {name} is called: it {why}" for name, why in named if isinstance(why, str))


def _in_graph(
    x: Tensor,
    of_norm: NormMaths | str | None,
    of_gate: GateMaths | str | None,
    adds: bool,
    code: int | None,
    knows_means: bool,
) -> Plan:
    """What a compiler gets."""
    if isinstance(of_norm, str) or isinstance(of_gate, str):
        return Plan("modules", _why_called(of_norm, of_gate))
    if x.numel() == 0:
        return Plan("modules", "x is empty")
    if of_gate is None:
        return Plan("modules", "there is no gate: a compiler fuses the rest as well")
    training = of_norm is not None and of_norm.takes_batch_statistics
    if (
        of_norm is not None
        and of_gate.is_band
        and not is_exporting()
        and (training or not torch.is_grad_enabled())
        and is_operation_in_graph(x, training)
    ):
        return Plan(
            "operation", "the kernels are faster than what Inductor makes", "", of_norm, of_gate, adds=adds, act=code
        )
    if training:
        why = "Inductor fuses it: statistics of the batch give the gate's means"
        return Plan("formula", why, "", of_norm, of_gate, adds=adds, act=None)
    if knows_means or (x.is_cuda and not is_exporting()):
        why = "Inductor fuses it: one pass over x after its means"
        return Plan("formula", why, "", of_norm, of_gate, adds=adds, act=code)
    return Plan("modules", "a compiler fuses them as well, and what is exported must run without this library")


def explain(
    x: Tensor,
    norm: nn.Module | None = None,
    gate: nn.Module | None = None,
    residual: Tensor | None = None,
    act: str | nn.Module | None = None,
    *,
    compiled: bool = False,
) -> str:
    """Say in one line who computes :func:`ecanet.nn.norm_gate_add_act` of these arguments now, and why.

    Args:
        x: As that function takes it. Nothing is computed.
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
        the modules (norm, gate, residual, relu): the norm is called: it is no BatchNorm of torch
    """
    check_arguments(x, norm, gate, act)
    made = _plan(COMPILER if compiled else decide(x), x, norm, gate, residual, act, knows_means=False)
    is_attached = gate is None and norm is not None and attached_gate(norm) is not None
    called = made.calls_gate or (is_attached and made.calls_norm)
    places = {
        "norm": _place(norm is not None, called=made.calls_norm),
        "gate": _place(gate is not None or is_attached, called=called),
        "residual": _place(residual is not None, afterwards=not made.adds),
        type(act).__name__ if isinstance(act, nn.Module) else str(act): _place(
            act is not None, afterwards=made.act is None
        ),
    }
    if made.who == "modules":
        places = {part: place and "inside" for part, place in places.items()}
    inside, *others = (
        ", ".join(part for part, place in places.items() if place == where)
        for where in ("inside", "called", "afterwards")
    )
    rest = "".join(
        f"; {where}: {parts}" for where, parts in zip(("called", "afterwards"), others, strict=True) if parts
    )
    return f"{_NAMES[made.who, made.backend]} ({inside}){rest}: {made.why}"


def _place(is_there: bool, called: bool = False, afterwards: bool = False) -> str:
    return "" if not is_there else "called" if called else "afterwards" if afterwards else "inside"


_NAMES = {
    ("modules", ""): "the modules",
    ("kernels", "cpu"): "the C++ kernels",
    ("kernels", "triton"): "the Triton kernels",
    ("operation", ""): "one operation in a compiler's graph",
    ("formula", ""): "a formula in a compiler's graph",
}
