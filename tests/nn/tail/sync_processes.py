"""One training step of a tail with SyncBatchNorm, in one process or shared by two: test_sync_batch_norm.py compares.

The two meet over gloo on the CPU; where there are two GPUs, over NCCL with one each.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ecanet.nn import build_gate, norm_gate_add_act
from ecanet.nn.attached import attach_
from tests import fresh

C = 16

#: Gate, activation, samples of each process and arguments of the norm; whether the gate is attached to the norm, and
#: whether x requires a gradient.
CASES: dict[str, dict[str, Any]] = {
    "no gate": {"gate": None, "act": "relu", "samples": (2, 2)},
    "eca": {"gate": "eca", "act": "relu", "samples": (2, 2)},
    "se": {"gate": "se", "act": "relu", "samples": (2, 2)},
    "unequal batches": {"gate": "eca", "act": "silu", "samples": (1, 4)},
    "one value per channel in a process": {"gate": "eca", "act": None, "samples": (1, 2), "size": ()},
    "cumulative average": {"gate": "eca", "act": "relu", "samples": (3, 1), "norm": {"momentum": None}},
    "not affine": {"gate": "se", "act": "relu", "samples": (2, 1), "norm": {"affine": False}},
    "channels last": {"gate": "eca", "act": "relu", "samples": (2, 3), "last": True},
    "variances": {"gate": "gct", "act": "relu", "samples": (2, 1), "last": True},
    "variances and a shift": {"gate": "grn", "act": "silu", "samples": (1, 2)},
    "a gate that shares statistics": {"gate": "srm", "act": "relu", "samples": (3, 2)},
    "frozen layers before": {"gate": "eca", "act": "relu", "samples": (2, 1), "needs_x": False},
    "an empty batch": {"gate": "eca", "act": "relu", "samples": (3, 0)},
    "an empty batch, no gate": {"gate": None, "act": "silu", "samples": (0, 3), "last": True},
    "an empty batch, se": {"gate": "se", "act": "relu", "samples": (0, 2), "norm": {"momentum": None}},
    "an empty batch, not affine": {"gate": "eca", "act": nn.GELU(), "samples": (2, 0), "norm": {"affine": False}},
    "an empty batch, a gate that is attached to the norm": {
        "gate": "eca",
        "act": "relu",
        "samples": (0, 2),
        "is_attached": True,
    },
    "an empty batch, frozen layers before": {"gate": "se", "act": "relu", "samples": (2, 0), "needs_x": False},
}
#: Every process has an empty batch.
NOTHING = {"nothing": {"gate": "eca", "act": "relu", "samples": (0, 0)}}


def training_step(name: str, sync: bool, rank: int | None = None, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Two steps on the samples of one process, or on all of them: outputs, gradients, statistics."""
    case = {"size": (5, 3), "norm": {}, "last": False, "is_attached": False, "needs_x": True, **(CASES | NOTHING)[name]}
    torch.manual_seed(0)
    norm_type = nn.SyncBatchNorm if sync else nn.BatchNorm2d if case["size"] else nn.BatchNorm1d
    norm = norm_type(C, **case["norm"]).double().to(device)
    gate = None if case["gate"] is None else build_gate(case["gate"], C).double().to(device)
    if gate is not None:
        for i, t in enumerate(gate.parameters()):  # a start as the identity would hide what is wrong
            t.data.add_(torch.linspace(-0.5, 0.5, t.numel(), dtype=t.dtype).reshape(t.shape).roll(i, 0))
        gate = nn.SyncBatchNorm.convert_sync_batchnorm(gate) if sync else gate
    if gate is not None and case["is_attached"]:
        attach_(norm, gate)
        gate = None
    first = 0 if rank in (None, 0) else case["samples"][0]
    count = sum(case["samples"]) if rank is None else case["samples"][rank]
    seen = {}
    for step in range(2):
        shape = (sum(case["samples"]), C, *case["size"])
        generator = torch.Generator().manual_seed(step)
        x, residual, dout = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
        x = 2 * x + torch.arange(C).reshape(C, *[1] * len(case["size"]))
        mine = [t[first : first + count].clone().to(device) for t in (x, residual)]
        if case["last"]:
            mine = [t.to(memory_format=torch.channels_last) for t in mine]
        mine = [mine[0].requires_grad_(case["needs_x"]), mine[1].requires_grad_()]
        out = norm_gate_add_act(mine[0], norm, gate, mine[1], case["act"])
        out.backward(dout[first : first + count].to(device))
        seen |= {f"output {step}": out.detach(), f"gradient of residual {step}": mine[1].grad}
        if case["needs_x"]:
            seen[f"gradient of x {step}"] = mine[0].grad
    for kind, module in (("norm", norm), ("gate", gate)):
        if module is not None:
            seen |= {f"gradient of {kind}.{key}": p.grad for key, p in module.named_parameters()}
            seen |= {f"{kind}.{key}": t for key, t in module.named_buffers()}
    return {key: t if t is None else t.cpu() for key, t in seen.items()}


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":  # not by the machine's name, which need not lead anywhere
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend, device = ("nccl", f"cuda:{rank}") if torch.cuda.device_count() >= 2 else ("gloo", "cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    patience = timedelta(minutes=2)  # where the processes wait for each other in vain
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", timeout=patience, rank=rank, world_size=2)
    try:
        seen = {name: training_step(name, sync=True, rank=rank, device=device) for name in CASES | NOTHING}
        torch.save(seen, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_in_processes(folder: Path) -> list[dict[str, dict[str, torch.Tensor]]]:
    """Every case in a group of two processes; what each of them saw."""
    fresh.run_ranks(_process, (str(folder),), 2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
