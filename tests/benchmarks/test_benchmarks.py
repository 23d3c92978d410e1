"""The benchmarks run, compute their ratios right and lose nothing; no test asserts a time."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("timm")

from benchmarks import cases, results, run
from benchmarks import cpu as benchmark
from benchmarks import report as report_again
from benchmarks.finetune import report as finetune_report
from benchmarks.gpu import __main__ as gpu_benchmark
from benchmarks.gpu import correctness, kernels, tails
from benchmarks.gpu import networks as gpu_networks
from benchmarks.gpu.workers import Job, Workers
from benchmarks.measure import check_agreement, fault_of_environment
from benchmarks.networks import network_cases, saved_bytes
from benchmarks.tables import GPU_TARGETS, report, roofline, verdicts
from ecanet.nn import ECA
from ecanet.ops import cpu, gpu
from ecanet.profile.turns import Competitor, geometric_mean, geometric_mean_of_ratios, ratio_of_medians, take_turns

BOUND = {"OMP_PROC_BIND": "true"}


@pytest.mark.parametrize(
    ("threads", "environment", "remedy"),
    [
        (1, {"OMP_NUM_THREADS": "1"}, None),
        (1, {}, "OMP_NUM_THREADS=1 python"),
        (1, {"OMP_NUM_THREADS": "2"}, "OMP_NUM_THREADS=1 python"),
        (2, BOUND, None),
        (2, {**BOUND, "OMP_NUM_THREADS": "2"}, None),
        (2, {"OMP_PROC_BIND": "TRUE"}, None),
        (2, {"OMP_NUM_THREADS": "2"}, "OMP_PROC_BIND=true"),
        (2, {"OMP_PROC_BIND": "false"}, "OMP_PROC_BIND=true"),
        (2, {**BOUND, "OMP_NUM_THREADS": "1"}, "set it to 2"),
        (3, BOUND, "--threads 2"),
    ],
)
def test_openmp_settings_that_spoil_a_measurement(
    threads: int, environment: dict[str, str], remedy: str | None
) -> None:
    fault = fault_of_environment(threads, environment, cores=2)
    assert fault is None if remedy is None else remedy in (fault or "")


@pytest.mark.parametrize("spoiled", ["openmp", "kernels"])
def test_refuses_to_measure(
    spoiled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr(cpu, "_reason", "not built; to build them: ecanet build" if spoiled == "kernels" else None)
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--out", str(tmp_path / "out.json")])
    assert stopped.value.code == 2
    assert ("ecanet build" if spoiled == "kernels" else "OMP_NUM_THREADS=1") in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_ratio_of_medians() -> None:
    ratio = ratio_of_medians([1.0, 2.0, 900.0], [4.0, 4.0, 4.0])
    assert ratio.value == 0.5
    assert 0.25 <= ratio.low <= ratio.value <= ratio.high <= 225


def test_interval_keeps_the_rounds_together() -> None:
    """A round that is slow for both says nothing about their ratio."""
    slow_rounds = [1.0, 5.0, 2.0, 80.0, 3.0]
    ratio = ratio_of_medians([3 * seconds for seconds in slow_rounds], slow_rounds)
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((3, 3, 3))


def test_geometric_mean() -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4)
    mean = geometric_mean_of_ratios([([1.0] * 3, [2.0] * 3), ([8.0] * 3, [1.0] * 3)])
    assert (mean.low, mean.value, mean.high) == pytest.approx((2, 2, 2))


def test_competitors_take_turns() -> None:
    order: list[str] = []

    def run(name: str) -> None:
        order.append(name)

    competitors = {name: Competitor(lambda name=name: run(name)) for name in "AB"}
    timings = take_turns(competitors, rounds=4, turn_seconds=1e-6)
    turns = re.findall(r"A+|B+", "".join(order))
    assert "".join(turn[0] for turn in turns) == "AB" * 5  # calibration, then four rounds
    for name, turn in zip("AB" * 4, turns[2:], strict=True):
        assert len(turn) == timings[name].calls + 1  # the first one is not timed
    assert all(len(timing.seconds) == 4 and min(timing.seconds) > 0 for timing in timings.values())


def test_wrong_results_are_not_timed() -> None:
    competitors = {"right": Competitor(lambda: torch.ones(3)), "wrong": Competitor(lambda: torch.full((3,), torch.nan))}
    with pytest.raises(RuntimeError, match="wrong and right disagree"):
        check_agreement(competitors, ("right", "wrong"), tolerance=0.1)


def _case(**medians: float) -> dict[str, Any]:
    return {"maps": 3, "map_bytes": 8, "seconds": {name.replace("_", " "): [s] * 3 for name, s in medians.items()}}


def test_targets_and_roofline() -> None:
    cases = {
        "inference/tail/1x2x3x3/contiguous": _case(ecanet=2.0, no_gate=1.0, timm=8.0, copy=1.0),
        "inference/tail/1x2x3x3/channels_last": _case(ecanet=1.0, no_gate=2.0, timm=1.0, copy=1.0),
        "network/memory/8x3x9x9/contiguous": {"saved_bytes": {"ecanet": 103, "no gate": 100}},
    }
    found = {verdict.what: (verdict.ratio.value, verdict.verdict) for verdict in verdicts(cases)}
    assert found == {
        "inference/tail, geometric mean: ecanet / no gate": (pytest.approx(1.0), "met"),
        "inference/tail, geometric mean: ecanet / timm": (pytest.approx(0.5), "missed"),
        "network/memory, contiguous: ecanet / no gate": (pytest.approx(1.03), "missed"),
    }
    assert roofline(cases["inference/tail/1x2x3x3/contiguous"]) == pytest.approx(3 * 0.5 / 2)


def test_saved_bytes_are_counted_once_and_without_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
    x, target = torch.randn(2, 3), torch.tensor([0, 1])
    # x; the ReLU's output; of the loss its input log_softmax, the target and the total weight
    assert saved_bytes(model, x, target) == 4 * (2 * 3 + 2 * 5 + 2 * 5) + 8 * 2 + 4


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return tmp_path / "out.json"


def _run(path: Path, *args: str) -> results.Document:
    benchmark.main(["--quick", "--no-compile", "--out", str(path), *args])
    return results.read(path)


def test_quick_run(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = quick.with_suffix(".png")
    document = _run(quick, "--only", "op,module,inference,training", "--plot", str(picture))
    assert picture.stat().st_size > 10_000
    assert len(document["cases"]) == 11 * 2 * 2
    assert document["command"].endswith("--threads 1 --quick --no-compile --only op,module,inference,training")
    assert {"machine", "versions", "commit", "environment", "load_average_at_start", "summary"} <= document.keys()
    assert str(Path.home()) not in quick.read_text()
    for key, case in document["cases"].items():
        assert {"ecanet", "neutral" if "factor" in key else "copy"} < case["seconds"].keys()
        assert all(math.isfinite(s) and s > 0 for samples in case["seconds"].values() for s in samples)
    output = capsys.readouterr().out
    assert output.strip() == report(document)
    assert "training/tail, geometric mean: ecanet / no gate" in output


@pytest.mark.parametrize("path", sorted(Path("benchmarks/results").glob("*.json")), ids=lambda path: path.stem)
def test_a_result_file_is_shown_by_its_command_and_refused_by_others_in_a_line(path, capsys) -> None:
    writer = path.stem.partition("-")[0]
    for shown, show in (("cpu gpu traffic", report_again), ("finetune finetune.photographs", finetune_report)):
        if writer in shown:
            show.main([str(path)])
            assert capsys.readouterr().out.count("\n") > 5
            continue
        with pytest.raises(SystemExit) as refused:
            show.main([str(path)])
        assert refused.value.code == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert re.search(rf"{path} was written by benchmarks\.\S*{writer}: ", said)
        assert f"files of {' and '.join(f'benchmarks.{name}' for name in shown.split())}" in said
        assert "shows this one" in said


@pytest.mark.parametrize("memory_format", cases.MEMORY_FORMATS)
@pytest.mark.parametrize("backward", [True, False])
def test_all_forms_of_the_training_tail_agree(
    backward: bool, memory_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled as far as Inductor, whose code takes minutes to write."""
    monkeypatch.setattr(cases, "_compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    work = cases._training(True, cases.Setup(), (2, 16, 3, 5), memory_format, backward)
    forms = {"timm", "ecanet", "timm compiled", "ecanet compiled", "formula compiled", "gate op compiled"}
    assert set(work.agree[0]) == forms
    assert work.maps == (11 if backward else 4)
    for names in work.agree:
        check_agreement(work.competitors, names, 1e-5)


@pytest.mark.parametrize("name", ["memory", "training", "inference", "ecaresnet50d-training", "ecaresnet50d-inference"])
def test_networks(name: str) -> None:
    case = next(case for case in network_cases(quick=True, compiled=False) if case.name == name)
    result = run._measure(case, {"rounds": 1, "quick": True}, "")
    assert {"ecanet", "timm", "no gate"} <= result.get("seconds", result.get("saved_bytes")).keys()


def test_a_killed_run_goes_on_where_it_was(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, measured = run._measure, []

    def killed_at_the_third(case: Any, *rest: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(case.key)
        return measure(case, *rest)

    monkeypatch.setattr(run, "_measure", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        _run(quick, "--only", "module")
    before = results.read(quick)["cases"]
    assert list(before) == measured
    assert len(measured) == 2

    monkeypatch.setattr(run, "_measure", measure)
    after = _run(quick, "--only", "module", "--resume")
    assert len(after["cases"]) == 4
    assert {key: after["cases"][key] for key in before} == before
    assert "summary" in after


def test_resume_refuses_another_run(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = _run(quick, "--only", "inference")
    quick.write_text(json.dumps({**document, "commit": "another"}))
    with pytest.raises(SystemExit) as stopped:
        _run(quick, "--only", "inference", "--resume")
    assert stopped.value.code == 2
    assert "its commit differ: another there" in capsys.readouterr().err


def test_resume_without_a_file_starts(quick: Path) -> None:
    assert _run(quick, "--only", "inference", "--resume")["cases"]


@pytest.mark.parametrize(
    "args", [["--only", "module,nonsense"], ["--rounds", "0"], ["--threads", "-1"], ["--rounds", "x"]]
)
def test_wrong_options(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(args)
    assert stopped.value.code == 2
    assert args[-1].split(",")[-1] in capsys.readouterr().err


def test_cases_can_be_chosen_by_their_keys(quick: Path) -> None:
    document = _run(quick, "--only", "module,op", "--matching", "/squeeze/2x16")
    assert list(document["cases"]) == [f"op/squeeze/2x16x6x6/{layout}" for layout in cases.MEMORY_FORMATS]
    assert document["command"].endswith("--no-compile --only op --matching /squeeze/2x16")


def test_a_case_that_fails_is_told_and_the_others_are_measured(
    quick: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = run._measure

    def fail_once(case: Any, *rest: Any) -> Any:
        if case.memory_format == "contiguous":
            raise torch.OutOfMemoryError("out of memory\nmore")
        return measure(case, *rest)

    monkeypatch.setattr(run, "_measure", fail_once)
    document = _run(quick, "--only", "module")
    assert len(document["cases"]) == 2
    assert set(document["failed"].values()) == {"OutOfMemoryError: out of memory"}
    assert "FAILED, not measured: module/forward/2x16x6x6/contiguous: OutOfMemoryError" in capsys.readouterr().out
    monkeypatch.setattr(run, "_measure", measure)
    again = _run(quick, "--only", "module", "--resume")
    assert (len(again["cases"]), "failed" in again) == (4, False)


def test_a_run_on_a_gpu_goes_on_though_its_bandwidth_is_measured_anew(tmp_path: Path) -> None:
    def header(bandwidth: float, name: str = "one") -> dict[str, Any]:
        same = dict.fromkeys(("settings", "versions", "kernels", "commit"), "same")
        return {**same, "machine": {"gpu": {"name": name, "copy_gb_per_second": bandwidth}}}

    path = tmp_path / "out.json"
    results.write(path, {**header(2871.0), "cases": {"a": {}}})
    assert results.resume(path, header(2873.0))["cases"] == {"a": {}}
    with pytest.raises(ValueError, match="its machine differ"):
        results.resume(path, header(2871.0, "another"))


# --- on a GPU -----------------------------------------------------------------------------------------------------


def test_targets_of_a_gpu() -> None:
    def case(**seconds: float) -> dict[str, Any]:
        return {**_case(**seconds), "map_bytes": 2**27}

    network = {"images": 128, "peak_bytes": {"ecanet": 101, "no gate": 100, "timm": 130}}
    cases = {
        "op/apply_/256x256x56x56/channels_last": case(ecanet=1.5, plain=9.0, copy=1.0),
        "op/apply_/256x256x56x56/contiguous": case(ecanet=1.8, plain=9.0, copy=1.0),
        "op/apply_/1x2x3x3/channels_last": {**case(ecanet=99.0, plain=9.0, copy=1.0), "map_bytes": 8},
        "training/tail/8x2x3x3/channels_last": case(
            ecanet=1.0, ecanet_compiled=2.0, no_gate_compiled=2.0, timm_compiled=4.0, copy=1.0
        ),
        "network/resnet50-training-compiled/128x3x224x224/channels_last": {
            "seconds": {"ecanet": [1.0] * 3, "no gate": [0.97] * 3, "timm": [1.2] * 3},
            **network,
        },
    }
    found = {verdict.what: (verdict.ratio.value, verdict.verdict) for verdict in verdicts(cases, GPU_TARGETS)}
    name = "network/resnet50-training-compiled"
    assert found == {
        "op/apply_, worst: 256x256x56x56 contiguous: ecanet / roofline": (pytest.approx(1.2), "missed"),
        "training/tail, channels_last: ecanet compiled / no gate compiled": (pytest.approx(1.0), "met"),
        "training/tail, channels_last: ecanet compiled / timm compiled": (pytest.approx(0.5), "met"),
        f"{name}, geometric mean: ecanet / no gate": (pytest.approx(1 / 0.97), "missed"),
        f"{name}, geometric mean: ecanet / timm": (pytest.approx(1 / 1.2), "met"),
        f"{name}, peak memory, geometric mean: ecanet / no gate": (pytest.approx(1.01), "met"),
    }


def test_a_network_with_a_wrong_gate_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(ECA):
        def logits(self, s: torch.Tensor) -> torch.Tensor:
            return torch.full_like(s, -3.0)

    setup = cases.Setup("cpu", torch.bfloat16, "auto")
    for make, right in ((gpu_networks._small, True), (partial(gpu_networks._small, Wrong), False)):
        monkeypatch.setitem(gpu_networks._QUICK_BUILDERS, "ecanet", make)
        work = gpu_networks.build("training", setup, gpu_networks.QUICK_NETWORK, None, (8, 3, 32, 32))
        with nullcontext() if right else pytest.raises(RuntimeError, match="ecanet and timm disagree"):
            check_agreement(work.competitors, ("timm", "ecanet"), work.tolerance)


#: As the command in the interpreter measures.
INTERPRETED = cases.Setup("cpu", torch.bfloat16, "triton")
QUICK = {"rounds": 1, "quick": True}
in_the_interpreter = pytest.mark.skipif(not gpu.interpreting(), reason="the interpreter is off")


@in_the_interpreter
@pytest.mark.parametrize("training", [True, False])
def test_all_forms_of_the_tail_on_a_gpu_agree(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled as far as Inductor, whose code takes minutes to write."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    setup = cases.Setup("cpu", torch.float32, "triton")
    work = tails._tail(training, True, setup, (2, 16, 3, 5), "channels_last")
    assert {"formula compiled", "operation compiled", "SE compiled", "no gate", "copy"} <= work.competitors.keys()
    assert ("gate op compiled" in work.competitors) == training
    for names in work.agree:
        assert len(names) >= 2
        check_agreement(work.competitors, names, 1e-5)


@in_the_interpreter
@pytest.mark.parametrize("name", ["batch_moments", "apply_", "eca_coefficients_backward"])
def test_operations_on_a_gpu(name: str) -> None:
    case = next(case for case in kernels.kernel_cases(True, INTERPRETED) if case.name == name)
    result = run._measure(case, QUICK, "")
    small = len(case.shape) == 2  # between the passes: no map, no roofline
    assert result.get("maps") == (None if small else cases.OPS[name])
    assert result["seconds"].keys() == {"ecanet", "plain" if small else "copy"}


def test_what_is_read_twice_has_left_the_cache() -> None:
    """Of 25 MB maps there are several sets, of 205 MB one."""
    assert [kernels.sets_of(size, 3) for size in (25 * 2**20, 205 * 2**20)] == [4, 1]
    work = tails._tail(True, False, cases.Setup(), (2, 512, 32, 32), "contiguous")
    assert work.sets == kernels.sets_of(4 * 2 * 512 * 32 * 32, 3) > 1


@pytest.mark.parametrize("mode", gpu_networks.MODES)
@pytest.mark.parametrize("what", ["training", "inference"])
def test_peak_memory_is_left_out_where_a_graph_is_replayed(
    what: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_peak", lambda _: 7)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    setup, shape = cases.Setup("cpu", torch.bfloat16, "auto"), (2, 3, 8, 8)
    options = gpu_networks.MODES[mode]
    case = cases.Case(
        "network",
        mode,
        shape,
        "channels_last",
        partial(gpu_networks.build, what, setup, gpu_networks.QUICK_NETWORK, options, shape),
    )
    result = run._measure(case, QUICK, "")
    assert set(result["peak_bytes"].values()) == {None if mode == "graphs" else 7}


def _on_gpu(path: Path, *args: str) -> results.Document:
    gpu_benchmark.main(["--quick", "--no-compile", "--workers", "2", "--out", str(path), *args])
    return results.read(path)


@in_the_interpreter
def test_the_gpu_benchmark_runs_in_the_interpreter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "out.png"
    document = _on_gpu(
        tmp_path / "out.json",
        "--stages",
        "environment,tails,networks",
        "--matching",
        "inference",
        "--plot",
        str(picture),
    )
    assert set(document["stages"]) == {"environment", "tails", "networks"}
    assert len(document["cases"]) == 2 + 1 + 1
    assert document["command"].startswith("TRITON_INTERPRET=1 python -m benchmarks.gpu --dtype bfloat16 --quick")
    said = capsys.readouterr()
    assert "images/s" in said.out
    assert "== tails (" in said.err
    assert picture.stat().st_size > 10_000
    for key, case in document["cases"].items():
        assert {"ecanet", "timm", "no gate", "SE"} <= case["seconds"].keys(), key


@in_the_interpreter
def test_a_spent_budget_skips_and_a_resumed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that was measured is lost, and what was not is listed."""
    path, few = tmp_path / "out.json", ("--stages", "environment,kernels,networks", "--matching", "op/squeeze/")
    measure, clock = run._measure, time.monotonic

    def spend_it_all(case: Any, *rest: Any) -> Any:
        monkeypatch.setattr(time, "monotonic", lambda: clock() + 1000)
        return measure(case, *rest)

    monkeypatch.setattr(run, "_measure", spend_it_all)
    document = _on_gpu(path, *few)
    assert (len(document["cases"]), len(document["skipped"])) == (1, 3)
    assert "1 measured, 3 skipped" in document["stages"]["kernels"]
    monkeypatch.undo()
    again = _on_gpu(path, *few, "--resume")
    assert len(again["cases"]) == 4
    assert "skipped" not in again
    assert document["cases"].items() <= again["cases"].items()


@in_the_interpreter
def test_a_stage_that_fails_is_told_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SMALL_OPS", ())

    def broken(*_: Any) -> Any:
        raise KeyError("a stage")

    stages = [replace(stage, cases=broken) if stage.name == "networks" else stage for stage in gpu_benchmark.STAGES]
    monkeypatch.setattr(gpu_benchmark, "STAGES", stages)
    path = tmp_path / "out.json"
    few = ["--stages", "networks,kernels", "--matching", "squeeze/2x32"]
    assert gpu_benchmark.main(["--quick", "--no-compile", "--out", str(path), *few]) == 1
    document = results.read(path)
    assert "FAILED, KeyError: 'a stage'" in document["stages"]["networks"]
    assert len(document["cases"]) == 2


@in_the_interpreter
def test_workers_check_kernels_and_compile_ahead(tmp_path: Path) -> None:
    """A job that fails says why and loses itself alone."""
    settings = {"quick": True, "compiled": True, "dtype": "bfloat16"}
    key = next(case.key for case in kernels.kernel_cases(True, INTERPRETED) if case.name == "squeeze")
    jobs = [Job("check", ("eca_coefficients",)), Job("check", ("nonsense",)), Job("compile", (key,), ("ecanet",))]
    workers = Workers(jobs, settings, at_a_time=2, heavy_at_a_time=1)
    workers.wait(120)
    found = {name: result["failures"] for name, result in workers.results.items()}
    assert found.pop("check nonsense")[0].startswith("exit status 1: KeyError")
    assert found == {str(jobs[0]): [], str(jobs[2]): []}
    assert workers.results[str(jobs[0])]["checks"] == 6
    assert workers.results[str(jobs[2])]["seconds"][f"{key} ecanet"] > 0


@in_the_interpreter
def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu.eca_coefficients
    monkeypatch.setattr(gpu, "eca_coefficients", lambda *args: tuple(t * 1.01 for t in right(*args)))
    deterministic = torch.are_deterministic_algorithms_enabled()
    found = correctness.check(["eca_coefficients"], quick=True)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    assert len(found["failures"]) == found["checks"] == 6
    assert re.match(r"eca_coefficients \(3, 5\) torch\.float64 Options\(.*\): AssertionError", found["failures"][0])


@pytest.mark.parametrize("interpreting", [True, False])
def test_no_gpu_is_said(
    interpreting: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "interpreting", lambda: interpreting)
    monkeypatch.setattr(gpu, "why_not", lambda: None if interpreting else "torch sees no GPU")
    with pytest.raises(SystemExit) as stopped:
        gpu_benchmark.main([])
    assert stopped.value.code == 2
    assert ("use --quick" if interpreting else "torch sees no GPU") in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_traffic_is_counted_without_a_gpu(tmp_path) -> None:
    """In a process of its own: it makes triton and Inductor believe in a GPU."""
    file = tmp_path / "traffic.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.traffic", "--quick", "--out", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counted = results.read(file)["cases"]
    assert set(counted) == {"tail/training/32x64x28x28/channels_last"}
    for key, case in counted.items():
        assert key in done.stdout
        total = {name: traffic["forward"] + traffic["backward"] for name, traffic in case.items()}
        bytes_of_map = 32 * 64 * 28 * 28 * 2
        # Forward reads x and the residual and writes; backward reads the result, its gradient and x, and writes two.
        assert total["no gate"] >= (3 + 5) * bytes_of_map
        assert total["ecanet"] < total["timm"]
