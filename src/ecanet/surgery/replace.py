"""Swap the attention of a network: its own, or gates that were inserted."""

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ecanet.networks.checks import check_input_shape, check_model
from ecanet.networks.cost import parameters
from ecanet.nn import Gate
from ecanet.nn.absent_gates import ATTACHED, keep_loading_
from ecanet.nn.attached import GATE, attached_gate
from ecanet.nn.build import GateFactory
from ecanet.nn.hooks import called_differently
from ecanet.nn.neutral import make_identity_
from ecanet.nn.norms import class_with_forward
from ecanet.nn.undo import Undo, all_or_nothing
from ecanet.surgery.find.dry_run import DryRun, dry_run
from ecanet.surgery.find.layers import ATTENTION, attention_in, certain_channels, names_of
from ecanet.surgery.find.sites import FilterFn
from ecanet.surgery.fitting import arguments_of, build_fitting_gate
from ecanet.surgery.optimizers import add_parameters_, check_optimizer, remove_parameters_
from ecanet.surgery.replaced_keys import accept_replaced_keys_
from ecanet.surgery.report import Report, Row, gate_row

#: Attributes that YOLO's network reads off its layers: index, source of the input, type and number of parameters.
_YOLO_ROW = ("i", "f", "type", "np")


#: Where a module keeps the hooks on its calls.
_CALL_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


#: Where a module keeps the hooks on its state dicts.
_STATE_DICT_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class _Swap(NamedTuple):
    name: str
    old: nn.Module
    new: nn.Module
    channels: int | None
    spatial: torch.Size | None


def replace_gates_(
    model: nn.Module,
    gate: str | GateFactory | Mapping[str, nn.Module] = "eca",
    *,
    kernel_size: int | Literal["adaptive"] = "adaptive",
    filter_fn: FilterFn | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    input_shape: Sequence[int] | Literal["auto"] | None = "auto",
) -> Report:
    """Swap every attention module of a network for a gate: squeeze-and-excitation for ECA, and back.

    It finds this library's gates wherever they are, and squeeze-and-excitation, ECA and similar modules of torchvision
    and timm (:data:`ecanet.surgery.ATTENTION`). The new gate takes the place and name of the old one, and the hooks on
    its calls. State dicts with the old one's keys still load: its values in them are ignored. A neutral gate becomes a
    neutral one of the same value, so the function stays the same. A trained gate only passes on its value at the start,
    such as 1 (factor 2 times the sigmoid of 0): the network needs fine-tuning. Attention that already is such a gate is
    left alone.

    Args:
        model: The network.
        gate: A name in :data:`ecanet.nn.GATES`, or a class or function of the number of channels; or a mapping from
            names of attention modules to new modules, such as ``replaced`` of an earlier report, which undoes that
            call.
        kernel_size: For gates that have one; ``"adaptive"`` is Eq. (12).
        filter_fn: Function of an attention module and its name that says whether to swap it.
        optimizer: The old gates' parameters are removed from it, and the new ones' added.
        input_shape: As in :func:`ecanet.insert_gates_`.

    Returns:
        What was swapped; ``replaced`` holds the old modules by name.

    Raises:
        TypeError: ``model`` is not a module, or is compiled, scripted or wrapped for parallel training.
        ValueError: the network has no attention, the gate cannot have that many channels, or the optimizer has none
            of the model's parameters. The network is then unchanged.

    Example:
        >>> import torchvision
        >>> model = torchvision.models.mobilenet_v3_small().eval()
        >>> report = replace_gates_(model, "eca")
        >>> len(report.rows), report.parameters
        (9, -461601)
        >>> back = replace_gates_(model, report.replaced)
        >>> back.parameters
        461601
    """
    check_model(model)
    check_optimizer(optimizer, model)
    if input_shape is not None and input_shape != "auto":
        check_input_shape(input_shape)
    attention = list(attention_in(model))
    registered = names_of(model)
    rows: list[Row] = []
    notes: list[str] = []
    with all_or_nothing(model, optimizer) as undo:
        if isinstance(gate, Mapping):
            swaps = list(_plan_named_swaps(dict(attention), gate, undo))
        else:
            swaps = _plan_swaps(model, attention, gate, kernel_size, filter_fn, input_shape, undo)
        for name, old, new, channels, spatial in swaps:
            row = gate_row(name, new, name.removesuffix(f".{GATE}"), channels, spatial)
            before = gate_row(name, old, "", channels, spatial).multiply_adds
            madds = None if row.multiply_adds is None or before is None else row.multiply_adds - before
            rows.append(row._replace(parameters=row.parameters - parameters(old), multiply_adds=madds))
        for name, old, new, _, _ in swaps:
            notes += _move_hooks_(name, old, new)
            notes += _notes_on_lost_changes(name, old, new)
            _install_(model, registered[old], old, new)
            remove_parameters_(optimizer, old.parameters())
            parent = model.get_submodule(name.rpartition(".")[0])
            add_parameters_(optimizer, new, name, parent)
        if swaps:
            keep_loading_(model)
    same = len(attention) - len(swaps)
    if swaps and same:
        notes.insert(0, f"{same} of the {len(attention)} attention modules stay as they are")
    return Report("replaced", tuple(rows), tuple(notes), {swap.name: swap.old for swap in swaps})


def channels_of(model: nn.Module, name: str, attention: nn.Module) -> int | None:
    """Number of channels that an attention module scales, from its layers or the layer registered before it."""
    if isinstance(attention, Gate):
        return attention.channels
    path = ATTENTION.get(class_with_forward(attention))
    if path is not None:
        layer = attention.get_submodule(path)
        return int(getattr(layer, "in_channels", 0) or getattr(layer, "in_features", 0)) or None
    parent_name, _, child_name = name.rpartition(".")
    known: int | None = None
    for sibling_name, sibling in model.get_submodule(parent_name).named_children():
        if sibling_name == child_name:
            return known
        known = certain_channels(sibling) or known
    return None


def _plan_swaps(
    model: nn.Module,
    attention: list[tuple[str, nn.Module]],
    gate: str | GateFactory,
    kernel_size: int | Literal["adaptive"],
    filter_fn: FilterFn | None,
    input_shape: Sequence[int] | Literal["auto"] | None,
    undo: Undo,
) -> list[_Swap]:
    if not attention:
        raise ValueError(
            f"{type(model).__name__} has no attention to replace (known: gates of ecanet, "
            f"{', '.join(name.rpartition('.')[2] for name in ATTENTION)}): insert_gates_ puts gates in"
        )
    wanted = [(name, old) for name, old in attention if filter_fn is None or filter_fn(old, name)]
    if not wanted:
        raise ValueError(f"filter_fn refuses all of the {len(attention)} attention modules")
    run = dry_run(model, input_shape)
    return [s for name, old in wanted if (s := _plan_swap(model, name, old, gate, kernel_size, run, undo)) is not None]


def _plan_swap(
    model: nn.Module,
    name: str,
    old: nn.Module,
    gate: str | GateFactory,
    kernel_size: int | Literal["adaptive"],
    run: DryRun | None,
    undo: Undo,
) -> _Swap | None:
    channels, spatial = channels_of(model, name, old), None
    shape = run.shapes[old].input if run is not None and old in run.shapes else None
    if run is not None and shape is not None and (run.failed is None or shape[1] == channels):
        channels, spatial = shape[1], shape[2:]
    like = next(old.parameters(), next(model.parameters(), None))
    new = build_fitting_gate(gate, kernel_size, name, old, channels, like, undo)
    if type(new) is type(old) and isinstance(new, Gate) and arguments_of(new) == arguments_of(old):
        return None
    constant = old.constant() if isinstance(old, Gate) else None
    if constant is not None:
        _make_constant_(name, new, constant)
    elif isinstance(old, Gate) and isinstance(new, Gate):
        new.factor = old.value_at_start / new.neutral_value
        new.starts_as_identity = old.starts_as_identity and _can_be_identity(new)
    accept_replaced_keys_(new, old)
    vars(new).update({key: value for key, value in vars(old).items() if key in _YOLO_ROW})
    return _Swap(name, old, new, channels, spatial)


def _can_be_identity(gate: Gate) -> bool:
    try:
        copy.deepcopy(gate).make_identity_()
    except ValueError:
        return False
    return True


def _make_constant_(name: str, gate: nn.Module, constant: float) -> None:
    """Make the new gate the constant that the old one was, so that the function stays the same."""
    try:
        make_identity_(gate)
    except ValueError as error:
        raise ValueError(
            f"{name} is neutral, and a gate in its place has to be, too: {error}; take another gate"
        ) from error
    if isinstance(gate, Gate):
        gate.factor *= constant
    elif constant != 1:
        raise ValueError(
            f"{name} is {constant:g}, and a {type(gate).__name__} has no factor for that; take another gate"
        )


def _plan_named_swaps(attention: dict[str, nn.Module], modules: Mapping[str, nn.Module], undo: Undo) -> Iterator[_Swap]:
    for name, module in modules.items():  # check all before any is changed
        if name not in attention:
            raise ValueError(
                f"gate names {name!r}, where the network has no attention: it has {', '.join(attention) or 'none'}"
            )
        if not isinstance(module, nn.Module):
            raise TypeError(f"gate[{name!r}] must be a module, got {type(module).__name__}")
    for name, module in modules.items():
        old = attention[name]
        if module is not old:
            undo.cover(module)
            like = next(old.parameters(), None)
            module = module if like is None else module.to(device=like.device, dtype=like.dtype)
            yield _Swap(name, old, module.train(old.training), None, None)


def _install_(model: nn.Module, names: list[str], old: nn.Module, new: nn.Module) -> None:
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        parent._modules[child] = new  # the order of the parent's hooks stays
        if child == GATE and attached_gate(parent) is not None:
            setattr(new, ATTACHED, True)
            vars(old).pop(ATTACHED, None)


def _move_hooks_(name: str, old: nn.Module, new: nn.Module) -> Iterator[str]:
    """Give the new gate the hooks on the old one's calls, and return notes on those that cannot move.

    A hook's handle refers to the dictionary that holds it, so the new gate gets the dictionary and not a copy: the
    handle still removes its hook. Hooks of pruning and the like act on the old weights, so they do not move.
    """
    for attribute in _CALL_HOOKS:
        theirs, own = vars(old)[attribute], vars(new)[attribute]
        if theirs is own or not theirs:
            continue
        if any(_is_for_weights(hook) for hook in getattr(theirs, "values", list)()):
            yield f"left behind: the hooks of {type(old).__name__} {name} for its weights, such as pruning"
        elif own:
            own.update(theirs)
        else:
            vars(new)[attribute] = theirs
    inner = [part for part, layer in old.named_modules() if part and called_differently(layer)]
    if inner:
        yield f"left behind: hooks inside {type(old).__name__} {name}, on {', '.join(inner)}"


def _notes_on_lost_changes(name: str, old: nn.Module, new: nn.Module) -> Iterator[str]:
    """Notes on other changes to the old gate that the new one does not have, such as frozen parameters."""
    what = f"{type(old).__name__} {name}"
    for part, layer in old.named_modules():
        if any(_is_foreign(hook) for hooks in _STATE_DICT_HOOKS for hook in _hooks_in(vars(layer).get(hooks))):
            yield f"left behind: the hooks on state dicts of {what}{f', on {part}' if part else ''}"
    own = [key for key, value in vars(old).items() if callable(value) and callable(getattr(type(old), key, None))]
    if own:
        yield f"left behind: the {', '.join(own)} that was set on {what} in place of its class's"
    frozen = [p for p in old.parameters() if not p.requires_grad]
    if frozen and any(p.requires_grad for p in new.parameters()):
        some = "" if len(frozen) == len(list(old.parameters())) else " in part"
        yield f"{what} was frozen{some}, and the {type(new).__name__} in its place is not"


def _hooks_in(hooks: Any) -> Iterable[Any]:
    return hooks.values() if isinstance(hooks, dict) else hooks or ()


def _is_foreign(hook: Any) -> bool:
    """Whether a hook on state dicts is neither this library's nor torch's."""
    hook = getattr(hook, "hook", hook)
    while isinstance(hook, functools.partial):
        hook = hook.func
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return not module.startswith(("ecanet.", "torch."))


def _is_for_weights(hook: object) -> bool:
    return type(hook).__module__.startswith("torch.nn.utils.")
