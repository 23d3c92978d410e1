"""The demonstration: one small ResNet with no gate, SE, ECA and ECA with a neutral start, on embedded pictures."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ecanet.files.atomic import write_whole
from ecanet.inspect import (
    gate_values,
    plot_gates_per_class,
    plot_kernel_sizes,
    plot_matrices,
    plot_training_curves,
)
from ecanet.nn import ECA, LinearGate, SEGroup, SEVar2, SEVar3
from ecanet.study.comparison import Comparison, compare
from ecanet.study.conclusions import verdict
from ecanet.study.report import measure_costs, table
from ecanet.train import DataConfig, ModelConfig, OptimConfig, Recipe, build_network, load_trained
from ecanet.train.data.loading import ImageData
from ecanet.train.evaluate import data_of

BASELINE, TRAINED = "none", "ECA"


def demo_recipes(epochs: int = 6) -> dict[str, Recipe]:
    """The four entries: no gate first, then SE, ECA and ECA with a neutral start.

    Args:
        epochs: Passes over the 8,000 training pictures.
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
    """Train the entries, print a table and what it means, and draw the pictures.

    It needs no internet and no GPU. A second call reads the finished runs.

    Args:
        out: Folder for runs, ``results.csv``, ``summary.json``, ``summary.txt``, ``costs.json`` and the pictures.
        seeds: Seeds of each entry.
        epochs: Passes over the 8,000 training pictures.
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
    print("Timing a training step of each, in turns on one thread ...", flush=True)
    networks = {name: build_network(recipe.model, 10) for name, recipe in recipes.items()}
    costs = measure_costs(networks)
    limits = "These are short runs of a small network on small data: they say little about others."
    noise = "The two ECA entries are the same network: where their times differ, that is the machine's noise."
    summary = f"{table(comparison, costs)}\n\n{verdict(comparison.summary)}\n{limits}\n{noise}\n"
    print(f"\n{summary}")
    write_whole(out / "summary.txt", summary)
    document = {entry: vars(cost) for entry, cost in costs.items()}
    write_whole(out / "costs.json", json.dumps(document, indent=2) + "\n")
    for path in draw(comparison, out):
        print(f"wrote {path}")
    return comparison


def draw(comparison: Comparison, out: Path) -> list[Path]:
    """Write the pictures of a finished demonstration.

    Args:
        comparison: What :func:`demo` returned.
        out: Folder for the PNG files.

    Returns:
        Their paths: training curves, matrices W, k against C, learned gates per class.
    """
    trained = load_trained(comparison.runs[TRAINED][0].folder)
    images = ImageData(data_of(trained))
    curves = {
        entry: [[record["val/top1"] for record in run.history] for run in runs]
        for entry, runs in comparison.runs.items()
    }
    *_, (_, learned) = trained.network.gated_norms()  # type: ignore[operator]
    assert isinstance(learned, ECA)
    channels = learned.channels
    matrices: dict[str, LinearGate] = {
        "SE-Var2 (as initialised)": SEVar2(channels),
        "SE-Var3 (as initialised)": SEVar3(channels),
        "SE-GC, groups of 8 (as initialised)": SEGroup(channels, channels // 8),
        "ECA (learned)": learned,
    }
    batches = ((trained.normalise(pictures), labels) for pictures, labels in images.val_dataloader())
    values = gate_values(trained.network, batches, len(images.classes))
    figures = {
        "training_curves.png": plot_training_curves(curves),
        "matrices.png": plot_matrices(matrices),
        "kernel_sizes.png": plot_kernel_sizes(),
        "gates_per_class.png": plot_gates_per_class(values, images.classes),
    }
    for name, figure in figures.items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        write_whole(out / name, picture.getvalue())
    return [out / name for name in figures]
