"""One run of a study: what it calls, where it writes, and the file that it leaves."""

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

#: On a full disk, as with a locked folder, the worker ends, and the run is tried again in a new one.
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class Job:
    """One run of a study.

    Attributes:
        condition: Name of its condition.
        seed: Its seed.
        folder: Where it may write; its file is beside it.
        work: Called with the folder; returns metrics and whatever else JSON can hold, by name.
        fingerprint: Tells it from the same condition and seed of another study.
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
        """Its file, once it ended."""
        return self.folder.with_name(self.folder.name + ".json")

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.condition}, seed {self.seed}"

    def read(self) -> dict[str, Any] | None:
        """What the run left, or None if it did not end yet.

        Raises:
            ValueError: its file is damaged, or of another study.
        """
        if not os.path.lexists(self.file):
            return None
        stored = read_run(self.file, self.check)
        if stored["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"{self.file} was made by another recipe, function or version: "
                f"choose another folder, or delete it with {self.folder}"
            )
        return stored

    def run(self) -> bool:
        """Run it and write its file; False if it failed, which the file then says."""
        self.folder.mkdir(parents=True, exist_ok=True)
        about: dict[str, Any] = {"condition": self.condition, "seed": self.seed, "fingerprint": self.fingerprint}
        (self.folder / "error.txt").unlink(missing_ok=True)  # of an earlier try
        start = time.perf_counter()
        try:
            metrics, details = _sorted_out(self.work(self.folder))
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


def _sorted_out(returned: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """Numbers, those of torch and NumPy included, and the rest, which JSON has to hold."""
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
