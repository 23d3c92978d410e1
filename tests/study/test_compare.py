"""Paired seeds, one finished run one file, nothing finished is lost or repeated."""

import json
import math
import os
import pickle
import signal
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ecanet
from ecanet.study import Comparison, Run, compare, paired_difference
from ecanet.study.conclusions import verdict
from ecanet.study.costs import Cost
from ecanet.study.processes import Processes
from ecanet.study.report import table
from ecanet.train import Recipe, fit
from tests.fresh import FreshProcess

#: Workers of a script are forks, too: a spawned one imports torch for five seconds.
FORKS = """
import multiprocessing
get_context = multiprocessing.get_context
multiprocessing.get_context = lambda method=None: get_context("fork" if method == "spawn" else method)
"""
SCRIPT_OF_PICKLES = """
import pickle, sys
from ecanet.study import compare
with open(sys.argv[1], "rb") as file:
    compare(pickle.load(file), [0], sys.argv[2], workers=1)
"""


def conditions(tiny: Callable[..., Recipe], **changes: object) -> dict[str, Recipe]:
    return {name: tiny(gate=gate, epochs=1, **changes) for name, gate in (("none", None), ("ECA", "eca"))}


def stop_once_saved(record: dict[str, float]) -> None:
    """The first epoch's record comes before its checkpoint: that of the second is the end."""
    if record["epoch"] == 2:
        raise InterruptedError


def test_every_condition_runs_with_every_seed(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    comparison = compare(conditions(tiny), [0, 3], tmp_path, workers=2, progress=False)
    assert list(comparison.runs) == ["none", "ECA"]
    assert comparison.baseline == "none"
    assert [run.seed for run in comparison.runs["ECA"]] == [0, 3]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["conditions"]["ECA"]["mean"] == pytest.approx(comparison.mean("ECA"), rel=1e-12)
    assert (tmp_path / "results.csv").read_text().startswith("condition,seed,top1,seconds\nnone,0,")
    files = sorted(path.name for path in (tmp_path / "runs").glob("*.json"))
    assert files == ["eca-seed0.json", "eca-seed3.json", "none-seed0.json", "none-seed3.json"]
    for runs in comparison.runs.values():
        for run in runs:
            assert (run.folder / "best.ckpt").exists()
            assert run.top1 == run.history[-1]["val/top1"]


def test_a_run_in_a_worker_equals_the_same_run_alone(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    comparison = compare(conditions(tiny), [5], tmp_path, workers=2, progress=False)
    recipe = conditions(tiny)["ECA"]
    alone = fit(replace(recipe, trainer=replace(recipe.trainer, seed=5)), None, progress=False)
    assert comparison.runs["ECA"][0].top1 == alone.top1
    assert comparison.runs["ECA"][0].history[-1]["val/loss"] == alone.history[-1]["val/loss"]


def test_finished_runs_are_read_and_new_ones_added(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    compare(conditions(tiny), [0], tmp_path, workers=1, progress=False)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    comparison = compare(conditions(tiny), [0, 1], tmp_path, workers=1, progress=False)
    assert len(comparison.runs["none"]) == 2
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_runs_of_another_recipe_are_refused(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    compare(conditions(tiny), [0], tmp_path, workers=1, progress=False)
    with pytest.raises(ValueError, match=r"none-seed0\.json was made by another recipe, function or version"):
        compare(conditions(tiny, lr=0.01), [0], tmp_path, progress=False)


def test_a_half_finished_run_of_another_version_goes_on_after_saying_so_and_names_both(
    tiny: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = replace(conditions(tiny)["ECA"], optim=tiny(epochs=2).optim)
    folder = tmp_path / "runs" / "eca-seed0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ecanet.__version__", "0.0.9")
        patch.setattr("torch.__version__", "2.10.0")
        with pytest.raises(InterruptedError):
            fit(recipe, folder, progress=False, on_epoch=stop_once_saved)
    (tmp_path / "recipes").write_bytes(pickle.dumps({"ECA": recipe}))
    _, told = FreshProcess(FORKS + SCRIPT_OF_PICKLES, tmp_path / "recipes", tmp_path).communicate(timeout=120)
    assert "was trained with ecanet 0.0.9, torch 2.10.0" in told
    stamped = json.loads((tmp_path / "runs" / "eca-seed0.json").read_text())["details"]["versions"]
    assert [(each["ecanet"], each["torch"]) for each in stamped] == [
        ("0.0.9", "2.10.0"),
        (ecanet.__version__, str(torch.__version__)),
    ]


def test_there_is_a_worker_for_each_cpu_without_affinity_too_and_one_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Processes().size == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Processes().size == 1


def test_a_failing_run_is_named_and_leaves_the_others_finished(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    broken = conditions(tiny)["ECA"]
    broken = replace(broken, trainer=replace(broken.trainer, precision="17-true"))
    for _ in range(2):  # it is not tried again
        with pytest.raises(RuntimeError, match=r"^1 of 2 runs failed, .*broken, seed 0: ValueError: .*17-true"):
            compare({"broken": broken, "none": conditions(tiny)["none"]}, [0], tmp_path, workers=1, progress=False)
    runs = {name: json.loads((tmp_path / f"runs/{name}-seed0.json").read_text()) for name in ("none", "broken")}
    assert runs["none"]["metrics"].keys() == {"top1"}
    assert runs["broken"]["metrics"] == {}


def test_pictures_that_are_not_there_and_networks_that_cannot_be_are_named_before_anything_runs(
    tiny: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = tiny()
    wrong = {
        "kernel_size must be odd": replace(recipe, model=replace(recipe.model, kernel_size=4)),
        "nowhere": replace(recipe, data=replace(recipe.data, root=tmp_path / "nowhere")),
        "no.pth": replace(recipe, model=replace(recipe.model, weights=str(tmp_path / "no.pth"))),
    }
    for words, broken in wrong.items():
        with pytest.raises(ValueError, match=rf"conditions\['ECA'\]: .*{words}"):
            compare({"none": recipe, "ECA": broken}, [0], tmp_path / "out")
        assert not (tmp_path / "out").exists()


SCRIPT = """
import signal, sys
from pathlib import Path
from ecanet.study import compare
from ecanet.train import *
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored
data = DataConfig("image_folder", root=Path(sys.argv[1]), image_size=12, resize=12, batch_size=8)
model, optim = ModelConfig(options={"widths": [8, 16]}), OptimConfig(epochs=10)
recipe = Recipe(model, data, optim, TrainerConfig(accelerator="cpu"))
compare({"ECA": recipe}, range(20), sys.argv[2], workers=1, progress=False)
"""


@pytest.mark.parametrize("killer", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_killed_comparison_keeps_what_it_finished_and_leaves_no_worker(
    image_folder: Path, tmp_path: Path, killer: signal.Signals
) -> None:
    out = tmp_path / "out"
    process = FreshProcess(FORKS + SCRIPT, image_folder, out, environment=os.environ | {"OMP_NUM_THREADS": "1"})
    while not list(out.glob("runs/*.json")):
        assert process.returncode is None
        time.sleep(0.05)
    os.kill(process.pid, killer)  # the parent alone: the workers have to notice
    assert process.wait(timeout=30) != 0
    deadline = time.monotonic() + 30
    while subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True, check=False).stdout:
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.1)
    process.close()
    for path in out.glob("runs/*.json"):
        assert json.loads(path.read_text())["metrics"]["top1"] >= 0


def found(command: list[str]) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()


def test_a_comparison_whose_worker_and_then_whose_parent_is_killed_gives_the_table_of_one_left_alone(
    tiny: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipes = {name: tiny(gate=gate, epochs=5) for name, gate in (("none", None), ("ECA", "eca"))}
    (tmp_path / "recipes").write_bytes(pickle.dumps(recipes))
    out, runs = tmp_path / "out", tmp_path / "out" / "runs"
    parent = FreshProcess(FORKS + SCRIPT_OF_PICKLES, tmp_path / "recipes", out)

    def wait_for_a_checkpoint(name: str) -> None:
        while not (runs / name / "last.ckpt").exists():
            assert parent.returncode is None
            time.sleep(0.01)

    wait_for_a_checkpoint("none-seed0")
    [worker] = found(["pgrep", "-P", str(parent.pid)])
    os.kill(int(worker), signal.SIGKILL)
    assert not list(runs.glob("*.json")), "it was killed too late"
    wait_for_a_checkpoint("eca-seed0")
    parent.kill()
    _, told = parent.communicate()
    assert "none, seed 0: its process was killed by signal 9; it is tried once more." in told
    assert {path.name for path in runs.glob("*.json")} == {"none-seed0.json"}
    while found(["pgrep", "-s", str(parent.pid)]):
        time.sleep(0.05)
    compare(recipes, [0], out, workers=1, progress=False)
    compare(recipes, [0], tmp_path / "alone", workers=1, progress=False)
    assert (out / "summary.json").read_text() == (tmp_path / "alone/summary.json").read_text()
    tables = [(folder / "results.csv").read_text().splitlines() for folder in (out, tmp_path / "alone")]
    mine, alone = ([line.rpartition(",")[0] for line in lines] for lines in tables)  # without the seconds
    assert mine == alone


@pytest.mark.parametrize(
    ("names", "seeds", "message"),
    [
        ([], [0], "conditions must name at least one"),
        (["a"], [], "seeds must be one or more different"),
        (["a"], [1, 1], "seeds must be one or more different"),
        (["ECA!", "eca"], [0], "differ in letters and digits"),
    ],
)
def test_wrong_arguments_are_named(
    tiny: Callable[..., Recipe], tmp_path: Path, names: list[str], seeds: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare({name: tiny() for name in names}, seeds, tmp_path)


@pytest.mark.parametrize("changes", [{"devices": 2}, {"devices": -1}, {"nodes": 2}], ids=str)
def test_a_recipe_for_several_devices_is_refused_before_anything_runs(tiny, tmp_path, changes) -> None:
    recipe = tiny()
    recipe = replace(recipe, trainer=replace(recipe.trainer, **changes))
    with pytest.raises(ValueError, match=r"conditions\['ECA'\] must train on one device, got trainer\.devices="):
        compare({"none": tiny(), "ECA": recipe}, [0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def comparison_of(**top1: list[float]) -> Comparison:
    return Comparison(
        {name: [Run(name, i, value, [], Path()) for i, value in enumerate(values)] for name, values in top1.items()}
    )


def test_interval_is_students_t_on_the_paired_differences() -> None:
    comparison = comparison_of(none=[80.0, 82.0, 81.0], ECA=[81.0, 82.5, 83.0])
    difference = comparison.difference("ECA")
    margin = 4.302652729749464 * statistics.stdev([1.0, 0.5, 2.0]) / math.sqrt(3)
    assert difference.mean == pytest.approx(3.5 / 3)
    assert difference.low == pytest.approx(3.5 / 3 - margin, rel=1e-12)
    assert difference.high == pytest.approx(3.5 / 3 + margin, rel=1e-12)


def test_interval_covers_the_truth_in_95_of_100_studies() -> None:
    samples = torch.randn(4000, 3, generator=torch.Generator().manual_seed(1)) + 0.7
    covered = 0
    for row in samples.tolist():
        difference = paired_difference(row)
        assert difference.low is not None
        assert difference.high is not None
        covered += difference.low <= 0.7 <= difference.high
    assert 0.94 < covered / 4000 < 0.96


def test_one_seed_has_no_interval() -> None:
    comparison = comparison_of(none=[80.0], ECA=[81.0])
    assert comparison.spread("ECA") is None
    assert comparison.difference("ECA").low is None
    said = verdict(comparison.summary)
    assert "which takes 6 seeds" in said
    assert "One seed gives no spread" in said
    assert "at least three" not in said, "three can show nothing either"


def test_three_seeds_show_no_difference_however_far_the_intervals_are_from_zero() -> None:
    comparison = comparison_of(
        none=[80.0, 80.1, 80.2], A=[85.0, 85.2, 85.1], B=[75.0, 75.1, 75.3], C=[79.0, 82.0, 80.0]
    )
    a, b, c, why, _ = verdict(comparison.summary).splitlines()
    assert a.startswith("A is 5.00 above none (95 % interval +4.75 to +5.25, 3 seeds, p 0.25, 0.75 after")
    assert "the interval lies above zero, but p after the correction is above 0.05, so no difference is shown" in a
    assert "the interval lies below zero, but p after the correction is above 0.05, so no difference is shown" in b
    assert "the interval includes zero, so no difference is shown" in c
    assert why.startswith("3 seeds cannot show a difference at 0.05")


def test_table_has_a_row_for_every_condition() -> None:
    comparison = comparison_of(none=[80.0, 81.0], ECA=[81.0, 83.0])
    lines = table(comparison, {"none": Cost(0, 0, 0.1), "ECA": Cost(9, 1000, 0.11)}).splitlines()
    assert lines[2].split()[:2] == ["none", "80.50"]
    assert lines[3].split() == [
        "ECA",
        "82.00",
        "1.41",
        "+1.50",
        "-4.85",
        "to",
        "+7.85",
        "9",
        "1,000",
        "110.0",
        "x",
        "1.10",
    ]
