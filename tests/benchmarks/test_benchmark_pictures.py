"""The pictures of result files, drawn from the files in the repository, can be read and show what the files say."""

from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks import finetune, gates, picture, report, results
from benchmarks.cases import MEMORY_FORMATS
from benchmarks.finetune import picture as finetune_picture
from benchmarks.tables import value
from ecanet.inspect.style import IDEAS
from ecanet.nn import GATES
from ecanet.profile.turns import geometric_mean
from tests.inspect.readable import assert_readable

RESULTS = Path(finetune.__file__).parents[1] / "results"
DOCS = RESULTS.parents[1] / "docs/gates.md"


def drawn(file: str, draw: Callable[[results.Document], Figure] = picture.draw) -> Figure:
    return draw(results.read(RESULTS / f"{file}.json"))


@pytest.mark.parametrize(
    "file", ["cpu-1-threads", "cpu-1-thread-compiled-networks", "cpu-1-thread-compiled", "gpu-h200-2", "gpu-h200-3"]
)
def test_pictures_of_costs_can_be_read(file: str) -> None:
    assert_readable(drawn(file))


@pytest.mark.parametrize("file", ["finetune-mobilenet_v2", "finetune-tf_efficientnet_lite0"])
def test_pictures_of_fine_tuning_can_be_read_and_have_the_colours_of_the_ideas(file: str) -> None:
    figure = drawn(file, finetune_picture.draw)
    assert_readable(figure)
    lines = {line.get_label(): line.get_color() for line in figure.axes[1].lines}
    assert lines == {
        "no gate": IDEAS["none"],
        "ECA, function kept": IDEAS["neutral"],
        "ECA, random gate": IDEAS["fresh"],
    }


def test_networks_and_operations_have_a_panel_each_with_a_log_axis_and_numbers_on_the_bars() -> None:
    figure = drawn("cpu-1-threads")
    figure.draw_without_rendering()
    networks, operations = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Whole networks (ResNet-50), 1: no gate",
        "Operations on one map",
    ]
    assert [axes.get_xscale() for axes in figure.axes] == ["log", "log"]
    assert networks.get_xlim()[1] < 1.5 < operations.get_xlim()[1]
    cases = results.read(RESULTS / "cpu-1-threads.json")["cases"]
    shapes = [case for key, case in cases.items() if key.startswith("training/tail/")]
    means = [geometric_mean([value(case, name, "no gate") for case in shapes]) for name in ("ecanet", "timm")]
    bars = [patch for patch in operations.patches if isinstance(patch, Rectangle)][:2]
    assert [to_hex(bar.get_facecolor()) for bar in bars] == [IDEAS["ECA"].lower(), IDEAS["timm"].lower()]
    for mean, bar, number in zip(means, bars, operations.texts, strict=False):
        assert 1 + bar.get_width() == pytest.approx(mean)
        assert number.get_text() == f"{mean:.2f}"
        box, of_bar = number.get_window_extent(), bar.get_window_extent()
        side = box.x0 - of_bar.x1 if mean >= 1 else of_bar.x0 - box.x1
        assert 0 < side < 20, "pixels between a bar's end and its number"
        assert of_bar.y0 <= (box.y0 + box.y1) / 2 <= of_bar.y1


def test_the_picture_of_all_gates_can_be_read_and_has_their_ratios() -> None:
    figure = drawn("cpu-1-thread-gates", gates.draw_gates)
    assert_readable(figure)
    (axes,) = figure.axes
    assert {label.get_text() for label in axes.get_yticklabels()} == set(GATES)
    cases = results.read(RESULTS / "cpu-1-thread-gates.json")["cases"]
    for name in ("gct", "simam"):
        mean = geometric_mean([value(c, "ecanet", "no gate") for key, c in cases.items() if f"/{name}/" in key])
        assert f"{mean:.2f}" in [text.get_text() for text in axes.texts]


def test_docs_on_gates_say_what_the_result_file_says() -> None:
    cases = results.read(RESULTS / "cpu-1-thread-gates.json")["cases"]
    _, _, said = DOCS.read_text().partition("images/gates_cost.png")
    said = " ".join(said.split())

    def mean(name: str, of: str) -> str:
        ratios = [value(case, of, "no gate") for key, case in cases.items() if key.startswith(f"gates/{name}/")]
        return f"{geometric_mean(ratios):.3f}" if name.endswith("saved") else f"{geometric_mean(ratios):.2f}"

    names = ("grn", "gct", "srm", "eca")
    fused, plain = ([mean(name, of) for name in names] for of in ("ecanet", "plain"))
    assert "GRN {}, GCT {}, SRM {}, ECA {}.".format(*fused) in said
    assert "take {}, {}, {} and {}.".format(*plain) in said
    smallest = sorted(value(cases[f"gates/grn/8x2048x7x7/{form}"], "ecanet", "no gate") for form in MEMORY_FORMATS)
    assert "GRN takes {:.2f} to {:.2f} of".format(*smallest) in said
    assert {mean(f"{name}-saved", "ecanet") for name in names[:3]} == {"1.014"}
    assert {mean(f"{name}-saved", "ecanet") for name in ("eca", "se", "lct")} == {"1.010"}


def test_a_file_without_anything_to_draw_has_its_tables_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, plot = RESULTS / "gpu-h200-2-tuning.json", tmp_path / "none.png"
    with pytest.raises(ValueError, match="document must have a case of a module, tail or network, got tuning/"):
        picture.draw(results.read(file))
    report.main([str(file), "--plot", str(plot)])
    assert f"no picture {plot}: document must have a case" in capsys.readouterr().out
    assert not plot.exists()
