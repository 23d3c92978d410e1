"""The file of a finished run: JSON with a checksum, so that a damaged or edited file is not taken for a result."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ecanet.files.atomic import write_whole

#: Limits on the size of a file, in bytes: for any file, and per epoch for one with thousands of them.
_MAX_BYTES, _MAX_BYTES_PER_EPOCH = 1_000_000, 1_000

_CHECKSUM = "sha256"


def write_run(file: Path, run: Mapping[str, Any]) -> None:
    """Write a finished run in one step.

    Args:
        file: Path of the file; an existing one is replaced.
        run: ``top1`` in per cent, ``history`` with one record for each epoch, ``fingerprint``, and anything else.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(file, json.dumps({**run, _CHECKSUM: _checksum(run)}, indent=2) + "\n")


def read_run(file: Path, epochs: int) -> dict[str, Any]:
    """Read what :func:`write_run` wrote.

    Args:
        file: Path of the file.
        epochs: Epochs of the run, which limit the size of its file.

    Raises:
        ValueError: it is damaged, too large or not such a file; the message names it and says what to do.
    """
    try:
        return _checked(json.loads(_text(file, max(_MAX_BYTES, _MAX_BYTES_PER_EPOCH * epochs))))
    except RecursionError:
        why = "it is nested too deeply"
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
    raise ValueError(f"{file} holds no finished run ({why}): delete it and run again; the other runs are kept")


def _text(file: Path, largest: int) -> str:
    if not file.is_file():
        raise ValueError("it is not a regular file")
    size = file.stat().st_size
    if size > largest:
        raise ValueError(f"it has {size:,} bytes, and at most {largest:,} are read")
    return file.read_bytes().decode()


def _checked(run: Any) -> dict[str, Any]:
    if not isinstance(run, dict):
        raise ValueError("it is not a JSON object")
    missing = [key for key in ("fingerprint", "top1", "history", _CHECKSUM) if key not in run]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    if run.pop(_CHECKSUM) != _checksum(run):
        raise ValueError("its checksum does not fit, so it was damaged or edited")
    if not isinstance(run["fingerprint"], str):
        raise ValueError("its fingerprint is not a string")
    if not _is_per_cent(run["top1"]):
        raise ValueError("its top1 is not a number from 0 to 100")
    if not (isinstance(run["history"], list) and run["history"] and all(map(_is_record, run["history"]))):
        raise ValueError("its history is not a list of records of numbers with a val/top1 from 0 to 100")
    if run["history"][-1]["val/top1"] != run["top1"]:
        raise ValueError("its top1 is not that of the last epoch")
    return run


def _is_record(record: Any) -> bool:
    """Whether a record holds the numbers of an epoch; a loss may be NaN, an accuracy may not."""
    return isinstance(record, dict) and _is_per_cent(record.get("val/top1")) and all(map(_is_number, record.values()))


def _is_per_cent(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 100


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or type(value) is int


def _checksum(run: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
