"""A folder for one writer at a time. The lock is on the folder itself and ends with the process, however that ends."""

import os
from pathlib import Path
from types import ModuleType

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

#: Handles of the open folders that this process has locked.
_held: set[int] = set()


def _close_held() -> None:
    # A lock lasts while any process has the folder open, and a killed run's loading processes outlive it by seconds.
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_held)


def lock_folder(path: Path) -> int | None:
    """Lock a folder against other processes of this machine, and other callers in this one.

    Args:
        path: The folder, which exists.

    Returns:
        What :func:`unlock_folder` takes; None on systems or file systems without such locks, such as Windows.

    Raises:
        BlockingIOError: it is locked.
    """
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:  # a file system without locks
        os.close(handle)
        return None
    _held.add(handle)
    return handle


def unlock_folder(handle: int | None) -> None:
    """Release a lock; does nothing in a process that was forked after the lock was taken."""
    if handle in _held:
        _held.remove(handle)
        os.close(handle)
