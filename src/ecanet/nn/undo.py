"""Changes to a network happen completely or not at all."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Undo:
    """The state of modules and tensors before a change."""

    def __init__(self) -> None:
        self._modules: dict[nn.Module, tuple[type[nn.Module], _Snapshot]] = {}
        self._tensors: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def cover(self, module: nn.Module) -> None:
        """Record a module whose attributes, children, hooks, type, device and values may change."""
        self._cover_attributes(module)
        for part in module.modules():
            self.keep(t for t in (*part._parameters.values(), *part._buffers.values()) if t is not None)

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Record tensors whose values may be written, and their gradients."""
        for t in tensors:
            if id(t) not in self._tensors:
                self._tensors[id(t)] = t, t.data, t.detach().clone()
                if t.is_leaf and t.grad is not None:
                    self.keep([t.grad])

    def _cover_attributes(self, module: nn.Module) -> None:
        for part in module.modules():
            self._modules.setdefault(part, (type(part), _snapshot(vars(part))))

    def _put_back(self) -> None:
        for module, (cls, attributes) in self._modules.items():
            if type(module) is not cls:
                module.__class__ = cls
            _put_back(attributes)
        for t, memory, value in self._tensors.values():
            with torch.inference_mode() if t.is_inference() else torch.no_grad():
                if (t.dtype, t.device) != (memory.dtype, memory.device):
                    t.data = memory
                t.copy_(value)


@contextmanager
def all_or_nothing(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[Undo]:
    """If anything is raised inside, restore the network, its hooks and the optimizer bit for bit.

    Args:
        model: The network; its modules' classes, attributes, children and hooks are restored.
        optimizer: Its parameter groups and state are restored; or None.

    Yields:
        The record. Before a change, call its ``cover`` with any other module, and its ``keep`` with tensors whose
        values may be written.
    """
    undo = Undo()
    undo._cover_attributes(model)
    groups = [] if optimizer is None else [_snapshot(group) for group in optimizer.param_groups]
    state: Any = None if optimizer is None else optimizer.state
    kept = {} if state is None else dict(state)
    try:
        yield undo
    except BaseException:
        undo._put_back()
        for group in groups:
            _put_back(group)
        if state is not None:
            state.clear()
            state.update(kept)
        raise


_Snapshot = list[tuple[Any, Any]]


def _snapshot(attributes: dict[str, Any]) -> _Snapshot:
    """A dictionary and the dictionaries, lists and sets in it, which may be shared, each with a copy of its content."""
    containers = [attributes, *(value for value in attributes.values() if isinstance(value, (dict, list, set)))]
    return [(container, container.copy()) for container in containers]


def _put_back(snapshot: _Snapshot) -> None:
    for container, content in snapshot:
        if isinstance(container, list):
            container[:] = content
        else:
            container.clear()
            container.update(content)
