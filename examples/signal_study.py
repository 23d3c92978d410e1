"""Which gate helps a 1-D network? A paired study on MNIST-1D, digits as signals of 40 samples.

pip install 'ecanet[study]' mnist1d
python examples/signal_study.py --seeds 20 --out runs/signal_study

It shows how to study a network and a training loop of your own: `train` below is called for each condition and seed.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mnist1d.data import get_dataset_args, make_dataset
from torch import Tensor, nn

from ecanet.nn import build_gate
from ecanet.study import run

# The first is the baseline. Anything JSON can hold may stand behind a name: `train` gets it as it is.
CONDITIONS: dict[str, dict[str, Any]] = {
    "none": {"gate": None},
    "SE": {"gate": "se"},
    "ECA": {"gate": "eca"},
    "ECA, neutral start": {"gate": "eca", "neutral": True},
    "GCT": {"gate": "gct"},
    "SRM": {"gate": "srm"},
}


class Block(nn.Module):
    """Two convolutions, a gate at the end of the branch, the residual connection."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv1d(inside, outside, 5, stride, 2, bias=False), nn.BatchNorm1d(outside)
        self.conv2, self.norm2 = nn.Conv1d(outside, outside, 5, padding=2, bias=False), nn.BatchNorm1d(outside)
        self.gate: nn.Module = nn.Identity()
        self.shortcut = nn.Conv1d(inside, outside, 1, stride) if (inside, 1) != (outside, stride) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, inside, L) to (N, outside, L / stride)."""
        branch = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.gate(branch) + self.shortcut(x))


def build(gate: str | None, neutral: bool = False) -> nn.Module:
    """The network. Gates come last, so that a seed gives the same backbone with any of them."""
    widths = (16, 32, 64)
    blocks = [Block(1, widths[0], 1), Block(widths[0], widths[1], 2), Block(widths[1], widths[2], 2)]
    network = nn.Sequential(*blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
    if gate is not None:
        for block, width in zip(blocks, widths, strict=True):
            block.gate = build_gate(gate, width)
            if neutral:  # the gate is 1 at first: the network starts as the one without gates
                block.gate.make_identity_()
    return network


@functools.cache
def signals(samples: int) -> dict[str, Tensor]:
    """MNIST-1D as its package makes it, always the same: one in five to train on, which leaves something to gain."""
    arguments = get_dataset_args()
    arguments.num_samples, arguments.train_split = samples, 0.2
    made = make_dataset(arguments)
    x = {key: torch.from_numpy(made[key]).float().unsqueeze(1) for key in ("x", "x_test")}
    return x | {key: torch.from_numpy(made[key]).long() for key in ("y", "y_test")}


def train(
    condition: dict[str, Any], seed: int, folder: Path, epochs: int = 40, samples: int = 5000
) -> dict[str, float]:
    """Train one network. What is returned is a metric, by its name."""
    data = signals(samples)  # before the seed: making it draws random numbers
    torch.manual_seed(seed)
    network = build(**condition)
    order = torch.Generator().manual_seed(seed)  # of its own: no gate can change the order of the signals
    steps = epochs * -(-len(data["x"]) // 50)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(data["x"]), generator=order).split(50):
            loss = F.cross_entropy(network(data["x"][chosen]), data["y"][chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        logits = network(data["x_test"])
    right = (logits.argmax(1) == data["y_test"]).sum().item()
    return {"accuracy": 100 * right / len(logits), "loss": F.cross_entropy(logits, data["y_test"]).item()}


def main() -> None:
    """Run the study, or go on with it, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/signal_study"), help="Folder of the study.")
    parser.add_argument("--seeds", type=int, default=20, help="Seeds of each condition.")
    parser.add_argument("--workers", type=int, default=None, help="Runs at a time, by default one for each core.")
    args = parser.parse_args()
    print(run(train, CONDITIONS, range(args.seeds), args.out, metric="accuracy", workers=args.workers))


if __name__ == "__main__":  # the processes that run `train` import this file
    main()
