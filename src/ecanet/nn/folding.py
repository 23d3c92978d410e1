"""A gate's factor inside the norm before it: the paper's exact form, with the keys of the authors' files."""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ecanet.nn.attached import attached_gates
from ecanet.nn.gate import Gate, check_factor
from ecanet.nn.norms import affine
from ecanet.nn.undo import all_or_nothing


@torch.no_grad()
def fold_factors_(model: nn.Module, *, factor: float = 1.0) -> list[str]:
    """Move the factors of a network's gates into the norms before them, or back: the network computes the same.

    Gates of factor 1 have the keys of the authors' and timm's modules, and the norms hold what a neutral gate of 1/2
    needs; the weights of a trained gate take back that it sees the norm's output scaled. From then on norm and gate
    belong together: whoever loads, moves or replaces one of the two without the other halves or doubles the branch.
    Gates that keep their factor, as this library makes them, have no such tie.

    Args:
        model: A network with gates that :func:`ecanet.insert_gates_` put in, or one of :mod:`ecanet.models`.
        factor: What every gate is left with: 1 folds the factors, 2 is the inverse for neutral gates that were folded.

    Returns:
        The names of the gates whose factor was another.

    Raises:
        TypeError: ``factor`` is not a number.
        ValueError: ``factor`` is not finite and above 0, or there is no norm before a gate, or one that cannot take a
            factor: without weight and bias, of unknown code, or with weights that another module has, too; or the gate
            is trained and has no weights that could follow (SE-Var1). Nothing is changed then.

    Example:
        >>> import torchvision
        >>> from ecanet import insert_gates_
        >>> model = torchvision.models.resnet18()
        >>> _ = insert_gates_(model)
        >>> len(fold_factors_(model)), "layer1.0.bn2.gate.scale" in model.state_dict()
        (8, False)
    """
    factor = check_factor(factor)
    changes = [(name, norm, gate) for name, norm, gate in _pairs(model) if gate.factor != factor]
    count = owners(model)
    tensors = [
        (tensors_to_scale(f"the factor of {name}", norm, count), _weights_to_scale(name, gate, count))
        for name, norm, gate in changes
    ]
    with all_or_nothing(model) as undo:
        for (_, _, gate), (of_norm, of_gate) in zip(changes, tensors, strict=True):
            undo.cover(gate)
            undo.keep(of_norm)
            fold_(gate, of_norm, of_gate, factor)
    return [name for name, _, _ in changes]


@torch.no_grad()
def fold_(gate: Gate, of_norm: tuple[Tensor, ...], of_gate: tuple[Tensor, ...] = (), factor: float = 1.0) -> None:
    """Leave a gate with a factor, and let the rest of what it had go into a norm.

    Args:
        gate: The gate.
        of_norm: Weight and bias of the norm before it: :func:`tensors_to_scale`.
        of_gate: Weights of the gate that see the means of the norm's output.
        factor: What the gate is left with.
    """
    ratio = gate.factor / factor
    for tensor in of_norm:
        tensor.mul_(ratio)
    for tensor in of_gate:
        tensor.div_(ratio)
    gate.factor = factor


def _pairs(model: nn.Module) -> Iterator[tuple[str, nn.Module, Gate]]:
    """Name of every gate with a module before it, that module, and the gate.

    Raises:
        ValueError: a gate follows several modules: one factor cannot be in the norms of some and not of others.
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
    """Weights of a gate that see the means of the norm's output; of a constant gate none do."""
    if gate.constant() is not None or any(t.is_meta for t in gate.parameters()):
        return ()
    weights = gate.weights_on_means()
    if not weights or any(count[id(weight)] > 1 for weight in weights):
        raise ValueError(
            f"the factor of {name} cannot be folded: the gate is not constant, and a {type(gate).__name__} has no "
            "plain weights of its own that could take back that it sees the norm's output scaled; leave it in the gate"
        )
    return weights


def check_foldable(model: nn.Module) -> None:
    """Raise ValueError where :func:`fold_factors_` would, if every gate had a factor."""
    count = owners(model)
    for name, norm, _ in _pairs(model):
        tensors_to_scale(f"the factor of {name}", norm, count)


def tensors_to_scale(what: str, norm: nn.Module, count: Counter[int]) -> tuple[Tensor, Tensor]:
    """Weight and bias of the norm before a gate.

    Args:
        what: What is to be folded, for the error.
        norm: The module before it.
        count: What :func:`owners` says of the network.

    Raises:
        ValueError: it cannot take a factor.
    """
    tensors = affine(norm)
    if tensors is None:
        problem = f"{type(norm).__name__} is no norm with a plain weight and bias that could take it"
    elif any(count[id(t)] > 1 for t in tensors):
        problem = f"another module has the weights of its {type(norm).__name__}, too"
    else:
        return tensors
    raise ValueError(f"{what} cannot be folded into what is before it: {problem}; leave it in the gate")


def owners(model: nn.Module) -> Counter[int]:
    """In how many modules each parameter and buffer is registered, by its id."""
    return Counter(
        id(t)
        for module in model.modules()
        for t in (*module._parameters.values(), *module._buffers.values())
        if t is not None
    )
