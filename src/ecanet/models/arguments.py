"""Checks on arguments of networks that come from a file: a recipe, a checkpoint, a folder of the Hub."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from ecanet.nn.build import check_gate_name
from ecanet.untrusted import check_number, listed, shown

_Check = Callable[[Any, str], None]
#: Most places for gates in one network, and most characters in the name of each.
_MAX_PLACES, _LONGEST_NAME = 1000, 300


def _number(low: float, high: float, *, whole: bool = True) -> _Check:
    def check(value: Any, what: str) -> None:
        check_number(value, what, low, high)
        if whole and not isinstance(value, int):
            raise TypeError(f"{what} must be a whole number, got {shown(value)}")

    return check


def _one_of(*values: Any) -> _Check:
    def check(value: Any, what: str) -> None:
        if not any(value is v or (type(value) is type(v) and value == v) for v in values):
            raise ValueError(f"{what} must be one of {', '.join(map(repr, values))}, got {shown(value)}")

    return check


def _list_of(item: _Check, most: int) -> _Check:
    def check(value: Any, what: str) -> None:
        if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= most:
            got = f"{len(value)} values" if isinstance(value, (list, tuple)) else shown(value)
            raise ValueError(f"{what} must be a list of 1 to {most} values, got {got}")
        for entry in value:
            item(entry, what)

    return check


def _or_none(check: _Check) -> _Check:
    return lambda value, what: None if value is None else check(value, what)


def _kernel_size(value: Any, what: str) -> None:
    if isinstance(value, str):
        _one_of("adaptive", "released")(value, what)
    elif isinstance(value, (list, tuple)):
        _list_of(_kernel_size, 16)(value, what)
    else:
        _number(1, 2**15)(value, what)


def _gate(value: Any, what: str) -> None:
    if value is None or value == "none":
        return
    if not isinstance(value, str):
        raise ValueError(f"{what} must be the name of a gate, 'none' or None, got {shown(value)}")
    try:
        check_gate_name(value, ", 'none' or None")
    except ValueError as error:
        raise ValueError(f"{what.removesuffix('gate')}{error}") from None


def _bool(value: Any, what: str) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{what} must be true or false, got {shown(value)}")


def _where(value: Any, what: str) -> None:
    places = [value] if isinstance(value, str) else value
    if not isinstance(places, (list, tuple)) or not 1 <= len(places) <= _MAX_PLACES:
        raise ValueError(f"{what} must be a name or a list of 1 to {_MAX_PLACES}, got {shown(value)}")
    if not all(isinstance(place, str) and len(place) <= _LONGEST_NAME for place in places):
        raise TypeError(f"{what} must be names of at most {_LONGEST_NAME} characters")


#: The check of each argument, for every network that has it. No check accepts a file, class or function.
CHECKS: dict[str, _Check] = {
    "depth": _one_of(18, 34, 50, 101, 152),
    "gate": _gate,
    "kernel_size": _kernel_size,
    "num_classes": _number(0, 1_000_000),
    "neutral": _bool,
    "factor": _or_none(_number(1e-6, 1e6, whole=False)),
    "fold": _bool,
    "widths": _list_of(_number(1, 16_384), 16),
    "blocks": _number(1, 256),
    "stem_stride": _number(1, 8),
    "width_mult": _number(1e-3, 16, whole=False),
    "dropout": _number(0, 1, whole=False),
    "drop_rate": _number(0, 1, whole=False),
    "in_chans": _number(1, 4096),
    "global_pool": _one_of("", "avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastmax"),
    "output_stride": _one_of(8, 16, 32),
    "zero_init_residual": _bool,
    "groups": _number(1, 1024),
    "width_per_group": _number(1, 4096),
    "replace_stride_with_dilation": _or_none(_list_of(_bool, 3)),
    "norm_layer": _one_of(None),
    "where": _where,
    "preserve": _or_none(_bool),
    "fuse": _bool,
    "input_size": _or_none(_number(1, 4096)),
}
_RESNET_OPTIONS = ("factor", "fold", "zero_init_residual", "groups", "width_per_group", "replace_stride_with_dilation")
#: What a recipe's ``model.options`` may hold, by the network's name.
OPTIONS: dict[str, tuple[str, ...]] = {
    **{f"eca_resnet{depth}": _RESNET_OPTIONS for depth in (18, 34, 50, 101, 152)},
    "eca_mobilenet_v2": ("factor", "fold", "width_mult", "dropout"),
    "small_eca_resnet": ("factor", "fold", "widths", "blocks", "stem_stride"),
}
#: What it may hold for a network that gates are inserted into.
OPTIONS_OF_INSERTION = ("fold", "fuse")


def check_arguments(arguments: object, source: str | Path, allowed: Collection[str]) -> dict[str, Any]:
    """Check that arguments from a file are known and in range, and return them.

    Args:
        arguments: Names to values.
        source: The file, for errors.
        allowed: Names that may occur.

    Returns:
        The arguments.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a name is unknown or a value out of range; says which.

    Example:
        >>> check_arguments({"widths": [16, 32]}, "recipe.yaml", OPTIONS["small_eca_resnet"])
        {'widths': [16, 32]}
    """
    where = shown(str(source), 200)
    if not isinstance(arguments, Mapping):
        raise TypeError(f"{where} must hold names of arguments and their values, got {shown(arguments)}")
    unknown = [name for name in arguments if not isinstance(name, str) or name not in allowed or name not in CHECKS]
    if unknown:
        raise ValueError(f"{where} has {listed(map(str, unknown), 5)}, and the network takes {', '.join(allowed)}")
    for name, value in arguments.items():
        CHECKS[name](value, f"{where}: {name}")
    return dict(arguments)
