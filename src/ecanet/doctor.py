"""``ecanet doctor``: what runs on this machine, what does not and why, and what to do about it."""

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ecanet import __version__, private_torch
from ecanet.nn import ECA, explain
from ecanet.ops import backend, cpu, gpu
from ecanet.ops.build import LIBRARY, BuildError, find_compiler
from ecanet.profile.machine import cpu_features, processor, read, version_of

_AVX2 = {"avx2", "fma"}
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_SHOWN_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Diagnosis:
    """What ``ecanet doctor`` prints.

    Attributes:
        lines: What works and what is missing; the last line says what to do next, or that all is well.
        broken: Whether something that should work does not.
    """

    lines: tuple[str, ...]
    broken: bool


@dataclass(frozen=True)
class Threads:
    """How many threads torch uses, and on which CPUs.

    Attributes:
        torch: Threads of one operation.
        cpus: Logical CPUs that this process may run on.
        cores: Physical cores that these belong to.
        quota: CPU time that the control group allows, in CPUs; None without a limit.
    """

    torch: int
    cpus: int
    cores: int
    quota: float | None


def doctor() -> Diagnosis:
    """Look at versions, CPU, kernels, backend, threads and extras."""
    lines = [*_versions(), *_cpu_lines(processor()["cpu"], cpu_features()), *_kernels(), f"backend    {_backend()}"]
    threads = measure_threads()
    limits = f"{threads.cpus} CPUs on {threads.cores} cores" + (f", quota {threads.quota:g}" if threads.quota else "")
    settings = ", ".join(f"{name} {os.environ.get(name) or 'unset'}" for name in ("OMP_NUM_THREADS", "OMP_PROC_BIND"))
    slow = slow_settings(threads, os.environ)
    lines += [
        f"threads    {threads.torch} of torch; {limits}; {settings}",
        *(f"           {setting}: {why}" for setting, why in slow),
    ]
    lines += [f"torch      has no {path}: {without}" for path, without in private_torch.missing.items()]
    lines.append(f"tail       {_tail()}")
    lines += _extras()

    choice_refused = backend.reason_against(backend.current())
    broken = choice_refused is not None or (os.path.lexists(LIBRARY) and cpu.why_not() is not None)
    lines.append(_next_step(choice_refused, [setting for setting, _ in slow]))
    return Diagnosis(tuple(lines), broken)


def slow_settings(threads: Threads, environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """Settings of OpenMP that make torch slower here.

    Returns:
        Pairs: what to set instead, and why.
    """
    best = max(1, min(threads.cores, int(threads.quota or threads.cores)))
    pairs = []
    if threads.torch > best:
        if threads.quota is not None and threads.torch > threads.quota:
            why = f"the control group stops {threads.torch} threads when they have used {threads.quota:g} CPUs' time"
        elif threads.torch > threads.cpus:
            why = f"{threads.torch} threads take turns on {threads.cpus} CPUs, and each waits for all"
        else:
            why = f"{threads.torch} threads share the arithmetic units of {threads.cores} cores"
        pairs.append((f"OMP_NUM_THREADS={best}", why))
    if min(best, threads.torch) > 1 and environment.get("OMP_PROC_BIND", "").lower() in ("", "false"):
        why = "threads may share a core while others idle; not where a DataLoader has workers: all would get one core"
        pairs.append(("OMP_PROC_BIND=true", why))
    return pairs


def measure_threads(root: Path = Path("/")) -> Threads:
    """Torch's threads and the CPUs they have; ``root`` is where ``proc`` and ``sys`` are."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    folder = root / "sys/devices/system/cpu"
    cores = {read(folder / f"cpu{i}/topology/thread_siblings_list") or f"cpu{i}" for i in allowed}
    return Threads(torch.get_num_threads(), len(allowed), len(cores), cpu_quota(root))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPU time that this process's control groups (version 1 or 2) allow, in CPUs; None without a limit."""
    quotas = []
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        folder = top / path.lstrip("/")
        while folder.is_relative_to(top):
            if controllers:
                limits = [read(folder / "cpu.cfs_quota_us"), read(folder / "cpu.cfs_period_us")]
            else:
                limits = read(folder / "cpu.max").split()
            if len(limits) == 2 and all(limit.isdigit() for limit in limits) and int(limits[1]) > 0:
                quotas.append(int(limits[0]) / int(limits[1]))
            folder = folder.parent
    return min(quotas, default=None)


def loops_for(features: set[str], machine: str) -> str:
    """The instruction set that the C++ kernels use; csrc/kernels.h decides by the same rule."""
    if machine not in ("x86_64", "AMD64"):
        return "the compiler's default for " + machine
    return "AVX-512" if features >= _AVX512 else "AVX2" if features >= _AVX2 else "SSE2"


def _versions() -> list[str]:
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    triton = version_of("triton") or "not installed"
    return [
        f"ecanet     {__version__}, Python {platform.python_version()}, {sys.platform} {platform.machine()}",
        f"torch      {torch.__version__}, torchvision {version_of('torchvision') or 'not installed'}",
        f"GPU        CUDA {torch.version.cuda or 'not in this torch'}, {cuda}; triton {triton}, "
        + (gpu.why_not() or ("kernels in the interpreter" if gpu.interpreting() else "kernels run")),
    ]


def _cpu_lines(name: str, features: set[str]) -> list[str]:
    shown = " ".join(feature for feature in _SHOWN_FEATURES if feature in features) or "features unknown"
    return [f"CPU        {name}; {shown}; loops for {loops_for(features, platform.machine())}"]


def _kernels() -> list[str]:
    reason = cpu.why_not()
    return [f"kernels    {LIBRARY}: loaded" if reason is None else f"kernels    {reason}"]


def _backend() -> str:
    reason = backend.reason_against(backend.current())
    if reason is not None:
        return f"{backend.current()} cannot run: {reason}"
    names = {"cpu": "C++ kernels on the CPU", "triton": "Triton kernels on a GPU"}
    if backend.current() == "triton" and gpu.interpreting():
        names["triton"] = "Triton's interpreter on the CPU, slow"
    ready = {"cpu": cpu.why_not() is None, "triton": torch.cuda.is_available() and gpu.why_not() is None}
    chosen = [names[name] for name in names if backend.current() in (name, "auto") and ready.get(name)]
    if backend.current() in names:
        return f"{backend.current()}: {names[backend.current()]}"
    return f"{backend.current()}: " + ", ".join([*chosen, "plain PyTorch" + " elsewhere" * bool(chosen)])


def _tail() -> str:
    """What computes the end of a residual branch on the CPU, and why."""
    x = torch.zeros(2, 4, 2, 2)
    try:
        return explain(x, torch.nn.BatchNorm2d(4), ECA(4), x, "relu")
    except RuntimeError as error:
        return str(error)


def _extras() -> list[str]:
    """The extras with all their packages, then a line for each extra that lacks one, as ecanet's metadata says."""
    try:
        declared = importlib.metadata.requires("ecanet") or []
    except importlib.metadata.PackageNotFoundError:
        return ["extras     unknown: ecanet is not installed with pip"]
    missing: dict[str, list[str]] = {}
    for requirement in declared:
        match = re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]", requirement)
        if match is not None and match[1] != "ecanet" and match[2] != "dev":
            absent = missing.setdefault(match[2], [])
            if version_of(match[1]) is None:
                absent.append(match[1])
    complete = [extra for extra, absent in missing.items() if not absent]
    return [
        f"extras     {', '.join(complete) or 'none'}",
        *(
            f"           {extra}: no {', '.join(absent)}; pip install 'ecanet[{extra}]'"
            for extra, absent in missing.items()
            if absent
        ),
    ]


def _next_step(choice_refused: str | None, settings: list[str]) -> str:
    if choice_refused is not None and backend.current() == "triton":
        return "next: unset ECANET_BACKEND"
    if cpu.why_not() is not None:
        try:
            find_compiler()
        except BuildError as error:
            return f"next: install a C++ compiler ({error}), then: ecanet build"
        return "next: ecanet build"
    if any(setting.startswith("OMP_NUM_THREADS") for setting in settings):
        return f"next: set {' '.join(settings)} in the environment"
    return "all is well" + "".join(f"; for inference and benchmarks set {setting}" for setting in settings)
