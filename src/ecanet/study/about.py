"""How a study was made, in ``study.json``: conditions and seeds, the command, versions, the commit, the machine."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import ecanet
from ecanet.files.atomic import write_whole
from ecanet.untrusted import check_file

FILE = "study.json"
#: Largest size of the file, in bytes; settings that would make it larger are left out.
_MAX_BYTES = 2**22
#: Packages whose versions may change a result.
_PACKAGES = ("torch", "torchvision", "lightning", "timm", "ultralytics", "numpy", "scipy", "statsmodels")
#: Fields that are set when runs start; a call that finds every run finished keeps their stored values.
_START_FIELDS = ("command", "date", "commit", "versions", "machine")


@dataclass
class About:
    """How a study was made.

    Attributes:
        metric: The metric that is compared, or None if the caller did not name it.
        seeds: Its seeds, in order.
        conditions: The settings of each condition (anything JSON can hold) by name, the baseline first.
        command: The command that started it, as typed in a shell.
        date: Day of the last start, as in 2026-11-27.
        commit: Commit of the git work tree in which it was started, with a mark if files had changed; None outside one.
        versions: Versions of Python and of packages, by name.
        machine: System, processor and cores.
        lost: Condition, seed and reason of runs that left no file because their processes died.
    """

    metric: str | None = None
    seeds: list[int] = field(default_factory=list)
    conditions: dict[str, Any] = field(default_factory=dict)
    command: str | None = None
    date: str | None = None
    commit: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    machine: str | None = None
    lost: list[tuple[str, int, str]] = field(default_factory=list)


def write_about(
    folder: Path,
    metric: str | None,
    seeds: Sequence[int],
    conditions: Mapping[str, Any],
    lost: Sequence[tuple[str, int, str]] = (),
    is_start: bool = True,
) -> None:
    """Write ``study.json``, and replace that of an earlier start.

    Args:
        folder: Folder of the study.
        metric: The metric that is compared, if the caller named it.
        seeds: Its seeds.
        conditions: Settings of each condition by name, the baseline first.
        lost: As in :class:`About`.
        is_start: Whether runs start now. If not, command, date, commit, versions and machine keep their stored values;
            without a file they are unknown. The command is replaced if metric, seeds or conditions have changed, as the
            stored command would no longer reproduce this study.

    Raises:
        OSError: it cannot be written.
    """
    from ecanet.ops.build import available_cores  # imports torch, which reading a study does not need

    about = About(
        metric=metric,
        seeds=[int(seed) for seed in seeds],
        conditions=dict(conditions),
        command=_command(sys.orig_argv),
        date=date.today().isoformat(),
        commit=_commit(),
        versions=_versions(),
        machine=f"{platform.system()} {platform.machine()}{_processor()}, {available_cores()} cores",
        lost=list(lost),
    )
    if not is_start:
        try:
            before = read_about(folder)
        except ValueError:  # a damaged file counts as none
            before = About()
        command = about.command
        about = replace(about, **{name: getattr(before, name) for name in _START_FIELDS})
        if before.command is not None and _compared(before) != _compared(about):
            about.command = command
    text = json.dumps(asdict(about), indent=2)
    if len(text) > _MAX_BYTES:
        about.conditions = dict.fromkeys(conditions)
        text = json.dumps(asdict(about), indent=2)
    write_whole(folder / FILE, text + "\n")


def read_about(folder: Path) -> About:
    """Read what :func:`write_about` wrote; a folder of an earlier version, which has no such file, gives an empty one.

    Raises:
        ValueError: the file is damaged, too large or not such a file; the message names it and says what is wrong.
    """
    content = read_json(folder / FILE)
    if content is None:
        return About()
    kinds = {"metric": str, "command": str, "date": str, "commit": str, "machine": str}
    try:
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        for key, kind in kinds.items():
            if not isinstance(content.get(key), (kind, type(None))):
                raise ValueError(f"its {key} is not a text")
        seeds, conditions, versions = (content.get(key) for key in ("seeds", "conditions", "versions"))
        if not (isinstance(seeds, list) and all(type(seed) is int and abs(seed) < 2**64 for seed in seeds)):
            raise ValueError("its seeds are not a list of integers")
        if not (isinstance(conditions, dict) and all(conditions)):
            raise ValueError("its conditions are not settings by name")
        if not (isinstance(versions, dict) and all(isinstance(each, str) for each in versions.values())):
            raise ValueError("its versions are not texts by name")
        lost = content.get("lost", [])
        if not (isinstance(lost, list) and all(map(_is_lost, lost))):
            raise ValueError("its lost runs are not conditions, seeds and reasons")
    except ValueError as error:
        raise ValueError(f"{folder / FILE} does not say how a study was made ({error}): delete it") from error
    about = About(seeds=seeds, conditions=conditions, versions=versions, lost=[tuple(run) for run in lost])
    for key in kinds:
        setattr(about, key, content.get(key))
    return about


def _is_lost(run: Any) -> bool:
    return isinstance(run, list) and [type(part) for part in run] == [str, int, str]


def read_json(file: Path, max_bytes: int = _MAX_BYTES) -> Any:
    """Read a JSON file; None if there is none.

    Args:
        file: The file.
        max_bytes: The largest size that is read.

    Raises:
        ValueError: the file is damaged, too large, or not a regular file.
    """
    if not os.path.lexists(file):
        return None
    try:
        check_file(file, max_bytes)
        return json.loads(file.read_bytes().decode())
    except RecursionError:
        why = "it is nested too deeply"
    except (OSError, ValueError) as error:
        why = str(error)
    raise ValueError(f"{file} cannot be read ({why}): delete it")


def _compared(about: About) -> tuple[str | None, list[int], list[str]]:
    return about.metric, about.seeds, list(about.conditions)


def _command(argv: Sequence[str]) -> str:
    """The command line, without the paths of the ``ecanet`` program and the Python interpreter."""
    _, *arguments = argv
    if arguments and Path(arguments[0]).name in ("ecanet", "ecanet.exe"):
        return shlex.join(["ecanet", *arguments[1:]])
    return shlex.join(["python", *arguments])


def _commit() -> str | None:
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git("-c", "core.fsmonitor=false", "status", "--porcelain", "--untracked-files=no")
    return commit if changed == "" else f"{commit}, with changes"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "ecanet": ecanet.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _processor() -> str:
    """The processor's name after a comma; empty if the system does not tell it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((f", {line.partition(':')[2].strip()}" for line in lines if line.startswith("model name")), "")
