"""Torch may take any of its private names away: ecanet is imported, computes the same, and doctor says what is gone."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest

import private_names

NAMES = private_names.names()
#: Without one of these nobody could tell whether somebody looks on, or call a kernel below autograd.
NEEDED_BY_KERNELS = {
    "torch._C._are_functorch_transforms_active",
    "torch._C._AutoDispatchBelowAutograd",
    "torch.autograd.forward_ad._current_level",
    "torch.nn.modules.module._has_any_global_hook",
}
#: Asked for where they are used, since import torch does not bring them or every object has its own.
LOOKED_UP_LATER = {name for name in NAMES if "." not in name or name.startswith("torch.export")}


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    """What came out without each name."""
    run = subprocess.run(
        [sys.executable, private_names.__file__],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env={**os.environ, "ECANET_BACKEND": ""},
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("name", NAMES)
def test_without_a_private_name_of_torch_the_values_are_the_same_and_doctor_says_what_is_missing(name, found) -> None:
    got = found[name]
    assert "error" not in got, got["error"]
    assert got["worst"] < 1e-4
    assert got["gates"] == 2
    if name not in LOOKED_UP_LATER:
        assert all(f"has no {path}" in got["doctor"] for path in got["missing"])
        assert got["missing"]
    runs_kernels = got["explains"].startswith(("the C++ kernels", "the modules (norm, gate, residual, relu): the C++"))
    assert runs_kernels or name in NEEDED_BY_KERNELS
    if name in NEEDED_BY_KERNELS:
        assert f"has no {name}_gone, which they need" in got["explains"]
        assert got["explains"].startswith("the modules")


def private_names_in(code: str) -> list[str]:
    """Names of torch with an underscore that a file imports or looks up."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            found.append(ast.unparse(node))
    return [name for name in found if re.fullmatch(r"(torch|nn|dist|F|fx)(\.\w+)*\._[a-zA-Z]\w*(\.\w+)*", name)]


def test_no_other_file_of_the_library_names_what_is_private_in_torch() -> None:
    assert private_names_in("from torch.nn import _x\nimport torch._y\ntorch._C._z()") != []
    source = private_names.SOURCE.parent
    others = {path: private_names_in(path.read_text()) for path in source.rglob("*.py") if path != private_names.SOURCE}
    assert {path.name: names for path, names in others.items() if names} == {}
