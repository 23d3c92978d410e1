"""Every kind of network that can be profiled, and bad names, told before anything is built or timed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v3_small, resnet18

import ecanet
from ecanet.models import ECAMobileNetV2, ECAResNet, eca_resnet18, small_eca_resnet
from ecanet.networks.cost import parameters
from ecanet.profile import paper, profile_models, run
from ecanet.profile.subjects import attention_modules, subjects, without_gates
from ecanet.surgery.insertion_file import Insertion, save


def inserted(path: Path) -> tuple[Path, int, int]:
    insertion = Insertion("torchvision/resnet18", num_classes=10)
    model, _ = insertion.build()
    save(model, insertion, path / "inserted.pt")
    return path / "inserted.pt", parameters(model), 36


def authors_file(path: Path) -> tuple[Path, int, int]:
    model = eca_resnet18(kernel_size="released", num_classes=5)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path / "eca.pth.tar")
    return path / "eca.pth.tar", parameters(model), 44


def pretrained(path: Path) -> tuple[Path, int, int]:
    pytest.importorskip("safetensors")
    model = ECAMobileNetV2(num_classes=3, width_mult=0.25)
    model.save_pretrained(path / "hub")
    return path / "hub", parameters(model), sum(gate.conv.weight.numel() for _, gate in model.gated_norms())


@pytest.mark.parametrize("make", [inserted, authors_file, pretrained])
def test_a_saved_network_is_counted_as_it_was_saved(make: Callable[[Path], tuple], tmp_path: Path) -> None:
    path, number, in_gates = make(tmp_path)
    row = profile_models([path], image_size=32, time=False).rows[0]
    assert (row.name, row.counts.parameters, row.counts.gate_parameters) == (str(path), number, in_gates)


def test_a_runs_folder_has_the_pictures_it_was_trained_on(tiny, tmp_path: Path) -> None:
    from ecanet.train import fit

    fit(tiny(epochs=1), tmp_path / "run")
    row = profile_models([tmp_path / "run"], time=False).rows[0]
    assert row.image_size == 12
    assert row.counts.gate_parameters == 6
    checkpoint = profile_models([tmp_path / "run" / "best.ckpt"], time=False).rows[0]
    assert checkpoint.counts == row.counts


def test_names_of_ours_of_torchvision_and_of_timm_with_and_without_a_gate_bring_the_papers_row() -> None:
    pytest.importorskip("timm")
    models = ["eca_resnet18", "torchvision/resnet18", "timm/resnet18"]
    profile = profile_models(models, ["none", "se"], image_size=32, time=False)
    assert [row.counts.parameters for row in profile.rows] == [11_689_512, 11_689_512 + 87_040] * 3
    row = profile_models(["small_eca_resnet"], ["timm:cbam"], time=False).rows[0]
    assert (row.name, row.counts.gate_parameters, row.paper) == ("small_eca_resnet + timm:cbam", 2_988, None)
    found = [subject.paper and subject.paper.name for subject in subjects(["eca_resnet50", "eca_mobilenet_v2"])]
    assert found == ["ResNet-50 + ECA", "MobileNetV2 + ECA"]
    assert paper.paper_row("torchvision/resnet101", "cbam").name == "ResNet-101 + CBAM"
    assert paper.paper_row("eca_resnet50", "gct") is paper.paper_row("eca_resnet50", "a2") is None


@pytest.mark.parametrize(
    "build",
    [
        lambda: ECAResNet(18, "se", num_classes=5, neutral=True),
        lambda: ECAMobileNetV2("eca", width_mult=0.25, kernel_size="released"),
        lambda: small_eca_resnet("cbam", widths=[8, 16]),
        lambda: _with_gates(resnet18(num_classes=5)),
        lambda: mobilenet_v3_small(),
    ],
    ids=["ours", "MobileNetV2", "small", "inserted", "another library's"],
)
def test_without_its_gates_a_network_runs_and_has_the_other_parameters(build: Callable[[], nn.Module]) -> None:
    network = build().eval()
    plain = without_gates(network).eval()
    assert attention_modules(plain) == []
    in_gates = parameters(nn.ModuleList(attention_modules(network)))
    assert parameters(plain) == parameters(network) - in_gates < parameters(network)
    assert plain(torch.zeros(1, 3, 32, 32)).shape == network(torch.zeros(1, 3, 32, 32)).shape


def _with_gates(network: nn.Module) -> nn.Module:
    ecanet.insert_gates_(network)
    return network


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"models": []}, "models must name at least one network, got none"),
        (
            {"models": ["eca_resnet51"]},
            r"torchvision/NAME.* got 'eca_resnet51', which is neither such a name nor an existing",
        ),
        ({"models": ["torchvision/resnet51"]}, "torchvision has no 'resnet51'; close to it: torchvision/resnet50"),
        ({"models": ["eca_resnet18"], "gates": ["sse"]}, "gate must be one of .*'none', got 'sse': did you mean 'se'"),
        ({"models": ["eca_resnet18", "eca_resnet18"]}, "models and gates must differ, got eca_resnet18 twice"),
        (
            {"models": ["torchvision/vit_b_16"], "gates": ["eca"]},
            r"torchvision/vit_b_16 \+ eca: where='block' finds no",
        ),
        ({"models": ["eca_resnet18"], "batch_size": 0}, "batch_size must be a whole number of 1 or more, got 0"),
        ({"models": ["eca_resnet18"], "rounds": 2.5}, "rounds must be a whole number of 1 or more, got 2.5"),
        ({"models": ["eca_resnet18"], "threads": 99_999}, f"threads must be at most {os.cpu_count()}, the cores of"),
        ({"models": ["eca_resnet18"], "threads": True}, "threads must be a whole number of 1 or more, got True"),
        ({"models": ["eca_resnet18"], "image_size": -1}, "image_size must be a whole number of 1 or more, got -1"),
        ({"models": ["eca_resnet18"], "device": "gpu"}, "device must be cpu or cuda, such as cuda:0, got 'gpu'"),
        ({"models": ["eca_resnet18"], "device": "meta"}, "device must be cpu or cuda, such as cuda:0, got 'meta'"),
        (
            {"models": ["eca_resnet18"], "device": "cuda:99"},
            r"device must be one of the \d GPUs that torch sees, got 'cuda:99'",
        ),
    ],
    ids=lambda value: ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_bad_argument_is_named_before_any_work(arguments: dict, said: str, monkeypatch) -> None:
    monkeypatch.setattr(run, "count", lambda *_: pytest.fail("counted"))
    with pytest.raises(ValueError, match=said):
        profile_models(**arguments)


def test_a_gate_cannot_go_into_a_saved_network_and_what_is_no_network_is_refused(tmp_path: Path) -> None:
    path, *_ = inserted(tmp_path)
    with pytest.raises(ValueError, match=r"gate='eca' cannot go into .*: a saved network has the gates"):
        profile_models([path], ["eca"], time=False)
    torch.save(nn.Linear(2, 2), tmp_path / "pickled.pt")
    with pytest.raises(ValueError, match=r"pickled.pt was refused: it holds torch.nn.modules.linear.Linear"):
        profile_models([tmp_path / "pickled.pt"], time=False)
    shutil.copy(__file__, tmp_path / "text.pt")
    with pytest.raises(ValueError, match=r"text.pt is not a checkpoint"):
        profile_models([tmp_path / "text.pt"], time=False)
