"""The studies in examples/: a user's own training function, of another library and of another kind of network."""

import csv
import importlib.util
import json
import re

import pytest
import torch

from examples import signal_study, yolo_study
from tests.integrations.deepforest_tiles import needs_deepforest, write_yolo

pytest.importorskip("statsmodels")


@needs_deepforest
@pytest.mark.skipif(importlib.util.find_spec("ultralytics") is None, reason="pip install ultralytics-opencv-headless")
def test_a_detector_is_studied_with_ultralytics_own_training(tmp_path):
    data = write_yolo(tmp_path / "trees", size=128, held_out="OSBS_029", limit=4)
    quick = {"epochs": 1, "imgsz": 64, "batch": 4, "workers": 0, "device": "cpu", "amp": False, "plots": False}
    made = yolo_study.study(data, "yolo11n.yaml", ["none", "eca"], 2, tmp_path / "out", quick, workers=1)
    assert not made.failed
    assert [len(runs) for runs in made.runs.values()] == [2, 2]
    assert (made.metric, list(made.runs)) == ("mAP50-95", ["none", "eca"])
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").read_text().splitlines()))
    assert {(row["condition"], row["seed"]) for row in rows} == {(c, s) for c in ("none", "eca") for s in "01"}
    gates = {}
    for condition, runs in made.runs.items():
        for run in runs:
            saved = torch.load(run.folder / "run" / "weights" / "last.pt", weights_only=False)
            network = saved["model"] or saved["ema"]
            gates[condition, run.seed] = sum(type(m).__name__ == "ECA" for m in network.modules())
    assert gates["none", 0] == gates["none", 1] == 0
    assert gates["eca", 0] == gates["eca", 1] == 77


@pytest.mark.parametrize(
    ("data", "gates", "kind", "message"),
    [
        ("trees.yaml", ["none", "ecaa"], ValueError, "got 'ecaa': did you mean 'eca'?"),
        ("nowhere.yaml", ["none", "eca"], FileNotFoundError, "nowhere.yaml"),
    ],
)
def test_a_study_of_detectors_names_a_mistake_before_it_starts(tmp_path, data, gates, kind, message):
    (tmp_path / "trees.yaml").touch()
    with pytest.raises(kind, match=re.escape(message)):
        yolo_study.study(tmp_path / data, "yolo11n.yaml", gates, 2, tmp_path / "out", {}, workers=1)
    assert not (tmp_path / "out").exists()


def test_a_1d_network_is_studied_and_a_seed_gives_every_condition_the_same_backbone(tmp_path):
    pytest.importorskip("mnist1d")
    states = []
    for condition in signal_study.CONDITIONS.values():
        torch.manual_seed(3)
        states.append(signal_study.build(**condition).state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[key], value) for key, value in states[0].items())
    torch.manual_seed(0)
    plain, signal = signal_study.build(None).eval(), torch.randn(2, 1, 40)
    torch.manual_seed(0)
    assert torch.equal(signal_study.build("eca", neutral=True).eval()(signal), plain(signal))

    metrics = signal_study.train(signal_study.CONDITIONS["ECA"], 0, tmp_path, epochs=6, samples=1000)
    assert metrics == signal_study.train(signal_study.CONDITIONS["ECA"], 0, tmp_path, epochs=6, samples=1000)
    assert metrics["accuracy"] > 20  # ten classes
    json.dumps(metrics)
