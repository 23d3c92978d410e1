"""The demonstration runs from end to end on one seed and one epoch, and its pictures are pictures."""

import errno
import io
import json
import multiprocessing
import os
import struct
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from PIL import Image

import ecanet.study.demo
import ecanet.study.evidence
from ecanet.study.comparison import Comparison
from ecanet.study.costs import measure_costs
from ecanet.study.demo import demo, demo_recipes, draw
from ecanet.train import DataConfig, Recipe, build_network
from ecanet.train.data import embedded


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


def as_idx(values: torch.Tensor) -> bytes:
    """A file of bytes in MNIST's format."""
    return bytes([0, 0, 8, values.dim()]) + struct.pack(f">{values.dim()}I", *values.shape) + values.numpy().tobytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path, str]:
    """The comparison of a demonstration with half the width and a quarter of the pictures, its folder, its output."""
    pictures = tmp_path_factory.mktemp("pictures")
    there = embedded()
    for name, of, count in (("train", there.train, 2000), ("t10k", there.val, 500)):
        (pictures / f"{name}-images-idx3-ubyte").write_bytes(as_idx(of.images[:count, 0]))
        (pictures / f"{name}-labels-idx1-ubyte").write_bytes(as_idx(of.labels[:count].byte()))

    def small(epochs: int) -> dict[str, Recipe]:
        options = {"widths": [8, 16, 32], "stem_stride": 2}
        data = DataConfig("fashion_mnist", root=pictures, batch_size=32, augment="none")
        recipes = demo_recipes(epochs).items()
        return {name: replace(r, data=data, model=replace(r.model, options=options)) for name, r in recipes}

    folder, said = tmp_path_factory.mktemp("demo"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        context = multiprocessing.get_context("forkserver")  # workers need not import torch
        patch.setattr(multiprocessing, "get_context", lambda method=None: context)
        patch.setattr(ecanet.study.demo, "demo_recipes", small)
        patch.setattr(ecanet.study.evidence, "_ROUNDS", 1)
        patch.setattr(ecanet.study.evidence, "_PIXELS", 2 * 28 * 28)
        comparison = demo(folder, seeds=1, epochs=1)
    return comparison, folder, said.getvalue()


def test_a_picture_that_cannot_be_written_leaves_the_old_one(
    made: tuple[Comparison, Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison, folder, _ = made

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = {path.name: path.read_bytes() for path in (folder / "figures").glob("*.png")}
    assert before
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        draw(comparison, folder)
    assert {path.name: path.read_bytes() for path in (folder / "figures").glob("*.png")} == before
    assert not list(folder.rglob(".*.partial"))


def test_demo(made: tuple[Comparison, Path, str]) -> None:
    comparison, folder, said = made
    for condition in demo_recipes():
        assert 30 < comparison.mean(condition) < 100, "ten classes: chance is 10 %"
        assert condition in said
    assert "One seed gives no spread" in said
    assert json.loads((folder / "costs.json").read_text())["ECA"]["parameters"] == 9
    rows = json.loads((folder / "summary.json").read_text())["conditions"]
    assert {condition: row["mean"] for condition, row in rows.items()} == {
        name: comparison.mean(name) for name in demo_recipes()
    }
    assert said.splitlines()[-1] == f"wrote {folder / 'report.html'}"
    report = (folder / "report.html").read_text()
    for section in ("cost", "differences", "gates", "profile", "runs", "settings"):
        assert f'<h2 id="{section}">' in report
    for name in ("differences", "cost", "gates-eca", "gates-eca-neutral-start", "gates-se", "matrices", "kernel_sizes"):
        with Image.open(folder / "figures" / f"{name}.png") as image:
            assert image.width > 600
            assert len(image.convert("RGB").getcolors(2**24)) > 10
