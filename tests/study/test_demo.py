"""The demonstration runs from end to end on one seed and one epoch, and its pictures are pictures."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from ecanet.study.demo import demo, demo_recipes
from ecanet.study.report import measure_costs
from ecanet.train import build_network


def test_entries_share_everything_but_the_gate() -> None:
    recipes = demo_recipes()
    assert list(recipes) == ["none", "SE", "ECA", "ECA, neutral start"]
    networks = {}
    for name, recipe in recipes.items():
        torch.manual_seed(3)
        networks[name] = build_network(recipe.model, 10).eval()
    plain = networks["none"].state_dict()
    for name in ("SE", "ECA"):
        state = networks[name].state_dict()
        assert all(torch.equal(state[key], value) for key, value in plain.items())
    x = torch.randn(4, 3, 28, 28)
    assert torch.allclose(networks["ECA, neutral start"](x), networks["none"](x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(networks["ECA"](x), networks["none"](x), rtol=1e-2)


def test_costs_are_those_of_the_gates() -> None:
    networks = {name: build_network(recipe.model, 10) for name, recipe in demo_recipes().items()}
    costs = measure_costs(networks, rounds=1, batch_size=2)
    assert costs["none"].parameters == costs["none"].multiply_adds == 0
    assert costs["ECA"].parameters == 9
    maps = 16 * 14 * 14 + 32 * 7 * 7 + 64 * 4 * 4
    assert costs["ECA"].multiply_adds == maps + 3 * (16 + 32 + 64)
    assert costs["SE"].parameters == 2 * (16 * 1 + 32 * 2 + 64 * 4)
    assert all(cost.seconds > 0 for cost in costs.values())


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparison = demo(tmp_path, seeds=1, epochs=1)
    said = capsys.readouterr().out
    for entry in demo_recipes():
        assert 30 < comparison.mean(entry) < 100, "ten classes: chance is 10 %"
        assert entry in said
    assert "One seed gives no spread" in said
    assert json.loads((tmp_path / "summary.json").read_text())["ECA"]["cost"]["parameters"] == 9
    for name in ("training_curves", "matrices", "kernel_sizes", "gates_per_class"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 600
            assert len(image.convert("RGB").getcolors(2**24)) > 10
