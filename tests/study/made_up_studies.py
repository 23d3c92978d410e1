"""Folders of finished studies whose runs nobody trained, for tests of reports."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ecanet.study.results import slug
from ecanet.study.run_files import write_run

MODEL = {"name": "small_eca_resnet", "kernel_size": "adaptive", "neutral": False}
#: By condition: how much better than the baseline it is, and its model.
CONDITIONS: dict[str, tuple[float, dict[str, Any]]] = {
    "none": (0.0, {"gate": None}),
    "SE": (-0.5, {"gate": "se"}),
    "ECA": (0.6, {"gate": "eca"}),
    **{f"ECA, k = {k}": (0.1 * k, {"gate": "eca", "kernel_size": k}) for k in (1, 3, 9)},
    "ECA, neutral start": (0.05, {"gate": "eca", "neutral": True}),
    "GCT": (0.2, {"gate": "gct"}),
}
CLASSES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def write_made_up_run(
    folder: Path, name: str, seed: int, metrics: Mapping[str, float], details: Any = None, error: str | None = None
) -> Path:
    """The file of a run, as the engine writes it."""
    file = folder / "runs" / f"{slug(name)}-seed{seed}.json"
    about = {"condition": name, "seed": seed, "fingerprint": "0" * 16, "seconds": 20.0 + seed, "error": error}
    write_run(file, about | {"metrics": dict(metrics), "details": details or {}})
    return file


def write_summary(folder: Path, names: Sequence[str], metric: str) -> None:
    """What is read of ``summary.json``: the metric, and the order of the conditions."""
    document = {"baseline": names[0], "metric": metric, "conditions": {name: {} for name in names}}
    (folder / "summary.json").write_text(json.dumps(document))


def trained_study(folder: Path, seeds: int = 9, epochs: int = 12) -> Path:
    """A study of recipes with everything that a report can show, one failed run included."""
    draw = random.Random(0)
    for seed in range(seeds):
        luck = draw.gauss(0, 0.3)
        for name, (gain, model) in CONDITIONS.items():
            recipe = {"model": {**MODEL, **model}, "optim": {"lr": 0.1, "epochs": epochs}, "trainer": {"seed": seed}}
            top1 = 88.0 + gain + luck + draw.gauss(0, 0.15)
            history = [
                {
                    "epoch": epoch,
                    "val/top1": top1 - 20 * math.exp(-(epoch + 1) / 3) * (epoch + 1 < epochs),
                    "train/loss": 2 * math.exp(-epoch / 5) + 0.3 + draw.gauss(0, 0.02),
                    "val/loss": 1.5 * math.exp(-epoch / 4) + 0.4 + draw.gauss(0, 0.02),
                    "lr": 0.1 / (1 + epoch),
                    "seconds": 1.0,
                }
                for epoch in range(epochs)
            ]
            versions = [{"ecanet": "0.1.0", "torch": "2.14.1", "device": "cpu"}]
            details = {"history": history, "recipe": recipe, "versions": versions}
            write_made_up_run(folder, name, seed, {"top1": top1}, details)
    write_made_up_run(folder, "SE", seeds, {}, error="RuntimeError: out of memory")
    write_summary(folder, list(CONDITIONS), "top1")
    costs = {
        name: {"parameters": 9 * i, "multiply_adds": 6064 * i, "seconds": 0.0227 + 0.0011 * i}
        for i, name in enumerate(CONDITIONS)
    }
    (folder / "costs.json").write_text(json.dumps(costs))
    (folder / "profile.csv").write_text("network,parameters,latency\nResNet-18,11689512,\nSE,11778592,\n")
    (folder / "gates.json").write_text(json.dumps({"ECA": made_up_gates(draw), "SE": made_up_gates(draw)}))
    about = {
        "metric": "top1",
        "seeds": [*range(seeds + 1)],
        "conditions": {
            name: {"model": {**MODEL, **model}, "optim": {"lr": 0.1}} for name, (_, model) in CONDITIONS.items()
        },
        "command": "ecanet study my_study.yaml --seeds 9",
        "date": "2026-11-27",
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "versions": {"python": "3.11.2", "ecanet": "0.1.0"},
        "machine": "Linux x86_64, 2 cores",
    }
    (folder / "study.json").write_text(json.dumps(about))
    return folder


def made_up_gates(draw: random.Random) -> dict[str, Any]:
    """Gates of three stages; one class has no images."""
    values = {
        f"layer{stage}.0.eca": [
            [None if label == 8 else 1 / (1 + math.exp(draw.gauss(0, 0.5 * stage))) for _ in range(channels)]
            for label in range(len(CLASSES))
        ]
        for stage, channels in ((1, 16), (2, 32), (3, 64))
    }
    return {"seed": 0, "classes": CLASSES, "gates": values}
