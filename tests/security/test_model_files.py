"""A model file of Ultralytics is data: what it names is a layer, or it is refused before anything is called."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tests.integrations.conftest  # noqa: F401  where Ultralytics writes its settings
from ecanet.integrations.ultralytics import example
from ecanet.profile import profile_models

tasks = pytest.importorskip("ultralytics.nn.tasks", reason="pip install ultralytics-opencv-headless")


def small() -> dict[str, Any]:
    """A classifier of three rows."""
    return {
        "nc": 3,
        "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "nn.ReLU", []]],
        "head": [[-1, 1, "Classify", ["nc"]]],
    }


def counted(described: object, folder: Path) -> Any:
    path = folder / "model.yaml"
    path.write_text(yaml.safe_dump(described))
    return profile_models([path], image_size=32, time=False).rows[0].counts


def test_an_honest_file_is_counted_and_so_is_one_with_gates(tmp_path: Path) -> None:
    assert counted(small(), tmp_path).parameters > 0
    assert counted({**small(), "activation": "nn.LeakyReLU(0.1, inplace=True)"}, tmp_path).parameters > 0
    row = profile_models([example("yolo11-eca")], image_size=64, time=False).rows[0]
    assert row.counts.gate_parameters == 13


MARK = "ran.txt"
CALLS = f"__import__('pathlib').Path('{MARK}').touch()"
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "an activation that is code": ({"activation": CALLS}, "activation must be a layer"),
    "code inside an activation": ({"activation": f"nn.SiLU({CALLS})"}, "activation must be a layer"),
    "an activation from elsewhere": ({"activation": "os.abort()"}, "activation must be a layer"),
    "a function that unpickles": (
        {"backbone": [[-1, 1, "torch_safe_load", ["evil.pt"]]]},
        "must name a layer, got t",
    ),
    "a function that loads": ({"backbone": [[-1, 1, "load_checkpoint", ["evil.pt"]]]}, "must name a layer, got load_"),
    "a whole network": ({"backbone": [[-1, 1, "DetectionModel", ["other.yaml"]]]}, "must name a layer, got Detection"),
    "a layer that downloads": ({"backbone": [[-1, 1, "TorchVision", [8, "resnet18", "DEFAULT"]]]}, "must name a layer"),
    "a function of torch.nn": ({"backbone": [[-1, 1, "nn.factory_kwargs", [{}]]]}, "must name a layer, got nn.factory"),
    "a path through a module": ({"backbone": [[-1, 1, "nn.modules.os.system", ["true"]]]}, "must name a layer"),
    "a name that is no text": ({"backbone": [[-1, 1, ["Conv"], []]]}, "must name a layer, got a list"),
    "a million repeats": (
        {"backbone": [[-1, 10**6, "Conv", [8, 3, 2]]]},
        "repeats of row 0 .* at most",
    ),
    "a million channels": (
        {"backbone": [[-1, 1, "Conv", [10**6, 3, 2]]]},
        "a number in row 0 .* at most",
    ),
    "a large width": ({"width_multiple": 1e6}, "width_multiple must be at most 16"),
    "a large scale": ({"scales": {"n": [1e6, 1.0, 1024]}}, "a scale's depth must be at most 16"),
    "a million rows": ({"head": [[-1, 1, "Conv", [8]]] * 1001}, "head must be a list of 1 to 1000 rows"),
    "a row that is no row": ({"head": [[-1, 1]]}, "row 0 of head must be"),
    "no head": ({"head": None}, "head must be a list"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_model_file_is_refused_and_nothing_it_names_is_called(case: str, tmp_path: Path, monkeypatch) -> None:
    change, said = HOSTILE[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(ValueError, match=f"model.yaml is not a model file of Ultralytics: .*{said}"):
        counted({**small(), **change}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.yaml"]


@pytest.mark.parametrize("text", ["", "- 1\n", "a", "{", "nc: !!python/object/apply:os.abort []"])
def test_what_is_no_mapping_is_no_model_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"model.yaml is not a model file of Ultralytics"):
        profile_models([tmp_path / "model.yaml"], time=False)


def test_an_address_is_not_fetched_and_a_missing_or_large_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be files on this machine, got the address"):
        profile_models(["https://example.org/yolo11n.yaml"], time=False)
    with pytest.raises(FileNotFoundError, match=r"none of Ultralytics' has that name: nowhere.yaml"):
        profile_models(["nowhere.yaml"], time=False)
    (tmp_path / "large.yaml").write_text("#" * 2**18)
    with pytest.raises(ValueError, match="more than the 131,072 allowed"):
        profile_models([tmp_path / "large.yaml"], time=False)
