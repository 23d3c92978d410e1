"""A gate in another module's place loads that module's state dicts and ignores its values in them."""

from typing import Any

from torch import nn

#: Attribute of a replacement: the keys of the module that it replaced.
REPLACED_KEYS = "replaced_keys"


def accept_replaced_keys_(new: nn.Module, old: nn.Module) -> None:
    """Let a module ignore the keys of the one that it replaces when it loads a state dict."""
    known = getattr(new, REPLACED_KEYS, ())
    setattr(new, REPLACED_KEYS, tuple(sorted({*known, *getattr(old, REPLACED_KEYS, ()), *old.state_dict()})))
    new.register_load_state_dict_pre_hook(_put_own_values)


def _put_own_values(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook that puts the module's own values into a state dict in place of the replaced module's."""
    own = module.state_dict()
    old_keys = [prefix + key for key in getattr(module, REPLACED_KEYS) if prefix + key in state]
    is_own = all(prefix + key in state and state[prefix + key].shape == value.shape for key, value in own.items())
    if is_own or not old_keys:
        return
    for key in old_keys:
        del state[key]
    state.update({prefix + key: value for key, value in own.items()})
