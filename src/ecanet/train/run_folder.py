"""The folder of a run: only one run uses it at a time, and it must remain the same folder until the end."""

import contextlib
import csv
import errno
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ecanet.files.atomic import write_whole
from ecanet.files.folder_lock import lock_folder, unlock_folder

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
#: Files that a run writes into its folder. Partial files of a killed run are removed when the next one starts.
FILES_OF_A_RUN = ("best.ckpt", "last.ckpt", "metrics.csv", "recipe.json")


class RunFolder:
    """A run's output folder, created and locked inside the context.

    The lock is on the folder itself and ends with the process, however that ends. It works between processes of this
    machine; systems or file systems without such locks, such as Windows, have no lock. A new folder that stays empty is
    removed.

    Args:
        path: The folder.
        first: Whether this is the first process of a run; the others neither create nor lock the folder.

    Raises:
        BlockingIOError: another run is writing into the folder.
        NotADirectoryError: the path is a file.
    """

    def __init__(self, path: Path, first: bool = True) -> None:
        self.path, self.first = path, first
        self._identity: tuple[int, int] | None = None

    def __enter__(self) -> "RunFolder":
        self._created: list[Path] = []
        self._handle: int | None = None
        if not self.first:
            return self
        self._created = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise NotADirectoryError(f"{self.path} cannot be the output folder, {error.filename} is a file") from error
        try:
            self._handle = lock_folder(self.path)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"another run is writing into {self.path}: wait until it ends, or choose another --out"
            ) from error
        self._identity = _identity(self.path)
        return self

    def __exit__(self, *exc: object) -> None:
        for path in self._created:
            with contextlib.suppress(OSError):  # a folder that is not empty stays
                path.rmdir()
        unlock_folder(self._handle)

    def check(self) -> None:
        """Check that the folder is still the one that the run started in.

        Raises:
            FileNotFoundError: it was removed, moved or replaced.
        """
        if self._identity is not None and _identity(self.path) != self._identity:
            raise FileNotFoundError(
                f"the output folder {self.path} was removed or replaced during the run, and nothing can be saved in "
                "it: run the same command again, or move the folder back and add --resume"
            )

    def write_file(self, name: str, text: str) -> None:
        """Write a small file in one step: another process reads either the old or the new one.

        Args:
            name: Name of the file, one of :data:`FILES_OF_A_RUN`.
            text: Its contents.
        """
        assert name in FILES_OF_A_RUN, f"{name} is not in FILES_OF_A_RUN, so its partial files would not be removed"
        write_whole(self.path / name, text)

    def write_metrics(self, records: Sequence[Mapping[str, float]]) -> None:
        """Write ``metrics.csv``: a row for each epoch, and a column for each name in its records.

        Args:
            records: All records of the run, also those before it was resumed.
        """
        columns = list(dict.fromkeys(name for record in records for name in record))
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        self.write_file("metrics.csv", table.getvalue())

    @contextlib.contextmanager
    def errors_named(self) -> Iterator[None]:
        """Add the folder's name to errors raised while writing.

        Raises:
            FileNotFoundError: the folder was removed meanwhile.
            OSError: the error, with the folder and the remedy added if the disk is full and the error names no folder.
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
    """What to do after a failed write into a run's folder."""
    first = "free some space" if error.errno in _FULL else "fix that"
    return f"{first}; {how_to_go_on(folder)}"


def how_to_go_on(folder: Path) -> str:
    """What a run's folder holds, and the command that goes on from there."""
    last = folder / "last.ckpt"
    if last.exists():
        return f"{last} holds the state up to its last save: go on with the same command and --resume"
    return f"there is no {last} to go on from: run the same command again"
