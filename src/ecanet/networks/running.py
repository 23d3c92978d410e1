"""Run a network, or a copy of it without data, observe its gates, and leave it unchanged."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ecanet.nn import Gate
from ecanet.private_torch import GLOBAL_HOOKS, FakeTensor, FakeTensorMode


def gates(model: nn.Module) -> dict[str, Gate]:
    """Every gate of a model by qualified name, in registration order (for ResNets, the order of the forward pass).

    Only subclasses of :class:`~ecanet.nn.Gate` count; a gate that several blocks share appears once.

    Example:
        >>> from ecanet.models import small_eca_resnet
        >>> {name: gate.channels for name, gate in gates(small_eca_resnet()).items()}
        {'layer1.0.eca': 32, 'layer2.0.eca': 64, 'layer3.0.eca': 128}
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, Gate)}


def example_tensor(model: nn.Module) -> Tensor:
    """A tensor like the model's first floating-point tensor in type and device; without one, float32 on the CPU."""
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))


@contextmanager
def without_hooks_on_all_modules() -> Iterator[None]:
    """Disable global forward hooks (those on all modules) inside the context."""
    kept = [dict(registry) for registry in GLOBAL_HOOKS]
    for registry in GLOBAL_HOOKS:
        registry.clear()
    try:
        yield
    finally:
        for registry, hooks in zip(GLOBAL_HOOKS, kept, strict=True):
            registry.update(hooks)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode without gradients, then restore each module's own mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Silence a logger."""
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def running_without_data(twin: nn.Module) -> Iterator[None]:
    """Make calls compute only shapes, in eval mode, without global hooks; the random generator is restored after it."""
    with (
        evaluating(twin),
        _only_shapes(),
        _quiet(_SHAPES_LOG),  # the caller reports what fails
        torch.random.fork_rng(devices=[]),
        without_hooks_on_all_modules(),
    ):
        yield


#: Where torch logs a traceback of every operation without data that fails, before it raises the error.
_SHAPES_LOG = logging.getLogger("torch._subclasses.fake_tensor")
_BATCH_NORM = torch.ops.aten.native_batch_norm.default


@functools.cache
def _mode_of_shapes() -> Any:
    class ModeOfShapes(FakeTensorMode):
        """Knows what a BatchNorm in eval mode returns: torch needs 20 operations for it, the time of 7 convolutions.

        Torch has compared the sizes of the operation's tensors before it calls this.
        """

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is not _BATCH_NORM or args[5] or not _are_fake_on_one_device(*args[:5]):
                return super().__torch_dispatch__(func, types, args, kwargs)
            return torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0)

    return ModeOfShapes


def _are_fake_on_one_device(x: Tensor, *weights: Tensor | None) -> bool:
    return isinstance(x, FakeTensor) and all(t is None or t.device == x.device for t in weights)


def _only_shapes() -> AbstractContextManager[Any]:
    return nullcontext() if FakeTensorMode is None else _mode_of_shapes()(allow_non_fake_inputs=True)


@contextmanager
def observing(model: nn.Module, observe: Callable[[str, Gate, Tensor], None]) -> Iterator[None]:
    """Call ``observe(name, gate, x)`` after every forward pass of every gate; x is the gate's input.

    Raises:
        ValueError: a gate never ran, so that the observations do not describe the model.
    """
    waiting = gates(model)
    handles = []

    def hook_for(name: str) -> Callable[..., None]:
        def hook(gate: Gate, args: tuple[Any, ...], kwargs: dict[str, Any], _: Tensor) -> None:
            waiting.pop(name, None)
            observe(name, gate, args[0] if args else kwargs["x"])

        return hook

    try:
        for name, gate in gates(model).items():
            handles.append(gate.register_forward_hook(hook_for(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
    if waiting:
        raise ValueError(
            f"model has gates whose forward did not run in eval mode: {', '.join(waiting)}; "
            "if they are fused or compiled, pass the original model; if they are unused, remove them"
        )
