"""Builds the C++ kernels: runs the compiler on ``csrc`` and writes one shared library.

Only torch's headers are needed; neither torch nor the rest of the package has to be importable. ``setup.py`` loads this
file by its path, in an environment that may have only setuptools.
"""

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parents[1] / "csrc"
LIBRARY = Path(__file__).parents[1] / "lib" / "ecanet_cpu.so"

_OLDEST_TORCH = (2, 10)
# The library uses only what torch 2.10 has, whatever version the headers are.
_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
_COMPILE = (
    "-std=c++20",
    "-O3",
    "-fno-math-errno",  # vectorised square roots
    "-fno-trapping-math",
    "-fopenmp-simd",  # vectorised sums, where a pragma asks for them
    "-fPIC",
    "-fvisibility=hidden",
    "-Wno-psabi",
    _TARGET,
)
_LINK = {"linux": ("-shared", "-Wl,-z,now"), "darwin": ("-shared", "-undefined", "dynamic_lookup")}
# The stamp at the end of the library's file: the hash of its sources, and a checksum of everything before the stamp.
_STAMP_START = b"ecanet built from "


class BuildError(Exception):
    """Why the library was not built, in one line.

    Attributes:
        output: The last lines the compiler printed, if it ran.
    """

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.output = output


class NothingToBuildWithError(BuildError):
    """No compiler, no torch headers, or a platform for which there is no build."""


def build(torch_dir: Path | None, output: Path = LIBRARY, say: Callable[[str], object] = print) -> Path:
    """Compile ``csrc``, one process per core, and link the library. This takes about 90 seconds on two cores.

    Args:
        torch_dir: Folder of the torch package, 2.10 or newer; None if there is none.
        output: The library's file. It is replaced in one step at the very end. A build that is killed leaves the old
            file, and no other files.
        say: Called with each line of progress.

    Returns:
        ``output``.

    Raises:
        NothingToBuildWithError: no compiler, no torch headers, or not Linux or macOS.
        BuildError: the compiler failed, ``output`` cannot be written, or another build into its folder is running.
    """
    if sys.platform not in _LINK:
        raise NothingToBuildWithError(f"the C++ kernels build on Linux and macOS, this is {sys.platform}")
    if output.is_dir():
        raise BuildError(f"cannot write {output}: it is a folder, remove it")
    output = output.absolute()
    torch_dir = _check_torch(torch_dir)
    compiler = find_compiler()
    includes = [torch_dir / "include", torch_dir / "include" / "torch" / "csrc" / "api" / "include"]
    # Error messages of the library contain file names; keep this machine's folders out of them.
    unnamed = f"-ffile-prefix-map={torch_dir}=torch"
    compile_one = [*compiler, *_COMPILE, unnamed, *(f"-isystem{path}" for path in includes), "-c"]
    units = sorted(path.name for path in SOURCES.glob("*.cpp"))
    processes = min(len(units), available_cores())
    say(f"compiling {len(units)} files with {compiler[0]}, {processes} at a time: a minute or two")
    began = time.monotonic()
    try:
        with ThreadPoolExecutor(processes) as pool, _build_folder(output) as (folder, run):
            jobs = {pool.submit(run, [*compile_one, unit, "-o", f"{folder}/{unit}.o"], unit): unit for unit in units}
            try:
                for job in as_completed(jobs):
                    job.result()
                    say(f"  {jobs[job]} ({time.monotonic() - began:.0f} s)")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # _build_folder ends the running compilers
                raise
            # torch is always loaded before the library, so the file need not contain torch's path.
            libraries = [f"-L{torch_dir / 'lib'}", "-ltorch_cpu"] if sys.platform == "linux" else []
            objects = [f"{folder}/{unit}.o" for unit in units]
            linked = folder / output.name
            run([*compiler, *_LINK[sys.platform], *objects, *libraries, "-o", str(linked)], "linking")
            with linked.open("r+b") as file:
                file.write(_stamp(file.read()))
            os.replace(linked, output)
    except OSError as error:
        raise BuildError(f"cannot write {error.filename or output}: {error.strerror or error}") from error
    return output


def sources_hash() -> str:
    """A hash of everything the library is built from (sources, flags, platform), as 16 hexadecimal digits."""
    digest = hashlib.sha256(repr((_COMPILE, _LINK, sys.platform, platform.machine())).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def hash_within(library: Path) -> str | None:
    """The :func:`sources_hash` in a library's stamp; None if there is no stamp."""
    with library.open("rb") as file:
        file.seek(-min(library.stat().st_size, 256), os.SEEK_END)
        _, mark, rest = file.read().rpartition(_STAMP_START)
    return rest[:16].decode("ascii", "replace") if mark else None


def fault(library: Path = LIBRARY) -> str | None:
    """Why a library is not, byte for byte, the result of building the current sources.

    Returns:
        None if it is, otherwise the end of a sentence that starts with "the C++ kernels".

    Raises:
        OSError: it does not exist or cannot be read.
    """
    if not library.is_file():
        return f"cannot be loaded ({library}: it is not a file)"
    built_from = hash_within(library)
    if built_from is not None and built_from != sources_hash():
        return "are built from other sources"
    content, mark, rest = library.read_bytes().rpartition(_STAMP_START) if built_from else (b"", b"", b"")
    if mark + rest != _stamp(content):
        return f"cannot be loaded ({library}: it is damaged, or not a library of ecanet)"
    return None


def is_current(library: Path = LIBRARY) -> bool:
    """Whether the library exists, is undamaged, and is built from the current sources."""
    return library.is_file() and fault(library) is None


def find_compiler() -> list[str]:
    """The C++ compiler's command: the environment variable ``CXX``, otherwise g++, c++ or clang++.

    Raises:
        NothingToBuildWithError: there is none.
    """
    if given := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(given[0]) is None:
            raise NothingToBuildWithError(f"no C++ compiler: CXX={given[0]} is not a program")
        return given
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name) is not None:
            return [name]
    raise NothingToBuildWithError("no C++ compiler: none of g++, c++, clang++ in PATH")


def find_torch() -> Path | None:
    """The torch package's folder, without importing it: from ``sys.path``, or from this interpreter's own packages.

    Build isolation hides the interpreter's own packages from ``sys.path``.
    """
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    folders = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:  # a virtual environment does not see the user's packages
        folders.append(site.getusersitepackages())
    return next((torch for f in folders if ((torch := Path(f) / "torch") / "__init__.py").is_file()), None)


def _check_torch(torch_dir: Path | None) -> Path:
    if torch_dir is None:
        raise NothingToBuildWithError("torch is not installed where the build can see it")
    version_file = torch_dir / "version.py"
    match = re.search(r"__version__ = '(\d+)\.(\d+)", version_file.read_text() if version_file.is_file() else "")
    if match is None or not (torch_dir / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        version = f" {match[1]}.{match[2]}" if match else ""
        raise NothingToBuildWithError(f"torch{version} has no C++ headers of the stable ABI")
    if (int(match[1]), int(match[2])) < _OLDEST_TORCH:
        raise NothingToBuildWithError(f"torch {match[1]}.{match[2]} is too old: 2.10 or newer is needed")
    return torch_dir.resolve()  # the form in which the compiler writes it


def available_cores() -> int:
    """How many CPUs this process may use; macOS and Windows report only the total."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _stamp(content: bytes) -> bytes:
    """The stamp that is appended to a library's content."""
    return _STAMP_START + f"{sources_hash()} sha256 {hashlib.sha256(content).hexdigest()}".encode()


_Run = Callable[[Sequence[str], str], None]

# Waits until the build's process is gone, however it ended. Then ends the compilers, which are in the script's own
# process group, and removes their files.
_JANITOR = 'trap "" TERM INT HUP; read _; kill -TERM 0; rm -rf "$1" || { sleep 1; rm -rf "$1"; }; kill -KILL 0'


def remove_leftovers(output: Path) -> None:
    """Remove the folders of builds whose whole session was killed, or that a crash of the machine interrupted."""
    for folder in output.parent.glob(f".{output.name}.*.build"):
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _build_folder(output: Path) -> Iterator[tuple[Path, _Run]]:
    """A folder beside the output, and a function that runs a compiler in it; neither outlives this process."""
    folder = output.with_name(f".{output.name}.{os.getpid()}.build")
    output.parent.mkdir(parents=True, exist_ok=True)
    with _lock(output.parent):
        remove_leftovers(output)
        janitor = subprocess.Popen(["/bin/sh", "-c", _JANITOR, "sh", folder], stdin=subprocess.PIPE, **_in_group(0))
        try:
            folder.mkdir()
            yield folder, functools.partial(_run, folder, janitor.pid)
        finally:
            janitor.communicate()


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    import fcntl  # Linux and macOS

    held = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems have no locks
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BuildError(f"another build into {folder} is running: wait for it") from None
        yield
    finally:
        os.close(held)


def _in_group(leader: int) -> dict[str, Any]:
    """Arguments of :class:`subprocess.Popen` that start a process in a process group; 0 makes a new group."""
    if sys.version_info >= (3, 11):
        return {"process_group": leader}
    return {"preexec_fn": functools.partial(os.setpgid, 0, leader)}


def _run(folder: Path, group: int, command: Sequence[str], what: str) -> None:
    done = subprocess.run(
        command,
        cwd=SOURCES,
        env={**os.environ, "TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        **_in_group(group),
    )
    if done.returncode == 0:
        return
    lines = [line.rstrip() for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]
    ended = f"it ended with {done.returncode}"
    reason = next((line.strip() for line in lines if "error" in line.lower()), lines[-1].strip() if lines else ended)
    raise BuildError(f"{command[0]} failed on {what}: {reason}", "\n".join(lines[-20:]))
