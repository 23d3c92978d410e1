"""The command line: what a user types, and what it says when something is wrong."""

import csv
import errno
import json
import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import yaml

from ecanet.cli import VERBS, main
from ecanet.models.arguments import OPTIONS
from ecanet.nn import GATES
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
    assert {path.name for path in run.iterdir()} == {"best.ckpt", "last.ckpt", "metrics.csv", "recipe.json", "logs"}
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


@pytest.mark.parametrize(
    "name", ["a&b [x] {y", "a: [&a [1], *a]", "null", "# 1", "\N{CAMERA}", "a\nb", "\udcff"], ids=ascii
)
def test_resume_alone_finds_pictures_in_a_folder_of_any_name(name: str, image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to(image_folder)
    words = ["--data.source=image_folder", f"--data.root={tmp_path / name}", "--data.image_size=12", "--data.resize=12"]
    words += ['--model.options={"widths": [4], "blocks": 1}', "--trainer.accelerator=cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for root in (f"./{name}", str(tmp_path / name)):
            out = ["--out", str(tmp_path / ("out" if root.startswith(".") else "absolute"))]
            main(["fit", *words, f"--data.root={root}", *out, "--optim.epochs=1"])
            main(["fit", *out, "--resume", "--optim.epochs=2"])
            assert len(load_trained(Path(out[1]) / "last.ckpt").history) == 2


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

    monkeypatch.setattr("ecanet.cli.fit.fit", fail)
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


def test_the_table_of_a_prediction_that_cannot_be_written_leaves_the_old_one(
    run: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "table.csv"
    table.write_text("old")

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match="No space left on device"):
        main(["predict", str(run), str(image_folder / "val"), "--out", str(table)])
    assert table.read_text() == "old"
    assert os.listdir(tmp_path) == ["table.csv"]


def test_the_table_of_a_prediction_goes_through_links_and_into_pipes(
    run: Path, image_folder: Path, tmp_path: Path
) -> None:
    link, pipe, file = tmp_path / "link.csv", tmp_path / "pipe", tmp_path / "table.csv"
    link.symlink_to(file)
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for out in (link, pipe):
        main(["predict", str(run), str(image_folder / "val" / "bag"), "--out", str(out)])
    assert link.is_symlink()
    assert pipe.is_fifo()
    assert os.read(reading, 2**16) == file.read_bytes()
    os.close(reading)


def test_the_help_of_fit_names_every_network_and_every_gate(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"{', '.join(OPTIONS)}; torchvision/NAME or timm/NAME" in said
    assert f"{', '.join(GATES)}; or timm:NAME, a layer of timm's; or null for none." in said


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert f"Example: ecanet {verb}" in " ".join(capsys.readouterr().out.split())


def test_overview_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    said = capsys.readouterr().out
    assert all(f"  {verb} " in said for verb in VERBS)


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
        (["fit", "--model.gate", "cbm"], ["gate must be one of", "cbm", "did you mean"]),
        (["fit", "--model.name", "resnet50"], ["name must be one of", "resnet50"]),
        (["fit", "--model.kernel_size", "4"], ["kernel_size must be odd", "4"]),
        (["fit", "--data.source", "image_folder"], ["data.root"]),
        (["fit", "--data.source", "image_folder", "--data.root", "nowhere"], ["nowhere"]),
        (["fit", "--data.root", "photos"], ["no folder 'photos': it must have train/<class>/"]),
        (["fit", "--data.root=photos.csv"], ["photos.csv"]),
        (
            ["fit", "--data.root", "photos", "--data.source", "embedded"],
            ["data.root='photos'", "data.source to image_folder"],
        ),
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


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(run, tmp_path / "copied"))


def held(folder: Path) -> dict[str, object]:
    """What lies in a folder and in its folders, each with its bytes or where it leads."""
    return {
        str(path.relative_to(folder)): path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


def options_of(run: Path) -> list[str]:
    """The recipe of the run, said by options alone."""
    recipe = yaml.safe_load((run.parent / "recipe.yaml").read_text())
    recipe["optim"]["epochs"] = 3
    blocks = recipe.items()
    return [f"--{block}.{key}={json.dumps(v).strip(chr(34))}" for block, of in blocks for key, v in of.items()]


def test_a_run_to_resume_that_was_not_begun_begins_and_says_so(run: Path, tmp_path: Path, capsys) -> None:
    arguments = ["fit", *options_of(run), "--optim.epochs", "1", "--resume", "--out", str(tmp_path / "out")]
    main(arguments)
    line = f"there is no {tmp_path / 'out' / 'last.ckpt'}: this run starts from the beginning"
    assert line in capsys.readouterr().err.splitlines()
    main(arguments)
    assert "from the beginning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["--out", "runs/fashoin"], ["--out=runs/fashoin", "--optim.epochs=40"], []],
    ids=["a folder", "more epochs", "nothing"],
)
def test_a_run_to_resume_that_is_not_there_is_an_error_where_no_option_says_what_to_train(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = "runs/fashoin" if words else "runs/fit"
    said = complaint(["fit", "--resume", *words], capsys)
    assert f"there is no run in {folder} to resume: give its folder with --out, or a new run's recipe" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("leads_to", ["nowhere", "last.ckpt"], ids=["nothing", "itself"])
def test_a_run_whose_last_checkpoint_is_a_link_to_nothing_is_neither_begun_anew_nor_written_over(
    leads_to: str, copied: Path, capsys
) -> None:
    (copied / "last.ckpt").unlink()
    (copied / "last.ckpt").symlink_to(leads_to)
    before = held(copied)
    said = complaint(["fit", "--out", str(copied), "--resume"], capsys)
    assert f"{copied / 'last.ckpt'} is a link to {leads_to}, which does not exist: restore that" in said
    assert "add --resume to go on with it" in complaint(["fit", "--out", str(copied)], capsys)
    assert held(copied) == before


def test_a_run_whose_recipe_is_gone_goes_on_by_the_same_one_and_no_other(run: Path, copied: Path, capsys) -> None:
    recipe, config = copied / "recipe.json", str(run.parent / "recipe.yaml")
    written = recipe.read_text()
    for same in (["--config", config, "--optim.epochs", "3"], options_of(run)):
        recipe.unlink()
        main(["fit", *same, "--resume", "--out", str(copied)])
        assert recipe.read_text() == written
    recipe.unlink()
    before = held(copied)
    for other, words in (
        (
            [],
            "recipe.json; it should hold the recipe of the run there: pass that recipe with --config",
        ),
        (["--optim.epochs", "5"], "model.gate: 'se' then, 'eca' now"),
        ([*options_of(run), "--model.gate", "eca"], "model.gate: 'se' then, 'eca' now): use the one that it"),
    ):
        assert words in complaint(["fit", *other, "--resume", "--out", str(copied)], capsys)
    assert held(copied) == before


def test_the_recipe_is_that_of_the_folder_which_is_said_last(run: Path, tmp_path: Path, capsys) -> None:
    other = str(tmp_path / "other")
    for out in (["--out", other, f"--out={run}"], [f"--out={other}", "--out", str(run)]):
        main(["fit", *out, "--resume"])
        assert f"see {run}" in capsys.readouterr().out
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"out: {run}\n")
    assert "a recipe has only the blocks model, data, optim, trainer, got out" in complaint(
        ["fit", "--config", str(recipe), "--resume"], capsys
    )
    assert "expected one argument" in complaint(["fit", "--resume", "--out"], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_text("x: " * 2**16), "more than the 65,536"),
        (lambda path: path.write_bytes(bytes(range(256))), "is not a recipe"),
        (lambda path: path.write_text("[" * 5000), "nested deeper than 8 levels"),
        (lambda path: path.write_text("{" * 5000), "nested deeper than 8 levels"),
        (lambda path: path.write_text("model: &a [1]\ndata: *a"), "anchor or alias"),
        (lambda path: path.write_text("model: {class_path: os.system}"), "class_path"),
        (lambda path: path.write_text("null"), "it must hold the blocks"),
        (lambda path: path.write_text('{"optim": {"epochs": 1e999}}'), "optim.epochs must be a finite number"),
        (lambda path: path.write_text(""), "it must hold the blocks"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: os.mkfifo(path), "is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
        (lambda path: path.symlink_to("nowhere"), "no such file"),
        (lambda path: path.symlink_to(path), "recipe.json"),
    ],
    ids=[
        *("huge", "binary", "nested", "nested mappings", "anchors", "a class", "null", "infinite", "empty", "a folder"),
        *("a pipe", "a link to a device", "a link to nothing", "a link to itself"),
    ],
)
@pytest.mark.parametrize("begun", [True, False], ids=["a run", "no run yet"])
def test_a_hostile_recipe_in_the_folder_of_a_run_is_one_line_with_the_remedy(
    damage, words: str, begun: bool, run: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if begun:
        (out / "last.ckpt").symlink_to(run / "last.ckpt")
    damage(out / "recipe.json")
    before = [(path.name, path.lstat().st_mtime_ns) for path in out.iterdir()]
    said = complaint(["fit", "--resume", "--out", str(out), "--optim.epochs", "4"], capsys)
    assert words in said
    assert str(out / "recipe.json") in said
    assert len(said) < 700
    first, *others = said.strip().splitlines()
    assert others == ["(ECANET_TRACEBACK=1 shows where)"]
    assert first.endswith("pass that recipe with --config")
    assert [(path.name, path.lstat().st_mtime_ns) for path in out.iterdir()] == before


@pytest.mark.parametrize("words", [["--conf", "FILE"], ["--conf=FILE"], ["--res"], ["--mode", "FILE"]], ids=" ".join)
def test_an_abbreviated_option_is_none(words: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    """It would be expanded after what options say was checked."""
    (tmp_path / "recipe.yaml").write_text("optim: {epochs: 1}\n")
    monkeypatch.chdir(tmp_path)
    said = complaint(["fit", *(word.replace("FILE", "recipe.yaml") for word in words)], capsys)
    assert f"unrecognized arguments: {words[0].partition('=')[0]}" in said
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
