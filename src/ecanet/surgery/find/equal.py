"""Caches answers about modules: equal ones have the same class, settings and layers inside, and share an answer."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Answer(NamedTuple):
    """An answer about a module.

    Attributes:
        value: The answer.
        holds_for_equal_ones: False if it may depend on more than :func:`description_of` compares.
    """

    value: Any
    holds_for_equal_ones: bool = True


_answers: ContextVar[dict[Hashable, Any] | None] = ContextVar("answers", default=None)


@contextmanager
def caching_answers() -> Iterator[None]:
    """Cache the answers of functions under :func:`cached_by_module` inside the context; no module may change in it."""
    token = _answers.set({})
    try:
        yield
    finally:
        _answers.reset(token)


def cached_by_module(ask: Callable[[nn.Module], Answer]) -> Callable[[nn.Module], Any]:
    """Inside :func:`caching_answers`, call a function of a module once for each module, or once for all equal ones."""

    @functools.wraps(ask)
    def cached(module: nn.Module) -> Any:
        answers = _answers.get()
        if answers is None:
            return ask(module).value
        if (ask, module) not in answers:
            description = description_of(module)
            if description is not None and (ask, description) in answers:
                answers[ask, module] = answers[ask, description]
            else:
                answer = ask(module)
                answers[ask, module] = answer.value
                if answer.holds_for_equal_ones and description is not None:
                    answers[ask, description] = answer.value
        return answers[ask, module]

    return cached


#: Larger modules are hardly ever equal, and comparing them takes time.
_MAX_MODULES = 100
_COMPARED_BY_VALUE = (
    *(NoneType, bool, int, float, complex, str, bytes),
    *(torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: What a module stores for its state dict, and the numbers of its hooks.
_NOT_COMPARED = frozenset(
    {
        *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
        *("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"),
        "_non_persistent_buffers_set",
    }
)


class _Same:
    """Equal only to a ``_Same`` of the same object. It holds the object, so that no other object gets its address."""

    __slots__ = ("thing",)

    def __init__(self, thing: object) -> None:
        self.thing = thing

    def __hash__(self) -> int:
        return id(self.thing)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.thing is self.thing


def description_of(module: nn.Module) -> Hashable | None:
    """A key that two modules share only if the code of both does the same; None for a module of many modules.

    It compares classes, all attributes, the modules inside and the hooks on calls. Parameters and buffers are compared
    by their kind, and by which of them are the same tensor, not by their values. An object of an unknown kind is equal
    only to itself. That includes each tensor or module that is a plain attribute.
    """
    for count, _ in enumerate(module.modules(), 1):
        if count > _MAX_MODULES:
            return None
    return _Describer().of_module(module)


class _Describer:
    """Describes objects: in full the first time, and by a number if they occur again."""

    def __init__(self) -> None:
        self.numbers: dict[_Same, int] = {}

    def seen(self, thing: object) -> int | None:
        number = self.numbers.get(_Same(thing))
        if number is None:
            self.numbers[_Same(thing)] = len(self.numbers)
        return number

    def of_module(self, module: nn.Module | None) -> Hashable:
        if module is None:
            return None
        if (number := self.seen(module)) is not None:
            return number
        return type(module), *(
            (name, self.of_attribute(name, value)) for name, value in vars(module).items() if name not in _NOT_COMPARED
        )

    def of_attribute(self, name: str, value: Any) -> Hashable:
        if name == "_modules":
            return tuple((child_name, self.of_module(child)) for child_name, child in value.items())
        if name in ("_parameters", "_buffers"):
            return tuple((own_name, self.of_tensor(t)) for own_name, t in value.items())
        if name in _HOOKS:
            return tuple(map(_Same, value.values()))
        return self.of_value(value)

    def of_tensor(self, t: Tensor | None) -> Hashable:
        if t is None or type(t) not in (Tensor, nn.Parameter):
            return _Same(t)
        number = self.seen(t)
        return (type(t), t.shape, t.dtype, t.device, t.requires_grad) if number is None else number

    def of_value(self, value: Any) -> Hashable:
        kind = type(value)
        if kind in _COMPARED_BY_VALUE:
            return kind, value
        if kind is tuple:
            return kind, *map(self.of_value, value)
        if kind not in (list, dict, OrderedDict):
            return _Same(value)
        if (number := self.seen(value)) is not None:
            return number
        return kind, *map(self.of_value, value if kind is list else value.items())
