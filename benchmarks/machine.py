"""The machine, software and settings that a result was measured with."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import ecanet
from ecanet.doctor import loops_for
from ecanet.ops import cpu
from ecanet.profile.machine import cpu_features, processor, read

_ROOT = Path(__file__).parents[1]
_SETTINGS = re.compile(r"(OMP|GOMP|KMP|MKL|ONEDNN|ECANET|THP|MALLOC)_\w+|ATEN_CPU_CAPABILITY|GLIBC_TUNABLES")


def describe(threads: int, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Machine, versions, commit and settings. Folders of the machine are left out."""
    return {
        "machine": {**_processor(), "system": f"{platform.system()} {platform.release()}", "threads": threads},
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm")},
            "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "not installed",
            "ecanet": ecanet.__version__,
            "compiler": _output(environment.get("CXX") or "g++", "--version").partition("\n")[0],
        },
        "kernels": cpu.why_not() or "loaded",
        "commit": environment.get("BENCHMARK_COMMIT") or _output("git", "rev-parse", "HEAD") or "unknown",
        "tree_is_dirty": bool(_output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")),
        "environment": {name: value for name, value in sorted(environment.items()) if _SETTINGS.fullmatch(name)},
        "preloaded": [Path(path).name for path in re.split("[: ]+", environment.get("LD_PRELOAD", "")) if path],
        "huge_pages": read(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "load_average_at_start": [round(load, 2) for load in os.getloadavg()],
    }


def describe_gpu(copy_bytes: int, matrix: int) -> dict[str, Any]:
    """The GPU and its two ceilings: bandwidth of a copy in GB/s, read and written, and of a matrix product in TFLOP/s.

    Args:
        copy_bytes: Bytes that are copied.
        matrix: Rows and columns of the bfloat16 matrices that are multiplied.
    """
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    source = torch.randint(256, (copy_bytes,), dtype=torch.uint8, device="cuda")
    destination = torch.empty_like(source)
    a, b = (torch.randn(matrix, matrix, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    copied = _gpu_seconds(lambda: destination.copy_(source))
    multiplied = _gpu_seconds(lambda: a @ b)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "cache_mb": round(properties.L2_cache_size / 1e6, 1),
        "cuda": torch.version.cuda or torch.version.hip,
        "copy_gb_per_second": float(f"{2 * copy_bytes / copied / 1e9:.4g}"),
        "matrix_tflop_per_second": float(f"{2 * matrix**3 / multiplied / 1e12:.4g}"),
    }


def _gpu_seconds(run: Callable[[], Any], rounds: int = 20) -> float:
    """Median of some calls, by the GPU's clock."""
    seconds = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def _processor() -> dict[str, Any]:
    features = cpu_features()
    return {
        **processor(),
        "flags": sorted(flag for flag in features if re.match(r"avx|fma|f16c|amx|asimd|sve", flag)),
        "ecanet_uses": loops_for(features, platform.machine()),
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
