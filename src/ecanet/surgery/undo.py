"""Surgery happens as a whole or not at all."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def all_or_nothing(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, tensors: Iterable[Tensor] = ()
) -> Iterator[None]:
    """Whatever is raised inside, the network, its hooks and the optimizer are bit for bit what they were.

    Args:
        model: Its modules keep their classes, attributes, children and hooks.
        optimizer: Its groups and what it keeps for parameters, or None.
        tensors: Whose values may be written.
    """
    modules = [(module, type(module), _snapshot(vars(module))) for module in model.modules()]
    groups = [] if optimizer is None else [_snapshot(group) for group in optimizer.param_groups]
    state: Any = None if optimizer is None else optimizer.state
    kept = {} if state is None else dict(state)
    values = [(t, t.detach().clone()) for t in tensors]
    try:
        yield
    except BaseException:
        for module, cls, attributes in modules:
            if type(module) is not cls:
                module.__class__ = cls
            _put_back(attributes)
        for group in groups:
            _put_back(group)
        if state is not None:
            state.clear()
            state.update(kept)
        with torch.no_grad():
            for t, value in values:
                t.copy_(value)
        raise


_Snapshot = list[tuple[Any, Any]]


def _snapshot(attributes: dict[str, Any]) -> _Snapshot:
    """A dictionary and what it holds, and so for the dictionaries, lists and sets in it, which others may hold, too."""
    containers = [attributes, *(value for value in attributes.values() if isinstance(value, (dict, list, set)))]
    return [(container, container.copy()) for container in containers]


def _put_back(snapshot: _Snapshot) -> None:
    for container, content in snapshot:
        if isinstance(container, list):
            container[:] = content
        else:
            container.clear()
            container.update(content)
