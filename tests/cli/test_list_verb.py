"""``ecanet list``: what can be named, and weights to start from."""

import importlib.util
import sys

import pytest

from ecanet.cli import main
from ecanet.models import MODELS
from ecanet.surgery.networks import check_network_name, known_networks

pytest.importorskip("timm")


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    main(["list", *words])
    return capsys.readouterr().out.splitlines()


def test_every_network_that_can_be_named_has_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    names = [line.split("  ")[0] for line in listed(capsys)]
    assert names[: len(MODELS)] == list(MODELS)
    assert names[len(MODELS) :] == known_networks()
    assert len(set(names)) == len(names) > 1000
    for name in ("torchvision/resnet50", "timm/mobilenetv3_small_050"):
        assert name in names
        check_network_name(name)
    assert "timm/eca_resnet18" not in names, "ecanet's own are there once"


def test_words_choose_names_that_have_all_of_them_and_weights_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(capsys, "torchvision", "ResNet50")[:2] == [
        "torchvision/deeplabv3_resnet50  (only for insert)  weights: COCO_WITH_VOC_LABELS_V1",
        "torchvision/fasterrcnn_resnet50_fpn  (only for insert)  weights: COCO_V1",
    ]
    assert listed(capsys, "torchvision/resnet50") == ["torchvision/resnet50  weights: IMAGENET1K_V2, IMAGENET1K_V1"]
    assert listed(capsys, "eca_resnet50") == ["eca_resnet50  weights: IMAGENET1K_V2, IMAGENET1K_V1"]
    assert listed(capsys, "small_eca") == ["small_eca_resnet"]
    assert listed(capsys, "timm/mobilenetv3_small_050") == ["timm/mobilenetv3_small_050  weights: lamb_in1k"]


def test_no_such_name_and_no_timm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"none of the [\d,]+ names contains 'resnet' and 'zebra'"):
        main(["list", "resnet", "zebra"])
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "timm" else find(name, *a))
    monkeypatch.setitem(sys.modules, "timm", None)
    main(["list", "mobilenet_v3"])
    said = capsys.readouterr()
    assert "torchvision/mobilenet_v3_small" in said.out
    assert "timm" not in said.out
    assert "pip install 'ecanet[timm]'" in said.err
