"""Processes that train one network together, each in a way of its own: what test_protocol.py compares.

Three of them meet over gloo on the CPU; where there are three GPUs, over NCCL with one each. A process that takes part
in another collective than the others is an error of theirs, at once or after a minute of waiting.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.modules import _functions
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

import ecanet
from ecanet.nn import build_gate, norm_gate_add_act
from ecanet.ops import cpu, gpu
from tests import fresh

C = 4
DEVICE = "cuda" if torch.cuda.device_count() >= 3 else "cpu"


class Block(nn.Module):
    def __init__(self, gate: str | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(C)
        self.gate = None if gate is None else build_gate(gate, C)
        self.checkpoint: bool | None = None  # reentrant or not

    def body(self, x: Tensor) -> Tensor:
        return norm_gate_add_act(self.conv(x), self.norm, self.gate, x, "relu")

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpoint is None:
            return self.body(x)
        return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=self.checkpoint)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(Block("eca"), Block("se"), Block(None)).double()
    for block in net:
        nn.init.uniform_(block.norm.weight, 0.5, 1.5)
    return net


# --- ways to run ---------------------------------------------------------------------------------------------------


def _see(*_: Any) -> None:
    """A hook that looks on."""


def as_it_is(net: nn.Sequential, stack: contextlib.ExitStack) -> None:
    pass


def reference(net: nn.Sequential, stack: contextlib.ExitStack) -> None:
    stack.enter_context(ecanet.backend("reference"))


def interpreted(net: nn.Sequential, stack: contextlib.ExitStack) -> None:
    stack.enter_context(ecanet.backend("triton"))


def without_library(net: nn.Sequential, stack: contextlib.ExitStack) -> None:
    stack.enter_context(mock.patch.object(cpu, "_reason", "the C++ kernels are not built"))
    stack.enter_context(mock.patch.object(ecanet.ops.backend, "_has_warned", True))


def hook_on(child: str, register: str) -> Callable[[nn.Sequential, contextlib.ExitStack], None]:
    def way(net: nn.Sequential, stack: contextlib.ExitStack) -> None:
        for block in net:
            if getattr(block, child) is not None:
                stack.callback(getattr(getattr(block, child), register)(_see).remove)

    return way


def global_hook(net: nn.Sequential, stack: contextlib.ExitStack) -> None:
    stack.callback(nn.modules.module.register_module_forward_hook(_see).remove)


def attached(net: nn.Sequential, stack: contextlib.ExitStack) -> None:
    for block in net:
        if block.gate is not None:
            ecanet.nn.attached.attach_(block.norm, block.gate)
            block.gate = None


def attached_and_hooked(net: nn.Sequential, stack: contextlib.ExitStack) -> None:
    attached(net, stack)
    hook_on("norm", "register_forward_hook")(net, stack)


def compiled(net: nn.Sequential, stack: contextlib.ExitStack) -> None:
    for block in net:
        block.body = torch.compile(block.body, backend="eager")


class TorchsOwn(nn.SyncBatchNorm):
    """Torch's SyncBatchNorm with torch's collectives; the five kernels that it has for GPUs alone are formulas here."""

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        buffers = self.running_mean, self.running_var, self.eps, self.momentum
        group = self.process_group
        return _functions.SyncBatchNorm.apply(x, self.weight, self.bias, *buffers, group, dist.get_world_size(group))


def _over(t: Tensor) -> Tensor:
    return t.reshape(-1, 1, 1)


def _stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.mean((0, 2, 3)), (x.var((0, 2, 3), correction=0) + eps).rsqrt()


def _gather(x: Any, means: Tensor, inverses: Tensor, mean: Any, var: Any, momentum: float, eps: float, counts: Tensor):
    n = counts.sum()
    m = (means * counts[:, None]).sum(0) / n
    v = ((inverses**-2 - eps + (means - m) ** 2) * counts[:, None]).sum(0) / n
    mean.lerp_(m, momentum)
    var.lerp_(v * n / (n - 1), momentum)
    return m, (v + eps).rsqrt()


def _elemt(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, eps: float) -> Tensor:
    return (x - _over(mean)) * _over(inverse * weight) + _over(bias)


def _reduce(grad: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, *_: Any) -> tuple[Tensor, ...]:
    sums = grad.sum((0, 2, 3)), (grad * (x - _over(mean))).sum((0, 2, 3))
    return *sums, sums[1] * inverse, sums[0]


def _backward(grad: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, dy: Tensor, dy_xmu: Tensor, n):
    n = n.sum()
    centered = grad - _over(dy / n) - (x - _over(mean)) * _over(inverse**2 * dy_xmu / n)
    return centered * _over(inverse * weight)


def torchs_own(net: nn.Sequential, stack: contextlib.ExitStack) -> None:
    for name, formula in (
        ("batch_norm_stats", _stats),
        ("batch_norm_gather_stats_with_counts", _gather),
        ("batch_norm_elemt", _elemt),
        ("batch_norm_backward_reduce", _reduce),
        ("batch_norm_backward_elemt", _backward),
    ):
        stack.enter_context(mock.patch.object(torch, name, formula))
    for block in net:
        norm = TorchsOwn(C, process_group=block.norm.process_group).double().to(DEVICE)
        norm.load_state_dict(block.norm.state_dict())
        block.norm = norm


class OfSomebody(nn.SyncBatchNorm):
    """A subclass that changes nothing; a parametrised norm is one, too."""


def subclassed(net: nn.Sequential, stack: contextlib.ExitStack) -> None:
    for block in net:
        block.norm.__class__ = OfSomebody


WAYS: dict[str, Callable[[nn.Sequential, contextlib.ExitStack], None]] = {
    "as it is": as_it_is,
    "reference": reference,
    "no library": without_library,
    "hook on the norm": hook_on("norm", "register_forward_hook"),
    "hook before the norm": hook_on("norm", "register_forward_pre_hook"),
    "backward hook on the norm": hook_on("norm", "register_full_backward_hook"),
    "hook on the gate": hook_on("gate", "register_forward_hook"),
    "global hook": global_hook,
    "a subclass": subclassed,
    "gate is attached to the norm": attached,
    "gate is attached to a hooked norm": attached_and_hooked,
    "torch's own": torchs_own,
}
#: Slower, and tried with each other alone.
SLOW_WAYS = {"compiled": compiled} | ({"triton, interpreted": interpreted} if gpu.interpreting() else {})

DDP_CASE = "DDP, a collective for each parameter"
#: Samples of each process; whether blocks are checkpointed, reentrant or not; whether DistributedDataParallel adds the
#: gradients up, whose collectives come between those of the norms.
CASES: dict[str, dict[str, Any]] = {
    "equal batches": {"samples": (2, 2, 1)},
    "uneven batches": {"samples": (1, 4, 2)},
    "an empty batch": {"samples": (3, 0, 2)},
    "checkpointed": {"samples": (2, 1, 2), "checkpoint": False},
    "checkpointed, reentrant": {"samples": (2, 1, 0), "checkpoint": True},
    DDP_CASE: {"samples": (1, 2, 2), "ddp": True},
}


def plan(world: int) -> list[tuple[str, tuple[str, ...]]]:
    """Cases, and a way for each process: all pairs of two, and every way beside two others of three."""
    cases, ways = itertools.cycle(CASES), list(WAYS)
    if world == 2:
        together = list(itertools.product(ways, ways))
        together += [(*SLOW_WAYS, "as it is")[:2]]
    else:
        together = [
            tuple(ways[(i + step * r) % len(ways)] for r in range(3)) for i in range(len(ways)) for step in (1, 4)
        ]
    with_ddp = [(way, "as it is") for way in ways] + [("reference", way) for way in ways] if world == 2 else []
    return [(next(cases), ways) for ways in together] + [(DDP_CASE, ways) for ways in with_ddp]


def training_step(
    case: dict[str, Any], way: str, world: int, rank: int | None = None, group: Any = None
) -> dict[str, Tensor]:
    """A step or two on the samples of one process, or of all as one: outputs, gradients, statistics."""
    samples = case["samples"][:world]
    with contextlib.ExitStack() as stack:
        net = network().to(DEVICE)
        if rank is not None:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net, group)
        norms = [block.norm for block in net]
        (WAYS | SLOW_WAYS)[way](net, stack)
        norms = [
            new if isinstance(new := block.norm, TorchsOwn) else old for block, old in zip(net, norms, strict=True)
        ]
        for block in net:
            block.checkpoint = case.get("checkpoint")
        first = 0 if rank is None else sum(samples[:rank])
        count = sum(samples) if rank is None else samples[rank]
        seen, model = {}, net
        if case.get("ddp") and rank is not None:
            stack.enter_context(mock.patch.object(DDP, "_passing_sync_batchnorm_handle"))
            model = DDP(net, process_group=group, bucket_cap_mb=1e-6)
        for step in range(2 if case.get("ddp") else 1):  # DDP sorts its buckets anew after the first
            generator = torch.Generator().manual_seed(step)
            x, dout = (torch.randn(sum(samples), C, 4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
            mine = x[first : first + count].to(DEVICE, copy=True).requires_grad_()
            out = model(mine)
            out.backward(dout[first : first + count].to(DEVICE))
            seen |= {f"output {step}": out.detach(), f"gradient of x {step}": mine.grad}
    for i, (block, norm) in enumerate(zip(net, norms, strict=True)):
        gate = block.gate if block.gate is not None else norm._modules.get("gate")
        for kind, module in (("conv", block.conv), ("norm", norm), ("gate", gate)):
            parameters = () if module is None else module.named_parameters(recurse=kind == "gate")
            # Torch's SyncBatchNorm gives an empty batch no gradients at all.
            of_all = "mean" if case.get("ddp") else "sum"
            seen |= {
                f"{of_all} {i} {kind}.{k}": torch.zeros_like(p) if p.grad is None else p.grad for k, p in parameters
            }
        seen |= {f"same {i} {key}": getattr(norm, key) for key in ("running_mean", "running_var")}
    return {key: t.cpu() for key, t in seen.items()}


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":  # not by the machine's name, which need not lead anywhere
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    patience = timedelta(seconds=60)  # where the processes wait for each other in vain
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", timeout=patience, rank=rank, world_size=3)
    try:
        groups = {world: dist.new_group(range(world)) for world in (2, 3)}
        for world, group in groups.items():
            if rank < world:
                seen = [training_step(CASES[case], ways[rank], world, rank, group) for case, ways in plan(world)]
                torch.save(seen, f"{folder}/{rank} of {world}.pt")
    finally:
        dist.destroy_process_group()


def run_in_processes(folder: Path) -> Iterator[tuple[int, str, tuple[str, ...], list[dict[str, Tensor]]]]:
    """How many processes share the norms, the case, the ways of each, and what each of them saw."""
    fresh.run_ranks(_process, (str(folder),), 3)
    for world in (2, 3):
        seen = [torch.load(folder / f"{rank} of {world}.pt", weights_only=True) for rank in range(world)]
        for (case, ways), *each in zip(plan(world), *seen, strict=True):
            yield world, case, ways, each
