"""save_pretrained and from_pretrained: what comes back, and what is refused."""

import functools
import json
import sys
from pathlib import Path

import huggingface_hub.hub_mixin
import pytest
import safetensors.torch
import torch
from plain_networks import randomise_
from torch import nn

from ecanet.models import ECAMobileNetV2, ECAResNet, SmallECAResNet
from ecanet.nn import ECA, GATES, SE, build_gate, se_gc3

SMALL = {"widths": [16, 32], "num_classes": 3}


def gates(model: nn.Module) -> list[str]:
    return [repr(gate) for _, gate in model.gated_norms()]


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (ECAResNet, {"depth": 18}),
        (ECAResNet, {"depth": 18, "gate": None, "num_classes": 7, "zero_init_residual": True}),
        (ECAResNet, {"depth": 50, "kernel_size": "released", "replace_stride_with_dilation": [False, True, True]}),
        (ECAMobileNetV2, {"gate": "se", "width_mult": 0.5, "dropout": 0.5}),
        (ECAMobileNetV2, {"kernel_size": "released", "num_classes": 5, "width_mult": 0.5}),
        (SmallECAResNet, {"kernel_size": (3, 5, 7), "widths": (32, 64, 128), "blocks": 2, "stem_stride": 2}),
        (SmallECAResNet, {"gate": "eca_ns", "kernel_size": 5, "neutral": True}),
        (SmallECAResNet, {"gate": "se", "neutral": True, "fold": True}),
        (SmallECAResNet, {"factor": 1.5}),
        (SmallECAResNet, {"gate": ECA}),
        (SmallECAResNet, {"gate": se_gc3}),
    ],
    ids=lambda part: part.__name__ if isinstance(part, type) else ",".join(part),
)
def test_a_folder_gives_the_network_back(kind, arguments, tmp_path):
    model = randomise_(kind(**arguments))
    assert model.save_pretrained(tmp_path / "new" / "folder") is None
    back = kind.from_pretrained(tmp_path / "new" / "folder")
    assert type(back) is kind
    assert not back.training
    assert gates(back) == gates(model)
    assert json.dumps(back.config) == json.dumps(model.config)
    assert list(back.state_dict()) == list(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in back.state_dict().items())


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("gate", [name for name in GATES if next(build_gate(name, 64).parameters(), None) is not None])
def test_a_folder_remembers_that_gates_start_as_one_whatever_factor_they_need_for_it(gate, fold, tmp_path):
    model = SmallECAResNet(gate, neutral=True, fold=fold, **SMALL)
    model.save_pretrained(tmp_path)
    back = SmallECAResNet.from_pretrained(tmp_path)
    has_factor = any(gate.neutral_value != 1 for _, gate in model.gated_norms())
    assert (back.config["neutral"], back.config["fold"]) == (True, fold and has_factor)
    for (norm, gate), (_, own) in zip(back.gated_norms(), model.gated_norms(), strict=True):
        assert gate.starts_as_identity
        assert gate.factor == own.factor == (1 if fold else 1 / gate.neutral_value)
        assert (norm.weight * gate.constant() == 1).all()


def test_a_folder_is_readable(tmp_path):
    SmallECAResNet(SE, **SMALL).save_pretrained(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {
        "gate": "se",
        "kernel_size": "adaptive",
        "widths": [16, 32],
        "num_classes": 3,
        "blocks": 1,
        "stem_stride": 1,
        "neutral": False,
        "factor": 1.0,
        "fold": False,
    }
    assert "library_name: ecanet" in (tmp_path / "README.md").read_text()


def test_a_folder_can_be_written_again(tmp_path):
    for num_classes in (3, 5):
        SmallECAResNet(num_classes=num_classes).save_pretrained(tmp_path)
        assert SmallECAResNet.from_pretrained(tmp_path).fc.out_features == num_classes


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to(memory_format=torch.channels_last),
        lambda model: torch.compile(model, backend="eager"),
        nn.SyncBatchNorm.convert_sync_batchnorm,
    ],
    ids=["channels last", "compiled", "sync batchnorm"],
)
def test_what_can_be_saved_besides_a_fresh_network(change, tmp_path):
    model = SmallECAResNet(**SMALL)
    change(model).save_pretrained(tmp_path)
    back = SmallECAResNet.from_pretrained(tmp_path)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in back.state_dict().items())


def test_arguments_of_from_pretrained_go_before_the_folders(tmp_path):
    SmallECAResNet(**SMALL).save_pretrained(tmp_path)
    back = SmallECAResNet.from_pretrained(tmp_path, gate=functools.partial(ECA, circular=True))
    assert next(back.gated_norms())[1].circular


# What cannot be saved


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: SmallECAResNet(lambda channels: ECA(channels, 3)), "cannot write gate=<function"),
        (lambda: SmallECAResNet(functools.partial(SE, reduction=4)), "cannot write gate=functools.partial"),
        (lambda: ECAResNet(18, norm_layer=nn.InstanceNorm2d), "cannot write norm_layer=<class"),
    ],
)
def test_what_json_cannot_hold_is_refused(model, message, tmp_path):
    with pytest.raises(ValueError, match=message + ".* torch.save"):
        model().save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def another_classifier(model):
    model.fc = nn.Linear(32, 4)


def another_gate(model):
    model.layer2[0].eca = SE(32)


def another_kernel(model):
    model.layer1[0].eca = ECA(16, 9)


def other_arguments(model):
    model.layer1[0].eca = ECA(16, circular=True)


def one_gate_less(model):
    model.layer1[0].eca = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_classifier, r"builds one that differs in fc.weight, fc.bias\. Build it"),
        (another_gate, "differs in layer2.0.eca.fc1.weight, layer2.0.eca.fc2.weight, layer2.0.eca.conv.weight"),
        (another_kernel, r"differs in layer1.0.eca.conv.weight\."),
        (other_arguments, "differs in the arguments of its gates"),
        (one_gate_less, "differs in layer1.0.eca.conv.weight"),
    ],
)
def test_a_network_changed_after_it_was_built_is_refused(change, message, tmp_path):
    model = SmallECAResNet(**SMALL)
    change(model)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)


# What cannot be loaded


def test_the_folder_of_another_network_is_refused(tmp_path):
    ECAMobileNetV2(width_mult=0.5).save_pretrained(tmp_path)
    for network in (SmallECAResNet, ECAResNet):
        with pytest.raises(ValueError, match=r"config\.json has .*width_mult.*and the network takes"):
            network.from_pretrained(tmp_path)


def test_damaged_weights_are_refused_unless_asked_for(tmp_path):
    SmallECAResNet(**SMALL).save_pretrained(tmp_path)
    state = SmallECAResNet(**SMALL).state_dict()
    del state["bn1.bias"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit.*1 missing: bn1\.bias"):
        SmallECAResNet.from_pretrained(tmp_path)
    SmallECAResNet.from_pretrained(tmp_path, strict=False)


# The Hub, and extras that are not installed


def test_push_to_hub_writes_the_same_folder(tmp_path, monkeypatch):
    pushed = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path, repo_id, **_):
            pushed.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()}, repo_id=repo_id)
            return "https://huggingface.co/commit"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    model = SmallECAResNet("se", **SMALL)
    assert model.push_to_hub("me/small") == "https://huggingface.co/commit"
    assert pushed["repo_id"] == "me/small"
    assert json.loads(pushed["config.json"]) == model.config
    assert model.save_pretrained(tmp_path / "folder", push_to_hub=True) == "https://huggingface.co/commit"
    assert pushed["repo_id"] == "folder"
    assert pushed["model.safetensors"] == (tmp_path / "folder" / "model.safetensors").read_bytes()


def test_without_safetensors_pip_is_named(tmp_path, monkeypatch):
    model = SmallECAResNet(**SMALL)
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    remedy = r"pretrained needs huggingface_hub and safetensors: pip install 'ecanet\[hub\]'"
    with pytest.raises(ImportError, match=f"save_{remedy}"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ImportError, match=f"from_{remedy}"):
        SmallECAResNet.from_pretrained(tmp_path)
