"""Refusals that every operation shares, before anything is done."""

import torch
from torch import nn

_WRAPPERS = (
    nn.parallel.DistributedDataParallel,
    nn.DataParallel,
    torch.distributed.fsdp.FullyShardedDataParallel,
)


def check_model(model: object) -> None:
    """Raise unless surgery may be done on a network.

    Raises:
        TypeError: it is no module, or is compiled, scripted or wrapped for parallel training; says what to pass.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        where = "model is" if not name else f"model.{name} is"
        if isinstance(module, _WRAPPERS):
            raise TypeError(
                f"{where} wrapped in {type(module).__name__}: do surgery on the plain model first and wrap the result, "
                "so that the processes know of the new parameters"
            )
        if isinstance(module, torch.distributed.fsdp.FSDPModule):
            raise TypeError(f"{where} sharded by fully_shard: do surgery first, and shard the result")
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
            raise TypeError(
                f"{where} compiled: do surgery on the model from before torch.compile, and compile the result"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"{where} scripted or traced: do surgery on the model from before that, and script the result"
            )
