"""Where gates go: from the ``where=`` argument to modules of the network, and what is known of their outputs."""

import difflib
import fnmatch
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

from torch import nn

from ecanet.nn.attached import CONTAINERS, GATE, attached_gates
from ecanet.nn.norms import class_with_forward
from ecanet.surgery.find.blocks import CONCATENATED_LATER, WIDER_THAN_BRANCH, Branch, find_blocks
from ecanet.surgery.find.dry_run import DryRun, dry_run
from ecanet.surgery.find.equal import caching_answers
from ecanet.surgery.find.groups import find_groups
from ecanet.surgery.find.layers import CONVOLUTIONS, MERGES, is_empty, names_of, out_channels
from ecanet.surgery.find.traces import is_pooled

FilterFn: TypeAlias = Callable[[nn.Module, str], bool]
Where: TypeAlias = str | Sequence[str] | FilterFn

KINDS = ("block", "stage", "conv")


class Site(NamedTuple):
    """A module whose output a gate is to scale.

    Attributes:
        name: Name of the module.
        host: The module.
        channels: Number of channels of its output, or None if its layers do not show it.
        certain: Whether the network's code shows that this number is right.
    """

    name: str
    host: nn.Module
    channels: int | None
    certain: bool = False


@caching_answers()
def find_sites(
    model: nn.Module, where: Where, filter_fn: FilterFn | None, run: DryRun | None
) -> tuple[list[Site], list[str]]:
    """The modules to attach gates to, in the order of registration.

    Args:
        model: The network.
        where: As in :func:`ecanet.insert_gates_`.
        filter_fn: As in :func:`ecanet.insert_gates_`.
        run: A dry run of all modules, or None.

    Returns:
        The sites, and notes on what was left out.

    Raises:
        TypeError: ``where`` has a wrong type.
        ValueError: nothing is found; the message says what can be named instead.
    """
    if where in ("block", "stage"):
        return _at_blocks(model, str(where), filter_fn, run)
    names = names_of(model)
    channels_by_name: dict[str, int | None]
    notes: list[str] = []
    if where == "conv":
        groups = find_groups(model, names, {} if run is None else run.shapes)
        if run is not None:
            for name in _pooled_at_any_size(model, groups.ends, run):
                del groups.ends[name]
                groups.left_out.append(f"{name}: it works on features that are pooled to one position")
        channels_by_name, notes = {**groups.ends}, [f"left out: {what}" for what in groups.left_out]
        if not channels_by_name:
            more = f" ({'; '.join(groups.left_out[:3])})" if notes else ""
            raise ValueError(
                f"where='conv' finds no convolution with an activation after it{more}; {_what_to_name(model)}"
            )
    else:
        channels_by_name = dict.fromkeys(_names_matching(model, where))
    modules = dict(model.named_modules(remove_duplicate=False))
    sites: dict[nn.Module, Site] = {}
    if not channels_by_name:
        raise ValueError(f"where={where!r} names only gates that are already there; {_what_to_name(model)}")
    for name, channels in channels_by_name.items():
        if filter_fn is not None and not filter_fn(modules[name], name):
            continue
        site = _site(model, name, channels or out_channels(modules[name]))._replace(certain=channels is not None)
        sites.setdefault(site.host, site)
    if not sites:
        raise ValueError(f"filter_fn refuses all of the {len(channels_by_name)} modules that where={where!r} finds")
    return list(sites.values()), notes


def _pooled_at_any_size(model: nn.Module, names: Iterable[str], run: DryRun) -> list[str]:
    """The modules that return one position for any input size, not only for this input because of strides."""

    def pooled_in(names: Iterable[str], run: DryRun) -> list[str]:
        shapes = [(name, run.shapes.get(_site(model, name, None).host)) for name in names]
        return [name for name, shape in shapes if shape is not None and is_pooled(shape.output)]

    pooled = pooled_in(names, run)
    if not pooled or math.prod(run.input_shape[2:]) == 1:
        return []
    larger = dry_run(model, (*run.input_shape[:2], *(4 * size for size in run.input_shape[2:])))
    if larger is None or larger.failed is not None:
        return pooled
    return pooled_in(pooled, larger)


def _names_matching(model: nn.Module, where: object) -> list[str]:
    gates = tuple(f"{f'{name}.' if name else ''}{GATE}." for name, _, _ in attached_gates(model))
    names = [n for n, _ in model.named_modules(remove_duplicate=False) if n and not f"{n}.".startswith(gates)]
    if callable(where):
        matching = [name for name in names if where(model.get_submodule(name), name)]
        if not matching:
            raise ValueError(f"where={where!r} is true for no module; {_what_to_name(model)}")
        return matching
    patterns = [where] if isinstance(where, str) else where
    if not isinstance(patterns, Iterable) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(
            f"where must be one of {', '.join(map(repr, KINDS))}, names or patterns of modules, or a function of "
            f"module and name, got {where!r}"
        )
    matching = []
    for pattern in patterns:
        if pattern in KINDS:
            raise ValueError(f"where={where!r}: {pattern!r} stands alone, without other kinds, names or patterns")
        matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            close = difflib.get_close_matches(pattern, names, 3, 0.5)
            near = f"; close to it: {', '.join(close)}" if close else ""
            raise ValueError(
                f"where={pattern!r} is neither one of {', '.join(map(repr, KINDS))} nor the name of a module, nor a "
                f"pattern such as 'layer4.*.bn3' that fits one{near}; {_what_to_name(model)}"
            )
        matching += matched
    if not matching:
        raise ValueError(f"where={where!r} names nothing; {_what_to_name(model)}")
    return list(dict.fromkeys(matching))


def _what_to_name(model: nn.Module) -> str:
    """Modules that a user can name, as the end of an error message."""
    useful = [n for n, m in model.named_modules() if n and not isinstance(m, CONTAINERS) and out_channels(m)]
    shown = ", ".join([*useful[:4], "...", *useful[-4:]] if len(useful) > 9 else useful)
    return f"modules that can be named: {shown}" if useful else "it has no convolution or norm"


def _at_blocks(
    model: nn.Module, where: str, filter_fn: FilterFn | None, run: DryRun | None
) -> tuple[list[Site], list[str]]:
    shapes = {} if run is None else run.shapes
    branches, not_searched = find_blocks(model, shapes)
    if not branches:
        reasons = "; ".join(f"{name or 'the network itself'}: {why}" for name, why in list(not_searched.items())[:3])
        could_not = f" (not looked into: {reasons})" if not_searched else ""
        could_not += f" (the network {run.failed})" if run is not None and run.failed is not None else ""
        groups = "try where='conv', or " if find_groups(model, names_of(model), shapes).ends else ""
        raise ValueError(
            f"where={where!r} finds no residual block in {type(model).__name__}{could_not}: {groups}name modules; "
            f"{_what_to_name(model)}"
        )
    wanted = [b for b in branches if filter_fn is None or filter_fn(model.get_submodule(b.block), b.block)]
    if not wanted:
        raise ValueError(f"filter_fn refuses all of the {len(branches)} blocks that where={where!r} finds")
    notes = [
        f"not looked into: {name}: {why}"
        for name, why in not_searched.items()
        if why == MERGES or any(isinstance(child, CONVOLUTIONS) for child in model.get_submodule(name).children())
    ]
    if where == "stage":
        return _at_stages(model, wanted), notes
    possible = [branch for branch in wanted if branch.why_not is None]
    left_out = [f"left out: {branch.block}: {branch.why_not}" for branch in wanted if branch.why_not is not None]
    if not possible:
        more = f", and {len(wanted) - 1} more such blocks" if len(wanted) > 1 else ""
        raise ValueError(f"where='block' finds no place for a gate in {type(model).__name__}: {left_out[0]}{more}")
    sites: dict[nn.Module, Site] = {}
    for branch in possible:
        site = _site(model, branch.end, branch.channels)
        sites.setdefault(site.host, site)
    return list(sites.values()), notes + left_out


def _at_stages(model: nn.Module, branches: list[Branch]) -> list[Site]:
    """The sites at the last block of each stage: a run of blocks with the same parent and number of channels."""
    last: list[Branch] = []
    for branch in branches:
        block = model.get_submodule(branch.block)
        if class_with_forward(block) in CONCATENATED_LATER:
            raise ValueError(
                f"where='stage' does not work with {type(block).__name__}, whose output is concatenated with that of "
                "others: use where='block', or name modules"
            )
        if not branch.block or isinstance(block, CONTAINERS):
            raise ValueError(
                f"where='stage' needs blocks that are modules of their own, and {branch.end} is in the code of "
                f"{branch.block or 'the network itself'}: use where='block', or name modules"
            )
        same = last and _stage(last[-1]) == _stage(branch)
        last[-1:] = [branch] if same else [*last[-1:], branch]
    wider = [class_with_forward(model.get_submodule(branch.block)) in WIDER_THAN_BRANCH for branch in last]
    return [_site(model, b.block, None if more else b.channels) for b, more in zip(last, wider, strict=True)]


def _stage(branch: Branch) -> tuple[str, int | None]:
    return branch.block.rpartition(".")[0], branch.channels


def _site(model: nn.Module, name: str, channels: int | None) -> Site:
    """The site for a named module; for a sequence that is its last layer."""
    host = model.get_submodule(name)
    while isinstance(host, nn.Sequential) and type(host).forward is nn.Sequential.forward:
        last = next((key for key, child in reversed(host._modules.items()) if not is_empty(child)), None)
        if last is None:
            break
        host, name = host.get_submodule(last), f"{name}.{last}"
    if isinstance(host, CONTAINERS):
        raise ValueError(f"where: {name} is a {type(host).__name__}, which returns nothing: name a module in it")
    return Site(name, host, channels)
