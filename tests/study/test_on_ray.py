"""A study on a Ray cluster has the files, the retries and the marks of one in processes."""

import csv
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import made_up_runs
import pytest

from ecanet.study import run
from ecanet.study.engine import check_engine
from ecanet.study.job import Job

SCRIPT = """
import os, sys
sys.path.insert(0, sys.argv[1])
import made_up_runs

def train(condition, seed, folder):  # of the script itself; two runs at a time meet in the folder above
    assert os.getcwd() == sys.argv[3]
    return made_up_runs.on_a_cluster(condition, seed, folder)

if __name__ == "__main__":
    from ecanet.study import run
    import ray
    print(run(train, {"none": 0.0, "ECA": 0.9}, range(2), sys.argv[2], "acc", workers=2, on="ray"))
    assert not ray.is_initialized()
"""


def test_on_a_cluster_of_two_workers_one_of_them_killed_every_run_has_its_file_and_what_raises_is_marked(
    tmp_path: Path,
) -> None:
    pytest.importorskip("ray")
    (tmp_path / "go.py").write_text(SCRIPT.replace("sys.argv[3]", repr(str(tmp_path))))
    out = tmp_path / "out"
    command = [sys.executable, "go.py", str(Path(made_up_runs.__file__).parent), str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    timer = threading.Timer(300, process.kill)
    timer.start()
    said, told = process.communicate()
    timer.cancel()
    assert process.returncode == 0, told
    assert "ECA, seed 0: its process died (WorkerCrashedError: " in told
    assert told.count("it is tried once more.") == 1
    assert "ECA, seed 1 failed: ValueError: no such layer; see " in told
    assert "4/4 done" in told
    assert "Failed and not counted: ECA, seed 1: ValueError: no such layer." in said
    runs = {path.stem: json.loads(path.read_text()) for path in out.glob("runs/*.json")}
    assert {name: run["metrics"].get("acc") for name, run in runs.items()} == {
        "none-seed0": made_up_runs.accuracy(0.0, 0),
        "none-seed1": made_up_runs.accuracy(0.0, 1),
        "eca-seed0": made_up_runs.accuracy(0.9, 0),
        "eca-seed1": None,
    }
    assert len({run["details"]["process"] for run in runs.values() if run["details"]}) == 3, "a process for each run"
    assert runs["none-seed0"]["details"]["met"], "two at a time"
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["condition"], row["seed"], bool(row["acc"])) for row in rows] == [
        ("none", "0", True),
        ("ECA", "0", True),
        ("none", "1", True),
        ("ECA", "1", False),
    ]


@pytest.mark.parametrize(
    ("there", "most", "size", "gpus"),
    [
        ({"CPU": 8.0}, None, 8, 0),
        ({"CPU": 8.0}, 3, 3, 0),
        ({"CPU": 16.0, "GPU": 2.0}, None, 2, 1),
        ({"CPU": 16.0, "GPU": 2.0}, 5, 2, 1),
        ({}, None, 1, 0),
    ],
    ids=["cores", "fewer than cores", "a run a GPU", "no more than GPUs", "a cluster that has yet to grow"],
)
def test_a_run_has_a_gpu_where_there_are_any_and_otherwise_a_cpu(
    there: dict[str, float], most: int | None, size: int, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    from ecanet.study import on_ray

    options: dict[str, Any] = {}
    monkeypatch.setattr(on_ray.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(on_ray.ray, "cluster_resources", lambda: there)
    monkeypatch.setattr(on_ray.ray, "remote", lambda **given: options.update(given) or (lambda function: function))
    workers = on_ray.OnRay(most)
    assert (workers.size, options["num_gpus"], options["max_retries"]) == (size, gpus, 0)
    workers.close()  # a cluster that the caller is in stays


def test_a_file_written_where_the_folder_is_not_shared_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    from ecanet.study import on_ray

    job = Job("none", 3, tmp_path / "runs" / "none-seed3", made_up_runs.of_the_folder_alone, "f")
    content = on_ray._run(on_ray.ray.cloudpickle.dumps(job), "/no/such/folder", [])
    job.file.unlink()  # as on a machine that has none of the other's files
    workers = object.__new__(on_ray.OnRay)
    workers._jobs = {"task": job}
    monkeypatch.setattr(on_ray.ray, "get", lambda task: content)
    assert workers._receive("task") == (job, None)
    stored = job.read()
    assert stored is not None
    assert stored["metrics"] == {"acc": 1.0}


def test_a_cluster_that_lacks_the_function_stops_the_study_at_once_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    from ecanet.study import on_ray

    def get(task: str) -> bytes:
        raise ModuleNotFoundError("No module named 'my_study'")

    workers = object.__new__(on_ray.OnRay)
    workers._jobs = {"task": Job("none", 3, tmp_path / "none-seed3", made_up_runs.of_the_folder_alone, "f")}
    monkeypatch.setattr(on_ray.ray, "get", get)
    with pytest.raises(
        RuntimeError, match=r"no run starts on the cluster \(ModuleNotFoundError: .*'my_study'\): every"
    ):
        workers._receive("task")


def test_an_address_where_no_cluster_answers_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConnectionError, match=r"RAY_ADDRESS=127\.0\.0\.1:1: no Ray cluster answers there \("):
        run(made_up_runs.train, {"none": 0.0}, [0], tmp_path / "out", "acc", on="ray", progress=False)
    assert not list(tmp_path.rglob("*.json"))


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"on='ray' needs Ray: pip install 'ecanet\[ray\]'"):
        check_engine("ray", None)
