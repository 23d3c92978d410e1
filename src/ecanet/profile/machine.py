"""The machine on which something was measured."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from ecanet.ops import cpu


def describe(device: torch.device, threads: int) -> dict[str, Any]:
    """Processor, device, versions and settings, without any paths."""
    packages = ("ecanet", "torchvision", "timm", "ultralytics-opencv-headless", "ultralytics")
    installed = {package: version for package in packages if (version := version_of(package)) is not None}
    return {
        **processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": threads,
        "system": f"{platform.system()} {platform.release()}",
        "load_average_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "kernels": cpu.why_not() or "loaded",
        "environment": {name: value for name, value in sorted(os.environ.items()) if re.match(r"(OMP|MALLOC)_", name)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **installed},
    }


def processor() -> dict[str, Any]:
    """Name, cores and caches of the CPU."""
    fields = _cpu_fields()
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "family_model_stepping": [fields.get(name) for name in ("cpu family", "model", "stepping")],
        "logical_cpus": os.cpu_count(),
        "physical_cores": len(_siblings()) or os.cpu_count(),
        "caches_of_one_core": _caches(),
    }


def cpu_features() -> set[str]:
    """Names of the CPU's instruction sets; empty if the system is not Linux."""
    fields = _cpu_fields()
    return set((fields.get("flags") or fields.get("Features") or "").split())


def read(path: Path) -> str:
    """The text of a system file, or an empty text if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _cpu_fields() -> dict[str, str]:
    return dict(re.findall(r"^([\w ]+?)\s*: (.*)$", read(Path("/proc/cpuinfo")), re.MULTILINE))


def _siblings() -> set[str]:
    folders = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
    return {read(path) for path in folders}


def _caches() -> dict[str, str]:
    caches = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = {"Data": "d", "Instruction": "i"}.get(read(folder / "type"), "")
        caches[f"L{read(folder / 'level')}{kind}"] = read(folder / "size")
    return caches


def version_of(package: str) -> str | None:
    """Version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
