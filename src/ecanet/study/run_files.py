"""The file of a run that ended: JSON with a checksum, so that a damaged or edited file is not used as a result."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ecanet.files.atomic import write_whole

#: Largest file, in bytes; the file of a run of 10,000 epochs has about 2 million.
_MAX_BYTES = 2**24

_CHECKSUM = "sha256"


def write_run(file: Path, run: Mapping[str, Any]) -> None:
    """Write a run that ended, in one step.

    Args:
        file: Path of the file; an existing one is replaced.
        run: ``fingerprint``; ``metrics``, numbers by name; ``seconds``; ``details``, anything else JSON can hold; and
            ``error``, why the run failed, or None.

    Raises:
        ValueError: the file would be too large.
        OSError: it cannot be written.
    """
    text = json.dumps({**run, _CHECKSUM: _checksum(run)}, indent=2) + "\n"
    if len(text) > _MAX_BYTES:
        raise ValueError(f"what it returned takes {len(text):,} bytes, and at most {_MAX_BYTES:,} are kept")
    write_whole(file, text)


def read_run(file: Path, check: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Read what :func:`write_run` wrote.

    Args:
        file: Path of the file.
        check: Called with the content; raises ValueError, with the reason, for a run that is not valid.

    Raises:
        ValueError: the file is damaged, too large or not such a file; the message names it and says what to do.
    """
    try:
        run = _checked(json.loads(_text(file)))
        if check is not None:
            check(run)
        return run
    except RecursionError:
        why = "it is nested too deeply"
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
    raise ValueError(f"{file} holds no finished run ({why}): delete it and run again; the other runs are kept")


def _text(file: Path) -> str:
    if not file.is_file():
        raise ValueError("it is not a regular file")
    size = file.stat().st_size
    if size > _MAX_BYTES:
        raise ValueError(f"it has {size:,} bytes, and at most {_MAX_BYTES:,} are read")
    return file.read_bytes().decode()


def _checked(run: Any) -> dict[str, Any]:
    if not isinstance(run, dict):
        raise ValueError("it is not a JSON object")
    missing = [key for key in ("fingerprint", "metrics", "details", "seconds", "error", _CHECKSUM) if key not in run]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    if run.pop(_CHECKSUM) != _checksum(run):
        raise ValueError("its checksum does not match, so it was damaged or edited")
    if not isinstance(run["fingerprint"], str):
        raise ValueError("its fingerprint is not a string")
    if not (isinstance(run["metrics"], dict) and all(map(is_number, run["metrics"].values()))):
        raise ValueError("its metrics are not numbers by name")
    if not isinstance(run["details"], dict):
        raise ValueError("its details are not an object")
    if not (is_number(run["seconds"]) and math.isfinite(run["seconds"]) and run["seconds"] >= 0):
        raise ValueError("its seconds are not a number of 0 or more")
    if not (run["error"] is None or isinstance(run["error"], str)):
        raise ValueError("its error is not a text")
    return run


def is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold, including NaN; booleans do not count as numbers."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**1000)


def _checksum(run: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
