"""One run of a study: the function it calls, the folder it writes into, and the file it leaves."""

import errno
import json
import os
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecanet.files.atomic import write_whole
from ecanet.study.run_files import is_number, read_run, write_run
from ecanet.untrusted import shown

#: On a full disk or a locked folder the worker process ends, and the run is tried again in a new one.
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class Job:
    """One run of a study.

    Attributes:
        condition: Name of its condition.
        seed: Its seed.
        folder: The folder it may write into; its file is next to the folder.
        work: Called with the folder; returns metrics, and anything else JSON can hold, by name.
        fingerprint: Distinguishes it from a run of another study with the same condition and seed.
        check: As in :func:`ecanet.study.run_files.read_run`.
    """

    condition: str
    seed: int
    folder: Path
    work: Callable[[Path], Mapping[str, Any]]
    fingerprint: str
    check: Callable[[dict[str, Any]], None] | None = None

    @property
    def file(self) -> Path:
        """Path of the file that it writes when it ends."""
        return self.folder.with_name(self.folder.name + ".json")

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"{self.condition}, seed {self.seed}"

    def read(self) -> dict[str, Any] | None:
        """Read the file of the run; None if it has not ended.

        Raises:
            ValueError: its file is damaged, or of another study.
        """
        if not os.path.lexists(self.file):
            return None
        stored = read_run(self.file, self.check)
        if stored["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"{self.file} was made by another recipe, function or version: "
                f"choose another folder, or delete it and {self.folder}"
            )
        return stored

    def run(self) -> bool:
        """Run it and write its file; return False if it failed, with the error in the file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        about: dict[str, Any] = {"condition": self.condition, "seed": self.seed, "fingerprint": self.fingerprint}
        (self.folder / "error.txt").unlink(missing_ok=True)  # of an earlier attempt
        start = time.perf_counter()
        try:
            metrics, details = _metrics_and_details(self.work(self.folder))
            about["seconds"] = time.perf_counter() - start
            write_run(self.file, {**about, "metrics": metrics, "details": details, "error": None})
        except Exception as error:
            if isinstance(error, BlockingIOError) or (isinstance(error, OSError) and error.errno in _FULL_DISK):
                raise
            about["seconds"] = time.perf_counter() - start
            write_whole(self.folder / "error.txt", traceback.format_exc().encode(errors="backslashreplace"))
            why = shown(" ".join(f"{type(error).__name__}: {error}".split()), 500)
            write_run(self.file, {**about, "metrics": {}, "details": {}, "error": why})
            return False
        return True


def _metrics_and_details(returned: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """Split what a run returned into numbers (also those of torch and NumPy) and the rest, which JSON must hold."""
    if not isinstance(returned, Mapping):
        raise TypeError(f"the training function must return a dict of metrics, got {shown(returned)}")
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {}
    for name, value in returned.items():
        if not isinstance(name, str):
            raise TypeError(f"names of metrics must be texts, got {shown(name)}")
        if callable(getattr(value, "item", None)) and getattr(value, "ndim", None) == 0:
            value = value.item()
        if is_number(value):
            metrics[name] = value
            continue
        try:
            details[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(
                f"{shown(name)} must be a number, or something that JSON can hold, got {shown(value)}"
            ) from error
    return metrics, details
