"""State dicts from before gates came in load into the network with gates, strictly, and keep their function."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ecanet.models.neutral import Neutralisable
from ecanet.nn.hung import GATE, hung_gates
from ecanet.surgery.layers import affine

#: Set on a gate that took another module's place: the keys that module had.
STANDS_FOR = "stands_for"
#: Set on a gate that a state dict without gates is to make neutral, so that the network computes what it did without.
PRESERVES = "preserves"


def keep_loading_(model: nn.Module) -> None:
    """Let the network, and every part of it that holds gates, load state dicts of its original keys; others no more."""
    holders = set(_holders(model))
    for module in model.modules():
        hooks = module._load_state_dict_pre_hooks
        there = [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is _fill]
        if module in holders and not there:
            module.register_load_state_dict_pre_hook(_fill)
        for key in there if module not in holders else ():
            del hooks[key]


def _holders(model: nn.Module) -> Iterator[nn.Module]:
    """The modules above hosts, and above gates that took another module's place."""
    names = [name for name, _, _ in hung_gates(model)]
    names += [name for name, module in model.named_modules() if hasattr(module, STANDS_FOR)]
    parts = [name.split(".") for name in names if name]
    prefixes = {".".join(path[:i]) for path in parts for i in range(len(path))} | ({""} if names else set())
    return (model.get_submodule(prefix) for prefix in sorted(prefixes))


def without_values(gate: nn.Module) -> bool:
    """Whether a gate is on the device ``"meta"``."""
    return any(t.is_meta for t in (*gate.parameters(), *gate.buffers()))


@torch.no_grad()
def _fill(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The hook: adds to a state dict of the original keys what the gates need."""
    _fill_replaced(model, state, prefix)
    hung = list(hung_gates(model))
    gates = tuple(f"{_start(prefix, name)}{GATE}." for name, _, _ in hung)
    if not gates or any(key.startswith(gates) for key in state):
        return  # a state dict with gates
    ours = tuple(gate_prefix.removeprefix(prefix) for gate_prefix in gates)
    original = [k for k in model.state_dict() if not k.startswith(ours) and not k.endswith("num_batches_tracked")]
    for name, host, gate in hung:
        covering = _covering(name, original)
        if not covering or not all(prefix + key in state for key in covering):
            continue  # a part of the network is loaded, and not this one
        own, source = _start(prefix, name), gate
        if getattr(gate, PRESERVES, False):
            source, constant = _neutral(gate, device=state[prefix + covering[0]].device)
            tensors = affine(host)
            if getattr(source, "scale", None) is None and tensors is not None:
                for key in ("weight", "bias"):
                    state[own + key] = state[own + key] / constant
        state.update({f"{own}{GATE}.{key}": value for key, value in source.state_dict().items()})


def _start(prefix: str, name: str) -> str:
    return f"{prefix}{name}." if name else prefix


def _covering(name: str, original: list[str]) -> list[str]:
    """Keys that are there wherever the output of a module is loaded: its own, or of the part around it."""
    path = name.split(".") if name else []
    for i in range(len(path), -1, -1):
        start = ".".join(path[:i]) + "." if i else ""
        found = [key for key in original if key.startswith(start)]
        if found:
            return found
    return []


def _neutral(gate: nn.Module, device: torch.device) -> tuple[nn.Module, float]:
    """A neutral copy of a gate, with values on the device also where the gate has none yet, and its constant."""
    twin = copy.deepcopy(gate)
    if without_values(gate):
        twin = twin.to_empty(device=device)
        for module in twin.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    assert isinstance(twin, Neutralisable)
    constant = twin.make_neutral_()
    scale = getattr(twin, "scale", None)
    if isinstance(scale, Tensor):
        scale.fill_(1 / constant)
    return twin, constant


def _fill_replaced(model: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Drop the keys of modules whose place a gate took, and keep that gate."""
    for name, gate in model.named_modules():
        keys = getattr(gate, STANDS_FOR, None)
        if keys is None:
            continue
        own, start = gate.state_dict(), f"{prefix}{name}."
        found = {key for key in keys if start + key in state}
        is_own = all(start + key in state and state[start + key].shape == value.shape for key, value in own.items())
        if is_own or not found:
            continue
        for key in found:
            del state[start + key]
        state.update({start + key: value for key, value in own.items()})
