"""Builds the C++ kernels: runs the compiler on ``csrc`` and writes one shared library.

Needs neither torch nor the rest of the package to be importable, only torch's headers: ``setup.py`` loads this file by
its path, in an environment that may have nothing but setuptools.
"""

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
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "csrc"
LIBRARY = Path(__file__).parents[1] / "lib" / "ecanet_cpu.so"

_OLDEST_TORCH = (2, 10)
# The library asks for nothing that torch 2.10 does not have, whatever version the headers are.
_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
_COMPILE = (
    "-std=c++20",
    "-O3",
    "-fno-math-errno",  # square roots in vectors
    "-fno-trapping-math",
    "-fopenmp-simd",  # sums in vectors, where a pragma says so
    "-fPIC",
    "-fvisibility=hidden",
    "-Wno-psabi",
    _TARGET,
)
_LINK = {"linux": ("-shared", "-Wl,-z,now"), "darwin": ("-shared", "-undefined", "dynamic_lookup")}
_MARK = b"ecanet built from "


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
    """Compile ``csrc``, one process per core, and link the library; about a minute and a half on two cores.

    Args:
        torch_dir: Folder of the torch package, 2.10 or newer; None if there is none.
        output: The library's file. It is replaced in one step, when everything else is done.
        say: Called with lines of progress.

    Returns:
        ``output``.

    Raises:
        NothingToBuildWithError: no compiler, no torch headers, or not Linux or macOS.
        BuildError: the compiler failed, or ``output`` cannot be written.
    """
    if sys.platform not in _LINK:
        raise NothingToBuildWithError(f"the C++ kernels build on Linux and macOS, this is {sys.platform}")
    torch_dir = _checked(torch_dir)
    compiler = find_compiler()
    includes = [torch_dir / "include", torch_dir / "include" / "torch" / "csrc" / "api" / "include"]
    # Error messages of the library name files: let them not name this machine's folders.
    unnamed = f"-ffile-prefix-map={torch_dir}=torch"
    compile_one = [*compiler, *_COMPILE, unnamed, *(f"-isystem{path}" for path in includes), "-c"]
    units = sorted(path.name for path in SOURCES.glob("*.cpp"))
    processes = min(len(units), _cores())
    say(f"compiling {len(units)} files with {compiler[0]}, {processes} at a time: a minute or two")
    began = time.monotonic()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="ecanet-build-") as name, ThreadPoolExecutor(processes) as pool:
            folder = Path(name)
            mark = folder / "mark.cpp"
            mark.write_text(_mark_source())
            objects = [folder / f"{unit}.o" for unit in [*units, mark.name]]
            _run([*compile_one, str(mark), "-o", str(objects[-1])], mark.name)
            jobs = {
                pool.submit(_run, [*compile_one, unit, "-o", str(made)], unit, SOURCES): unit
                for unit, made in zip(units, objects, strict=False)
            }
            try:
                for job in as_completed(jobs):
                    job.result()
                    say(f"  {jobs[job]} ({time.monotonic() - began:.0f} s)")
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            _link(compiler, objects, torch_dir, output)
    except OSError as error:
        raise BuildError(f"cannot write {error.filename or output}: {error.strerror or error}") from error
    return output


def sources_hash() -> str:
    """What the library is built from, as 16 hexadecimal digits: sources, flags and kind of machine."""
    digest = hashlib.sha256(repr((_COMPILE, _LINK, sys.platform, platform.machine())).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def hash_within(library: Path) -> str | None:
    """The :func:`sources_hash` that a library was built from; None if it says nothing."""
    _, mark, rest = library.read_bytes().partition(_MARK)
    return rest[:16].decode("ascii", "replace") if mark else None


def is_current(library: Path = LIBRARY) -> bool:
    """Whether the library is there and built from the sources as they are now."""
    return library.is_file() and hash_within(library) == sources_hash()


def find_compiler() -> list[str]:
    """The C++ compiler's command: ``CXX`` of the environment, else g++, c++ or clang++.

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
    """The torch package's folder, without importing it: in ``sys.path``, else where this interpreter's packages are.

    The second is what build isolation hides from ``sys.path``.
    """
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    folders = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:  # a virtual environment does not see the user's packages
        folders.append(site.getusersitepackages())
    return next((torch for f in folders if ((torch := Path(f) / "torch") / "__init__.py").is_file()), None)


def _checked(torch_dir: Path | None) -> Path:
    if torch_dir is None:
        raise NothingToBuildWithError("torch is not installed where the build can see it")
    version_file = torch_dir / "version.py"
    found = re.search(r"__version__ = '(\d+)\.(\d+)", version_file.read_text() if version_file.is_file() else "")
    if found is None or not (torch_dir / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        version = f" {found[1]}.{found[2]}" if found else ""
        raise NothingToBuildWithError(f"torch{version} has no C++ headers of the stable ABI")
    if (int(found[1]), int(found[2])) < _OLDEST_TORCH:
        raise NothingToBuildWithError(f"torch {found[1]}.{found[2]} is too old: 2.10 or newer is needed")
    return torch_dir.resolve()  # as the compiler writes it


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _mark_source() -> str:
    text = f"{_MARK.decode()}{sources_hash()}"
    return (
        'extern "C" __attribute__((visibility("default"))) const char ecanet_built_from[];\n'
        f'extern "C" const char ecanet_built_from[] = "{text}";\n'
    )


def _link(compiler: Sequence[str], objects: Sequence[Path], torch_dir: Path, output: Path) -> None:
    # torch is loaded before the library is, so that where it lies on this machine need not be written into the file.
    libraries = [f"-L{torch_dir / 'lib'}", "-ltorch_cpu"] if sys.platform == "linux" else []
    unfinished = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        command = [*compiler, *_LINK[sys.platform], *map(str, objects), *libraries, "-o", str(unfinished)]
        _run(command, "linking")
        os.replace(unfinished, output)
    finally:
        unfinished.unlink(missing_ok=True)


def _run(command: Sequence[str], what: str, folder: Path | None = None) -> None:
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode == 0:
        return
    lines = [line.rstrip() for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]
    ended = f"it ended with {done.returncode}"
    reason = next((line.strip() for line in lines if "error" in line.lower()), lines[-1].strip() if lines else ended)
    raise BuildError(f"{command[0]} failed on {what}: {reason}", "\n".join(lines[-20:]))
