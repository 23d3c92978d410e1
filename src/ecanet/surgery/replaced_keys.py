"""A gate in another module's place loads that module's state dicts: what they hold for it is left out."""

from typing import Any

from torch import nn

#: Set on a module that took another one's place: the keys that one had.
REPLACED_KEYS = "replaced_keys"


def accept_replaced_keys_(new: nn.Module, old: nn.Module) -> None:
    """Let a module pass over the keys of the one whose place it takes, whose values are of no use any more."""
    known = getattr(new, REPLACED_KEYS, ())
    setattr(new, REPLACED_KEYS, tuple(sorted({*known, *getattr(old, REPLACED_KEYS, ()), *old.state_dict()})))
    new.register_load_state_dict_pre_hook(_keep_own)


def _keep_own(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The hook: where a state dict holds the other one's values, the module's own take their place."""
    own = module.state_dict()
    found = [prefix + key for key in getattr(module, REPLACED_KEYS) if prefix + key in state]
    is_own = all(prefix + key in state and state[prefix + key].shape == value.shape for key, value in own.items())
    if is_own or not found:
        return
    for key in found:
        del state[key]
    state.update({prefix + key: value for key, value in own.items()})
