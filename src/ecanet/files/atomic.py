"""Files that are written whole or not at all: a kill or a full disk leaves what was there."""

import contextlib
import os
import re
import stat
from collections.abc import Collection
from pathlib import Path

_PARTIAL = re.compile(r"\.(.+)\.([1-9][0-9]{0,8})\.partial")


def write_whole(path: str | os.PathLike[str], content: bytes | memoryview | str) -> None:
    """Write a file beside its place, have the disk keep it, and rename it.

    Whoever reads meanwhile gets the old file or the new one, whole. What a kill leaves is a file named
    ``.NAME.PROCESS.partial``, for :func:`remove_partial_files`.

    Args:
        path: The file; its folder is made when it is not there.
        content: Bytes, or text to be written as UTF-8.

    Raises:
        OSError: it could not be written; nothing is left beside it.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def remove_partial_files(folder: Path, names: Collection[str]) -> None:
    """Remove what a kill in the middle of a write left behind: regular files, and none of another living process.

    Args:
        folder: Where to look.
        names: Of the files that were being written.
    """
    for path in folder.iterdir():
        match = _PARTIAL.fullmatch(path.name)
        is_ours = match is not None and match[1] in names and stat.S_ISREG(path.lstat().st_mode)
        if match is not None and is_ours and not _is_another(int(match[2])):
            path.unlink(missing_ok=True)


def _is_another(process: int) -> bool:
    """Whether a process lives that is not this one."""
    if process == os.getpid():  # numbers return, and in containers soon
        return False
    if os.name != "posix":  # there, to ask would be to end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
