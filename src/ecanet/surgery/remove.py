"""Take out the gates that were inserted."""

import torch
from torch import Tensor, nn

from ecanet.networks.checks import check_model
from ecanet.networks.cost import parameters
from ecanet.nn import Gate
from ecanet.nn.absent_gates import keep_loading_
from ecanet.nn.attached import GATE, attached_gates, detach_
from ecanet.nn.folding import owners, tensors_to_scale
from ecanet.nn.undo import all_or_nothing
from ecanet.surgery.find.sites import FilterFn
from ecanet.surgery.optimizers import check_optimizer, remove_parameters_
from ecanet.surgery.report import Report, Row


def remove_gates_(
    model: nn.Module,
    *,
    force: bool = False,
    fold: bool = False,
    filter_fn: FilterFn | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Report:
    """Take out the gates that :func:`ecanet.insert_gates_` put in: the network is the original one, with its keys.

    A neutral gate is 1, so the function stays the same. A trained gate is not: without it the function changes, and the
    network needs fine-tuning. Nothing but the gates changes, except with ``fold``.

    Args:
        model: The network.
        force: Take out trained gates, too.
        fold: If a gate is a constant other than 1 (a neutral gate after :func:`ecanet.fold_factors_`), multiply the
            norm before it by that constant; for a trained gate, by its initial value.
        filter_fn: Function of a gate and its name that says whether to take it out.
        optimizer: The gates' parameters are removed from it.

    Returns:
        What was removed; ``replaced`` holds the gates by name. Empty if there are no gates.

    Raises:
        TypeError: ``model`` is not a module, or is compiled, scripted or wrapped for parallel training.
        ValueError: gates are not 1 and neither ``force`` nor ``fold`` helps, or the optimizer has none of the model's
            parameters. The network is then unchanged.

    Example:
        >>> import torchvision
        >>> from ecanet import insert_gates_
        >>> model = torchvision.models.resnet18()
        >>> keys = list(model.state_dict())
        >>> _ = insert_gates_(model)
        >>> len(remove_gates_(model).rows), list(model.state_dict()) == keys
        (8, True)
    """
    check_model(model)
    check_optimizer(optimizer, model)
    wanted = [
        (name, host, gate)
        for name, host, gate in attached_gates(model)
        if filter_fn is None or filter_fn(gate, f"{name}.{GATE}" if name else GATE)
    ]
    constants = {name: _constant_value(gate) for name, _, gate in wanted}
    lost = [name for name, constant in constants.items() if constant is None or (constant != 1 and not fold)]
    if lost and not force:
        shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        if all(constants[name] is not None for name in lost):
            what, remedy = "constant, but not 1", "fold=True multiplies the norms before them by that"
        else:
            what = "not constant, and some add a shift" if any(_adds(gate) for _, _, gate in wanted) else "not constant"
            remedy = "force=True takes them out all the same"
        raise ValueError(
            f"the gates after {shown} are {what}, so taking them out changes what the network computes: {remedy}"
        )
    folds: dict[str, tuple[tuple[Tensor, ...], float]] = {}
    if fold:
        count = owners(model)
        for name, host, gate in wanted:
            constant = constants[name]
            value = _value_at_start(gate) if constant is None else constant
            if value != 1:
                folds[name] = tensors_to_scale(f"the value of the gate after {name}", host, count), value
    rows: list[Row] = []
    removed: dict[str, nn.Module] = {}
    for name, _, gate in wanted:
        gate_name = f"{name}.{GATE}" if name else GATE
        removed[gate_name] = gate
        channels = getattr(gate, "channels", None)
        rows.append(Row(gate_name, type(gate).__name__, name, channels, None, -parameters(gate)))
    with all_or_nothing(model, optimizer) as undo:
        for name, host, gate in wanted:
            tensors, value = folds.get(name, ((), 1))
            undo.keep(tensors)
            with torch.no_grad():
                for tensor in tensors:
                    tensor.mul_(value)
            detach_(host)
            remove_parameters_(optimizer, gate.parameters())
        keep_loading_(model)
    return Report("removed", tuple(rows), (), removed)


def _constant_value(gate: nn.Module) -> float | None:
    """The value that a gate has for every input, or None; on the meta device, its value at the start."""
    if any(t.is_meta for t in (*gate.parameters(), *gate.buffers())):
        return _value_at_start(gate)
    return gate.constant() if isinstance(gate, Gate) else None


def _adds(gate: nn.Module) -> bool:
    """Whether a gate adds something other than 0 to the map, besides scaling it."""
    shift = gate.try_out()[1] if isinstance(gate, Gate) and type(gate).forward is Gate.forward else None
    return shift is not None and bool(shift.any())


def _value_at_start(gate: nn.Module) -> float:
    """The value of a gate before training, with its present factor; 1 if that is not known."""
    return gate.value_at_start if isinstance(gate, Gate) and gate.starts_as_identity else 1.0
