"""Draw the README's pictures that need no training: docs/images/matrices.png and kernel_sizes.png.

Example: python scripts/make_images.py
"""

from pathlib import Path

import torch

from ecanet import ECA, ECANS, SEGroup, SEVar2, SEVar3
from ecanet.inspect import plot_kernel_sizes, plot_matrices

IMAGES = Path(__file__).parents[1] / "docs" / "images"


def main() -> None:
    torch.manual_seed(0)
    gates = {
        "ECA": ECA(64),
        "SE-Var2": SEVar2(64),
        "SE-Var3": SEVar3(64),
        "SE-GC": SEGroup(64, groups=8),
        "ECA-NS": ECANS(64),
    }
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, figure in {"matrices": plot_matrices(gates), "kernel_sizes": plot_kernel_sizes()}.items():
        path = IMAGES / f"{name}.png"
        figure.savefig(path, dpi=120)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
