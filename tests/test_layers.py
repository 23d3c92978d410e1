"""Nothing imports upwards, and nothing what imports it: CONTRIBUTING.md's paragraph on layers is the rule."""

from functools import cache
from pathlib import Path

import pytest

import layers

ROOT = Path(__file__).parents[1]
RANKS = layers.ranks((ROOT / "CONTRIBUTING.md").read_text())


@cache
def everything() -> layers.Graph:
    """The library and the benchmarks."""
    return layers.imports(layers.modules(ROOT / "src" / "ecanet") | layers.modules(ROOT / "benchmarks"))


@cache
def the_library() -> layers.Graph:
    return {name: imported for name, imported in everything().items() if name.split(".")[0] == "ecanet"}


def test_every_part_of_the_library_is_one_of_the_layers_and_every_layer_is_a_part_of_it() -> None:
    assert {layers.layer(module) for module in the_library()} - {"ecanet"} == RANKS.keys()


def test_no_module_imports_from_a_higher_layer() -> None:
    assert layers.arrows_up(the_library(), RANKS) == []


def test_the_library_imports_nothing_of_the_benchmarks() -> None:
    found = {f"{a} -> {b}" for a in the_library() for b in everything()[a] if b.startswith("benchmarks")}
    assert found == set()


def test_no_module_imports_what_imports_it() -> None:
    assert layers.circle(everything()) == []


def test_layers_of_one_height_do_not_import_each_other_in_a_circle() -> None:
    assert layers.circle(layers.between_layers(the_library())) == []


def test_the_order_is_read_from_the_text() -> None:
    text = "# C\n\n## Layers\n\n`a` (has\n`x`), `b` < `c`,\n`d` (< of `y`) < `e`. Nothing imports upwards. `f` < `g`\n"
    assert layers.ranks(text) == {"a": 0, "b": 0, "c": 1, "d": 1, "e": 2}


WAYS = {
    "at the top": "import ecanet.models.resnet",
    "under another name": "from ecanet.models import resnet as r",
    "a name of the module": "from ecanet.models.resnet import build",
    "from the package": "from ecanet.models import build",
    "relative": "from ..models.resnet import build",
    "relative, the module itself": "from ..models import resnet",
    "in a function": "def f():\n    from ecanet.models.resnet import build",
    "for type checkers": "if TYPE_CHECKING:\n    from ecanet.models import resnet",
    "if it is there": "try:\n    import ecanet.models.resnet\nexcept ImportError:\n    pass",
    "by a string": "importlib.import_module('ecanet.models.resnet')",
    "by a string, under another name": "from importlib import import_module as load\nload('ecanet.models.resnet')",
}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """``nn`` with a gate and a norm, below ``models`` with a resnet; the packages import their own files."""
    files = {
        "__init__.py": "from ecanet import models, nn",
        "nn/__init__.py": "from ecanet.nn.gate import Gate\nfrom . import norm",
        "nn/gate.py": "from ecanet.nn import norm",
        "nn/norm.py": "import torch.nn",
        "models/__init__.py": "from .resnet import build",
        "models/resnet.py": "from ecanet.nn import Gate",
    }
    for name, text in files.items():
        path = tmp_path / "ecanet" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "ecanet"


def _read(library: Path) -> layers.Graph:
    return layers.imports(layers.modules(library))


def test_packages_that_import_their_own_files_are_no_circle(library: Path) -> None:
    graph = _read(library)
    assert graph["ecanet.nn"] == {"ecanet.nn.gate", "ecanet.nn.norm"}
    assert layers.arrows_up(graph, {"nn": 0, "models": 1}) == layers.circle(graph) == []


@pytest.mark.parametrize("way", WAYS)
def test_an_import_from_a_higher_layer_is_found_however_it_is_written(library: Path, way: str) -> None:
    (library / "nn" / "norm.py").write_text(WAYS[way])
    target = "ecanet.models" if way == "from the package" else "ecanet.models.resnet"
    graph = _read(library)
    assert layers.arrows_up(graph, {"nn": 0, "models": 1}) == [f"ecanet.nn.norm -> {target}"]
    assert {"ecanet.nn.norm", target} <= set(layers.circle(graph))


def test_a_low_layer_that_imports_the_whole_library_imports_upwards(library: Path) -> None:
    (library / "nn" / "norm.py").write_text("import ecanet")
    assert layers.arrows_up(_read(library), {"nn": 0, "models": 1}) == ["ecanet.nn.norm -> ecanet"]


@pytest.mark.parametrize("text", ["import ecanet\necanet.study.run()", "import ecanet as e\nrun = e.study.run"])
def test_a_higher_layer_that_is_imported_at_its_first_use_is_found(library: Path, text: str) -> None:
    (library / "study.py").write_text("def run(): ...")
    (library / "models" / "resnet.py").write_text(text)
    assert layers.arrows_up(_read(library), {"nn": 0, "models": 1, "study": 2}) == [
        "ecanet.models.resnet -> ecanet.study"
    ]


@pytest.mark.parametrize("text", ["def f():\n    from . import gate", "from ecanet.nn import Gate", "import ecanet.nn"])
def test_a_circle_inside_a_layer_is_found_through_the_package_too(library: Path, text: str) -> None:
    (library / "nn" / "norm.py").write_text(text)
    assert "ecanet.nn.norm" in layers.circle(_read(library))


def test_layers_side_by_side_may_import_one_way_and_not_both_ways(library: Path) -> None:
    level = {"nn": 0, "models": 0}
    assert layers.arrows_up(_read(library), level) == layers.circle(layers.between_layers(_read(library))) == []
    (library / "nn" / "other.py").write_text("from ecanet.models import resnet")
    assert layers.circle(_read(library)) == layers.arrows_up(_read(library), level) == []
    assert {"nn", "models"} <= set(layers.circle(layers.between_layers(_read(library))))
