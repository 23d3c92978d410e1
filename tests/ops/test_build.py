"""Building the C++ kernels: what is compiled, what is said when it cannot be, and what a wheel is called."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from ecanet.ops import build as builder
from ecanet.ops import cpu
from ecanet.ops.build import BuildError, NothingToBuildWithError, build

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent
UNITS = sorted(path.name for path in builder.SOURCES.glob("*.cpp"))

# "Compiles" by joining the files it is given, and writes down how it was called.
STUB = """#!/bin/sh
here=$(dirname "$0")
echo "$*" >> "$here/calls"
out=; previous=; inputs=
for argument in "$@"; do
  case "$previous" in -o) out=$argument;; esac
  case "$argument" in *.cpp|*.cpp.o) [ "$previous" = -o ] || inputs="$inputs $argument";; esac
  case "$argument" in "$(cat "$here/fails_on" 2>/dev/null)") echo "$argument:7: error: no such thing"; exit 1;; esac
  previous=$argument
done
cat $inputs > "$out"
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a stub compiler that CXX names."""
    folder = tmp_path / "stub compiler"
    folder.mkdir()
    (folder / "c++").write_text(STUB)
    (folder / "c++").chmod(0o755)
    monkeypatch.setenv("CXX", f"'{folder / 'c++'}' -march=native")
    return folder


def fake_torch(folder: Path, version: str, headers: bool = True) -> Path:
    (folder / "include/torch/csrc/stable").mkdir(parents=True)
    (folder / "version.py").write_text(f"__version__ = '{version}+cpu'\n")
    if headers:
        (folder / "include/torch/csrc/stable/library.h").touch()
    return folder


# --- what is compiled ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="flags of Linux")
def test_every_unit_is_compiled_and_linked(stub: Path, tmp_path: Path) -> None:
    said: list[str] = []
    output = tmp_path / "new" / "ecanet_cpu.so"
    assert build(TORCH, output, said.append) == output
    *compiled, linked = (stub / "calls").read_text().splitlines()
    assert all(any(f" -c {unit} " in call for call in compiled) for unit in UNITS)
    assert all("-march=native" in call and "TORCH_TARGET_VERSION=0x020a000000000000" in call for call in compiled)
    assert "-shared" in linked
    assert "-ltorch_cpu" in linked
    assert "rpath" not in linked
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert {line.split()[0] for line in said[1:]} == set(UNITS)


def test_a_library_knows_what_it_is_built_from(stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(builder.SOURCES, tmp_path / "csrc")
    monkeypatch.setattr(builder, "SOURCES", tmp_path / "csrc")
    library = tmp_path / "ecanet_cpu.so"
    assert not builder.is_current(library)
    build(TORCH, library, str)
    assert builder.is_current(library)
    with (tmp_path / "csrc" / "kernels.h").open("a") as file:
        file.write("// changed\n")
    assert not builder.is_current(library)


def test_needs_neither_torch_nor_ecanet_to_be_importable() -> None:
    program = (
        "import importlib.util, sys\n"
        "sys.path = [path for path in sys.path if 'packages' not in path]\n"
        f"spec = importlib.util.spec_from_file_location('builder', {str(builder.__file__)!r})\n"
        "builder = importlib.util.module_from_spec(spec); spec.loader.exec_module(builder)\n"
        "assert importlib.util.find_spec('torch') is None\n"
        "print(builder.find_torch())"
    )
    found = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    if str(TORCH.parent) in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        assert found.stdout.strip() == str(TORCH), "what build isolation hides is found"


# --- what is said when it cannot be -------------------------------------------------------------------------------


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        NothingToBuildWithError, match="no C\\+\\+ compiler: none of g\\+\\+, c\\+\\+, clang\\+\\+ in PATH"
    ):
        build(TORCH, tmp_path / "x.so")


def test_cxx_names_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(NothingToBuildWithError, match="CXX=no-such-compiler is not a program"):
        build(TORCH, tmp_path / "x.so")


@pytest.mark.parametrize(
    ("version", "headers", "reason"),
    [
        ("2.9.1", True, "torch 2.9 is too old: 2.10 or newer is needed"),
        ("2.12.0", False, "torch 2.12 has no C\\+\\+ headers"),
        (None, False, "torch is not installed where the build can see it"),
    ],
    ids=["too_old", "no_headers", "no_torch"],
)
def test_no_fitting_torch(version: str | None, headers: bool, reason: str, stub: Path, tmp_path: Path) -> None:
    folder = None if version is None else fake_torch(tmp_path / "torch", version, headers)
    with pytest.raises(NothingToBuildWithError, match=reason):
        build(folder, tmp_path / "x.so")
    assert not (stub / "calls").exists()


def test_a_platform_without_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(NothingToBuildWithError, match="build on Linux and macOS, this is win32"):
        build(TORCH, tmp_path / "x.so")


def test_a_failing_compiler_leaves_the_old_library(stub: Path, tmp_path: Path) -> None:
    (stub / "fails_on").write_text("ops.cpp")
    (tmp_path / "lib").mkdir()
    library = tmp_path / "lib" / "ecanet_cpu.so"
    library.write_text("old")
    with pytest.raises(BuildError, match=r"failed on ops\.cpp: ops\.cpp:7: error: no such thing") as raised:
        build(TORCH, library, str)
    assert not isinstance(raised.value, NothingToBuildWithError)
    assert raised.value.output == "ops.cpp:7: error: no such thing"
    assert library.read_text() == "old"
    assert list(library.parent.iterdir()) == [library]


def test_an_output_that_cannot_be_written(stub: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BuildError, match=r"cannot write .*file"):
        build(TORCH, tmp_path / "file" / "x.so", str)


# --- the built library --------------------------------------------------------------------------------------------


@pytest.mark.skipif(cpu.why_not() is not None, reason=f"{cpu.why_not()}")
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("nm") is None, reason="needs nm")
def test_the_library_asks_torch_for_its_stable_c_functions_alone() -> None:
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(builder.LIBRARY)], capture_output=True, text=True, check=True
    )
    symbols = [line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines()]
    assert any(name.startswith("torch_") for name in symbols)
    others = ("_ZN2at", "_ZNK2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch", "_ZNK5torch", "Py", "_Py")
    assert [name for name in symbols if name.startswith(others)] == []


# --- setup.py -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="the stub links as on Linux")
@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="needs setuptools")
@pytest.mark.parametrize("has_compiler", [True, False], ids=["compiler", "no_compiler"])
def test_wheel_is_named_after_what_is_in_it(
    has_compiler: bool, stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    leave_out = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.xz", "lib")
    shutil.copytree(ROOT / "src", tree / "src", ignore=leave_out)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    if not has_compiler:
        monkeypatch.setenv("CXX", "no-such-compiler")
    program = f"import setuptools.build_meta as m; m.build_wheel({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=tree, capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    assert {f"ecanet/csrc/{name}" for name in (*UNITS, "kernels.h")} <= set(files)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform if has_compiler else 'any'}.whl")
    assert ("ecanet/lib/ecanet_cpu.so" in files) == has_compiler
    said = "installing without the C++ kernels (no C++ compiler: CXX=no-such-compiler is not a program); to build them"
    assert (said in done.stderr) != has_compiler
