"""Keeps an optimizer in step with the parameters that surgery adds and removes."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def add_parameters_(optimizer: torch.optim.Optimizer | None, gate: nn.Module, name: str, neighbour: nn.Module) -> None:
    """Add a gate's parameters to the group that holds its neighbour's, so that they share its settings.

    A group of its own would break learning rate schedulers, which count groups.

    Args:
        optimizer: The optimizer, or None.
        gate: The gate.
        name: Name of the gate in the network, for optimizers that hold names.
        neighbour: The module that the gate follows; if no group has a parameter of it, the first group is taken.
    """
    if optimizer is None:
        return
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    new = [(key, p) for key, p in gate.named_parameters() if id(p) not in known]
    neighbours = {id(p) for p in neighbour.parameters()} - {id(p) for p in gate.parameters()}
    groups = optimizer.param_groups
    group = next((g for g in groups if any(id(p) in neighbours for p in g["params"])), groups[0])
    group["params"].extend(p for _, p in new)
    if "param_names" in group:
        group["param_names"].extend(f"{name}.{key}" for key, _ in new)


def remove_parameters_(optimizer: torch.optim.Optimizer | None, gone: Iterable[Tensor]) -> None:
    """Take parameters out of an optimizer's groups and delete their state."""
    if optimizer is None:
        return
    ids = {id(p) for p in gone}
    for group in optimizer.param_groups:
        kept: list[int] = [i for i, p in enumerate(group["params"]) if id(p) not in ids]
        for key in ("params", "param_names"):
            if key in group:
                group[key][:] = [group[key][i] for i in kept]
    state: Any = optimizer.state
    for parameter in [p for p in state if id(p) in ids]:
        del state[parameter]


def check_optimizer(optimizer: object, model: nn.Module) -> None:
    """Raise unless it is None or an optimizer of the model's parameters that can take new ones.

    Raises:
        TypeError: it is not an optimizer, or one that cannot take new parameters.
        ValueError: it has none of the model's parameters.
    """
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}")
    if type(optimizer).__name__ in ("LBFGS", "Muon"):  # LBFGS fixes its number of parameters; Muon takes only matrices
        raise TypeError(f"optimizer: {type(optimizer).__name__} cannot take new parameters: build it after surgery")
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError("optimizer has none of the model's parameters: pass the one that trains this model")
