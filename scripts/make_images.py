"""Draw the pictures of README and docs/eca-explained.md that need neither training nor measurements.

Example: python scripts/make_images.py
"""

from pathlib import Path

import torch

from ecanet import ECA, ECANS, SEGroup, SEVar2, SEVar3
from ecanet.inspect import plot_kernel_sizes, plot_matrices, plot_se_and_eca, plot_sliding_kernel, save_animation

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
    figures = {
        "matrices": plot_matrices(gates),
        "kernel_sizes": plot_kernel_sizes(),
        "se_and_eca": plot_se_and_eca(),
        "sliding_kernel": plot_sliding_kernel(),
    }
    for name, figure in figures.items():
        figure.savefig(IMAGES / f"{name}.png")
    frames = (plot_sliding_kernel(positions=[i], padding=["zeros"]) for i in range(1, 9))
    save_animation(frames, IMAGES / "sliding_kernel.gif")
    print(f"wrote {', '.join(f'{name}.png' for name in figures)} and sliding_kernel.gif into {IMAGES}")


if __name__ == "__main__":
    main()
