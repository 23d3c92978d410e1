"""Files are written whole or not at all: after a kill or on a full disk, the old file is still there."""

import contextlib
import errno
import itertools
import os
import re
import stat
from collections.abc import Collection
from pathlib import Path

_PARTIAL = re.compile(r"\.(.+)\.([1-9][0-9]{0,8})(?:-[0-9]{1,19})?\.partial")
#: Of the writes of this process: two threads may write one file.
_numbers = itertools.count()


def write_whole(path: str | os.PathLike[str], content: bytes | memoryview | str) -> None:
    """Write a temporary file beside ``path``, flush it to disk, and rename it to ``path``.

    A concurrent reader sees the old file or the new one, always whole; of several writers the last one wins. A kill
    leaves a file named ``.NAME.PROCESS-NUMBER.partial``, which :func:`remove_partial_files` removes. A link is
    replaced, not followed.

    Args:
        path: The file; its folder is created if needed.
        content: Bytes, or text to be written as UTF-8.

    Raises:
        OSError: it could not be written; the temporary file is removed. Or it is a device or a pipe, whose place a
            renamed file would take.
        UnicodeEncodeError: the text has a lone surrogate.
    """
    target = Path(path)
    data = content.encode() if isinstance(content, str) else content
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise OSError(errno.EEXIST, "it is a device or a pipe, not a regular file", str(target))
    partial = target.with_name(f".{target.name}.{os.getpid()}-{next(_numbers)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def remove_partial_files(folder: Path, names: Collection[str]) -> None:
    """Remove the temporary files of killed writes: regular files only, and none of another process that is alive.

    Args:
        folder: Where to look.
        names: Names of the files that were being written.
    """
    for path in folder.iterdir():
        match = _PARTIAL.fullmatch(path.name)
        is_ours = match is not None and match[1] in names and stat.S_ISREG(path.lstat().st_mode)
        if match is not None and is_ours and not _is_alive_elsewhere(int(match[2])):
            path.unlink(missing_ok=True)


def _is_alive_elsewhere(process: int) -> bool:
    """Whether a process id belongs to a living process other than this one."""
    if process == os.getpid():  # ids are reused, in containers soon
        return False
    if os.name != "posix":  # os.kill would end the process there
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
