"""The folder of a run: one run in it at a time, and the same folder from beginning to end."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from ecanet.files.atomic import write_whole

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
#: Open folders whose locks this process holds.
_held: set[int] = set()


def _close_held() -> None:
    # A lock lives as long as any process has its file open, and loading processes outlive a killed run for seconds.
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_held)


#: What a run writes into its folder, one process at a time.
WRITTEN = ("best.ckpt", "last.ckpt", "recipe.json")


class RunFolder:
    """A run's output folder, made and locked while the context lasts.

    The lock is on the folder itself and ends with the process, however that ends. It is seen by the processes of this
    machine; there is none where the system or the file system has no such locks, as on Windows. A folder that stays
    empty is removed again.

    Args:
        path: The folder.
        first: Whether this is the first process of a run: the others neither make nor lock the folder.

    Raises:
        BlockingIOError: another run is writing into the folder.
        NotADirectoryError: it is a file.
    """

    def __init__(self, path: Path, first: bool = True) -> None:
        self.path, self.first = path, first
        self._identity: tuple[int, int] | None = None

    def __enter__(self) -> "RunFolder":
        self._made: list[Path] = []
        self._handle: int | None = None
        if not self.first:
            return self
        self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise NotADirectoryError(f"{self.path} cannot be the output folder, {error.filename} is a file") from error
        if fcntl is not None:
            self._lock()
        self._identity = _identity(self.path)
        return self

    def _lock(self) -> None:
        assert fcntl is not None
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise BlockingIOError(
                f"another run is writing into {self.path}: wait for its end, or choose another --out"
            ) from error
        except OSError:  # a file system without locks
            os.close(handle)
            return
        self._handle = handle
        _held.add(handle)

    def __exit__(self, *exc: object) -> None:
        for path in self._made:
            with contextlib.suppress(OSError):  # one that holds something stays
                path.rmdir()
        if self._handle in _held:
            _held.remove(self._handle)
            os.close(self._handle)

    def check(self) -> None:
        """See that the folder is still the one that the run began in.

        Raises:
            FileNotFoundError: it was removed, moved or replaced.
        """
        if self._identity is not None and _identity(self.path) != self._identity:
            raise FileNotFoundError(
                f"the output folder {self.path} was removed or replaced during the run, and nothing can be saved in "
                "it: run the same command again, or move the folder back and add --resume"
            )

    def write_text(self, name: str, text: str) -> None:
        """Write a small file at once: another process reads the old one or the new one, whole.

        Args:
            name: Of the file.
            text: What it will hold.
        """
        write_whole(self.path / name, text)

    @contextlib.contextmanager
    def errors_named(self) -> Iterator[None]:
        """Let errors of writing say which folder they are about.

        Raises:
            FileNotFoundError: the folder was removed meanwhile.
            OSError: what was raised, with the folder and what to do where it said neither.
        """
        try:
            yield
        except OSError as error:
            self.check()
            if error.errno in _FULL and str(self.path) not in str(error):
                raise OSError(
                    error.errno, f"cannot write into {self.path} ({error.strerror}): {remedy(error, self.path)}"
                ) from error
            raise


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def remedy(error: OSError, folder: Path) -> str:
    """What to do after an error of writing into a run's folder."""
    first = "free some space" if error.errno in _FULL else "mend that"
    return f"{first}; {how_to_go_on(folder)}"


def how_to_go_on(folder: Path) -> str:
    """What a run's folder holds, and the command that goes on from there."""
    last = folder / "last.ckpt"
    if last.exists():
        return f"{last} holds the state up to its last save: go on with the same command and --resume"
    return f"there is no {last} to go on from: run the same command again"
