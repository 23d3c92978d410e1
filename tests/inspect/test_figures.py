import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

import ecanet.inspect
from ecanet.inspect import (
    RELEASED_KERNELS,
    gate_responses,
    gate_values,
    gates,
    plot_confusion,
    plot_explanation,
    plot_gate_responses,
    plot_gates_per_class,
    plot_kernel_sizes,
    plot_matrices,
    plot_se_and_eca,
    plot_sliding_kernel,
    plot_training_curves,
    save_animation,
)
from ecanet.inspect.paired import paired_difference
from ecanet.inspect.sliding import taps
from ecanet.inspect.style import IDEAS, OTHERS, looks, spread
from ecanet.models import eca_resnet18, eca_resnet50, eca_resnet101, small_eca_resnet
from ecanet.nn import (
    ECA,
    ECANS,
    GATES,
    GRN,
    SE,
    Gate,
    LinearGate,
    SEGroup,
    SEVar1,
    SEVar2,
    SEVar3,
    adaptive_kernel_size,
)
from ecanet.ops import reference
from tests.inspect.readable import SMALLEST, assert_readable


def lines(axes: Axes) -> dict[str, list[float]]:
    """Heights of the lines that have a label."""
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines if not line.get_label().startswith("_")}


RUNS = {
    "none": [[60.0, 70.0, 74.0], [62.0, 69.0, 75.0]],
    "ECA": [[63.0, 72.0, 74.5], [64.0, 71.0, 75.0], [62.0, 73.0, 74.0]],
    "ECA, neutral start": [[68.0, 73.0, 75.0]],
}


def test_curves_show_every_run_and_the_mean() -> None:
    (axes,) = plot_training_curves(RUNS, ylabel="accuracy (%)", title="toy").axes
    assert lines(axes) == {name: np.mean(runs, axis=0).tolist() for name, runs in RUNS.items()}
    assert all(list(line.get_xdata()) == [1, 2, 3] for line in axes.lines)
    thin = [list(line.get_ydata()) for line in axes.lines if line.get_label().startswith("_")]
    assert thin == RUNS["none"] + RUNS["ECA"]  # a single run is its own mean
    assert axes.get_ylabel() == "accuracy (%)"
    assert axes.get_xlabel() == "epoch   (thick: mean of 1 to 3 runs, thin: each run)"
    assert axes.get_title(loc="left") == "toy"
    assert axes.get_xlim() == (1, 3)


def test_curves_have_labels_in_their_colour_at_their_end() -> None:
    (axes,) = plot_training_curves(RUNS).axes
    colours = {line.get_label(): line.get_color() for line in axes.lines}
    assert len({colours[name] for name in RUNS}) == 3
    for text, runs in zip(axes.texts, RUNS.values(), strict=True):
        assert text.get_color() == colours[text.get_text()]
        assert text.xy == (3, np.mean(runs, axis=0)[-1])


def test_runs_of_different_lengths_have_the_mean_of_the_common_epochs() -> None:
    (axes,) = plot_training_curves({"ECA": [[1.0, 2.0, 3.0, 4.0], [3.0, 4.0]]}).axes
    assert lines(axes) == {"ECA": [2.0, 3.0]}
    assert [len(line.get_xdata()) for line in axes.lines] == [4, 2, 2]


def test_nan_leaves_a_gap() -> None:
    (axes,) = plot_training_curves({"ECA": [[1.0, math.nan, 3.0], [3.0, 4.0, 5.0]], "gone": [[math.nan]]}).axes
    np.testing.assert_array_equal(lines(axes)["ECA"], [2.0, math.nan, 4.0])
    assert [text.get_text() for text in axes.texts] == ["ECA"]


def test_ylim_moves_the_labels_with_the_lines() -> None:
    figure = plot_training_curves(RUNS, ylim=(74.0, 76.0))
    assert figure.axes[0].get_ylim() == (74.0, 76.0)
    assert_readable(figure)


@pytest.mark.parametrize(("names", "epochs"), [(1, 1), (4, 1), (4, 30), (12, 2)])
def test_curves_that_end_together_have_labels_apart(names: int, epochs: int) -> None:
    together = {f"v{i}": [[70.0 + i / 100] * epochs] for i in range(names)}
    assert_readable(plot_training_curves({"low": [[0.0] * epochs], **together}))


@pytest.mark.parametrize(
    ("curves", "error", "match"),
    [
        ({}, ValueError, "at least one entry"),
        ({"ECA": []}, ValueError, r"curves\['ECA'\] must hold at least one run"),
        ({"ECA": [[1.0], []]}, ValueError, "every run at least one value"),
        ({"ECA": [1.0, 2.0]}, TypeError, r"for a single run write \[run\]"),
    ],
    ids=["none", "no run", "empty run", "flat"],
)
def test_wrong_curves(curves: dict[str, Sequence[Sequence[float]]], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        plot_training_curves(curves)


PAIRED = {
    "none": [[50.0, 80.0, 85.0, 88.0], [52.0, 82.0, 86.0, 88.5], [54.0, 81.0, 85.0, 89.0]],
    "SE": [[40.0, 79.0, 84.0, 87.0], [45.0, 80.0, 86.0, 88.0], [44.0, 81.0, 85.5, 87.5]],
    "ECA, neutral start": [[51.0, 80.0, 85.5, 88.5], [53.0, 82.5, 86.5, 88.0], [50.0, 83.0, 85.0, 90.0]],
}


def test_the_late_epochs_have_a_panel_of_paired_differences_with_their_intervals() -> None:
    figure = plot_training_curves(PAIRED)
    _, axes = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["3", "4"]
    points = [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "o"]
    intervals = [
        list(line.get_ydata()) for line in axes.lines if line.get_linestyle() != "None" and len(line.get_xdata()) == 2
    ]
    expected = [
        paired_difference([run[epoch] - other[epoch] for run, other in zip(PAIRED[name], PAIRED["none"], strict=True)])
        for name in ("SE", "ECA, neutral start")
        for epoch in (2, 3)
    ]
    assert points == [found.mean for found in expected]
    assert intervals == [[0, 0], *([found.low, found.high] for found in expected)]  # the first is the line at 0
    assert axes.get_ylim()[0] < min(found.low for found in expected)
    assert axes.get_ylim()[1] > max(found.high for found in expected)
    assert {text.get_text().splitlines()[0] for text in axes.texts} == {"SE", "ECA, neutral start"}
    se = next(text.get_text() for text in axes.texts if text.get_text().startswith("SE"))
    assert se == f"SE\n{expected[1].mean:+.2f} ({expected[1].low:+.2f} to {expected[1].high:+.2f})"
    assert_readable(figure)


@pytest.mark.parametrize(
    ("curves", "epochs", "intervals"),
    [
        ({"none": [[1.0]], "ECA": [[2.0]]}, ["1"], 0),
        ({"none": [[1.0] * 6, [2.0] * 6], "ECA": [[2.0] * 5, [2.0] * 6]}, ["3", "4", "5"], 3),
        ({"none": [[1.0] * 100] * 2, "ECA": [[2.0] * 100] * 2}, ["51", "67", "84", "100"], 4),
        ({"none": [[1.0, 1.0]] * 2, "ECA": [[2.0, math.nan]] * 2}, ["2"], 0),
    ],
    ids=["one seed", "other lengths", "many epochs", "NaN"],
)
def test_which_epochs_have_differences_and_which_of_them_intervals(
    curves: dict[str, list[list[float]]], epochs: list[str], intervals: int
) -> None:
    _, axes = plot_training_curves(curves).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == epochs
    assert sum(len(line.get_xdata()) == 2 and line.get_marker() == "None" for line in axes.lines) == 1 + intervals


def test_runs_that_cannot_be_paired_have_no_differences() -> None:
    assert len(plot_training_curves({"none": [[1.0], [2.0]], "ECA": [[1.0]]}).axes) == 1
    _, axes = plot_training_curves({"none": [[1.0]], "ECA": [[1.0]], "SE": [[1.0], [2.0]]}).axes
    assert [text.get_text() for text in axes.texts] == ["ECA\n+0.00"]


@pytest.mark.parametrize("positions", [[1.0, 1.0, 1.0], [3.0, 1.0, 1.2], [0.0, 9.0, 8.9, 8.8], [5.0]], ids=str)
def test_spread(positions: list[float]) -> None:
    moved = spread(positions, gap=1.0, low=0.0, high=10.0)
    assert np.argsort(moved, kind="stable").tolist() == np.argsort(positions, kind="stable").tolist()
    assert all(np.diff(sorted(moved)) >= 1 - 1e-9)
    assert min(moved) >= 0
    assert max(moved) <= 10


def linear_gates(channels: int) -> dict[str, LinearGate]:
    return {
        "ECA": ECA(channels, 3),
        "SE-Var2": SEVar2(channels),
        "SE-Var3": SEVar3(channels),
        "SE-GC": SEGroup(channels, groups=4),
        "ECA-NS": ECANS(channels, 3),
        "SE-Var1": SEVar1(channels),
    }


def matrices(figure: Figure) -> dict[str, list[np.ma.MaskedArray]]:
    """Images of each gate: the whole matrix, then its corner where there is one."""
    found: dict[str, list[np.ma.MaskedArray]] = {}
    for axes in figure.axes:
        if axes.images:
            found.setdefault(axes.get_label(), []).append(axes.images[0].get_array())
    return found


@pytest.mark.parametrize("channels", [8, 64, 128])
@pytest.mark.parametrize("shared_scale", [False, True])
def test_matrices_are_the_gates_with_zeros_masked(channels: int, shared_scale: bool) -> None:
    named = linear_gates(channels)
    shown = matrices(plot_matrices(named, shared_scale=shared_scale))
    assert list(shown) == list(named)
    for name, gate in named.items():
        matrix = gate.matrix().detach().numpy()
        whole, *corner = shown[name]
        np.testing.assert_array_equal(whole.filled(0), matrix)
        np.testing.assert_array_equal(whole.mask, matrix == 0)
        if channels >= 32:
            np.testing.assert_array_equal(corner[0].filled(0), matrix[:16, :16])
        else:
            assert corner == []


def test_zeros_are_white_and_small_weights_are_not() -> None:
    gate = ECA(8, 3)
    with torch.no_grad():
        gate.conv.weight.copy_(torch.tensor([[[-1.0, 1e-6, 1.0]]]))
    image = plot_matrices({"ECA": gate}).axes[0].images[0]
    pixels = image.cmap(image.norm(image.get_array()))
    white = (pixels[..., :3] == 1).all(-1)
    np.testing.assert_array_equal(white, gate.matrix().detach() == 0)
    assert pixels[1, 1, :3].max() < 0.9  # the small weights are on the diagonal
    assert image.get_clim() == (-1, 1)


def test_scales_of_the_panels() -> None:
    named = {"ECA": ECA(8), "SE-Var3": SEVar3(8)}
    largest = {name: gate.matrix().abs().max().item() for name, gate in named.items()}
    own, shared = plot_matrices(named), plot_matrices(named, shared_scale=True)
    assert [axes.images[0].get_clim()[1] for axes in own.axes if axes.images] == list(largest.values())
    assert [axes.images[0].get_clim()[1] for axes in shared.axes if axes.images] == [max(largest.values())] * 2
    assert len(own.axes) == 2 + 2
    assert len(shared.axes) == 2 + 1  # one colour bar


def test_a_thin_band_stays_visible_in_a_large_matrix() -> None:
    gate = ECA(2048, 3)
    with torch.no_grad():
        gate.conv.weight.copy_(torch.tensor([[[1.0, 2.0, 3.0]]]))
    whole, corner = matrices(plot_matrices({"ECA": gate}))["ECA"]
    i, j = np.indices(whole.shape)
    assert whole.shape == (128, 128)
    np.testing.assert_array_equal(~whole.mask, abs(i - j) <= 1)
    assert set(np.diag(whole)) == {2.0}
    assert set(np.diag(whole, 1)) == {3.0}
    np.testing.assert_array_equal(corner.filled(0), gate.matrix().detach()[:16, :16])


def test_a_large_matrix_whose_size_is_no_multiple_of_the_cells() -> None:
    figure = plot_matrices({"full": SEVar3(300)})
    assert not matrices(figure)["full"][0].mask.any()
    assert figure.axes[0].get_xlim() == (0.5, 300.5)


@pytest.mark.parametrize(
    ("gate", "title"),
    [
        (ECA(64, 5), "x\nk = 5 weights, shared"),
        (ECANS(64, 3), "x\n3 C = 192 weights"),
        (SEVar1(64), "x\nno weights"),
        (SEVar2(64), "x\nC = 64 weights"),
        (SEVar3(64), "x\nC² = 4,096 weights"),
        (SEGroup(64, groups=16), "x\nC²/16 = 256 weights"),
    ],
    ids=["ECA", "ECA-NS", "Var1", "Var2", "Var3", "GC"],
)
def test_titles_of_matrices(gate: LinearGate, title: str) -> None:
    assert plot_matrices({"x": gate}).axes[0].get_title() == title


def test_a_neutral_gate_says_that_it_is_all_zero() -> None:
    gate = ECA(8)
    gate.make_neutral_()
    figure = plot_matrices({"neutral": gate})
    assert matrices(figure)["neutral"][0].mask.all()
    assert [text.get_text() for text in figure.axes[0].texts] == ["all zero"]


@pytest.mark.parametrize("channels", [8, 512], ids=str)
def test_texts_of_matrices_do_not_overlap(channels: int) -> None:
    assert_readable(plot_matrices(linear_gates(channels)))
    assert_readable(plot_matrices({"one channel": ECA(1)}))


def test_matrices_of_different_sizes() -> None:
    figure = plot_matrices({"a": ECA(8), "b": SEVar2(64)})
    assert {name: [image.shape for image in images] for name, images in matrices(figure).items()} == {
        "a": [(8, 8)],
        "b": [(64, 64), (16, 16)],
    }
    assert_readable(figure)


def test_gates_without_a_matrix() -> None:
    with pytest.raises(TypeError, match=r"gates\['SE'\] must be a LinearGate: SE has no matrix W, as its ReLU is not"):
        plot_matrices({"ECA": ECA(8), "SE": SE(8)})
    with pytest.raises(ValueError, match="at least one entry"):
        plot_matrices({})


@pytest.mark.parametrize(
    ("name", "build"),
    [("ResNet-18", eca_resnet18), ("ResNet-50", eca_resnet50), ("ResNet-101, 152", eca_resnet101)],
)
def test_released_kernels_are_those_of_the_models(name: str, build: type[nn.Module]) -> None:
    with torch.device("meta"):
        model = build(kernel_size="released")
    assert {gate.channels: gate.kernel_size for gate in gates(model).values()} == RELEASED_KERNELS[name]


def test_kernel_sizes_show_the_formula_and_who_departs_from_it() -> None:
    (axes,) = plot_kernel_sizes().axes
    (formula,) = (line for line in axes.lines if line.get_label().startswith("adaptive k"))
    assert list(formula.get_xdata()) == list(range(8, 4097))
    assert list(formula.get_ydata()) == [adaptive_kernel_size(c) for c in range(8, 4097)]

    points = [line for line in axes.lines if line.get_label().startswith("_")]
    kernels = [(c, k) for network in RELEASED_KERNELS.values() for c, k in network.items()]
    for point, (c, k) in zip(points, kernels, strict=True):
        assert point.get_xdata()[0] == pytest.approx(c, rel=0.1)  # points that coincide are moved apart
        assert point.get_ydata()[0] == k
        assert (point.get_markerfacecolor() == "white") == (k == adaptive_kernel_size(c))
    assert axes.get_title(loc="left").startswith("13 of 23 kernel sizes differ from the formula")
    assert axes.get_xscale() == "log"


def test_the_contradiction_of_resnet50() -> None:
    assert RELEASED_KERNELS["ResNet-50"] == {256: 3, 512: 5, 1024: 5, 2048: 7}
    (axes,) = plot_kernel_sizes(points={"ResNet-50": RELEASED_KERNELS["ResNet-50"]}).axes
    points = {
        line.get_xdata()[0]: (line.get_ydata()[0], line.get_markerfacecolor() != "white")
        for line in axes.lines
        if line.get_label().startswith("_")
    }
    assert points == {256: (3, True), 512: (5, False), 1024: (5, False), 2048: (7, False)}


def test_points_that_coincide_stand_side_by_side() -> None:
    (axes,) = plot_kernel_sizes((16, 256), {"a": {64: 3}, "b": {64: 3}, "c": {64: 5}}).axes
    positions = [line.get_xdata()[0] for line in axes.lines if line.get_label().startswith("_")]
    assert positions[0] < 64 < positions[1]
    assert positions[2] == 64


def test_kernel_sizes_with_another_slope_and_without_points() -> None:
    (axes,) = plot_kernel_sizes((2, 64), {}, gamma=1, b=0).axes
    assert next(iter(lines(axes).values())) == [adaptive_kernel_size(c, 1, 0) for c in range(2, 65)]
    assert axes.get_title(loc="left") == ""


def test_texts_of_kernel_sizes_do_not_overlap() -> None:
    assert_readable(plot_kernel_sizes())


@pytest.mark.parametrize("channels", [(0, 8), (8, 8), (16, 8)], ids=str)
def test_wrong_range_of_channels(channels: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="channels must be a first and a larger last"):
        plot_kernel_sizes(channels)


class TwoGates(nn.Module):
    """Its gates see known maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ECA(3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.second = SE(3, reduction=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(self.norm(self.first(x)))).mean((2, 3))


def test_gate_values_are_the_means_per_class(device: torch.device) -> None:
    model = TwoGates().to(device)
    images, labels = torch.randn(11, 3, 4, 5), torch.tensor([0, 3, 1, 1, 0, 3, 3, 0, 1, 0, 3])
    values = gate_values(model, zip(images.split(4), labels.split(4), strict=True), num_classes=4)

    model.eval()
    with torch.no_grad():
        first = model.first.gate(images.to(device).mean((2, 3)))
        second = model.second.gate(reference.squeeze(model.norm(model.first(images.to(device))), 3))
    assert list(values) == ["first", "second"]
    for name, gate in (("first", first), ("second", second)):
        assert values[name].shape == (4, 3)
        assert values[name].dtype == torch.float64
        for c in (0, 1, 3):
            torch.testing.assert_close(values[name][c], gate[labels == c].mean(0).cpu().double(), atol=1e-6, rtol=0)
        assert values[name][2].isnan().all()


@torch.no_grad()
def trained(name: str) -> nn.Module:
    """A small network with a gate whose values differ."""
    model = small_eca_resnet(name, widths=(32, 64), num_classes=2).eval()
    for gate in gates(model).values():
        for parameter in gate.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("name", GATES)
def test_the_values_of_every_gate_are_what_its_maps_are_multiplied_by(name: str) -> None:
    model, images = trained(name), torch.randn(3, 3, 12, 12)
    maps: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        gate.register_forward_hook(lambda _, args, out, key=key: maps.update({key: (args[0], out)}))
        for key, gate in gates(model).items()
    ]
    values = gate_values(model, [(images, torch.tensor([0, 1, 2]))], 3)
    responses = gate_responses(model, images)
    for handle in handles:
        handle.remove()
    assert list(values) == list(responses) == ["layer1.0.eca", "layer2.0.eca"]
    for key, (x, out) in maps.items():
        seen = responses[key]
        scale, shift = (0 if t is None else t.float()[:, :, None, None] for t in (seen.scales, seen.shifts))
        if gates(model)[key].sees_map:  # its positions have their own; those of 0 show none
            torch.testing.assert_close(seen.scales.float(), (out / x).flatten(2).nanmean(2), rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(x * scale + shift, out, rtol=1e-5, atol=1e-5)
        assert torch.equal(values[key], seen.scales)
        torch.testing.assert_close(seen.means.float(), x.mean((2, 3)))
        if seen.deviations is not None:
            torch.testing.assert_close(seen.deviations.float(), x.std((2, 3), correction=0))


def test_responses_are_drawn_against_all_that_a_gate_sees() -> None:
    grn, eca = trained("grn"), trained("eca")
    images = torch.randn(3, 3, 12, 12)
    seen = {**gate_responses(grn, images), "eca": gate_responses(eca, images)["layer1.0.eca"]}
    figure = plot_gate_responses(seen)
    panels = [axes for axes in figure.axes if axes.lines]
    assert [len(axes.lines) for axes in panels] == [2, 2, 2, 2, 1]  # scale and shift; ECA has no shift, and sees means
    assert panels[0].get_title(loc="left") == "layer1.0.eca: C = 32, 3 maps"
    for axes, statistic in zip(panels[:2], (seen["layer1.0.eca"].means, seen["layer1.0.eca"].deviations), strict=True):
        scale, shift = axes.lines
        assert list(scale.get_xdata()) == list(shift.get_xdata()) == statistic.flatten().tolist()
        assert list(scale.get_ydata()) == seen["layer1.0.eca"].scales.flatten().tolist()
        assert list(shift.get_ydata()) == seen["layer1.0.eca"].shifts.flatten().tolist()
    assert_readable(figure)
    assert_readable(plot_gate_responses(gate_responses(eca, images)))


def test_responses_need_gates_and_known_names() -> None:
    with pytest.raises(ValueError, match=r"model must have at least one ecanet\.nn\.Gate, ReLU"):
        gate_responses(nn.ReLU(), torch.randn(1, 3))
    with pytest.raises(ValueError, match="values must have at least one gate"):
        plot_gate_responses({})
    seen = gate_responses(trained("grn"), torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"names must be among layer1.0.eca, layer2.0.eca, got eca"):
        plot_gate_responses(seen, names=["eca"])


def test_asking_for_responses_leaves_the_model_as_it_was() -> None:
    model = trained("srm").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gate_responses(model, torch.randn(2, 3, 8, 8))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_gate_that_runs_twice_has_the_samples_of_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate: Gate = GRN(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.gate(self.gate(x) + 1)

    seen = gate_responses(Twice(), x := torch.randn(3, 4, 5))["gate"]
    torch.testing.assert_close(seen.means, torch.cat([x.mean(2), x.mean(2) + 1]).double())
    assert seen.scales.shape == seen.shifts.shape == seen.deviations.shape == (6, 4)


def test_gates_below_zero_are_all_seen() -> None:
    panel, bar = plot_gates_per_class({"grn": torch.tensor([[-1.5, 2.5]])}, ["cat"]).axes
    (image,) = panel.images
    assert image.get_clim() == (-2, 3)
    assert list(bar.get_xticks()) == [-2, 0, 3]


def test_gate_values_leave_the_model_as_it_was() -> None:
    model = TwoGates()
    model.second.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gate_values(model, [(torch.randn(2, 3, 4, 4), torch.tensor([0, 1]))], 2, device="cpu")
    assert [m.training for m in (model, model.first, model.norm, model.second)] == [True, True, True, False]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(not m._forward_hooks for m in model.modules())


def test_gate_values_of_a_shared_gate_average_all_its_calls() -> None:
    gate = SEVar1(2)
    model = nn.Sequential(gate, gate)
    x = torch.randn(1, 2, 3)
    values = gate_values(model, [(x, torch.tensor([0]))], 1)["0"]
    expected = (gate.gate(x.mean(2)) + gate.gate(gate(x).mean(2))) / 2
    torch.testing.assert_close(values, expected.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("labels", "error", "match"),
    [
        (torch.tensor([0, 2]), ValueError, "labels must be 0 to num_classes - 1 = 1, got 0 to 2"),
        (torch.tensor([-1, 0]), ValueError, "got -1 to 0"),
        (torch.tensor([0.0, 1.0]), TypeError, "labels must be integers"),
        (torch.tensor([[0], [1]]), ValueError, r"labels must have shape \(N,\)"),
        (torch.tensor([0]), ValueError, "one entry for each of the 2 maps of first, got 1"),
    ],
    ids=["too large", "negative", "float", "shape", "number"],
)
def test_wrong_labels(labels: Tensor, error: type[Exception], match: str) -> None:
    model = TwoGates()
    with pytest.raises(error, match=match):
        gate_values(model, [(torch.randn(2, 3, 4, 4), labels)], 2)
    assert model.training
    assert all(not m._forward_hooks for m in model.modules())


def test_gate_values_without_gates_batches_or_classes() -> None:
    with pytest.raises(ValueError, match=r"at least one ecanet\.nn\.Gate, ReLU has none"):
        gate_values(nn.ReLU(), [], 2)
    with pytest.raises(ValueError, match="got none: is it used up"):
        gate_values(TwoGates(), iter([]), 2)
    with pytest.raises(ValueError, match="num_classes must be 1 or more"):
        gate_values(TwoGates(), [], 0)


CLASSES = ["cat", "dog", "frog"]


def maps(figure: Figure) -> dict[str, np.ndarray]:
    """The heat map of each gate, classes x channels."""
    return {axes.get_label(): axes.images[0].get_array() for axes in figure.axes if axes.images}


def test_gates_per_class_are_a_heat_map_with_a_row_for_each_class() -> None:
    values = {"a": torch.rand(3, 8), "b": torch.rand(3, 16)}
    figure = plot_gates_per_class(values, CLASSES, order="index")
    assert list(maps(figure)) == list(values)
    for axes, (name, gate) in zip(figure.axes, values.items(), strict=False):
        np.testing.assert_array_equal(maps(figure)[name], gate.double())
        deviation = np.std(gate.double().numpy(), axis=0).mean()
        title = f"{name}: C = {gate.shape[1]}, spread across classes {deviation:.3f}"
        assert axes.get_title(loc="left") == title
        assert axes.images[0].get_clim() == (0, 1)
        assert [label.get_text() for label in axes.get_yticklabels()] == CLASSES


def test_gates_of_a_larger_factor_are_all_seen() -> None:
    figure = plot_gates_per_class({"a": 2 * torch.rand(3, 8), "b": torch.full((3, 16), 1.9)}, CLASSES)
    assert [axes.images[0].get_clim() for axes in figure.axes if axes.images] == [(0, 2), (0, 2)]


@pytest.mark.parametrize(
    ("order", "cat", "said"),
    [
        ("class", [0.9, 0.7, 0.1, 0.5], "channels, sorted by the class with the largest gate"),
        ("mean", [0.1, 0.5, 0.7, 0.9], "channels, in ascending order of their mean gate"),
        ("index", [0.9, 0.1, 0.5, 0.7], "channel"),
    ],
)
def test_the_order_of_the_channels(order: str, cat: list[float], said: str) -> None:
    gate = torch.tensor([[0.9, 0.1, 0.5, 0.7], [0.8, 0.9, 0.6, 0.6]], dtype=torch.float64)
    gate[1, 1] = 0.3 if order == "mean" else 0.9
    figure = plot_gates_per_class({"a": gate}, CLASSES[:2], order=order)
    assert maps(figure)["a"][0].tolist() == cat
    assert figure.axes[0].get_xlabel() == said


def test_an_order_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="order must be one of 'class', 'mean', 'index', got 'size'"):
        plot_gates_per_class({"a": torch.rand(3, 4)}, CLASSES, order="size")


@pytest.mark.parametrize("order", ["class", "mean", "index"])
def test_classes_without_images(order: str) -> None:
    gate = torch.tensor([[0.2, 0.4], [math.nan, math.nan], [0.4, 0.8]])
    figure = plot_gates_per_class({"a": gate}, CLASSES, order=order)
    axes = figure.axes[0]
    assert axes.get_title(loc="left").endswith("classes 0.150")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog (no images)", "frog"]
    pixels = axes.images[0].cmap(axes.images[0].norm(np.ma.masked_invalid(maps(figure)["a"])))
    assert (pixels[1] == 1).all()
    assert (pixels[[0, 2], :, :3] < 1).any(-1).all()
    none = plot_gates_per_class({"a": torch.full((3, 4), math.nan)}, CLASSES, order=order)
    assert none.axes[0].get_title(loc="left").endswith("classes unknown")
    none.savefig(BytesIO(), format="png")


def names_shown(figure: Figure) -> list[str]:
    return list(maps(figure))


def test_which_gates_are_shown() -> None:
    widths = [4, 4, 8, 8, 8, 16, 16]
    values = {f"layer{i}": torch.rand(2, width) for i, width in enumerate(widths)}
    few = dict(list(values.items())[:6])
    assert names_shown(plot_gates_per_class(few, CLASSES[:2])) == list(few)
    assert names_shown(plot_gates_per_class(values, CLASSES[:2])) == ["layer1", "layer4", "layer6"]
    chosen = ["layer5", "layer0"]
    assert names_shown(plot_gates_per_class(values, CLASSES[:2], names=chosen)) == chosen


@pytest.mark.parametrize(("panels", "classes"), [(1, 1), (3, 10), (5, 25), (2, 100)])
def test_gates_per_class_can_be_read(panels: int, classes: int) -> None:
    values = {f"layer{i}.0.eca": torch.rand(classes, 32) for i in range(panels)}
    figure = plot_gates_per_class(values, [f"class number {c}" for c in range(classes)])
    assert 1 <= len(figure.axes[0].get_yticks()) <= 30
    assert_readable(figure)


def test_wrong_values_per_class() -> None:
    with pytest.raises(ValueError, match=r"values\['a'\] must have one row for each of the 3 classes, got .*\(2, 4\)"):
        plot_gates_per_class({"a": torch.rand(2, 4)}, CLASSES)
    with pytest.raises(ValueError, match="names must be among a, got b"):
        plot_gates_per_class({"a": torch.rand(3, 4)}, CLASSES, names=["b"])
    with pytest.raises(ValueError, match="at least one gate"):
        plot_gates_per_class({}, CLASSES)


def test_from_a_model_to_a_picture() -> None:
    model = small_eca_resnet(num_classes=3, widths=(8, 16))
    values = gate_values(model, [(torch.randn(6, 3, 12, 12), torch.tensor([0, 1, 2, 0, 1, 2]))], 3)
    buffer = BytesIO()
    plot_gates_per_class(values, CLASSES).savefig(buffer)
    assert buffer.getvalue().startswith(b"\x89PNG")


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize(
    ("channels", "k", "reduction"), [(256, "adaptive", 16), (16, 3, 4), (2048, 9, 16), (3, 5, 16), (10**6, 7, 2)]
)
def test_se_and_eca_side_by_side_say_the_parameters_that_the_gates_have(
    channels: int, k: int | str, reduction: int
) -> None:
    figure = plot_se_and_eca(channels, k, reduction, spatial=(7, 7))
    with torch.device("meta"):
        se, eca = SE(channels, reduction), ECA(channels, k)
    said = " ".join(" ".join(texts(figure)).split())
    hidden = max(1, channels // reduction)
    assert f"{hidden:,} x {channels:,} = {se.fc1.weight.numel():,} parameters" in said
    assert f"{channels:,} x {hidden:,} = {se.fc2.weight.numel():,} parameters" in said
    assert f"{sum(p.numel() for p in se.parameters()):,} parameters in all" in said
    assert f"{eca.kernel_size} parameters in all" in said
    assert said.count(f"x: {channels} x 7 x 7") == 4  # in and out, twice
    assert said.count(f"s: {channels:,} means") == said.count(f"g: {channels:,} gates") == 2
    assert_readable(figure)


def test_widths_in_the_picture_of_se_and_eca_are_to_scale() -> None:
    axes = plot_se_and_eca(64, 5, 4).axes[0]
    widths = {round(patch.get_window_extent().width) for patch in axes.patches}
    whole = max(widths)
    assert any(width == pytest.approx(whole / 4, abs=3) for width in widths)  # C / r
    assert any(width == pytest.approx(whole * 5 / 64, abs=3) for width in widths)  # k of C


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"channels": 0}, ValueError, "channels must be 1 or more, got 0"),
        ({"channels": 8.0}, TypeError, "channels must be an integer"),
        ({"kernel_size": 4}, ValueError, "kernel_size must be .*odd"),
        ({"reduction": 0}, ValueError, "reduction must be 1 or more"),
        ({"spatial": 56}, TypeError, "spatial must be a sequence of integers"),
        ({"spatial": (7, 0)}, ValueError, "spatial must have sizes of 1 or more"),
        ({"spatial": ()}, ValueError, "spatial must have sizes of 1 or more"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_of_se_and_eca(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        plot_se_and_eca(**arguments)


@pytest.mark.parametrize("circular", [False, True], ids=["zeros", "circular"])
@pytest.mark.parametrize(("channels", "k"), [(1, 1), (5, 5), (8, 3), (12, 7)])
def test_the_sliding_kernel_meets_the_means_that_the_rows_of_the_matrix_say(
    channels: int, k: int, circular: bool
) -> None:
    gate = ECA(channels, k, circular=circular)
    with torch.no_grad():
        gate.conv.weight.copy_(torch.arange(1.0, k + 1))
    matrix = gate.matrix().detach()
    for position in range(1, channels + 1):
        row = torch.zeros(channels)
        for weight, channel in enumerate(taps(position, channels, k, circular), start=1):
            if channel is not None:
                row[channel - 1] += weight
        assert torch.equal(row, matrix[position - 1])


def test_the_sliding_kernel_shows_three_positions_and_the_padded_ends_of_both_paddings() -> None:
    figure = plot_sliding_kernel(8, 3)
    sums = [text for text in texts(figure) if "sigmoid" in text]
    assert sums == [
        "g1 = sigmoid(w1 0 + w2 s1 + w3 s2)",
        "g4 = sigmoid(w1 s3 + w2 s4 + w3 s5)",
        "g8 = sigmoid(w1 s7 + w2 s8 + w3 0)",
        "g1 = sigmoid(w1 s8 + w2 s1 + w3 s2)",
        "g4 = sigmoid(w1 s3 + w2 s4 + w3 s5)",
        "g8 = sigmoid(w1 s7 + w2 s8 + w3 s1)",
    ]
    dashed = [patch for patch in figure.axes[0].patches if patch.get_linestyle() == "--"]
    assert len(dashed) == 6 * 2
    one = plot_sliding_kernel(8, 3, positions=[2], padding=["circular"])
    assert [text for text in texts(one) if "sigmoid" in text] == ["g2 = sigmoid(w1 s1 + w2 s2 + w3 s3)"]


@pytest.mark.parametrize(
    ("channels", "k", "smallest"),
    [
        (1, 1, SMALLEST),
        (2, 3, SMALLEST),
        (64, "adaptive", SMALLEST),
        (2048, 9, SMALLEST),
        (100_000, 7, 5),
        (40, 79, SMALLEST),
    ],
    ids=str,
)
def test_the_sliding_kernel_can_be_read_for_any_size(channels: int, k: int | str, smallest: float) -> None:
    padding = ["zeros"] if isinstance(k, int) and k > channels else ["zeros", "circular"]
    assert_readable(plot_sliding_kernel(channels, k, padding=padding), smallest)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"channels": 0}, ValueError, "channels must be 1 or more, got 0"),
        ({"kernel_size": 2}, ValueError, "kernel_size must be .*odd"),
        ({"channels": 2, "kernel_size": 3}, ValueError, "kernel_size must not exceed channels=2 with circular padding"),
        ({"padding": "zeros"}, ValueError, "padding must hold 'zeros', 'circular' or both, got 'zeros'"),
        ({"padding": ["reflect"]}, ValueError, r"padding must hold .*, got \['reflect'\]"),
        ({"padding": []}, ValueError, "padding must hold"),
        ({"positions": [0]}, ValueError, r"positions must be channels from 1 to 8, got \[0\]"),
        ({"positions": [9]}, ValueError, "positions must be channels from 1 to 8"),
        ({"positions": []}, ValueError, "positions must be channels from 1 to 8"),
        ({"positions": [1.5]}, ValueError, "positions must be channels from 1 to 8"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_of_the_sliding_kernel(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        plot_sliding_kernel(**{"channels": 8, **arguments})


@pytest.mark.parametrize("name", ["kernel.gif", "kernel.apng", "KERNEL.PNG"])
def test_an_animation_has_every_figure_for_its_time_and_starts_over(name: str, tmp_path: Path) -> None:
    frames = (plot_sliding_kernel(3, 3, positions=[i], padding=["zeros"]) for i in (1, 2, 3))
    save_animation(frames, tmp_path / name, seconds=0.25)
    with Image.open(tmp_path / name) as image:
        assert image.n_frames == 3
        assert image.info["loop"] == 0
        seen = []
        for frame in range(3):
            image.seek(frame)
            assert image.info["duration"] == 250
            seen.append(np.asarray(image.convert("RGB")))
    assert all(abs(a.astype(int) - b).max() > 100 for a, b in pairwise(seen))
    assert seen[0].shape[1] == 900


def test_wrong_animations(tmp_path: Path) -> None:
    figure, larger = plot_sliding_kernel(3, 3, padding=["zeros"]), plot_sliding_kernel(3, 3)
    for figures, path, seconds, error, match in (
        ([figure], "kernel.mp4", 1, ValueError, r"path must end in \.gif, \.png or \.apng, got '.*kernel\.mp4'"),
        ([figure], "kernel.gif", 0, ValueError, "seconds must be above 0 and at most 60, got 0"),
        ([figure], "kernel.gif", math.nan, ValueError, "seconds must be above 0"),
        ([figure], "kernel.gif", "1", TypeError, "seconds must be a number, got '1'"),
        ([], "kernel.gif", 1, ValueError, "figures must hold at least one figure"),
        (["kernel.png"], "kernel.gif", 1, TypeError, "figures must hold figures of matplotlib, got str"),
        ([figure, larger], "kernel.gif", 1, ValueError, "figures must have one size: .*number 2"),
    ):
        with pytest.raises(error, match=match):
            save_animation(figures, tmp_path / path, seconds=seconds)
    assert list(tmp_path.iterdir()) == []


#: One picture of every function that draws.
EXAMPLES: dict[str, Callable[[], Figure]] = {
    "plot_confusion": lambda: plot_confusion(torch.tensor([[8, 2, 0], [0, 9, 1], [3, 0, 7]]), CLASSES),
    "plot_explanation": lambda: plot_explanation(
        torch.zeros(3, 28, 28, dtype=torch.uint8), "a.png", CLASSES, [0.5, 0.3, 0.2], {"layer1": torch.rand(8)}
    ),
    "plot_gate_responses": lambda: plot_gate_responses(gate_responses(trained("grn"), torch.randn(3, 3, 12, 12))),
    "plot_gates_per_class": lambda: plot_gates_per_class({"a": torch.rand(3, 4)}, CLASSES),
    "plot_kernel_sizes": plot_kernel_sizes,
    "plot_matrices": lambda: plot_matrices(linear_gates(32), shared_scale=True),
    "plot_se_and_eca": plot_se_and_eca,
    "plot_sliding_kernel": plot_sliding_kernel,
    "plot_training_curves": lambda: plot_training_curves(PAIRED),
}


def test_every_function_that_draws_is_looked_at() -> None:
    assert set(EXAMPLES) == {name for name in ecanet.inspect.__all__ if name.startswith("plot_")}


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_text_overlaps_is_cut_or_tiny_and_colours_come_from_the_one_table(name: str) -> None:
    assert_readable(EXAMPLES[name]())


def test_one_colour_means_one_idea() -> None:
    names = ["none", "no gate", "SE", "se", "squeeze-and-excitation", "ECA", "ecanet", "eca, k = 3", "timm's EcaModule"]
    names += ["ECA, neutral start", "ECA, function kept", "ECA, random gate", "plain PyTorch"]
    ideas = ["none", "none", "SE", "SE", "SE", "ECA", "ECA", "ECA", "timm", "neutral", "neutral", "fresh", "plain"]
    found = looks(names)
    assert [found[name][0] for name in names] == [IDEAS[idea] for idea in ideas]
    assert len(set(found.values())) == len(names), "names with one colour have other dashes"
    none_of_them = ["SE-Var2", "ECA-NS", "secant", "random crops", "mine, without bias"]
    others = looks([*none_of_them, *names])
    assert [others[name][0] for name in none_of_them] == list(OTHERS[:5])
    table = np.array([to_rgb(colour) for colour in (*IDEAS.values(), *OTHERS)])
    distances = np.linalg.norm(table[:, None] - table, axis=-1) + np.eye(len(table))
    assert distances.min() > 0.2


def test_missing_matplotlib_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in EXAMPLES.values():
        with pytest.raises(ImportError, match=r"pip install 'ecanet\[plot\]'"):
            draw()


def test_figures_need_no_pyplot_and_importing_needs_no_matplotlib() -> None:
    code = (
        "import sys, io, ecanet.inspect as i\n"
        "assert 'matplotlib' not in sys.modules\n"
        "i.plot_kernel_sizes().savefig(io.BytesIO())\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
