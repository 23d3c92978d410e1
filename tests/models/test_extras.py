"""ecanet without the packages it can do without."""

import importlib
import subprocess
import sys

import pytest

import ecanet.models

WITHOUT = """
import sys

for name in ("timm", "huggingface_hub", "safetensors"):
    sys.modules[name] = None

import torch
import ecanet

model = ecanet.models.eca_resnet18(num_classes=10)
assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
assert ecanet.models.ECAMobileNetV2().config["gate"] == "eca"
open("weights.safetensors", "wb").close()
for call in (
    lambda: model.save_pretrained("folder"),
    lambda: ecanet.models.ECAResNet.from_pretrained("folder"),
    lambda: model.push_to_hub("me/model"),
    lambda: ecanet.models.read_state_dict("weights.safetensors"),
):
    try:
        call()
    except ImportError as error:
        assert "pip install 'ecanet[hub]'" in str(error), error
    else:
        raise AssertionError("nothing was raised")
"""


def test_without_timm_huggingface_hub_and_safetensors(tmp_path):
    subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT], check=True, cwd=tmp_path)


def test_a_timm_that_cannot_be_imported_costs_a_warning_only(monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.setitem(sys.modules, "ecanet.models.timm_models", None)
    with pytest.warns(UserWarning, match="not registered with timm.*pip install --upgrade timm"):
        importlib.reload(ecanet.models)
    assert ecanet.models.build_model("small_eca_resnet").config["gate"] == "eca"
