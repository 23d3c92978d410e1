"""Take out the gates that were put in."""

import torch
from torch import nn

from ecanet.nn import Gate
from ecanet.nn.hung import GATE, hung_gates, take_down_
from ecanet.surgery.checks import check_model
from ecanet.surgery.layers import affine, owners
from ecanet.surgery.loading import keep_loading_, without_values
from ecanet.surgery.optimizers import check_optimizer, remove_parameters_
from ecanet.surgery.report import Report, Row, parameters_of
from ecanet.surgery.sites import FilterFn


def remove_gates_(
    model: nn.Module,
    *,
    force: bool = False,
    filter_fn: FilterFn | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Report:
    """Take out the gates that :func:`ecanet.insert_gates_` put in: the network is the original one, with its keys.

    A neutral gate is a constant, and the norm before it takes it: the function stays. A gate that was trained is no
    constant.

    Args:
        model: The network.
        force: Take out trained gates, too. A norm before one takes 1/2, the value a gate starts from: the function
            changes, and the network needs fine-tuning.
        filter_fn: Function of a gate and its name that says whether it is to go.
        optimizer: Loses the gates' parameters.

    Returns:
        What was removed; ``replaced`` holds the gates by name. Without gates, nothing.

    Raises:
        TypeError: ``model`` is no module, or is compiled, scripted or wrapped for parallel training.
        ValueError: gates are not constant and ``force`` is not given, or the optimizer has none of the model's
            parameters. The network is then as it was.

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
        for name, host, gate in hung_gates(model)
        if filter_fn is None or filter_fn(gate, f"{name}.{GATE}" if name else GATE)
    ]
    gates = {name: gate for name, _, gate in wanted}
    constants = {name: gate.constant() if isinstance(gate, Gate) else None for name, _, gate in wanted}
    count = owners(model)
    tensors = {name: affine(host) or () for name, host, _ in wanted}
    shared = {name for name, _, _ in wanted if any(count[id(t)] > 1 for t in tensors[name])}
    lost = [
        name
        for name, constant in constants.items()
        if not without_values(gates[name])
        and (constant is None or (constant != 1 and (not tensors[name] or name in shared)))
    ]
    if lost and not force:
        shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise ValueError(
            f"the gates after {shown} are not constant, so taking them out changes what the network computes: "
            "force=True does it all the same"
        )
    rows: list[Row] = []
    removed: dict[str, nn.Module] = {}
    for name, host, gate in wanted:
        constant = constants[name]
        factor = 0.5 if constant is None and isinstance(gate, Gate) and gate.scale is None else constant
        if factor is not None and name not in shared:
            with torch.no_grad():
                for tensor in tensors[name]:
                    tensor.mul_(factor)
        take_down_(host)
        remove_parameters_(optimizer, gate.parameters())
        gate_name = f"{name}.{GATE}" if name else GATE
        removed[gate_name] = gate
        channels = getattr(gate, "channels", None)
        rows.append(Row(gate_name, type(gate).__name__, name, channels, None, -parameters_of(gate)))
    keep_loading_(model)
    return Report("removed", tuple(rows), (), removed)
