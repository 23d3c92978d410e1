"""Copies of networks that can run in place of the original."""

import contextlib
import copy
import functools
import types
import weakref
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from ecanet.nn.attached import is_hook_of_a_gate


def twin_of(model: nn.Module) -> nn.Module:
    """A copy of a network's modules that shares its tensors and leaves out users' forward and backward hooks.

    State that a run changes stays in the copy. Hooks need not be copyable. A function assigned to a module, such as its
    own ``forward``, works on the copy.

    Raises:
        TypeError: copying a module of the network returns the module itself.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        own = vars(module)
        for t in (*module._parameters.values(), *module._buffers.values(), *own.values()):
            if isinstance(t, Tensor):
                memo[id(t)] = t
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            hooks = own[name]
            memo[id(hooks)] = OrderedDict((key, hook) for key, hook in hooks.items() if is_hook_of_a_gate(hook))
    twin = copy.deepcopy(model, memo)
    originals = {*model.modules()}
    if (shared := next((module for module in twin.modules() if module in originals), None)) is not None:
        raise TypeError(f"a {type(shared).__name__} is its own copy")
    for module in twin.modules():
        for name, value in vars(module).items():
            vars(module)[name] = _redirected(value, memo)
    return twin


def _redirected(value: Any, memo: dict[int, Any]) -> Any:
    """A value with its references to the original pointed at the copy.

    :func:`copy.deepcopy` does not copy functions and weak references, so they still refer to the original.

    Args:
        value: Value of an attribute of the copy.
        memo: The memo of the deep copy.
    """
    if isinstance(value, types.FunctionType):
        return _redirected_function(value, memo)
    if isinstance(value, types.MethodType):
        function: Any = _redirected(value.__func__, memo)
        return value if function is value.__func__ else types.MethodType(function, value.__self__)
    if isinstance(value, functools.partial):
        arguments = [_redirected(v, memo) for v in value.args]
        named = {key: _redirected(v, memo) for key, v in value.keywords.items()}
        return functools.partial(_redirected(value.func, memo), *arguments, **named)
    if type(value) is weakref.ref:
        referent = memo.get(id(value()))
        return value if referent is None else weakref.ref(referent)
    if type(value) in (list, dict):
        if id(value) in memo:
            return value  # seen before: it contains itself
        memo[id(value)] = value
    if type(value) is list:
        value[:] = [_redirected(v, memo) for v in value]
    elif type(value) is dict:
        value.update({key: _redirected(v, memo) for key, v in value.items()})
    elif type(value) is tuple:
        return tuple(_redirected(v, memo) for v in value)
    return value


def _redirected_function(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    """A function with the same code, whose closure variables and defaults are copies."""
    if id(function) in memo:
        return memo[id(function)]
    cells = tuple(types.CellType() for _ in function.__closure__ or ())
    new = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
    memo[id(function)] = functools.update_wrapper(new, function)
    vars(new).pop("__wrapped__")

    def copied(value: Any) -> Any:
        try:
            return _redirected(copy.deepcopy(value, memo), memo)
        except Exception:  # cannot be copied, such as a lock or a file
            return value

    new.__defaults__, new.__kwdefaults__ = copied(function.__defaults__), copied(function.__kwdefaults__)
    for cell, own in zip(cells, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a variable without a value yet
            cell.cell_contents = copied(own.cell_contents)
    return new
