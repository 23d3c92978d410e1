"""``ecanet study``: gates by name or by file, what a dry run says, and mistakes named before anything trains."""

import csv
import importlib
import json
import multiprocessing
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ecanet.cli import fit, main
from ecanet.study.comparison import check_parts
from ecanet.study.conditions import conditions_from_options, recipes
from ecanet.study.study_file import with_study_recipe
from ecanet.train.config import DataConfig, ModelConfig, Recipe
from tests import fresh  # noqa: F401  what the server of forks imports

TINY = {"image_size": 12, "resize": 12, "batch_size": 8}
STUDY = {
    "conditions": {"none": {"gate": None}, "ECA, k=3": {"gate": "eca", "kernel_size": 3}, "neutral": {"neutral": True}},
    "seeds": [4],
    "recipe": {
        "model": {"options": {"widths": [4], "blocks": 1}},
        "data": {"source": "image_folder", **TINY},
        "optim": {"epochs": 7},
        "trainer": {"accelerator": "cpu"},
    },
}


@pytest.fixture
def file(tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study's file in the working folder."""
    monkeypatch.chdir(tmp_path)
    study = STUDY | {"recipe": STUDY["recipe"] | {"data": {**STUDY["recipe"]["data"], "root": str(image_folder)}}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return tmp_path / "study.yaml"


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["study", *arguments])
    return f"{stopped.value.code}\n{capsys.readouterr().err}"


def test_a_file_is_trained_with_what_the_command_line_overrides_and_its_tables_are_written(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("forkserver")  # workers need not import torch
    monkeypatch.setattr(multiprocessing, "get_context", lambda method=None: context)
    # The module that is imported: a test that imports the package anew leaves it without this attribute.
    monkeypatch.setattr(importlib.import_module("ecanet.study.evidence"), "_ROUNDS", 1)
    main(["study", str(file), "--optim.epochs", "1", "--out", "out", "--workers", "1"])
    said, told = capsys.readouterr()
    assert "neutral is " in said
    *_, wrote, following = said.splitlines()
    assert wrote == "wrote out/results.csv, out/summary.json and out/report.html"
    assert following.startswith(
        "next: the same command with 7 seeds in its file; finished runs are not repeated, and fewer can"
    )
    assert "report: out/report.html" in told
    assert told.startswith("1 seed cannot show a difference at 0.05: ")
    with (file.parent / "out" / "results.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert [(row["condition"], row["seed"]) for row in rows] == [(name, "4") for name in STUDY["conditions"]]
    details = json.loads((file.parent / "out/runs/eca-k-3-seed4.json").read_text())["details"]
    model = details["recipe"]["model"]
    assert (model["gate"], model["kernel_size"], len(details["history"])) == ("eca", 3, 1)
    main(["study", str(file), "--optim.epochs", "1", "--out", "out", "--dry-run"])
    assert "3 conditions x 1 seed = 3 runs, 0 left, into out" in capsys.readouterr().out
    assert "out holds another study: " in refused(
        ["--gates", "none,se", "--seeds", "1", "--out", "out", "--dry-run"], capsys
    )


def test_a_dry_run_says_how_many_runs_how_long_an_epoch_of_the_baseline_is_and_what_they_show_and_writes_nothing(
    file: Path, image_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(recipe: Recipe) -> float:
        assert recipe.model.gate is None
        return 90.0

    monkeypatch.setattr("ecanet.cli.study.seconds_of_an_epoch", seconds)
    flags = ["--data.root", str(image_folder), "--gates", "none,se,eca", "--optim.epochs", "20", "--workers", "2"]
    main(["study", *flags, "--seeds", "9", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 conditions x 9 seeds = 27 runs, 27 left, into runs/study"
    assert lines[1].startswith("an epoch took 90.0 s: 20 in a run, 2 runs at a time, about 7:00:00 in all")
    assert lines[2].startswith("9 seeds, 2 comparisons with the baseline: a difference of ")
    assert [path.name for path in file.parent.iterdir()] == ["study.yaml"]


def test_a_dry_run_trains_an_epoch_to_say_how_long_it_takes(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["study", str(file), "--seeds", "3", "--dry-run"])
    said = capsys.readouterr().out
    assert "3 conditions x 3 seeds = 9 runs, 9 left" in said
    assert re.search(r"^an epoch took \d+\.\d s: 7 in a run, ", said, re.MULTILINE)
    assert [path.name for path in file.parent.iterdir()] == ["study.yaml"]


def test_kernel_sizes_make_conditions_of_every_gate_that_has_one_and_those_that_are_one_network_are_told(
    file: Path, image_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ecanet.cli.study.seconds_of_an_epoch", lambda recipe: 1.0)
    flags = ["--config", "none.yaml", "--data.root", str(image_folder), "--seeds", "9", "--dry-run"]
    Path("none.yaml").write_text(yaml.safe_dump(STUDY["recipe"]))
    main(["study", *flags, "--gates", "none,timm:gc,eca", "--kernel-sizes", "1, 3,adaptive"])
    first, same, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("5 conditions x 9 seeds = 45 runs")
    assert same.startswith("eca, k=1 and eca, k=adaptive are the same: ")  # of 4 channels
    main(["study", *flags, "--kernel-sizes", "3"])
    assert capsys.readouterr().out.splitlines()[0].startswith("2 conditions x 9 seeds = 18 runs")


def test_places_and_starts_are_conditions_of_a_network_of_another_library(tmp_path: Path, image_folder: Path) -> None:
    shared = Recipe(ModelConfig("timm/resnet10t"), DataConfig("image_folder", root=image_folder, **TINY))
    places = {"block": {}, "stage": {"where": "stage"}, "norms": {"where": "layer?.*.bn2"}, "1": {"preserve": True}}
    found = recipes(shared, {"none": {"gate": None}, **places})
    assert [recipe.model.where for recipe in found.values()] == ["block", "block", "stage", "layer?.*.bn2", "block"]
    assert check_parts(found) == [
        "block and norms are the same: all but one of them take time and seeds, and can show nothing."
    ]
    with pytest.raises(ValueError, match=r"conditions\['last'\]: .*layer9"):
        check_parts(recipes(shared, {"none": {"gate": None}, "last": {"where": "layer9.*"}}))
    with pytest.raises(ValueError, match=r"condition last: model\.where must be block in small_eca_resnet"):
        recipes(Recipe(), {"last": {"where": "stage"}})


def test_a_sweep_in_a_file_is_the_same_conditions_and_what_a_condition_says_besides_stays() -> None:
    conditions = {"none": {"gate": None}, "ECA": {"preserve": True, "kernel_sizes": [5, "adaptive"]}}
    found = recipes(Recipe(), conditions)
    assert list(found) == ["none", "ECA, k=5", "ECA, k=adaptive"]
    models = [recipe.model for recipe in found.values()]
    assert [(m.gate, m.kernel_size, m.preserve) for m in models] == [
        (None, "adaptive", None),
        ("eca", 5, True),
        ("eca", "adaptive", True),
    ]
    by_options = recipes(Recipe(), conditions_from_options("none,eca,se", "5,adaptive"))
    assert [recipe.model.kernel_size for recipe in by_options.values()] == ["adaptive", 5, "adaptive", "adaptive"]


@pytest.mark.parametrize("prepare", [with_study_recipe, fit.prepare], ids=["study", "fit"])
def test_a_folder_or_a_csv_file_is_the_source_where_only_the_root_is_said(prepare: Callable[..., list[str]]) -> None:
    for root, source in (("x", "image_folder"), ("x.csv", "csv"), ("X.CSV", "csv"), ("csv", "image_folder")):
        for said in (["--data.root", root], [f"--data.root={root}", "--optim.epochs", "1"]):
            assert prepare(said) == [*said, "--data.source", source]
    assert prepare(["--data.root=x.csv", "--data.root", "y"])[-1] == "image_folder", "the last one counts"
    for said in (["--data.root=x", "--data.source", "fashion_mnist"], ["--config", "{}", "--data.root=x"], []):
        assert prepare(said) == said


MISTAKES: dict[str, tuple[list[str], str]] = {
    "a single seed": (
        ["study.yaml", "--trainer.seed=3"],
        "--trainer.seed is not for a study: every condition is trained",
    ),
    "no gates": (
        ["--seeds", "9"],
        "conditions must be named once, by --gates none,eca or --kernel-sizes 1,3,5, or",
    ),
    "an unknown gate": (["--gates", "none,cbamm", "--seeds", "9"], "got 'cbamm': did you mean 'cbam'?"),
    "an unknown gate of timm's": (["--gates", "none,timm:cbamm", "--seeds", "9"], "did you mean 'timm:cbam'?"),
    "a layer of timm's that is no gate": (["--gates", "none,timm:sk", "--seeds", "9"], "the place of a convolution"),
    "an empty gate": (["--gates", "none,,eca", "--seeds", "9"], "gate must be one of 'eca', "),
    "a gate twice": (["--gates", "none,eca,eca", "--seeds", "9"], "gates must be different, got none, eca, eca"),
    "no seeds": (["--gates", "none,se,eca"], "with 3 conditions, fewer than --seeds 7 can show nothing"),
    "zero seeds": (["--gates", "none,eca", "--seeds", "0"], "seeds must be 1 or more, got 0"),
    "a gate beside gates": (
        ["--gates", "none,eca", "--seeds", "2", "--model.gate=se"],
        "--model.gate sets the gate of every condition: leave it out, as --gates names them all",
    ),
    "no such pictures": (
        ["--gates", "none,eca", "--seeds", "2", "--data.root", "nowhere"],
        "Error: no folder",
    ),
    "a file for a folder": (
        ["study.yaml", "--out", "study.yaml/out"],
        "out must be a folder, got study.yaml/out: ",
    ),
    "a dry run with a file for a folder": (["study.yaml", "--dry-run", "--out", "study.yaml"], "study.yaml is a file"),
    "no such file": (["nothing.yaml"], "no such file: nothing.yaml"),
    "gates and a file with conditions": (["study.yaml", "--gates", "none,eca"], "got both"),
    "sizes and a file with conditions": (["study.yaml", "--kernel-sizes", "1,3"], "got both"),
    "an even size": (["--kernel-sizes", "1,2", "--seeds", "9"], "must be different odd integers or adaptive, such as"),
    "a size twice": (["--kernel-sizes", "3,3", "--seeds", "9"], "must be different odd integers or adaptive, such as"),
    "no size": (["--kernel-sizes", "", "--seeds", "9"], "must be different odd integers or adaptive, such as"),
    "a size of a gate that has none": (
        ["--gates", "none,se", "--kernel-sizes", "3", "--seeds", "9"],
        "kernel_sizes are for gates that have one, eca, eca_ns, got gates=none,se",
    ),
    "no worker": (["--gates", "none,eca", "--seeds", "2", "--workers", "0"], "workers must be 1 or more"),
    "a dry run with less than no worker": (
        ["--gates", "none,eca", "--seeds", "2", "--workers", "-1", "--dry-run"],
        "workers must be 1 or more",
    ),
}


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_before_anything_trains(
    arguments: list[str], words: str, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["ecanet.study.paired_study"], "run_all", lambda *_: pytest.fail("it trains"))
    assert words in refused(arguments, capsys)
    assert [path.name for path in file.parent.iterdir()] == ["study.yaml"]


FILES: dict[str, tuple[str, str]] = {
    "a list": ("[1]", "is not a study: it must hold conditions, seeds, recipe, got a list"),
    "another part": ("gates: [eca]", "a study has only the parts conditions, seeds, recipe, got gates"),
    "conditions in a list": (
        "conditions: [eca]",
        "conditions must be at most 1000 names with changes, such as none: {gate: null}, got a list",
    ),
    "a condition that is a text": ("conditions: {none: eca}", "conditions.none must be a name with gate, kernel_size"),
    "a number as a name": ("conditions: {1: {gate: eca}}", "must be a name with gate, kernel_size"),
    "a condition with a learning rate": (
        "conditions: {none: {lr: 1}}",
        "conditions.none cannot have lr; it may have gate",
    ),
    "a condition that calls": ("conditions: {none: {build: 'os:system'}}", "conditions.none cannot have build"),
    "a seed of its recipe": ("recipe: {trainer: {seed: 3}}", "recipe.trainer.seed is not for a study: every condition"),
    "a recipe that calls": ("recipe: {model: {build: 'os:system'}}", "model.build is never taken from a file"),
    "a condition with weights": ("conditions: {none: {weights: /etc/passwd}}", "conditions.none cannot have weights"),
    "a gate that is none": (
        "conditions: {none: {gate: cbamm}}\nseeds: 2",
        "condition none: model: gate must be one of",
    ),
    "a class": ("conditions: {none: {gate: {class_path: os.system}}}", "conditions.none.gate must be a number, a text"),
    "a class in the recipe": ("recipe: {model: {class_path: os.system}}", "class_path"),
    "a block that is none": (
        "recipe: {modell: {}}",
        "recipe: a recipe has only the blocks model, data, optim, trainer, got modell",
    ),
    "half a seed": (
        "conditions: {none: {}}\nseeds: 0.5",
        "seeds must be their number, from 1 to 1000, or a list",
    ),
    "no seed": ("conditions: {none: {}}\nseeds: 0", "seeds must be their number, from 1 to 1000, or a list"),
    "a seed twice": ("conditions: {none: {}}\nseeds: [1, 1]", "seeds must be one or more different integers from 0"),
    "two names with one file": ("conditions: {ECA: {}, eca!: {}}\nseeds: 1", "names that differ in letters and digits"),
    "two conditions with one name": ("conditions:\n  a: {}\n  a: {}\nseeds: 1", "the key a is repeated"),
    "no list of kernel sizes": (
        "conditions: {a: {kernel_sizes: 3}}\nseeds: 1",
        "condition a: kernel_sizes must be different odd integers or adaptive, such as 1,3,5,adaptive, got 3",
    ),
    "a kernel size and several": (
        "conditions: {a: {kernel_size: 3, kernel_sizes: [3]}}\nseeds: 1",
        "condition a must have kernel_size or kernel_sizes, got both",
    ),
    "one name twice by a sweep": (
        'conditions: {"a, k=3": {}, a: {kernel_sizes: [1, 3]}}\nseeds: 1',
        "conditions must have different names, got a, k=3 twice",
    ),
    "a class as a kernel size": (
        "conditions: {a: {kernel_sizes: [{class_path: os.system}]}}\nseeds: 1",
        "conditions.a.kernel_sizes",
    ),
    "anchors": ("conditions: &a {none: {}}\nrecipe: *a", "anchor or alias"),
    "a tag": ("conditions: !!python/object:os.system {}", "has a tag"),
    "nested deeply": ("[" * 500, "nested deeper than"),
    "binary": ("\x00\x01", "is not a study"),
    "huge": ("x: " * 2**16, "more than the 65,536"),
}


@pytest.mark.parametrize(("text", "words"), FILES.values(), ids=FILES)
def test_what_a_file_should_not_say_is_named_in_one_line(
    text: str, words: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(text)
    said = refused(["study.yaml"], capsys)
    assert words in said
    assert len(said.strip().splitlines()) == 2
    assert [path.name for path in file.parent.iterdir()] == ["study.yaml"]
