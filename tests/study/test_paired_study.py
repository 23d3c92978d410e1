"""Any training function: nothing finished is lost or repeated, a failed or killed run does not stop the study."""

import csv
import json
import multiprocessing
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import made_up_runs
import pytest
from tqdm import tqdm

from ecanet.files.folder_lock import lock_folder, unlock_folder
from ecanet.study import engine, processes, run
from ecanet.study.job import Job
from ecanet.study.paired_study import fingerprint
from tests import fresh
from tests.fresh import FreshProcess

CONDITIONS = {"none": 0.0, "SE": 0.1, "ECA, k=3": 0.9}
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import made_up_runs
if __name__ == "__main__":
    from ecanet.study import run
    train = getattr(made_up_runs, sys.argv[3])
    print(run(train, {"none": 0.0, "SE": 0.1, "ECA, k=3": 0.9}, range(9), sys.argv[2], "acc", workers=2))
"""


def study(out: Path, train: Any = made_up_runs.train, seeds: Any = (0, 1), conditions: Any = CONDITIONS, **more: Any):
    return run(train, conditions, seeds, out, **{"metric": "acc", "progress": False, "workers": 2} | more)


def tables(out: Path) -> tuple[list[dict[str, str]], str]:
    """The results without times, and the summary."""
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows], (
        out / "summary.json"
    ).read_text()


def calls(out: Path) -> dict[str, int]:
    return {path.parent.name: len(path.read_text()) for path in sorted(out.glob("runs/*/calls"))}


# --- a study ------------------------------------------------------------------------------------------------------


def test_a_study_has_a_file_for_each_run_a_table_and_a_summary(tmp_path: Path, capsys) -> None:
    found = study(tmp_path, seeds=range(7), progress=True)
    files = {path.name for path in (tmp_path / "runs").glob("*.json")}
    assert files == {f"{name}-seed{seed}.json" for name in ("none", "se", "eca-k-3") for seed in range(7)}
    rows, summary = tables(tmp_path)
    assert [(row["condition"], row["seed"]) for row in rows[:4]] == [
        ("none", "0"),
        ("SE", "0"),
        ("ECA, k=3", "0"),
        ("none", "1"),
    ]
    assert list(rows[0]) == ["condition", "seed", "acc", "loss"]
    assert float(rows[2]["acc"]) == found.runs["ECA, k=3"][0].metrics["acc"]
    assert found.runs["SE"][6].details == {"curve": [1, 2.5]}
    document = json.loads(summary)
    assert list(document) == ["baseline", "metric", "conditions"]
    assert (document["baseline"], document["metric"]) == ("none", "acc")
    keys = ["seeds", "mean", "std", "difference", "low", "high", "p", "p_holm", "effect", "seeds_needed"]
    assert [list(row) for row in document["conditions"].values()] == [keys] * 3
    assert document["conditions"]["ECA, k=3"]["difference"] == found.summary.conditions["ECA, k=3"].difference
    assert "ECA, k=3 is " in str(found)
    said = capsys.readouterr().err
    assert said.startswith("7 seeds, 2 comparisons with the baseline: a difference of ")
    assert "21/21 done" in said
    assert "0 running, 0 left, time left 00:00" in said


class EndsAtOnce:
    """Workers whose runs end when they are looked for."""

    size = 2

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def start(self, job: Job) -> None:
        self.jobs.append(job)

    def ended(self) -> list[tuple[Job, str | None]]:
        return [(self.jobs.pop(), "was killed")]

    def close(self) -> None: ...


def test_what_the_bar_says_is_done_running_and_left_is_all_runs_in_every_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "workers_on", lambda *_: EndsAtOnce())
    monkeypatch.setattr(engine, "tqdm", lambda **settings: tqdm(**settings | {"mininterval": 0}))
    jobs = [Job("none", seed, tmp_path / f"none-seed{seed}", dict, "") for seed in range(5)]
    engine.run_all(jobs, 2, "processes", True, lambda _: "", lambda: None)
    said = re.findall(r"(\d+)/5 done .* (\d+) running, (\d+) left", capsys.readouterr().err)
    assert len(said) > 5
    assert {sum(map(int, numbers)) for numbers in said} == {5}


def test_more_seeds_and_more_conditions_are_added_and_nothing_is_repeated(tmp_path: Path) -> None:
    study(tmp_path, conditions={"none": 0.0, "SE": 0.1})
    found = study(tmp_path, seeds=[1, 0, 5])
    assert [[run.seed for run in found.runs[name]] for name in CONDITIONS] == [[1, 0, 5]] * 3
    assert set(calls(tmp_path).values()) == {1}
    assert len(calls(tmp_path)) == 9


def test_another_metric_is_compared_without_training(tmp_path: Path) -> None:
    study(tmp_path)
    assert study(tmp_path, metric="loss").summary.conditions["SE"].difference == 0
    with pytest.raises(ValueError, match=r"one that the finished runs in .* have \(acc, loss\), got 'map'"):
        study(tmp_path, metric="map", seeds=range(3))
    assert calls(tmp_path) == dict.fromkeys(calls(tmp_path), 1)
    assert len(calls(tmp_path)) == 6


def test_a_metric_need_not_be_named_where_there_is_one_and_several_are_named_and_kept(tmp_path: Path) -> None:
    found = study(tmp_path / "one", made_up_runs.one_number, metric=None)
    assert found.metric == "acc"
    assert found.summary == study(tmp_path / "one", made_up_runs.one_number).summary
    for _ in range(2):  # at the end, and at once
        with pytest.raises(ValueError, match=r"one of acc, loss, which .*: the same call with metric='acc' compares"):
            study(tmp_path / "two", metric=None)
    assert len((tmp_path / "two/results.csv").read_text().splitlines()) == 7
    assert study(tmp_path / "two").summary.metric == "acc"
    assert set(calls(tmp_path / "two").values()) == {1}
    with pytest.raises(
        RuntimeError, match=r"no run returned a number, .*: none, seed 0: it returned no numbers; SE, seed 0"
    ):
        study(tmp_path / "none", made_up_runs.no_number, metric=None)


def test_a_metric_may_have_the_name_of_a_column(tmp_path: Path) -> None:
    study(tmp_path, made_up_runs.seconds_of_its_own, metric="seconds")
    rows, _ = tables(tmp_path)
    assert [row["seconds (metric)"] for row in rows[:2]] == ["3.5", "3.5"]


def test_conditions_that_are_the_same_are_told(tmp_path: Path, capsys) -> None:
    study(tmp_path, conditions={"none": 0.0, "plain": 0.0, "SE": 0.1}, progress=True)
    told = "none and plain are the same: all but one of them take time and seeds, and can show nothing."
    assert told in capsys.readouterr().err


def test_names_are_of_any_script(tmp_path: Path) -> None:
    names = {"基线": 0.0, "注意力": 0.1, "Größe, k=3": 0.2}
    found = study(tmp_path, seeds=[0], conditions=names, workers=2)
    assert [len(runs) for runs in found.runs.values()] == [1, 1, 1]
    files = {path.name for path in (tmp_path / "runs").glob("*.json")}
    assert files == {"基线-seed0.json", "注意力-seed0.json", "größe-k-3-seed0.json"}
    assert "注意力" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_names_alone_are_conditions_and_numbers_of_other_libraries_are_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = study(Path("out"), made_up_runs.numbers, [3], ["none", "eca"])  # which change the working folder
    [only] = found.runs["eca"]
    assert only.metrics == {"acc": 0.5, "int": 3, "array": 2.0}
    assert only.details == {"history": [{"loss": 1.5}], "ok": True}
    assert str(found).count("1 seed") >= 1


def test_a_training_function_may_start_processes(tmp_path: Path) -> None:
    assert study(tmp_path, made_up_runs.run_a_child, [0], ["none"]).runs["none"][0].metrics == {"acc": 5.0}


def test_a_worker_imports_neither_torch_nor_scipy_unless_its_function_does() -> None:
    code = "import sys, ecanet.study.processes; print({'torch', 'scipy', 'lightning'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_study_killed_in_the_middle_and_one_whose_workers_are_killed_give_the_table_of_one_left_alone(
    tmp_path: Path,
) -> None:
    out, alone = tmp_path / "out", tmp_path / "alone"

    def start(folder: Path) -> FreshProcess:
        return FreshProcess(SCRIPT, Path(made_up_runs.__file__).parent, folder, "train_and_be_killed_once")

    first = start(out)
    while len(list(out.glob("runs/*.json"))) < 5:
        assert first.returncode is None
        time.sleep(0.01)
    first.kill()
    first.communicate(timeout=30)  # the workers have their end of the pipes: it returns when they are gone
    finished = {path: path.read_bytes() for path in out.glob("runs/*.json")}
    assert 5 <= len(finished) < 27
    said, told = start(out).communicate(timeout=60)
    assert {path: path.read_bytes() for path in finished} == finished
    assert "was killed by signal 9; it is tried once more" in told
    study(alone, made_up_runs.train_slowly, range(9))
    assert tables(out) == tables(alone)
    assert "ECA, k=3 is" in said
    assert "not counted" not in said


def test_a_worker_whose_study_is_gone_ends_without_a_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("spawn").Process(target=processes._work, args=(theirs,))
    worker.start()
    theirs.close()
    assert ours.poll(60)
    ours.close()  # what it said stays unread, as when the study is killed: its pipe is reset
    worker.join(60)
    assert (worker.exitcode, capfd.readouterr().err) == (0, "")


def test_a_run_whose_process_dies_twice_is_told_and_the_study_neither_hangs_nor_loses_the_others(
    tmp_path: Path, capsys
) -> None:
    start = time.monotonic()
    found = study(tmp_path, made_up_runs.die_always, range(3), ["none", "eca"])
    assert time.monotonic() - start < 18, "a child that the process left is not waited for"
    reason = "its process ended with exit status 3, for the second time"
    assert [(f.condition, f.seed, f.reason) for f in found.failed] == [("none", 1, reason), ("eca", 1, reason)]
    assert [run.seed for run in found.runs["eca"]] == [0, 2]
    assert found.summary.conditions["eca"].seeds == 2
    told = capsys.readouterr().err
    assert told.count("eca, seed 1: its process ended with exit status 3; it is tried once more.") == 1
    assert told.count(f"eca, seed 1 failed: {reason}.") == 1
    assert f"Failed and not counted: none, seed 1: {reason}. The same call runs it again." in str(found)
    assert "eca-seed1.json" not in (tmp_path / "report.html").read_text(), "there is no file to delete"
    assert calls(tmp_path)["eca-seed1"] == 2
    assert not (tmp_path / "runs" / "eca-seed1.json").exists(), "the next call tries again"


def test_a_run_that_raises_or_has_no_number_is_marked_told_and_not_tried_again(tmp_path: Path, capsys) -> None:
    found = study(tmp_path, made_up_runs.fail, range(10), ["none", "eca"])
    told = capsys.readouterr().err
    for again in (found, study(tmp_path, made_up_runs.fail, range(10), ["none", "eca"])):
        assert {f.seed: f.reason for f in again.failed} == made_up_runs.FAILURES
        assert again.summary.conditions["eca"].seeds == 1
        assert again.summary.conditions["none"].seeds == 10
        for seed, why in made_up_runs.FAILURES.items():
            assert f"Failed and not counted: eca, seed {seed}: {why}." in str(again)
            assert f"eca, seed {seed} failed: {why}" in told
    assert set(calls(tmp_path).values()) == {1}
    assert "ValueError: no such\nlayer" in (tmp_path / "runs/eca-seed1/error.txt").read_text()
    rows, _ = tables(tmp_path)
    assert rows[3] == {"condition": "eca", "seed": "1", "acc": ""}
    (tmp_path / "runs/eca-seed1.json").unlink()
    study(tmp_path, made_up_runs.fail, range(10), ["none", "eca"])
    assert calls(tmp_path)["eca-seed1"] == 2


def test_a_script_without_a_guard_is_told_to_have_one(tmp_path: Path) -> None:
    script = tmp_path / "go.py"
    unguarded = SCRIPT.replace('if __name__ == "__main__":', "if True:").replace("workers=2", "workers=1")
    script.write_text(unguarded)
    code = f"__file__ = {str(script)!r}\n{unguarded}"  # the script itself, which its workers import
    done = fresh.run(code, Path(made_up_runs.__file__).parent, tmp_path / "out", "train")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("RuntimeError: no worker process starts: the last one ended with")
    assert 'if __name__ == "__main__": around the call' in done.stderr
    assert "another study is writing" not in done.stderr, "the worker says what is wrong, too"


# --- refused before anything runs ---------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no condition": ({"conditions": {}}, ValueError, "conditions must name at least one"),
    "two names that are one": ({"conditions": ["eca", "se", "eca"]}, ValueError, "conditions need different names"),
    "two names with one file": ({"conditions": {"ECA!": 1, "eca": 2}}, ValueError, "differ in letters and digits"),
    "a text": ({"conditions": "eca"}, ValueError, "conditions must be a list of names or a dict, got eca"),
    "names in no order": ({"conditions": {"none", "eca"}}, ValueError, "must be a list of names or a dict, got a set"),
    "no names": ({"conditions": None}, ValueError, "conditions must be a list of names or a dict, got"),
    "a list as a name": ({"conditions": [["eca"], ["se"]]}, ValueError, "conditions must have texts for names, got"),
    "a name too long for a file": ({"conditions": ["a" * 151]}, ValueError, "names of at most 150 bytes, got aaa"),
    "an empty name": ({"conditions": {"": 1}}, ValueError, "conditions must have texts for names"),
    "a number as a name": ({"conditions": [1, 2]}, ValueError, "conditions must have texts for names, got 1"),
    "no seeds": ({"seeds": []}, ValueError, "integers from 0 to 2\\^63 - 1, such as range"),
    "seeds that can be read once": (
        {"seeds": iter([0, 1])},
        ValueError,
        "seeds must be one or more different integers",
    ),
    "a seed beyond 64 bits": ({"seeds": [2**63]}, ValueError, "seeds must be one or more different integers from 0 to"),
    "a number of seeds": ({"seeds": 9}, ValueError, r"seeds must be .* such as range\(9\), got 9"),
    "a seed twice": ({"seeds": [1, 1]}, ValueError, "seeds must be one or more different"),
    "a negative seed": ({"seeds": [-1]}, ValueError, "seeds must be one or more different"),
    "half a seed": ({"seeds": [0.5]}, ValueError, "seeds must be one or more different"),
    "no metric": ({"metric": ""}, ValueError, "metric must name what train returns"),
    "metrics": ({"metric": ["a", "b"]}, ValueError, "metric must name what train returns"),
    "nowhere": ({"on": "slurm"}, ValueError, "on must be one of processes, ray, got 'slurm'"),
    "no worker": ({"workers": 0}, ValueError, "workers must be 1 or more, or None, got 0"),
    "no function": ({"train": 3}, TypeError, "train must be a function of condition, seed and folder, got 3"),
    "too few arguments": ({"train": len}, TypeError, "train must take condition, seed and folder"),
    "a lambda": ({"train": lambda c, s, f: {}}, TypeError, "train must be something that another process can import"),
    "a condition that stays here": (
        {"conditions": {"none": 1, "eca": lambda: 1}},
        TypeError,
        r"conditions\['eca'\] must be something that another process can import",
    ),
}


@pytest.mark.parametrize(("given", "kind", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_before_anything_runs(
    given: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        study(tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_study_is_refused_before_anything_runs(tmp_path: Path) -> None:
    study(tmp_path, seeds=[0])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for changes, message in (
        (
            {"conditions": {"none": 0.0, "gct": 0.2}},
            "another study: eca-k-3-seed0.json belongs to none of the conditions",
        ),
        ({"conditions": CONDITIONS | {"SE": 0.2}}, r"se-seed0\.json was made by another recipe, function or version"),
        ({"train": made_up_runs.train_slowly}, r"none-seed0\.json was made by another recipe, function or version"),
    ):
        with pytest.raises(ValueError, match=message):
            study(tmp_path, **{"seeds": [0, 1]} | changes)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_a_killed_study_left_half_written_is_removed(tmp_path: Path) -> None:
    study(tmp_path, seeds=[0], workers=1)
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = [
        tmp_path / f"{name}.{ended.pid}.partial" for name in (".summary.json", "runs/.none-seed1.json", ".notes.txt")
    ]
    for path in left:
        path.write_text("half")
    study(tmp_path, workers=1)
    assert [path.exists() for path in left] == [False, False, True], "what is none of a study's stays"


def test_two_studies_in_one_folder_at_a_time_are_refused_and_the_second_may_come_later(tmp_path: Path) -> None:
    handle = lock_folder(tmp_path)
    with pytest.raises(BlockingIOError, match=f"another study is writing into {tmp_path}: wait until it ends"):
        study(tmp_path)
    unlock_folder(handle)
    assert len(study(tmp_path).runs["none"]) == 2


class Plain:
    """An object that does not say what is in it."""


def test_a_fingerprint_is_that_of_the_values_and_not_of_where_they_are() -> None:
    same: list[tuple[Any, Any]] = [
        (Plain(), Plain()),
        ({"a": 1, "b": (2, Path("x"))}, {"b": [2, Path("x")], "a": 1}),
        ({"x", "y", "z"}, {"z", "y", "x"}),
        (made_up_runs.train, made_up_runs.train),
    ]
    assert all(fingerprint(a) == fingerprint(b) for a, b in same)
    different = [None, 0, 1, "1", 1.5, [1], {"1": 1}, Path("1"), made_up_runs.train, made_up_runs.fail, Plain, {"1"}]
    assert len({fingerprint(value) for value in different}) == len(different)


def test_a_call_that_only_reads_runs_does_not_say_that_its_command_and_commit_made_them(tmp_path: Path) -> None:
    study(tmp_path, seeds=[0], conditions={"none": 0.0}, workers=1)
    file = tmp_path / "study.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"commit": "that of the runs", "command": "that one"}))
    study(tmp_path, seeds=[0], conditions={"none": 0.0}, workers=1)
    about = json.loads(file.read_text())
    assert (about["commit"], about["command"], about["seeds"]) == ("that of the runs", "that one", [0])
    file.unlink()  # a study by an earlier version
    study(tmp_path, seeds=[0], conditions={"none": 0.0}, workers=1)
    assert json.loads(file.read_text())["command"] is None
    study(tmp_path, seeds=[0, 1], conditions={"none": 0.0}, workers=1)
    assert "python" in json.loads(file.read_text())["command"]


def test_a_call_that_compares_finished_runs_in_another_way_is_the_command_that_makes_it_again(tmp_path: Path) -> None:
    given: dict[str, Any] = {"seeds": [0, 1], "conditions": {"none": 0.0, "SE": 0.1}}
    study(tmp_path, **given, workers=2)
    file = tmp_path / "study.json"
    before = json.loads(file.read_text()) | {"commit": "that of the runs", "command": "that one"}
    for change in ({"metric": "loss"}, {"seeds": [0]}, {"conditions": {"SE": 0.1, "none": 0.0}}):
        file.write_text(json.dumps(before))
        study(tmp_path, **given | change)
        about = json.loads(file.read_text())
        assert about["commit"] == "that of the runs"
        assert "python" in about["command"], "that one does not compare them so"
