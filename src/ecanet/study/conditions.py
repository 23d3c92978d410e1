"""The conditions of a study of recipes: what each changes in the network, and a digest that tells which are equal."""

import hashlib
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from ecanet.nn import GATES
from ecanet.nn.build import check_gate_name, gate_factory, takes_kernel_size
from ecanet.train.config import ModelConfig, Recipe
from ecanet.untrusted import listed, shown

#: Fields of a recipe's block ``model`` that choose the backbone. A condition may not set them, because the study would
#: then compare backbones and not only gates.
_BACKBONE = ("name", "weights", "options", "build")
#: Fields that a condition may set.
SETTINGS = tuple(field.name for field in fields(ModelConfig) if field.name not in _BACKBONE)
#: Another key that a condition may have: a list of kernel sizes, each of which becomes a condition of its own.
SWEEP = "kernel_sizes"


def conditions_from_options(gates: str, kernel_sizes: str | None) -> dict[str, dict[str, Any]]:
    """Make conditions from the options of a command line.

    Args:
        gates: Names of gates, separated by commas, the baseline first; ``none`` means no gate.
        kernel_sizes: Odd integers and ``adaptive``, separated by commas: every gate that has a kernel size becomes one
            condition for each of them.

    Raises:
        ValueError: a gate is unknown or named twice, or no gate has a kernel size.
    """
    names = [name.strip() for name in gates.split(",")]
    for name in names:
        if name != "none":
            check_gate_name(name, ", 'none'")
    if len(set(names)) != len(names):
        raise ValueError(f"gates must be different, got {listed(names)}")
    conditions: dict[str, dict[str, Any]] = {name: {"gate": None if name == "none" else name} for name in names}
    if kernel_sizes is None:
        return conditions
    swept = [name for name in names if name != "none" and takes_kernel_size(gate_factory(name))]
    if not swept:
        supported = [name for name in GATES if takes_kernel_size(gate_factory(name))]
        raise ValueError(f"kernel_sizes are for gates that have one, {listed(supported)}, got gates={shown(gates)}")
    sizes = [_parsed_kernel_size(text.strip()) for text in kernel_sizes.split(",")]
    return {name: change | {SWEEP: sizes} if name in swept else change for name, change in conditions.items()}


def _parsed_kernel_size(text: str) -> int | str:
    return int(text) if text.isdecimal() and len(text) < 6 else text


def expand_sweeps(conditions: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Replace each condition that has a list of kernel sizes by one for each size, named ``NAME, k=3``.

    Raises:
        ValueError: a list does not hold different odd integers and ``"adaptive"``, or two conditions get one name.
    """
    expanded: dict[str, dict[str, Any]] = {}
    for name, change in conditions.items():
        without_sweep = {key: value for key, value in change.items() if key != SWEEP}
        new = {name: without_sweep}
        if SWEEP in change:
            sizes = _checked_sizes(change[SWEEP], name)
            if "kernel_size" in without_sweep:
                raise ValueError(f"condition {shown(name)} must have kernel_size or {SWEEP}, got both")
            new = {f"{name}, k={size}": without_sweep | {"kernel_size": size} for size in sizes}
        if repeated := [new_name for new_name in new if new_name in expanded]:
            raise ValueError(f"conditions must have different names, got {shown(repeated[0])} twice")
        expanded |= new
    return expanded


def _checked_sizes(sizes: Any, name: str) -> list[int | str]:
    if isinstance(sizes, list) and 0 < len(sizes) <= 100:
        are_valid = all(size == "adaptive" or (type(size) is int and size > 0 and size % 2) for size in sizes)
        if are_valid and len(set(sizes)) == len(sizes):
            return sizes
        sizes = listed(map(str, sizes))
    raise ValueError(
        f"condition {shown(name)}: {SWEEP} must be different odd integers or adaptive, such as 1,3,5,adaptive, "
        f"got {shown(sizes)}"
    )


def recipes(recipe: Recipe, conditions: Mapping[str, Mapping[str, Any]]) -> dict[str, Recipe]:
    """The recipe of every condition.

    Args:
        recipe: What they share.
        conditions: What each changes in its block ``model``.

    Raises:
        ValueError: a condition is not valid; the message names it.
    """
    by_name = {}
    for name, change in expand_sweeps(conditions).items():
        try:
            by_name[name] = replace(recipe, model=replace(recipe.model, **change))
        except (TypeError, ValueError) as error:
            raise ValueError(f"condition {shown(name)}: {error}") from error
    return by_name


def digest(network: nn.Module) -> str:
    """A hash of a network's layers, with their arguments, and of all its tensors."""
    hasher = hashlib.sha256(repr(network).encode())
    for name, tensor in network.state_dict().items():
        hasher.update(name.encode())
        if isinstance(tensor, torch.Tensor):
            hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()
