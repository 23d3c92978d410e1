"""Checks that every operation on a whole network makes before it changes anything."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parameter import is_lazy

from ecanet.private_torch import is_compiled


def check_model(model: object) -> None:
    """Raise unless a network can be changed or copied as it is.

    Raises:
        TypeError: it is not a module; it or a part of it is compiled, scripted or wrapped for parallel training; or it
            has uninitialised parameters. The message says what to pass.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if any(cls.__module__ == "ultralytics.engine.model" for cls in type(model).__mro__):
        raise TypeError(f"model is Ultralytics' {type(model).__name__}, which holds the network: pass its .model")
    for name, module in model.named_modules():
        where = f"model.{name}" if name else "model"
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or _is_sharded(module):
            raise TypeError(
                f"{where} is wrapped for parallel training ({type(module).__name__}): pass the plain model, such as "
                "model.module, and wrap the result, so that all processes know of its parameters"
            )
        if is_compiled(module):
            raise TypeError(f"{where} is compiled: pass the model before torch.compile, and compile the result")
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{where} is scripted or traced: pass the original model")
        if any(is_lazy(parameter) for parameter in module._parameters.values()):
            raise TypeError(f"{where} has parameters that are not initialised: run it once on an input first")


def check_input_shape(input_shape: object) -> None:
    """Raise unless the argument is a valid input shape.

    Raises:
        TypeError: it is not a sequence of integers.
        ValueError: it is empty, or a size is below 1.
    """
    if not isinstance(input_shape, Sequence) or not all(type(size) is int for size in input_shape):
        raise TypeError(f"input_shape must be a sequence of integers such as (1, 3, 224, 224), got {input_shape!r}")
    if not input_shape or min(input_shape) < 1:
        raise ValueError(f"input_shape must have sizes of 1 or more, such as (1, 3, 224, 224), got {input_shape!r}")


def _is_sharded(module: nn.Module) -> bool:
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return isinstance(module, (FSDPModule, FullyShardedDataParallel))
