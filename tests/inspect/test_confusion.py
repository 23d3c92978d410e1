"""The picture of a confusion matrix."""

import pytest
import torch

from ecanet.inspect import plot_confusion
from tests.inspect.readable import assert_readable


def counted(classes: int) -> torch.Tensor:
    """Of 50 images each, some taken for the next class, and in class 1 none at all."""
    counts = torch.diag(torch.full((classes,), 50))
    for index in range(classes):
        wrong = (7 * index) % 30
        counts[index, index] -= wrong
        counts[index, (index + 1) % classes] += wrong
    counts[1] = 0
    return counts


@pytest.mark.parametrize("classes", [2, 10, 12, 13, 25, 26, 1000])
def test_a_confusion_matrix_can_be_read_whatever_the_number_of_classes(classes: int) -> None:
    names = [f"class {index}, which is called like this" for index in range(classes)]
    figure = plot_confusion(counted(classes), names)
    assert_readable(figure)
    axes = figure.axes[0]
    assert len(axes.get_yticklabels()) == min(classes, 25)
    assert len(axes.get_xticklabels()) == min(classes, 26)


def test_blue_is_recognised_and_orange_is_taken_for_another_and_numbers_are_per_cent() -> None:
    figure = plot_confusion(torch.tensor([[3, 1, 0], [0, 0, 0], [1, 398, 1]]), ["a", "b", "c"])
    values = figure.axes[0].images[0].get_array()
    assert values.filled(9).tolist() == [[-0.75, 0.25, 9], [9, 9, 9], [0.0025, 0.995, -0.0025]]
    assert [text.get_text() for text in figure.axes[0].texts] == ["75", "25", "<1", "100", "<1"]
    assert figure.axes[0].get_yticklabels()[1].get_text() == "b (no images)"


def test_of_many_classes_those_taken_for_one_another_are_drawn_and_the_rest_is_counted() -> None:
    counts = torch.diag(torch.full((100,), 10))
    counts[40, 41], counts[40, 7], counts[70, 40] = 30, 10, 90
    figure = plot_confusion(counts, [str(index) for index in range(100)])
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    values = figure.axes[0].images[0].get_array()
    row = names.index("40")
    assert values[names.index("70"), row] == 0.9
    assert values[row, names.index("41")] == 0.6
    assert names == sorted(names, key=int)
    assert values[row].filled(0).sum() == pytest.approx(-0.2 + 0.8), "all of its images are in the row"


@pytest.mark.parametrize("shape", [(2, 3), (3, 3), (2,), (0, 0)], ids=str)
def test_counts_that_are_not_of_the_classes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a row and a column for each of the 2 classes, got"):
        plot_confusion(torch.zeros(shape, dtype=torch.long), ["a", "b"])
