"""The demonstration: one small ResNet with no gate, SE, ECA and ECA with a neutral start, on embedded pictures."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

from ecanet.files.atomic import write_whole
from ecanet.inspect import plot_kernel_sizes, plot_matrices
from ecanet.nn import ECA, LinearGate, SEGroup, SEVar2, SEVar3
from ecanet.study.comparison import Comparison, compare
from ecanet.study.conclusions import verdict
from ecanet.study.html_report.reading import read_costs
from ecanet.study.report import table
from ecanet.train import DataConfig, ModelConfig, OptimConfig, Recipe, load_trained

BASELINE, TRAINED = "none", "ECA"


def demo_recipes(epochs: int = 6) -> dict[str, Recipe]:
    """The four conditions: no gate first, then SE, ECA and ECA with a neutral start.

    Args:
        epochs: Number of passes over the 8,000 training pictures.
    """
    base = Recipe(
        model=ModelConfig("small_eca_resnet", gate=None, options={"widths": [16, 32, 64], "stem_stride": 2}),
        data=DataConfig("embedded", batch_size=64, augment="none"),
        optim=OptimConfig(epochs=epochs, lr=0.1, weight_decay=5e-4, nesterov=True, warmup_epochs=min(1, epochs / 3)),
    )
    gates: dict[str, dict[str, Any]] = {
        BASELINE: {"gate": None},
        "SE": {"gate": "se"},
        TRAINED: {"gate": "eca"},
        "ECA, neutral start": {"gate": "eca", "preserve": True},
    }
    return {name: replace(base, model=replace(base.model, **change)) for name, change in gates.items()}


def demo(out: str | Path = "runs/demo", seeds: int = 3, epochs: int = 6, workers: int | None = None) -> Comparison:
    """Train the conditions, print a table and what it means, and write the report and pictures.

    It needs neither internet nor GPU. A second call reads the finished runs.

    Args:
        out: Folder for what every study writes (runs, ``report.html``, ``figures``, ...), and for ``summary.txt``.
        seeds: Number of seeds of each condition.
        epochs: Number of passes over the 8,000 training pictures.
        workers: Runs at a time, by default one for each core.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: ``out`` holds runs with other settings, or ``seeds`` < 1.
    """
    out = Path(out)
    if seeds < 1:
        raise ValueError(f"seeds must be 1 or more, got {seeds}")
    recipes = demo_recipes(epochs)
    print(
        f"Training {', '.join(recipes)}: {seeds} seeds each, {epochs} epochs of 8,000 pictures, into {out}", flush=True
    )
    comparison = compare(recipes, range(seeds), out, workers)
    costs = read_costs(out, list(recipes))
    limits = "These are short runs of a small network on small data: they say little about other networks and data."
    noise = "The two ECA conditions are the same network: any difference between their times is the machine's noise."
    summary = f"{table(comparison, costs)}\n\n{verdict(comparison.summary)}\n{limits}\n{noise}\n"
    print(f"\n{summary}")
    write_whole(out / "summary.txt", summary)
    for path in (*draw(comparison, out), out / "report.html"):
        print(f"wrote {path}")
    return comparison


def draw(comparison: Comparison, out: Path) -> list[Path]:
    """Draw the two pictures that the report of a study does not have.

    Args:
        comparison: What :func:`demo` returned.
        out: Folder of the study.

    Returns:
        Paths of the PNG files: the matrices W of gates, and the kernel size k against the number of channels C.
    """
    trained = load_trained(comparison.runs[TRAINED][0].folder)
    *_, (_, learned) = trained.network.gated_norms()  # type: ignore[operator]
    assert isinstance(learned, ECA)
    channels = learned.channels
    matrices: dict[str, LinearGate] = {
        "SE-Var2 (as initialised)": SEVar2(channels),
        "SE-Var3 (as initialised)": SEVar3(channels),
        "SE-GC, groups of 8 (as initialised)": SEGroup(channels, channels // 8),
        "ECA (learned)": learned,
    }
    figures = {"matrices.png": plot_matrices(matrices), "kernel_sizes.png": plot_kernel_sizes()}
    for name, figure in figures.items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        write_whole(out / "figures" / name, picture.getvalue())
    return [out / "figures" / name for name in figures]
