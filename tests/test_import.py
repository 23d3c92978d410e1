"""Importing ecanet does nothing to a process, and nothing of torch is watched before a gate is attached."""

import json
import subprocess
import sys
from typing import Any

import pytest

import ecanet
from tests import fresh


def in_a_fresh_process(code: str) -> Any:
    """Run code that ends by printing a line of JSON, where torch is there and ecanet is not."""
    done = fresh.run(code, warnings_are_errors=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("argv", [None, ["--help"], ["--version"]], ids=["import", "--help", "--version"])
def test_torch_is_not_imported_before_it_must(argv) -> None:
    run = "" if argv is None else f"from ecanet.cli import main\nmain({argv})\n"
    code = f"import json, sys, ecanet\n{run}print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    imported = json.loads(done.stdout.splitlines()[-1])
    assert {name.partition(".")[0] for name in imported}.isdisjoint({"torch", "torchvision", "numpy", "lightning"})


def test_every_public_name_can_be_used_after_import_ecanet_alone() -> None:
    code = """
import json, ecanet
packages = [ecanet, ecanet.inspect, ecanet.profile, ecanet.study]
unlisted = [name for each in packages for name in each.__all__ if name not in dir(each)]
print(json.dumps(unlisted + [name for each in packages for name in each.__all__ if getattr(each, name) is None]))
"""
    assert in_a_fresh_process(code) == []
    assert {"ECA", "backend", "models", "nn", "surgery", "train"} <= set(dir(ecanet))


def test_another_name_is_an_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="module 'ecanet' has no attribute 'ECA2'"):
        _ = ecanet.ECA2


WATCHED = """
import json, sys
import torch, torchvision, torch.fx.experimental.optimization
from torch.nn.modules import module
from torch.nn.utils import fusion
def state():
    found = [value for name, value in vars(module).items() if name.startswith("_global") and hasattr(value, "keys")]
    return [[len(each) for each in found], torch.fx.Tracer.trace.__module__, fusion.fuse_conv_bn_eval.__module__]
before = state()
import ecanet
ecanet.ECA(8)(torch.ones(1, 8, 2, 2))
network = ecanet.models.small_eca_resnet()
network(torch.ones(1, 3, 32, 32))
ecanet.optimize_for_inference(network.eval())
used = state()
ecanet.insert_gates_(torchvision.models.resnet18())
print(json.dumps([before, used, state()]))
"""


def test_nothing_of_torch_is_watched_before_a_gate_is_attached() -> None:
    before, used, attached = in_a_fresh_process(WATCHED)
    assert used == before
    assert attached != before
    assert sum(attached[0]) == 2


def test_tools_are_watched_too_where_a_network_with_gates_comes_from_a_file(tmp_path) -> None:
    code = f"""
import json, torch, torchvision, ecanet
model = torchvision.models.resnet18()
ecanet.insert_gates_(model)
torch.save(model, {str(tmp_path / "model.pt")!r})
print(json.dumps(0))
"""
    in_a_fresh_process(code)
    code = f"""
import json, torch
from torch.nn.modules.module import _global_module_registration_hooks as hooks
import ecanet.nn
before = len(hooks)
torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
print(json.dumps([before, len(hooks)]))
"""
    assert in_a_fresh_process(code) == [0, 2]
