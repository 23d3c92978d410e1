"""The conditions of a study of recipes: what each changes in the network, and which of them are the same network."""

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

#: Fields of a recipe's block ``model`` that say which network it is. A condition may set the others: what changes more
#: than the gates would be compared along with them.
_BACKBONE = ("name", "weights", "options", "build")
#: What a condition may say.
SETTINGS = tuple(field.name for field in fields(ModelConfig) if field.name not in _BACKBONE)
#: What a condition may say as well: a list of kernel sizes, each of which makes a condition of it.
SWEEP = "kernel_sizes"


def of_gates(gates: str, kernel_sizes: str | None) -> dict[str, dict[str, Any]]:
    """Conditions from the options of a command line.

    Args:
        gates: Names of gates with commas between them, the baseline first; ``none`` for none.
        kernel_sizes: Odd integers and ``adaptive`` with commas between them: every gate that has a kernel size is a
            condition with each.

    Raises:
        ValueError: a gate is unknown or there twice; something else is no kernel size, or no gate has one.
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
        having = [name for name in GATES if takes_kernel_size(gate_factory(name))]
        raise ValueError(f"kernel_sizes are for gates that have one, {listed(having)}, got gates={shown(gates)}")
    sizes = [_kernel_size(text.strip()) for text in kernel_sizes.split(",")]
    return {name: change | {SWEEP: sizes} if name in swept else change for name, change in conditions.items()}


def _kernel_size(text: str) -> int | str:
    return int(text) if text.isdecimal() and len(text) < 6 else text


def expanded(conditions: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The conditions with a list of kernel sizes as one for each, called ``NAME, k=3``.

    Raises:
        ValueError: such a list is none of different odd integers and ``"adaptive"``, or two conditions then have one
            name.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, change in conditions.items():
        plain = {key: value for key, value in change.items() if key != SWEEP}
        each = {name: plain}
        if SWEEP in change:
            sizes = _checked(change[SWEEP], name)
            if "kernel_size" in plain:
                raise ValueError(f"condition {shown(name)} must have kernel_size or {SWEEP}, got both")
            each = {f"{name}, k={size}": plain | {"kernel_size": size} for size in sizes}
        if twice := [one for one in each if one in found]:
            raise ValueError(f"conditions need different names, and {shown(twice[0])} is there twice")
        found |= each
    return found


def _checked(sizes: Any, name: str) -> list[int | str]:
    if isinstance(sizes, list) and 0 < len(sizes) <= 100:
        right = all(size == "adaptive" or (type(size) is int and size > 0 and size % 2) for size in sizes)
        if right and len(set(sizes)) == len(sizes):
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
        ValueError: a condition is none; the message names it.
    """
    found = {}
    for name, change in expanded(conditions).items():
        try:
            found[name] = replace(recipe, model=replace(recipe.model, **change))
        except (TypeError, ValueError) as error:
            raise ValueError(f"condition {shown(name)}: {error}") from error
    return found


def digest(network: nn.Module) -> str:
    """A hash of a network's layers, with their arguments, and of all its tensors."""
    found = hashlib.sha256(repr(network).encode())
    for name, tensor in network.state_dict().items():
        found.update(name.encode())
        if isinstance(tensor, torch.Tensor):
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
