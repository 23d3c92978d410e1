"""``ecanet doctor`` and ``ecanet build``: what they find, what they say, and that they need no extras."""

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

from ecanet import doctor as doctors
from ecanet.cli import main
from ecanet.doctor import Threads, cpu_quota, loops_for, measure_threads, slow_settings
from ecanet.ops import backend as backends
from ecanet.ops import cpu, gpu
from ecanet.ops.build import SOURCES

MISSING = "the C++ kernels are not built; to build them: ecanet build"
BOUND = {"OMP_PROC_BIND": "true"}


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine on which nothing is wrong, and a library that is loaded; returns the library's file."""
    library = tmp_path / "ecanet_cpu.so"
    library.touch()
    monkeypatch.setattr(doctors, "LIBRARY", library)
    monkeypatch.setattr(doctors, "measure_threads", lambda: Threads(1, 4, 4, None))
    monkeypatch.setattr(cpu, "_reason", None)
    monkeypatch.setattr(backends, "_choice", "auto")
    monkeypatch.setattr(doctors, "find_compiler", lambda: ["c++"])
    return library


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


# --- the report ---------------------------------------------------------------------------------------------------


def test_all_is_well(calm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all is well"
    assert f"kernels    {calm}: loaded" in lines
    assert "backend    auto: C++ kernels on the CPU, plain PyTorch elsewhere" in lines
    assert [name for line in lines[:7] if (name := line[:11].strip())] == [
        "ecanet",
        "torch",
        "GPU",
        "CPU",
        "kernels",
        "backend",
        "threads",
    ]


def test_not_built_is_not_broken(
    calm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calm.unlink()
    monkeypatch.setattr(cpu, "_reason", MISSING)
    main(["doctor"])
    said = capsys.readouterr().out
    assert f"kernels    {MISSING}\nbackend    auto: plain PyTorch\n" in said
    assert said.endswith("\nnext: ecanet build\n")


def test_no_compiler_comes_first(
    calm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calm.unlink()
    monkeypatch.undo()
    monkeypatch.setattr(cpu, "_reason", MISSING)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctors.doctor().lines[-1] == (
        "next: install a C++ compiler (no C++ compiler: none of g++, c++, clang++ in PATH), then: ecanet build"
    )


def test_a_library_that_does_not_load_is_broken(
    calm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cpu, "_reason", "the C++ kernels are built from other sources; to build them again: ecanet build"
    )
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    assert stopped.value.code == 1
    assert capsys.readouterr().out.endswith("\nnext: ecanet build\n")


def test_a_backend_that_cannot_run_is_broken(
    calm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_choice", "triton")
    monkeypatch.setattr(gpu, "why_not", lambda: "torch sees no GPU")
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    assert stopped.value.code == 1
    said = capsys.readouterr().out
    assert "backend    triton cannot run: torch sees no GPU" in said
    assert said.endswith("\nnext: unset ECANET_BACKEND\n")


def test_extras_say_what_brings_them(calm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = [
        "torch>=2.10",
        'timm>=1.0.12; extra == "timm"',
        'torchmetrics[detection]>=1.4; extra == "detection"',
        'onnx>=1.17; extra == "export"',
        'onnxscript>=0.5; extra == "export"',
        'ecanet[train]; extra == "all"',
        'pytest>=8; extra == "dev"',
    ]
    installed = {"timm", "onnx"}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: declared)
    monkeypatch.setattr(importlib.metadata, "version", version)
    lines = doctors.doctor().lines
    assert lines[-4:-1] == (
        "extras     timm",
        "           detection: no torchmetrics; pip install 'ecanet[detection]'",
        "           export: no onnxscript; pip install 'ecanet[export]'",
    )


# --- threads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threads", "environment", "settings", "why"),
    [
        (Threads(1, 4, 4, None), {}, [], ""),
        (Threads(4, 4, 4, None), BOUND, [], ""),
        (Threads(4, 4, 4, None), {}, ["OMP_PROC_BIND=true"], "threads may share a core while others idle"),
        (Threads(4, 4, 4, None), {"OMP_PROC_BIND": "FALSE"}, ["OMP_PROC_BIND=true"], "would get one core"),
        (Threads(8, 8, 4, None), BOUND, ["OMP_NUM_THREADS=4"], "8 threads share the arithmetic units of 4 cores"),
        (Threads(8, 2, 2, None), BOUND, ["OMP_NUM_THREADS=2"], "8 threads take turns on 2 CPUs"),
        (Threads(4, 4, 4, 2.5), BOUND, ["OMP_NUM_THREADS=2"], "stops 4 threads when they have used 2.5 CPUs' time"),
        (Threads(4, 4, 4, 0.5), {}, ["OMP_NUM_THREADS=1"], "0.5 CPUs' time"),
    ],
    ids=["one", "bound", "unbound", "bind_false", "hyperthreads", "affinity", "quota", "small_quota"],
)
def test_slow_settings(threads: Threads, environment: dict[str, str], settings: list[str], why: str) -> None:
    found = slow_settings(threads, environment)
    assert [setting for setting, _ in found] == settings
    assert why in " ".join(reason for _, reason in found)


@pytest.mark.parametrize(
    ("threads", "last"),
    [
        (Threads(2, 2, 2, None), "all is well; for inference and benchmarks set OMP_PROC_BIND=true"),
        (Threads(4, 2, 2, None), "next: set OMP_NUM_THREADS=2 OMP_PROC_BIND=true in the environment"),
    ],
    ids=["unbound", "too_many"],
)
def test_a_slow_setting_is_the_last_line(
    threads: Threads, last: str, calm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_PROC_BIND", raising=False)
    monkeypatch.setattr(doctors, "measure_threads", lambda: threads)
    assert doctors.doctor().lines[-1] == last


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/cpu.max": "200000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/x\n0::/",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            3.0,
        ),
    ],
    ids=["no_cgroups", "v2_max", "v2", "v2_parent", "v1"],
)
def test_cpu_quota(files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    assert cpu_quota(write(tmp_path, files)) == quota


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_cores_are_counted_by_their_siblings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    siblings = {0: "0-1", 1: "0-1", 2: "2-3"}
    root = write(
        tmp_path,
        {f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": text for i, text in siblings.items()},
    )
    threads = measure_threads(root)
    assert (threads.cpus, threads.cores, threads.quota) == (3, 2, None)


@pytest.mark.parametrize(
    ("features", "machine", "loops"),
    [
        ("avx2 fma avx512f avx512bw avx512dq avx512vl", "x86_64", "AVX-512"),
        ("avx2 fma avx512f", "x86_64", "AVX2"),
        ("avx2", "x86_64", "SSE2"),
        ("asimd", "aarch64", "the compiler's default for aarch64"),
    ],
)
def test_loops(features: str, machine: str, loops: str) -> None:
    assert loops_for(set(features.split()), machine) == loops


def test_loops_are_told_by_the_rule_of_the_kernels() -> None:
    asked = set(re.findall(r'__builtin_cpu_supports\("(\w+)"\)', (SOURCES / "kernels.h").read_text()))
    assert loops_for(asked, "x86_64") == "AVX-512"
    assert all(loops_for(asked - {feature}, "x86_64") != "AVX-512" for feature in asked)


# --- the command line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["build", "doctor"])
def test_help_has_an_example_and_needs_no_extras(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert f"Example: ecanet {verb}" in " ".join(capsys.readouterr().out.split())


def test_build_says_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit) as stopped:
        main(["build"])
    assert stopped.value.code == "ecanet build: no C++ compiler: CXX=no-such-compiler is not a program"
    main(["build", "--if-possible"])
    assert capsys.readouterr().out == (
        "ecanet build: no C++ compiler: CXX=no-such-compiler is not a program; plain PyTorch runs on the CPU\n"
    )
