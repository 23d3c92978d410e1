"""Three training steps of a network with a gate, plain and sharded over processes: what test_sharded_gates.py compares.

The processes meet over gloo on the CPU.
"""

import copy
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy

from ecanet.nn import build_gate, norm_gate_add_act
from tests import fresh

GATES = ("eca", "se", "eca_ns", "se_var2")
#: What is a unit of its own, and how.
WAYS = (
    "FSDP1, every layer",
    "FSDP1, every layer, original parameters",
    "FSDP1, the gate",
    "FSDP1, the network",
    "FSDP1, the network, original parameters",
    "FSDP1, every layer, mixed precision",
    "FSDP2, every layer",
    "FSDP2, the gate",
    "FSDP2, the network",
)


class Network(nn.Module):
    """A convolution and a tail."""

    def __init__(self, gate: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.gate = build_gate(gate, 16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.fc(norm_gate_add_act(y, self.norm, self.gate, y, "relu").mean((2, 3)))


def _sharded(model: Network, way: str, mesh: DeviceMesh) -> nn.Module:
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear))]
    units = layers if "layer" in way else [model.gate] if "gate" in way else []
    if way.startswith("FSDP2"):
        for unit in units:
            fully_shard(unit, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=CustomPolicy(lambda module: module in units),
        use_orig_params="original" in way,
        device_id=torch.device("cpu"),
        mixed_precision=MixedPrecision(torch.bfloat16, cast_forward_inputs=True) if "mixed" in way else None,
    )


def _outputs(model: nn.Module) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    seen = []
    for step in range(3):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        out = model(x)
        optimizer.zero_grad()
        out.float().square().mean().backward()
        optimizer.step()
        seen.append(out.detach().float())
    return seen


def _process(rank: int, folder: str, world_size: int) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":  # not by the machine's name, which need not lead anywhere
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    meeting, patience = f"file://{folder}/meeting", timedelta(minutes=2)
    dist.init_process_group("gloo", init_method=meeting, timeout=patience, rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    seen: dict[str, list[Tensor]] = {}
    try:
        for gate in GATES:
            torch.manual_seed(0)
            model = Network(gate).eval()  # every process has the same batch
            seen[gate] = _outputs(copy.deepcopy(model))
            for way in WAYS:
                seen[f"{gate}, {way}"] = _outputs(_sharded(copy.deepcopy(model), way, mesh))
        torch.save(seen, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_in_processes(folder: Path, world_size: int) -> list[dict[str, list[Tensor]]]:
    """Outputs of the steps, by gate and way, in every process."""
    fresh.run_ranks(_process, (str(folder), world_size), world_size)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
