"""Files of finished runs are data: a damaged or hand-made one is refused by name before any work, never counted."""

import hashlib
import json
import math
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ecanet.cli import main
from ecanet.study import compare
from ecanet.study.comparison import comparison_jobs
from ecanet.study.demo import demo_recipes
from ecanet.study.run_files import read_run, write_run
from ecanet.train import OptimConfig, Recipe

RECIPE = Recipe(optim=OptimConfig(epochs=2))
HISTORY = [
    {"epoch": 0, "val/top1": 41.25, "val/loss": math.nan, "train/loss": 2.125, "seconds": 1.5},
    {"epoch": 1, "val/top1": 62.5, "val/loss": 1.0625, "train/loss": 1.5, "seconds": 1.25},
]


def signed(run: Any) -> bytes:
    """A file whose checksum fits, whatever is in it."""
    return json.dumps({**run, "sha256": hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()}).encode()


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a finished run of RECIPE, in a process that must not train."""

    def no_training(pending: list[Any], *_: Any) -> dict[Path, str]:
        assert not pending, "a run is started"
        return {}

    monkeypatch.setattr(sys.modules["ecanet.study.paired_study"], "run_all", no_training)
    # What is measured and drawn for the report comes after the files were read: seconds each.
    monkeypatch.setattr(sys.modules["ecanet.study.comparison"], "write_evidence", lambda *_: None)
    monkeypatch.setattr(sys.modules["ecanet.study.html_report"], "draw", lambda found: ())
    return finished(tmp_path)


def finished(out: Path, name: str = "eca", recipe: Recipe = RECIPE) -> Path:
    [job] = comparison_jobs({name: recipe}, [0], out)
    about = {"fingerprint": job.fingerprint, "seconds": 2.5, "error": None}
    write_run(job.file, about | {"metrics": {"top1": 62.5}, "details": {"history": HISTORY}})
    return job.file


def read(file: Path) -> Any:
    [run] = compare({"eca": RECIPE}, [0], file.parents[1], progress=False).runs["eca"]
    return run.top1, repr(run.history)


def refusal(file: Path) -> str:
    """What is said of a file; it has to name it and what to do, in one line."""
    with pytest.raises(ValueError, match="delete it and run again") as raised:
        read(file)
    said = str(raised.value)
    assert str(file) in said
    assert len(said.splitlines()) == 1
    assert len(said) < len(str(file)) + 300
    return said


def test_an_honest_file_is_read(file: Path) -> None:
    assert read(file) == (62.5, repr(HISTORY))
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    tables = {"results.csv", "summary.json", "study.json", "report.html"}
    assert {path.name for path in file.parents[1].iterdir()} - {"results.parquet", "figures"} == {"runs", *tables}


def test_a_file_of_thousands_of_epochs_is_read_and_one_too_large_is_not_written(tmp_path: Path) -> None:
    file = tmp_path / "long.json"
    run = {"fingerprint": "", "metrics": {"top1": 62.5}, "seconds": 0.5, "error": None}
    write_run(file, run | {"details": {"history": HISTORY * 5000}})
    assert file.stat().st_size > 1_000_000
    assert len(read_run(file)["details"]["history"]) == 10_000
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"takes 18,000,\d+ bytes, and at most 16,777,216 are kept"):
        write_run(file, run | {"details": {"text": "x" * 18_000_000}})
    assert file.read_bytes() == before


# --- damaged ------------------------------------------------------------------------------------------------------


def test_truncated_at_200_places(file: Path) -> None:
    honest = file.read_bytes()
    places = [round(i * (len(honest) - 2) / 199) for i in range(200)]
    for place in places:
        file.write_bytes(honest[:place])
        refusal(file)


def test_flipped_at_200_places(file: Path) -> None:
    """A flip that leaves the content, as of a blank to a line feed, is none."""
    honest = file.read_bytes()
    content, want = json.loads(honest), read(file)
    chance = random.Random(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(honest)
        damaged[chance.randrange(len(honest))] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        try:
            same = repr(json.loads(damaged)) == repr(content)
        except ValueError:
            same = False
        if same:
            assert read(file) == want
        else:
            refusal(file)
            refused += 1
    assert refused > 150


@pytest.mark.parametrize("digit", ["62.5", "41.25", "1.0625", "2.125"])
def test_a_number_that_changed_is_no_result(digit: str, file: Path) -> None:
    file.write_text(file.read_text().replace(digit, f"5{digit[1:]}"))
    assert "its checksum does not match" in refusal(file)


# --- anything else ------------------------------------------------------------------------------------------------

CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n",
    "[]": b"[]",
    "{}": b"{}",
    "null": b"null",
    "a number": b"62.5",
    "NaN": b"NaN",
    "a string": b'"top1"',
    "text": b"top1: 62.5\n",
    "zeros": bytes(400),
    "not UTF-8": b'{"top1": "\xff\xfe"}',
    "UTF-16": '{"top1": 62.5}'.encode("utf-16"),
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "lists 100,000 deep": b"[" * 100_000,
    "objects 100,000 deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a number of 900,000 digits": b'{"top1": ' + b"9" * 900_000 + b"}",
    "escape codes": b'{"\x1b[2J\x1b]0;x\x07": 1}',
    "two objects": b"{}\n{}",
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_what_is_no_run(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    assert "\x1b" not in refusal(file)


RECORD = {"epoch": 1, "val/top1": 62.5}


def top1(value: object) -> dict[str, Any]:
    return {"metrics": {"top1": value}}


def history(value: object) -> dict[str, Any]:
    return {"details": {"history": value}}


HAND_MADE: dict[str, tuple[dict[str, Any], str]] = {
    "top1 of 'x'": (top1("x"), "its metrics are not numbers"),
    "top1 of '62.5'": (top1("62.5"), "its metrics are not numbers"),
    "top1 of NaN": (top1(math.nan), "top1 is not a number"),
    "top1 of Infinity": (top1(math.inf), "top1 is not a number"),
    "top1 of -Infinity": (top1(-math.inf), "top1 is not a number"),
    "top1 of true": (top1(True), "its metrics are not numbers"),
    "top1 of null": (top1(None), "its metrics are not numbers"),
    "top1 in a list": (top1([62.5]), "its metrics are not numbers"),
    "top1 of -1": (top1(-1), "from 0 to 100"),
    "top1 of 100.1": (top1(100.1), "from 0 to 100"),
    "top1 of 10^4000": (top1(10**4000), "its metrics are not numbers"),
    "top1 of another epoch": (top1(41.25), "top1 is not that of the last epoch"),
    "no top1": ({"metrics": {"loss": 1.5}}, "top1 is not a number"),
    "metrics in a list": ({"metrics": [62.5]}, "its metrics are not numbers"),
    "details in a list": ({"details": [62.5]}, "its details are not an object"),
    "no epoch": (history([]), "its history"),
    "history of a string": (history("x"), "its history"),
    "history of an object": (history({"0": RECORD}), "its history"),
    "history of numbers": (history([62.5]), "its history"),
    "a record without accuracy": (history([{"epoch": 0}, RECORD]), "its history"),
    "a record with an accuracy of NaN": (history([{"val/top1": math.nan}, RECORD]), "its history"),
    "a record with a string": (history([RECORD | {"val/loss": "x"}]), "its history"),
    "a record with true": (history([RECORD | {"val/loss": True}]), "its history"),
    "fingerprint of a number": ({"fingerprint": 0}, "fingerprint is not a string"),
    "fingerprint of null": ({"fingerprint": None}, "fingerprint is not a string"),
    "seconds of NaN": ({"seconds": math.nan}, "its seconds"),
    "seconds below 0": ({"seconds": -1}, "its seconds"),
    "an error of a number": ({"error": 1}, "its error is not a text"),
}


@pytest.mark.parametrize(("changes", "why"), HAND_MADE.values(), ids=HAND_MADE)
def test_a_checksum_that_fits_makes_no_result_of_what_is_none(changes: dict[str, Any], why: str, file: Path) -> None:
    run = json.loads(file.read_bytes())
    del run["sha256"]
    file.write_bytes(signed(run))
    assert read(file)[0] == 62.5
    file.write_bytes(signed(run | changes))
    assert why in refusal(file)


@pytest.mark.parametrize("key", ["metrics", "details", "seconds", "error", "fingerprint", "sha256"])
def test_a_key_that_is_missing(key: str, file: Path) -> None:
    run = json.loads(file.read_bytes())
    del run[key]
    file.write_text(json.dumps(run))
    assert f"it lacks {key}" in refusal(file)


def test_a_run_of_another_recipe_is_refused_as_before(file: Path) -> None:
    run = json.loads(file.read_bytes()) | {"fingerprint": "0" * 16}
    del run["sha256"]
    file.write_bytes(signed(run))
    with pytest.raises(ValueError, match=r"eca-seed0\.json was made by another recipe, function or version"):
        read(file)


# --- what is no file ----------------------------------------------------------------------------------------------

PLACES: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a FIFO": os.mkfifo,
    "a symlink to a folder": lambda path: path.symlink_to(path.parent),
    "a symlink to a device without end": lambda path: path.symlink_to("/dev/zero"),
    "a symlink to text": lambda path: path.symlink_to(__file__),
}


@pytest.mark.parametrize("make", PLACES.values(), ids=PLACES)
def test_what_is_no_file(make: Callable[[Path], object], file: Path) -> None:
    file.unlink()
    make(file)
    refusal(file)


def test_a_file_of_ten_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.json").open("wb") as huge:
        huge.truncate(10**10)
    code = (
        "import sys, pathlib, importlib.util\n"
        "spec = importlib.util.spec_from_file_location('run_files', sys.argv[1])\n"
        "m = importlib.util.module_from_spec(spec); spec.loader.exec_module(m)\n"
        "m.read_run(pathlib.Path(sys.argv[2]))"
    )
    source = sys.modules[read_run.__module__].__file__
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "huge.json")],
        capture_output=True,
        text=True,
        timeout=10,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (10**9, 10**9)),
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ValueError: ")
    assert "huge.json holds no finished run (it has 10,000,000,000 bytes, and at most 16,777,216 are read)" in last


# --- on the command line ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["empty", "[]", "{}", "lists 100,000 deep"])
def test_the_command_line_says_it_in_one_line(content: str, tmp_path: Path) -> None:
    name = next(iter(demo_recipes(1)))
    file = finished(tmp_path, name, demo_recipes(1)[name])
    file.write_bytes(CONTENTS[content])
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--out", str(tmp_path), "--seeds", "1", "--epochs", "1"])
    said = str(stopped.value.code).splitlines()
    assert said[0].startswith(f"ecanet demo: ValueError: {file} holds no finished run (")
    assert said[1:] == ["(ECANET_TRACEBACK=1 shows where)"]
