"""The picture of one image and its gates."""

import math

import pytest
import torch

from ecanet.inspect.explanation import plot_explanation
from tests.inspect.readable import assert_readable

CLASSES, PROBABILITIES = ["golden retriever, or so it seems to be", "$x_1$", "b"], [0.75, 0.2, 0.05]


def drawn(gates: dict[str, torch.Tensor], means: dict[str, torch.Tensor] | None = None, width: int = 28):
    image = torch.randint(0, 256, (3, 28, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return plot_explanation(image, "a $file$ with a name that is long.png", CLASSES, PROBABILITIES, gates, means, 1234)


def gates(*widths: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layer{i}.0.eca": torch.rand(width, generator=generator) for i, width in enumerate(widths)}


@pytest.mark.parametrize(
    ("widths", "rows", "with_means"),
    [((1,), 1, True), ((4, 2048), 2, False), ((8, 8, 8, 8, 16, 16, 16), 2, True), (tuple(range(2, 14)), 8, True)],
    ids=["one channel", "few and many, no means", "stages", "twelve stages"],
)
def test_the_picture_can_be_read_whatever_the_network(widths: tuple[int, ...], rows: int, with_means: bool) -> None:
    of_image = gates(*widths)
    means = {name: values.flip(0) for name, values in of_image.items()} if with_means else None
    figure = drawn(of_image, means, width=90)
    assert_readable(figure)
    assert sum(axes.get_label() in of_image for axes in figure.axes) == rows


def test_gates_stand_over_their_mean_and_the_strongest_are_named() -> None:
    gate, mean = (
        torch.tensor([0.1, 0.9, 0.5, 0.8, 0.7, 0.6, math.nan]),
        torch.tensor([0.3, 0.2, 0.1, 0.4, 0.5, 0.6, 0.7]),
    )
    figure = drawn({"eca": gate}, {"eca": mean})
    _, classes, left, right = figure.axes
    line, dots, strong = left.lines
    assert line.get_ydata() == pytest.approx(sorted(mean.tolist()))
    assert dots.get_ydata()[:3] == pytest.approx([0.5, 0.9, 0.1])
    assert sorted(strong.get_ydata()) == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    assert [text.get_text() for text in right.get_yticklabels()] == ["2", "4", "5", "6", "3"]
    assert [bar.get_width() for bar in right.patches] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5])
    assert right.lines[0].get_xdata() == pytest.approx([0.2, 0.4, 0.5, 0.6, 0.1])
    assert [bar.get_width() for bar in classes.patches] == PROBABILITIES
    (legend,) = figure.legends
    assert legend.get_texts()[1].get_text().startswith("mean of 1,234 validation images of golden")


@pytest.mark.parametrize("gate", [torch.ones(8), torch.full((8,), math.nan)], ids=["constant", "zeros everywhere"])
def test_gates_that_are_all_the_same_have_no_strongest(gate: torch.Tensor) -> None:
    figure = drawn({"eca": gate})
    assert_readable(figure)
    assert [text.get_text() for text in figure.axes[3].texts] == ["all gates are the same"]


def test_what_does_not_fit_is_refused() -> None:
    of_image, picture = gates(8), torch.zeros(3, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="one for each of the 2 classes, got 1"):
        plot_explanation(picture, "a", ["b", "c"], [0.5], of_image)
    with pytest.raises(ValueError, match="at least one gate"):
        plot_explanation(picture, "a", ["b"], [0.5], {})
    for means in ({}, {"other": torch.ones(8)}, {"layer0.0.eca": torch.ones(9)}):
        with pytest.raises(ValueError, match="means must be of the same gates"):
            plot_explanation(picture, "a", ["b"], [0.5], of_image, means)
