"""The comparison of ways to insert gates: runs, resumes, pairs by seed, and draws."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import results
from benchmarks.finetune import __main__ as command
from benchmarks.finetune import photographs, pretrained
from benchmarks.finetune import report as again
from benchmarks.finetune.pretrained import NETWORKS
from benchmarks.finetune.runs import KEPT, PLAIN, RANDOM, WAYS, evaluated_after, insert
from benchmarks.finetune.tables import AVERAGE, comparison, report, seeds_of, summary

NETWORK = "mobilenet_v2"
MISSING = pretrained.missing(NETWORK)
needs_packages = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def _case(*top1: float, right: int = 17) -> dict[str, Any]:
    steps = [0, 10, 20]
    return {
        "photographs_right": right,
        "logits_moved": 0.0,
        "steps": steps,
        "top1": list(top1),
        "loss": [1.0] * 3,
        "train_loss": [2.0] * 10 + [1.0] * 10,
    }


@pytest.fixture
def document() -> results.Document:
    top1 = {PLAIN: [(10, 50, 80), (10, 60, 84)], KEPT: [(10, 51, 81), (10, 63, 83)], RANDOM: [(8, 20, 80), (9, 10, 82)]}
    cases = {
        f"{way}/seed {seed}": _case(*values, right=0 if way == RANDOM else 17)
        for way, runs in top1.items()
        for seed, values in enumerate(runs)
    }
    cases[f"{KEPT}/seed 1"]["train_loss"] = [3.0] * 10 + [2.0] * 10
    cases[f"{PLAIN}/seed 2"] = _case(0, 0, 0)  # a killed run: the other ways are not there yet
    settings = {"photographs": 20, "held_out": 300, "steps": 20}
    return {"command": "python -m benchmarks.finetune --seeds 3", "settings": settings, "cases": cases}


def test_differences_are_paired_by_seed(document: results.Document) -> None:
    assert seeds_of(document) == [0, 1]
    found = summary(document)["difference"]
    assert found[f"{KEPT} - {PLAIN}"]["10"]["mean"] == 2.0  # of 1 and 3
    assert found[f"{KEPT} - {PLAIN}"]["10"]["low"] == pytest.approx(2 - 12.706, abs=0.01)  # t of one degree of freedom
    assert found[f"{RANDOM} - {PLAIN}"]["20"] == {"mean": -1.0, "low": -13.71, "high": 11.71}
    assert found[f"{KEPT} - {RANDOM}"][AVERAGE]["mean"] == pytest.approx((16 + 27) / 2)
    assert comparison(document, 10, RANDOM).difference(KEPT).mean == 42
    assert summary(document)["train_loss"][PLAIN] == {"10": 2.0, "20": 1.0}
    assert summary(document)["train_loss_difference"][f"{KEPT} - {PLAIN}"] == {
        "mean": 0.5,
        "low": -5.8531,
        "high": 6.8531,
    }


def test_the_tables_say_what_was_measured(document: results.Document) -> None:
    lines = report(document).splitlines()
    assert lines[0] == "Right after insertion, 20 photographs of ImageNet"
    assert [line.split()[-2] for line in lines[3:6]] == ["17", "17", "0"]
    assert "no gate             10.0  55.0  82.0     68.5" in lines
    assert any(line.startswith("20 ") and "-1.0 (-13.7 to +11.7)" in line for line in lines)


def test_a_result_file_is_shown_again(
    document: results.Document, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "result.json", tmp_path / "picture.png"
    results.write(file, document)
    again.main([str(file), "--plot", str(picture)])
    assert capsys.readouterr().out.strip() == report(document)
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(("steps", "expected"), [(60, [0, 5, 10, 15, 20, 30, 45, 60]), (2, [0, 1, 2]), (1, [0, 1])])
def test_evaluations_start_at_nothing_and_end_at_the_end(steps: int, expected: list[int]) -> None:
    assert evaluated_after(steps) == expected


@needs_packages
def test_the_ways_share_everything_but_the_gates() -> None:
    plain, kept, random = (insert(NETWORK, way, seed=3, photographs=4) for way in WAYS)
    assert plain.logits_moved == 0
    assert kept.logits_moved == 0
    assert random.logits_moved > 0.5
    assert plain.photographs_right == kept.photographs_right == 4
    assert random.photographs_right <= 1
    state = plain.network.state_dict()
    in_random = random.network.state_dict()
    assert all(torch.equal(in_random[key], value) for key, value in state.items())
    assert len(in_random) == len(state) + 17
    assert len(kept.network.state_dict()) == len(state) + 2 * 17  # with their factors
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(kept.network.eval()(x), plain.network.eval()(x))
    assert not torch.equal(insert(NETWORK, PLAIN, 4, 1).network.classifier[1].weight, state["classifier.1.weight"])


@pytest.mark.skipif(pretrained.missing(*NETWORKS) is not None, reason=str(pretrained.missing(*NETWORKS)))
def test_what_random_gates_break_in_mobilenet_are_its_running_statistics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    photographs.main(["--seeds", "1", "--photographs", "6", "--out", str(file)])
    document = results.read(file)
    assert capsys.readouterr().out.strip() == photographs.report(document)
    assert len(document["cases"]) == 2 * 3
    plain, kept, random = (document["cases"][f"{NETWORK}/{way}/seed 0"] for way in WAYS)
    for statistics in ("running", "batch"):
        assert plain[statistics]["right"] == kept[statistics]["right"] >= 5
        assert plain[statistics]["moved"] == 0
        assert kept[statistics]["moved"] == 0
        assert plain[statistics]["gates"] is None
        assert kept[statistics]["gates"] == [1.0, 1.0, 1.0]
    low, middle, high = random["batch"]["gates"]
    assert 0.2 < low < middle < high < 0.8
    assert random["running"]["right"] <= 1
    assert random["batch"]["right"] >= 4
    assert random["batch"]["moved"] < 0.5 < random["running"]["moved"]


def _run(path: Path, *args: str) -> results.Document:
    command.main(["--quick", "--seeds", "1", "--out", str(path), *args])
    return results.read(path)


@needs_packages
def test_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "out.png"
    document = _run(tmp_path / "out.json", "--plot", str(picture))
    assert picture.stat().st_size > 10_000
    assert capsys.readouterr().out.strip() == report(document)
    assert document["command"].endswith("--threads 1 --network mobilenet_v2 --seeds 1 --quick --lr 0.001")
    assert {"machine", "versions", "commit", "environment", "summary"} <= document.keys()
    assert str(Path.home()) not in (tmp_path / "out.json").read_text()
    assert list(document["cases"]) == [f"{way}/seed 0" for way in WAYS]
    for case in document["cases"].values():
        assert case["steps"] == [0, 1, 2, 3, 4]
        assert len(case["top1"]) == len(case["loss"]) == 5
        assert len(case["train_loss"]) == 4
        assert all(math.isfinite(value) for value in (*case["loss"], *case["train_loss"]))
    # The same classifier and pictures in the same order: the first batch has the same loss where the function is kept.
    first = {way: document["cases"][f"{way}/seed 0"]["train_loss"][0] for way in WAYS}
    assert first[KEPT] == pytest.approx(first[PLAIN], rel=1e-3)
    assert first[RANDOM] != pytest.approx(first[PLAIN], rel=1e-3)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Runs take no time; the third is killed once."""
    ran: list[tuple[str, int]] = []

    def finetune(
        way: str, seed: int, settings: Mapping[str, Any], on_evaluation: Callable[[int, float], None]
    ) -> dict[str, Any]:
        ran.append((way, seed))
        on_evaluation(0, 10.0)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return _case(10, 50, len(ran))

    monkeypatch.setattr(command, "finetune", finetune)
    monkeypatch.setattr(pretrained, "missing", lambda *_: None)
    return ran


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, done: list[tuple[str, int]]) -> None:
    path = tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt):
        _run(path)
    before = results.read(path)["cases"]
    assert list(before) == [f"{PLAIN}/seed 0", f"{KEPT}/seed 0"]
    after = _run(path, "--resume")
    assert done == [(PLAIN, 0), (KEPT, 0), (RANDOM, 0), (RANDOM, 0)]
    assert {name: after["cases"][name] for name in before} == before
    assert after["summary"]["seeds"] == [0]


def test_resume_refuses_another_run(
    tmp_path: Path, done: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "out.json")
    with pytest.raises(SystemExit) as stopped:
        _run(tmp_path / "out.json", "--resume", "--lr", "0.5")
    assert stopped.value.code == 2
    assert "its settings differ" in capsys.readouterr().err


def test_missing_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrained, "PHOTOGRAPHS_IN", "no-such-package-of-photographs")
    with pytest.raises(SystemExit) as stopped:
        _run(tmp_path / "out.json")
    assert stopped.value.code == 2
    assert "no-such-package-of-photographs" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--steps", "0"], ["--lr", "2"], ["--lr", "x"], ["--batch", "1"]])
def test_wrong_options(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(args)
    assert stopped.value.code == 2
    assert f"got {args[1]}" in capsys.readouterr().err
