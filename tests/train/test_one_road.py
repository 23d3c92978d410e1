"""One road from any network and a folder of pictures to a trained network that classifies others: each of its steps."""

import csv
import io
import json
import shlex
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from PIL import Image

from ecanet import surgery
from ecanet.cli import main
from ecanet.inspect import gates
from ecanet.train import load_trained

pytest.importorskip("timm")

Said = dict[str, str]


def said_by(*words: object) -> str:
    """What a command prints."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        main([str(word) for word in words])
    return printed.getvalue()


def size_of(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as image:
        return image.size


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> tuple[Path, Said]:
    """A folder in which the road was walked, and what each step said."""
    folder = tmp_path_factory.mktemp("road")
    run, gated = folder / "run", folder / "new gated.pt"
    pictures = ["--data.val_fraction", 0.2]  # the folder has none for validation
    pictures += ["--data.image_size", 32, "--data.resize", 32, "--data.batch_size", 30, "--trainer.accelerator", "cpu"]
    said = {"insert": said_by("insert", "--model", "timm/mobilenetv3_small_050", "--gate", "eca", "--save", gated)}
    [line] = [line for line in said["insert"].splitlines() if line.startswith("next: ecanet ")]
    for its, ours in (("PHOTOS", str(image_folder / "train")), ("runs/photos", str(run))):
        line = line.replace(its, ours)
    steps: dict[str, list[object]] = {
        "fit": [*shlex.split(line)[2:], *pictures, "--optim.epochs", 1],
        "resume": ["fit", "--resume", "--out", run],
        "extend": ["fit", "--resume", "--out", run, "--optim.epochs", 2],
        "validate": ["validate", run, "--accelerator", "cpu", "--confusion", folder, "--out", folder / "metrics.json"],
        "predict": ["predict", run, image_folder / "val" / "bag", "--out", folder / "classes.csv"],
        "explain": ["explain", run, image_folder / "val" / "bag" / "00.png", "--out", folder / "explained.png"],
    }
    return folder, said | {name: said_by(*words) for name, words in steps.items()}


def the_file_of_insert_has_the_gates(folder: Path, said: Said) -> None:
    assert "gates inserted" in said["insert"]
    assert gates(surgery.load(folder / "new gated.pt"))


def fit_begins_with_its_gates_and_an_own_head(folder: Path, said: Said) -> None:
    network = load_trained(folder / "run").network
    inserted = surgery.load(folder / "new gated.pt")
    assert list(gates(network)) == list(gates(inserted))
    assert (network.classifier.out_features, inserted.classifier.out_features) == (3, 1000)
    model = json.loads((folder / "run" / "recipe.json").read_text())["model"]
    assert (model["name"], model["weights"]) == ("timm/mobilenetv3_small_050", str(folder / "new gated.pt"))
    assert "ecanet predict" in said["fit"]


def a_finished_run_is_resumed_and_extended(folder: Path, said: Said) -> None:
    assert "after the last epoch" in said["resume"]
    assert len(load_trained(folder / "run" / "last.ckpt").history) == 2


def validate_finds_the_accuracy_of_the_best_epoch(folder: Path, said: Said) -> None:
    best = max(record["val/top1"] for record in load_trained(folder / "run" / "last.ckpt").history)
    assert f"val/top1: {best:.2f} %" in said["validate"]
    assert json.loads((folder / "metrics.json").read_text())["metrics"]["val/top1"] == pytest.approx(best, abs=0.01)


def the_confusion_matrix_counts_every_picture(folder: Path, said: Said) -> None:
    names, *rows = csv.reader((folder / "confusion.csv").read_text().splitlines())
    assert names == ["class", "bag", "boot", "coat"]
    assert [sum(map(int, counts)) for _, *counts in rows] == [4, 4, 4]
    assert min(size_of(folder / "confusion.png")) > 100


def explain_draws_the_picture_that_it_names(folder: Path, said: Said) -> None:
    assert f"wrote {folder / 'explained.png'}" in said["explain"]
    assert min(size_of(folder / "explained.png")) > 100


def predict_ranks_the_classes_of_each_picture(folder: Path, said: Said) -> None:
    rows = list(csv.DictReader((folder / "classes.csv").read_text().splitlines()))
    assert len(rows) == 6 * 3
    assert {row["class"] for row in rows} == {"bag", "boot", "coat"}


def nothing_in_the_checkpoint_is_more_than_plain_values(folder: Path, said: Said) -> None:
    torch.load(folder / "run" / "last.ckpt", weights_only=True)


STEPS = [
    the_file_of_insert_has_the_gates,
    fit_begins_with_its_gates_and_an_own_head,
    a_finished_run_is_resumed_and_extended,
    validate_finds_the_accuracy_of_the_best_epoch,
    the_confusion_matrix_counts_every_picture,
    explain_draws_the_picture_that_it_names,
    predict_ranks_the_classes_of_each_picture,
    nothing_in_the_checkpoint_is_more_than_plain_values,
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_the_road(step: Callable[[Path, Said], None], road: tuple[Path, Said]) -> None:
    step(*road)


def test_the_page_of_the_road_names_verbs_and_options_that_are_there() -> None:
    page = (Path(__file__).parents[2] / "docs" / "road.md").read_text()
    commands = [line.partition("#")[0].split() for line in page.splitlines() if line.startswith("ecanet ")]
    assert {verb for _, verb, *_ in commands} >= {"list", "insert", "fit", "validate", "predict"}
    for verb in {verb for _, verb, *_ in commands}:
        help_text = io.StringIO()
        with pytest.raises(SystemExit), redirect_stdout(help_text):
            main([verb, "--help"])
        for _, other, *words in commands:
            for word in words if other == verb else ():
                assert not word.startswith("--") or f"{word} " in help_text.getvalue() + " ", word
