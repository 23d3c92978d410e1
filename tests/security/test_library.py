"""The library of C++ kernels: what is not whole is never loaded, and a build that is killed leaves nothing behind."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import ecanet
from ecanet.ops import build as builder
from ecanet.ops import cpu
from tests import fresh

PACKAGE = Path(ecanet.__file__).parent
MARK = b"ecanet built from " + builder.sources_hash().encode()
AGAIN = "; to build them again: ecanet build"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="libraries and processes of Linux")


# --- loading ------------------------------------------------------------------------------------------------------

TRY = """
import json, os, pathlib, sys, types
ecanet = sys.modules["ecanet"] = types.ModuleType("ecanet")  # its operations alone: the rest takes as long as torch
ecanet.__path__ = [sys.argv[1] + "/site/ecanet"]
from ecanet.ops import cpu
assert cpu.why_not() is not None
if os.geteuid() == 0:
    os.seteuid(65534)  # permissions are nothing to root
for path in sys.argv[2:]:
    cpu.LIBRARY = pathlib.Path(path)
    cpu.load()
    print(json.dumps(cpu.why_not()), flush=True)
"""


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    """A folder that every user can read, with a copy of ecanet that has no library."""
    with tempfile.TemporaryDirectory(prefix="ecanet-tests-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        leave_out = shutil.ignore_patterns("__pycache__", "*.xz", "lib")
        shutil.copytree(PACKAGE, folder / "site" / "ecanet", ignore=leave_out)
        yield folder


def run(shared: Path, code: str, *args: object, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(shared / "site")}
    return fresh.run(code, *args, timeout=timeout, environment=env, cwd=shared)


def reasons(shared: Path, *libraries: Path) -> list[str | None]:
    """What is said of each library by one process, which none of them may end."""
    done = run(shared, TRY, shared, *libraries)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr}"
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def whole() -> bytes:
    """The library as it was built."""
    if cpu.why_not() is not None:
        pytest.skip(str(cpu.why_not()))
    return builder.LIBRARY.read_bytes()


def numbered(shared: Path, name: str, contents: list[bytes]) -> list[Path]:
    paths = [shared / f"{name}{i}.so" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def refused_as_damaged(reason: str | None, path: Path) -> bool:
    return reason == f"the C++ kernels cannot be loaded ({path}: it is damaged, or not a library of ecanet){AGAIN}"


@pytest.mark.parametrize(
    "tail",
    [lambda whole: b"", lambda whole: MARK, lambda whole: whole[-200:], lambda whole: builder._stamp(whole)],
    ids=["cut", "and the mark", "and the end of the whole", "and the stamp of the whole"],
)
def test_truncated_at_20_places(tail: Callable[[bytes], bytes], whole: bytes, shared: Path) -> None:
    places = [round(i * (len(whole) - 1) / 19) for i in range(20)]
    paths = numbered(shared, "cut", [whole[:place] + tail(whole) for place in places])
    for path, reason in zip(paths, reasons(shared, *paths), strict=True):
        assert refused_as_damaged(reason, path), reason


def test_flipped_at_20_places(whole: bytes, shared: Path) -> None:
    """The last places are in the stamp: in the hash of the sources and in the checksum."""
    places = [round(i * (len(whole) - 400) / 14) for i in range(15)]
    places += [len(whole) - back for back in (1, 30, 70, 80, 100)]
    contents = [whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :] for place in places]
    paths = numbered(shared, "flipped", contents)
    for path, reason in zip(paths, reasons(shared, *paths), strict=True):
        assert refused_as_damaged(reason, path) or reason == f"the C++ kernels are built from other sources{AGAIN}"


def another() -> bytes:
    """A library that loads and is not ecanet's: one of Python's, or of torch's."""
    for name in ("_heapq", "_bisect", "_json", "_lsprof"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and spec.origin.endswith(".so"):
            return Path(spec.origin).read_bytes()
    return Path(torch.__file__).parent.joinpath("lib", "libshm.so").read_bytes()


def write(content: Callable[[], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content())


def unreadable(path: Path) -> None:
    path.write_bytes(MARK)
    path.chmod(0)


def symlink_to_itself(path: Path) -> None:
    path.symlink_to(path)


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10**11)


DAMAGED, NO_FILE = "it is damaged, or not a library of ecanet", "it is not a file"
MEMBERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "an empty file": (Path.touch, DAMAGED),
    "a text": (write(lambda: b"kernels\n" * 100), DAMAGED),
    "a text that ends with the mark": (write(lambda: b"kernels\n" * 100 + MARK), DAMAGED),
    "the mark alone": (write(lambda: MARK), DAMAGED),
    "the mark of other sources": (write(lambda: b"ecanet built from 0123456789abcdef"), "built from other sources"),
    "a mark that is cut": (write(lambda: b"ecanet built from 01"), "built from other sources"),
    "a text with a stamp that fits": (
        write(lambda: b"kernels" + builder._stamp(b"kernels")),
        "ELF header|too short",
    ),
    "nothing, with a stamp that fits": (write(lambda: builder._stamp(b"")), "ELF header|too short"),
    "another library": (write(another), DAMAGED),
    "another library with the mark": (write(lambda: another() + MARK), DAMAGED),
    "another library with a stamp that fits": (write(lambda: another() + builder._stamp(another())), "lacks squeeze, "),
    "zeros of 100 gigabytes": (huge, DAMAGED),
    "a folder": (Path.mkdir, NO_FILE),
    "a FIFO": (os.mkfifo, NO_FILE),
    "a symlink to nothing": (lambda path: path.symlink_to("nothing"), NO_FILE),
    "a symlink to itself": (symlink_to_itself, NO_FILE),
    "a symlink to a folder": (lambda path: path.symlink_to(path.parent), NO_FILE),
    "a symlink to a device without end": (lambda path: path.symlink_to("/dev/zero"), NO_FILE),
    "a symlink to a text": (lambda path: path.symlink_to(__file__), "Permission denied|damaged"),
    "a file without permission": (unreadable, "Permission denied"),
}


@pytest.fixture(scope="module")
def members(shared: Path) -> dict[str, tuple[Path, str | None]]:
    """Path of each, and what is said of it."""
    paths = [shared / f"member{i}.so" for i in range(len(MEMBERS))]
    for path, (make, _) in zip(paths, MEMBERS.values(), strict=True):
        make(path)
    return dict(zip(MEMBERS, zip(paths, reasons(shared, *paths), strict=True), strict=True))


@pytest.mark.parametrize("member", MEMBERS)
def test_what_is_no_library(member: str, members: dict[str, tuple[Path, str | None]]) -> None:
    path, reason = members[member]
    assert reason is not None
    assert re.search(MEMBERS[member][1], reason), reason
    assert str(path) in reason or "sources" in reason
    assert reason.endswith(AGAIN)
    assert len(reason.splitlines()) == 1


def test_a_library_that_is_removed_while_it_is_loaded_runs_on(whole: bytes, shared: Path) -> None:
    [path] = numbered(shared, "removed", [whole])
    path.chmod(0o644)
    code = TRY + (
        "import torch\nos.seteuid(os.getuid())\nos.unlink(sys.argv[2])\n"
        "from ecanet.ops.backend import choose\nx = torch.ones(1, 2, 3, 3)\n"
        "print(choose(x), torch.ops.ecanet.squeeze(x).tolist())"
    )
    done = run(shared, code, shared, path)
    assert done.stdout.splitlines() == ["null", "cpu [[1.0, 1.0]]"], done.stderr
    assert not path.exists()


def test_a_symlink_to_the_library_is_loaded(whole: bytes, shared: Path) -> None:
    [path] = numbered(shared, "target", [whole])
    (shared / "link.so").symlink_to(path)
    assert reasons(shared, shared / "link.so") == [None]


def test_importing_ecanet_and_the_doctor_survive_a_cut_library(shared: Path) -> None:
    library = shared / "site" / "ecanet" / "lib" / "ecanet_cpu.so"
    library.parent.mkdir()
    library.write_bytes(b"\x7fELF" + bytes(10_000) + MARK)
    code = (
        "import sys, ecanet.cli, torch\nprint(ecanet.ECA(8)(torch.ones(1, 8, 2, 2)).shape)\necanet.cli.main(['doctor'])"
    )
    try:
        done = run(shared, code)
    finally:
        shutil.rmtree(library.parent)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "torch.Size([1, 8, 2, 2])"
    assert f"kernels    the C++ kernels cannot be loaded ({library}: {DAMAGED}){AGAIN}" in lines
    assert lines[-1].startswith("next: ")
    assert lines[-1].endswith("ecanet build")


def test_the_kernels_that_have_to_be_registered_are_those_of_the_sources() -> None:
    registered = re.findall(r'm\.impl\("(\w+)"', (builder.SOURCES / "ops.cpp").read_text())
    assert sorted(cpu.KERNELS) == sorted(registered)


# --- building -----------------------------------------------------------------------------------------------------

# Writes down its process, leaves a file where compilers leave theirs, and stops for good where it is told to.
COMPILER = """#!/bin/sh
here=$(dirname "$0")
echo $$ >> "$here/processes"
echo . > "$(mktemp)"
out=; previous=; step=compiling
for argument in "$@"; do
  case "$previous" in -o) out=$argument;; esac
  [ "$argument" = -shared ] && step=linking
  previous=$argument
done
echo half > "$out"
if [ "$step" = "$(cat "$here/stops_at")" ]; then
  sleep 60 &
  echo $! >> "$here/processes"
  echo $step > "$here/reached"
  wait
fi
sleep 0.02
"""

# Needs no torch, as in setup.py: it starts within a tenth of a second.
BUILD = """
import importlib.util, pathlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
spec = importlib.util.spec_from_file_location("builder", sys.argv[1])
builder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(builder)
try:
    builder.build(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]), str)
except builder.BuildError as error:
    sys.exit(str(error))
"""


class Workplace:
    """A stub compiler, headers, and an old library in the place of the new one."""

    def __init__(self, folder: Path, stops_at: str) -> None:
        self.folder = folder
        for name in ("compiler", "lib", "tmp", "torch/include/torch/csrc/stable"):
            (folder / name).mkdir(parents=True)
        (folder / "torch/version.py").write_text("__version__ = '2.10.0+cpu'\n")
        (folder / "torch/include/torch/csrc/stable/library.h").touch()
        (folder / "compiler/c++").write_text(COMPILER)
        (folder / "compiler/c++").chmod(0o755)
        (folder / "compiler/stops_at").write_text(stops_at)
        self.library = folder / "lib" / "ecanet_cpu.so"
        self.library.write_text("old")

    def build(self) -> "subprocess.Popen[str]":
        paths = [str(builder.__file__), str(self.folder / "torch"), str(self.library)]
        env = {**os.environ, "CXX": str(self.folder / "compiler/c++"), "TMPDIR": str(self.folder / "tmp")}
        return subprocess.Popen([sys.executable, "-I", "-c", BUILD, *paths], env=env, stderr=subprocess.PIPE, text=True)

    def build_up_to_the_stop(self) -> "subprocess.Popen[str]":
        process = self.build()
        until(lambda: (self.folder / "compiler/reached").exists() or process.poll() is not None)
        assert process.poll() is None
        return process

    def running(self) -> list[str]:
        """Compilers that still run."""
        file = self.folder / "compiler/processes"
        return [pid for pid in file.read_text().split() if is_running(pid)] if file.exists() else []

    def left(self) -> list[str]:
        """Everything beside the library, and in the folder for temporary files."""
        here = [*self.library.parent.rglob("*"), *(self.folder / "tmp").rglob("*")]
        return [str(path.relative_to(self.folder)) for path in here if path != self.library]


def is_running(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("moment", ["compiling", "linking"])
@pytest.mark.parametrize("killer", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP], ids=lambda s: s.name)
def test_a_killed_build_leaves_nothing_and_no_compiler(moment: str, killer: signal.Signals, tmp_path: Path) -> None:
    place = Workplace(tmp_path, moment)
    process = place.build_up_to_the_stop()
    assert place.running()
    process.send_signal(killer)
    process.communicate(timeout=60)
    assert process.returncode != 0
    until(lambda: not place.running() and not place.left())
    assert place.library.read_text() == "old"


@pytest.mark.parametrize("killer", [signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_a_build_killed_at_any_moment(killer: signal.Signals, tmp_path: Path) -> None:
    for tenth in range(12):
        place = Workplace(tmp_path / str(tenth), "nothing")
        process = place.build()
        time.sleep(0.04 * tenth)
        process.send_signal(killer)
        process.communicate(timeout=60)
        until(lambda place=place: not place.running() and not place.left())
        content = place.library.read_bytes()
        assert content == b"old" or content == b"half\n" + builder._stamp(b"half\n")


def test_the_next_build_removes_what_a_killed_session_left(tmp_path: Path) -> None:
    place = Workplace(tmp_path, "compiling")
    process = place.build_up_to_the_stop()
    janitors = [pid for pid in os.listdir("/proc") if pid.isdigit() and parent_of(pid) == str(process.pid)]
    for pid in [*janitors, *place.running()]:
        with contextlib.suppress(ProcessLookupError):  # it ended with its parent
            os.kill(int(pid), signal.SIGKILL)  # with the build's own, there is nobody left to clean up
    process.kill()
    process.communicate(timeout=60)
    until(lambda: not place.running())
    assert place.left()
    (tmp_path / "compiler/stops_at").write_text("nothing")
    _, said = place.build().communicate(timeout=60)
    assert said == ""
    assert place.left() == []
    assert builder.is_current(place.library)


def parent_of(pid: str) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    except (FileNotFoundError, ProcessLookupError):
        return None


def test_a_second_build_into_the_folder_is_refused_while_one_runs(tmp_path: Path) -> None:
    place = Workplace(tmp_path, "linking")
    first = place.build_up_to_the_stop()
    second = place.build()
    _, said = second.communicate(timeout=60)
    assert (second.returncode, said) == (1, f"another build into {place.library.parent} is running: wait for it\n")
    assert place.running()
    first.kill()
    first.communicate(timeout=60)
    until(lambda: not place.running() and not place.left())


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("nothing")], ids=["FIFO", "symlink"])
def test_a_build_replaces_what_is_no_library(make: Callable[[Path], object], tmp_path: Path) -> None:
    place = Workplace(tmp_path, "nothing")
    place.library.unlink()
    make(place.library)
    assert place.build().communicate(timeout=60)[1] == ""
    assert builder.is_current(place.library)
    assert not place.library.is_symlink()


def test_a_folder_in_the_place_of_the_library_is_named_before_anything_is_compiled(tmp_path: Path) -> None:
    place = Workplace(tmp_path, "nothing")
    place.library.unlink()
    place.library.mkdir()
    assert place.build().communicate(timeout=60)[1] == f"cannot write {place.library}: it is a folder, remove it\n"
    assert not (tmp_path / "compiler/processes").exists()
