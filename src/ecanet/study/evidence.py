"""What a study of recipes measures besides its runs: the cost of a training step, and what the gates learned."""

import json
import math
import sys
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ecanet.files.atomic import write_whole
from ecanet.inspect import gate_values
from ecanet.inspect.per_class import gates_to_draw
from ecanet.networks.running import gates
from ecanet.study.about import read_json
from ecanet.study.costs import measure_costs
from ecanet.study.html_report.reading import COSTS, GATES, MAX_CELLS, MAX_CLASSES
from ecanet.study.results import FinishedRun, Study
from ecanet.train.checkpoint import load_trained
from ecanet.train.config import Recipe
from ecanet.train.data.loading import ImageData, Plain, image_size_of, test_transform
from ecanet.train.networks import build_network

#: Pixels of a timed step (those of 128 pictures of 28 x 28), and number of timed steps.
_PIXELS, _ROUNDS = 128 * 28 * 28, 20
#: Largest number of validation pictures for the mean gates of each class.
_MAX_PICTURES = 2_000


def write_evidence(recipes: Mapping[str, Recipe], study: Study, out: Path, progress: bool) -> None:
    """Write ``costs.json`` and ``gates.json`` into the folder of a study, unless they exist for its conditions.

    Neither file affects the verdict of the study. If something cannot be measured, because pictures or checkpoints are
    gone, a note is printed and the report omits it.

    Args:
        recipes: Recipes by condition.
        study: The runs of the study.
        out: Folder of the study.
        progress: Print which file is being measured.
    """
    first_runs = {name: runs[0] for name, runs in study.runs.items() if runs}
    measures = {COSTS: partial(_costs, recipes), GATES: partial(_gates, recipes, first_runs)}
    for (file, measure), names in zip(measures.items(), (recipes, first_runs), strict=True):
        try:
            if _holds_conditions(out / file, names):
                continue
            if progress:
                print(f"measuring for the report: {file}", file=sys.stderr)
            write_whole(out / file, json.dumps(measure(), indent=1) + "\n")
        except (ImportError, OSError, TypeError, ValueError, RuntimeError) as error:
            print(f"left out of the report: {file} ({type(error).__name__}: {error})", file=sys.stderr)


def _holds_conditions(file: Path, names: Collection[str]) -> bool:
    try:
        content = read_json(file)
    except ValueError:  # a damaged file is written again
        return False
    return isinstance(content, dict) and content.keys() == set(names)


def _costs(recipes: Mapping[str, Recipe]) -> dict[str, Any]:
    """Costs of each condition's training step; larger pictures come in smaller batches, so that it takes no longer."""
    data = next(iter(recipes.values())).data
    size, classes = image_size_of(data), len(ImageData(data).classes)
    networks = {name: build_network(recipe.model, classes) for name, recipe in recipes.items()}
    costs = measure_costs(networks, size, max(2, min(128, _PIXELS // size**2)), _ROUNDS, classes)
    return {name: vars(cost) for name, cost in costs.items()}


def _gates(recipes: Mapping[str, Recipe], first_runs: Mapping[str, FinishedRun]) -> dict[str, Any]:
    """What the gates of each condition's first run learned; None for a condition without gates of this library."""
    known: dict[str, ImageData] = {}
    learned: dict[str, Any] = {}
    cells = 0
    for name, run in first_runs.items():
        learned[name] = None
        trained = load_trained(run.folder)
        if not gates(trained.network):
            continue
        data = recipes[name].data
        images = known.setdefault(repr(data), ImageData(data))
        pictures = Plain(images.splits.val, test_transform(data))
        sample = Subset(pictures, range(0, len(pictures), -(-len(pictures) // _MAX_PICTURES)))
        batches = ((trained.normalise(batch), labels) for batch, labels in DataLoader(sample, data.batch_size))
        values = gate_values(trained.network, batches, len(images.classes))
        classes = range(0, len(images.classes), -(-len(images.classes) // MAX_CLASSES))
        chosen = {gate: values[gate][list(classes)] for gate in gates_to_draw(values, None)}
        cells += sum(value.numel() for value in chosen.values())
        if cells > MAX_CELLS:
            break
        rows = {gate: _plain(value) for gate, value in chosen.items()}
        learned[name] = {"seed": run.seed, "classes": [images.classes[i] for i in classes], "gates": rows}
    return {name: learned.get(name) for name in first_runs}


def _plain(values: Tensor) -> list[list[float | None]]:
    """Rows of numbers with four decimals, None for NaN."""
    return [[None if math.isnan(value) else round(value, 4) for value in row] for row in values.tolist()]
