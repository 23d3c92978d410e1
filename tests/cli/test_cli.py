"""The command line: what a user types, and what it says when something is wrong."""

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ecanet.cli import main
from ecanet.train import load_trained

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """A finished run of `ecanet fit` on a recipe file."""
    folder = tmp_path_factory.mktemp("cli")
    recipe = {
        "model": {"gate": "se", "options": {"widths": [8, 16]}},
        "data": {"source": "image_folder", "root": str(image_folder), "image_size": 12, "resize": 12, "batch_size": 8},
        "optim": {"epochs": 4, "lr": 0.05},
        "trainer": {"accelerator": "cpu"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    main(["fit", "--config", str(folder / "recipe.yaml"), "--out", str(folder / "out"), "--optim.epochs", "3"])
    return folder / "out"


def test_fit_writes_what_it_says(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {"best.ckpt", "last.ckpt", "recipe.json", "logs"}
    recipe = json.loads((run / "recipe.json").read_text())
    assert recipe["model"]["gate"] == "se"
    assert recipe["optim"]["epochs"] == 3, "the command line wins over the recipe"
    assert len(load_trained(run / "last.ckpt").history) == 3


def test_fit_resumes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(run.parent / "recipe.yaml")
    main(["fit", "--config", config, "--out", str(run), "--optim.epochs", "3", "--resume"])
    assert "after the last epoch" in capsys.readouterr().out


def test_resume_alone_takes_the_recipe_of_the_folder_and_more_epochs_extend_it(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(run, out)
    main(["fit", "--out", str(out), "--resume"])
    assert len(load_trained(out / "last.ckpt").history) == 3
    main(["fit", f"--out={out}", "--resume", "--optim.epochs", "5"])
    assert len(load_trained(out / "last.ckpt").history) == 5
    recipe = json.loads((out / "recipe.json").read_text())
    assert (recipe["model"]["gate"], recipe["optim"]["epochs"]) == ("se", 5)


def test_resume_with_a_recipe_takes_that_one(run: Path) -> None:
    config = str(run.parent / "recipe.yaml")
    with pytest.raises(SystemExit, match=r"optim\.lr: 0\.05 then, 0\.5 now"):
        main(["fit", "--config", config, "--out", str(run), "--optim.epochs", "3", "--optim.lr", "0.5", "--resume"])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError("CUDA error: out of\nmemory\n\nCompile with more"),
            "CUDA error: out of memory Compile with more",
        ),
        (KeyError("a key"), "KeyError: a key"),
        (KeyError("a", 1), "KeyError: ('a', 1)"),
        (IndexError("list index out of range"), "IndexError: list index out of range"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (NotImplementedError("not\nhere"), "NotImplementedError: not here"),
        (torch.cuda.OutOfMemoryError("tried to\nallocate"), "OutOfMemoryError: tried to allocate"),
        (torch.distributed.DistBackendError("NCCL\nerror"), "DistBackendError: NCCL error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_every_error_is_one_line(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(sys.modules["ecanet.train.fit"], "fit", fail)
    said, _, hint = complaint(["fit"], capsys).rstrip().partition("\n")
    assert said.startswith("ecanet fit: ")
    assert said.endswith(line)
    assert hint == "(ECANET_TRACEBACK=1 shows where)"


def test_validate_prints_the_best_accuracy(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["validate", str(run)])
    best = max(record["val/top1"] for record in load_trained(run / "last.ckpt").history)
    assert f"val/top1: {best:.2f} %" in capsys.readouterr().out


def test_predict_names_the_right_classes(run: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["predict", str(run), str(image_folder / "val" / "boot"), str(image_folder / "val" / "bag" / "00.png")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert lines[0].startswith(f"{image_folder / 'val' / 'boot' / '00.png'}: ")
    assert lines[0].count("%") == 3


def test_predict_writes_a_table(run: Path, image_folder: Path, tmp_path: Path) -> None:
    main(["predict", str(run), str(image_folder / "val"), "--top", "2", "--out", str(tmp_path / "new" / "table.csv")])
    with (tmp_path / "new" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18 * 2
    assert {row["class"] for row in rows} <= {"bag", "boot", "coat"}
    assert all(float(a["probability"]) >= float(b["probability"]) for a, b in zip(rows[::2], rows[1::2], strict=True))


@pytest.mark.parametrize("verb", ["fit", "validate", "predict", "demo"])
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert f"Example: ecanet {verb}" in " ".join(capsys.readouterr().out.split())


def test_overview_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    said = capsys.readouterr().out
    assert all(f"  {verb} " in said for verb in ("fit", "validate", "predict", "demo"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse_and_say_what_they_reached(path: Path) -> None:
    from jsonargparse import ArgumentParser

    from ecanet.train import Recipe, build_network

    parser = ArgumentParser()
    parser.add_class_arguments(Recipe)
    args = parser.instantiate(parser.parse_path(path))
    network = build_network(args.model, 10)
    assert any(True for _ in network.gated_norms())  # type: ignore[operator]
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = " ".join(header)
    assert "Not run here" in text if path.parent.name == "imagenet" else "Result:" in text
    assert f"recipes/{path.parent.name}/{path.name}" in text


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code not in (0, None)
    return f"{stopped.value.code} {capsys.readouterr().err}"


def test_unknown_key_in_a_recipe_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("optim:\n  learning_rate: 0.1\n")
    said = complaint(["fit", "--config", str(recipe), "--out", str(tmp_path / "out")], capsys)
    assert "learning_rate" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], ["unknown verb 'train'", "fit"]),
        (["fit", "--optim.epochs", "0"], ["optim.epochs must be 1 or more, got 0"]),
        (["fit", "--optim.epochs", "many"], ["optim.epochs", "many"]),
        (["fit", "--model.gate", "cbam"], ["gate must be one of", "cbam"]),
        (["fit", "--model.name", "resnet50"], ["name must be one of", "resnet50"]),
        (["fit", "--model.kernel_size", "4"], ["kernel_size must be odd", "4"]),
        (["fit", "--data.source", "image_folder"], ["data.root"]),
        (["fit", "--data.source", "image_folder", "--data.root", "nowhere"], ["nowhere"]),
        (["fit", "--data.root", "photos"], ["data.root='photos'", "data.source to image_folder"]),
        (["fit", "--data.verify", "true"], ["data.verify is for"]),
        (["fit", "--model.options", '{"depth": 3}'], ["model.options", "depth"]),
        (["fit", "--trainer.devices", "9", "--trainer.accelerator", "gpu"], ["the trainer block does not fit"]),
        (["fit", "--config", "nothing.yaml"], ["nothing.yaml"]),
        (["validate", "nowhere"], ["nowhere"]),
        (["predict", "nowhere", "nothing.png"], ["nothing.png"]),
        (["demo", "--seeds", "0"], ["seeds must be 1 or more, got 0"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_named(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    said = complaint(arguments, capsys)
    for word in words:
        assert word in said
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_run_without_its_recipe_is_not_taken_for_one_by_the_default(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(SystemExit, match=r"recipe\.json is no file.*give that recipe by --config"):
        main(["fit", "--resume", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
