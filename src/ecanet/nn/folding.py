"""Folds a gate's factor into the norm before it: the paper's exact form, with the keys of the authors' files."""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ecanet.nn.attached import attached_gates
from ecanet.nn.factors import check_factor
from ecanet.nn.gate import Gate
from ecanet.nn.norms import affine
from ecanet.nn.undo import all_or_nothing


@torch.no_grad()
def fold_factors_(model: nn.Module, *, factor: float = 1.0) -> list[str]:
    """Move the factors of a network's gates into the norms before them, or back: the network computes the same.

    Gates of factor 1 have the keys of the authors' and timm's modules. The norms are scaled by what the gates lose, for
    example by 2 for a neutral gate of 1/2. The weights of a trained gate are divided by it, because the gate sees the
    norm's scaled output. From then on norm and gate depend on each other: loading, moving or replacing one of the two
    without the other halves or doubles the branch. Gates that keep their factor, the library's default, do not.

    Args:
        model: A network with gates that :func:`ecanet.insert_gates_` inserted, or one of :mod:`ecanet.models`.
        factor: The factor that every gate keeps: 1 folds the factors; 2 undoes that for neutral gates.

    Returns:
        The names of the gates that had another factor.

    Raises:
        TypeError: ``factor`` is not a number.
        ValueError: ``factor`` is not finite and above 0; or there is no norm before a gate; or the norm cannot take a
            factor: it has no weight and bias, its code is unknown, or another module shares its weights; or the gate
            is trained and has no weights that could compensate (SE-Var1, SRM, GCT, GRN). Nothing is changed then.

    Example:
        >>> import torchvision
        >>> from ecanet import insert_gates_
        >>> model = torchvision.models.resnet18()
        >>> _ = insert_gates_(model)
        >>> len(fold_factors_(model)), "layer1.0.bn2.gate.scale" in model.state_dict()
        (8, False)
    """
    factor = check_factor(factor)
    changes = [(name, norm, gate) for name, norm, gate in _gates_after_norms(model) if gate.factor != factor]
    count = owners(model)
    tensors = [
        (tensors_to_scale(f"the factor of {name}", norm, count), _weights_to_scale(name, gate, count))
        for name, norm, gate in changes
    ]
    with all_or_nothing(model) as undo:
        for (_, _, gate), (norm_tensors, gate_weights) in zip(changes, tensors, strict=True):
            undo.cover(gate)
            undo.keep(norm_tensors)
            fold_(gate, norm_tensors, gate_weights, factor)
    return [name for name, _, _ in changes]


@torch.no_grad()
def fold_(
    gate: Gate, norm_tensors: tuple[Tensor, ...], gate_weights: tuple[Tensor, ...] = (), factor: float = 1.0
) -> None:
    """Set a gate's factor, and move the ratio of the old one to the new one into a norm.

    Args:
        gate: The gate.
        norm_tensors: Weight and bias of the norm before it: :func:`tensors_to_scale`.
        gate_weights: The gate's weights on the means of the norm's output.
        factor: The gate's new factor.
    """
    ratio = gate.factor / factor
    for tensor in norm_tensors:
        tensor.mul_(ratio)
    for tensor in gate_weights:
        tensor.div_(ratio)
    gate.factor = factor


def _gates_after_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module, Gate]]:
    """For every gate that follows a module: its name, that module, and the gate.

    Raises:
        ValueError: a gate follows several modules: its factor cannot be folded into only some of them.
    """
    names = {module: name for name, module in model.named_modules()}
    pairs = [(host, gate) for _, host, gate in attached_gates(model)]
    for module in model.modules():
        if callable(gated_norms := getattr(module, "gated_norms", None)):
            pairs += gated_norms()
    before: dict[nn.Module, nn.Module] = {}
    for norm, gate in pairs:
        if isinstance(gate, Gate) and before.setdefault(gate, norm) is not norm:
            raise ValueError(f"the factor of {names[gate]} cannot be folded: the gate follows several modules")
    for gate, norm in before.items():
        assert isinstance(gate, Gate)
        yield names[gate], norm, gate


def _weights_to_scale(name: str, gate: Gate, count: Counter[int]) -> tuple[Tensor, ...]:
    """A gate's weights on the means of the norm's output; empty for a constant gate, which ignores them."""
    if gate.constant() is not None or any(t.is_meta for t in gate.parameters()):
        return ()
    weights = gate.weights_on_means()
    if not weights or any(count[id(weight)] > 1 for weight in weights):
        raise ValueError(
            f"the factor of {name} cannot be folded: the gate is not constant, and a {type(gate).__name__} has no "
            "plain weights of its own that could compensate for the norm's scaled output; leave it in the gate"
        )
    return weights


def check_foldable(model: nn.Module) -> None:
    """Raise ValueError if the norm before any gate cannot take a factor, as :func:`fold_factors_` would."""
    count = owners(model)
    for name, norm, _ in _gates_after_norms(model):
        tensors_to_scale(f"the factor of {name}", norm, count)


def tensors_to_scale(what: str, norm: nn.Module, count: Counter[int]) -> tuple[Tensor, Tensor]:
    """Weight and bias of the norm before a gate.

    Args:
        what: What is to be folded, for the error.
        norm: The module before it.
        count: The result of :func:`owners` for the network.

    Raises:
        ValueError: the norm cannot take a factor.
    """
    tensors = affine(norm)
    if tensors is None:
        problem = f"{type(norm).__name__} is not a norm with a plain weight and bias that could take it"
    elif any(count[id(t)] > 1 for t in tensors):
        problem = f"another module shares the weights of its {type(norm).__name__}"
    else:
        return tensors
    raise ValueError(f"{what} cannot be folded into what is before it: {problem}; leave it in the gate")


def owners(model: nn.Module) -> Counter[int]:
    """The number of modules in which each parameter and buffer is registered, by its id."""
    return Counter(
        id(t)
        for module in model.modules()
        for t in (*module._parameters.values(), *module._buffers.values())
        if t is not None
    )
