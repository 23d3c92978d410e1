"""One training step of a tail with SyncBatchNorm, in one process or shared by two: what test_tail.py compares."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from ecanet.nn import build_gate, norm_gate_add_act

C = 16

#: Gate, activation, samples of each process and arguments of the norm.
CASES: dict[str, dict[str, Any]] = {
    "no gate": {"gate": None, "act": "relu", "samples": (2, 2)},
    "eca": {"gate": "eca", "act": "relu", "samples": (2, 2)},
    "se": {"gate": "se", "act": "relu", "samples": (2, 2)},
    "unequal batches": {"gate": "eca", "act": "silu", "samples": (1, 4)},
    "one value per channel in a process": {"gate": "eca", "act": None, "samples": (1, 2), "size": ()},
    "cumulative average": {"gate": "eca", "act": "relu", "samples": (3, 1), "norm": {"momentum": None}},
    "not affine": {"gate": "se", "act": "relu", "samples": (2, 1), "norm": {"affine": False}},
    "channels last": {"gate": "eca", "act": "relu", "samples": (2, 3), "last": True},
}


def training_step(name: str, sync: bool, rank: int | None = None) -> dict[str, torch.Tensor]:
    """Two steps on the samples of one process, or on all of them: outputs, gradients, statistics."""
    case = {"size": (5, 3), "norm": {}, "last": False, **CASES[name]}
    torch.manual_seed(0)
    norm_type = nn.SyncBatchNorm if sync else nn.BatchNorm2d if case["size"] else nn.BatchNorm1d
    norm = norm_type(C, **case["norm"]).double()
    gate = None if case["gate"] is None else build_gate(case["gate"], C).double()
    first = 0 if rank in (None, 0) else case["samples"][0]
    count = sum(case["samples"]) if rank is None else case["samples"][rank]
    seen = {}
    for step in range(2):
        shape = (sum(case["samples"]), C, *case["size"])
        generator = torch.Generator().manual_seed(step)
        x, residual, dout = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
        x = 2 * x + torch.arange(C).reshape(C, *[1] * len(case["size"]))
        mine = [t[first : first + count].clone().requires_grad_() for t in (x, residual)]
        if case["last"]:
            mine = [t.detach().to(memory_format=torch.channels_last).requires_grad_() for t in mine]
        out = norm_gate_add_act(mine[0], norm, gate, mine[1], case["act"])
        out.backward(dout[first : first + count])
        seen |= {f"output {step}": out.detach(), f"gradient of x {step}": mine[0].grad}
        seen[f"gradient of residual {step}"] = mine[1].grad
    for kind, module in (("norm", norm), ("gate", gate)):
        if module is not None:
            seen |= {f"gradient of {kind}.{key}": p.grad for key, p in module.named_parameters()}
            seen |= {f"{kind}.{key}": t for key, t in module.named_buffers()}
    return seen


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":  # not by the machine's name, which need not lead anywhere
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        torch.save({name: training_step(name, sync=True, rank=rank) for name in CASES}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_in_processes(folder: Path) -> list[dict[str, dict[str, torch.Tensor]]]:
    """Every case in a group of two processes; what each of them saw."""
    torch.multiprocessing.spawn(_process, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
