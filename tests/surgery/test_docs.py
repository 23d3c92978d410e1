"""docs/surgery.md: its examples run, and its tables are what the code finds."""

import re
from pathlib import Path

import pytest

from scripts.make_surgery_table import PAGE, class_tables, row
from tests.surgery.architectures import ARCHITECTURES, OK

SOME = (
    "torchvision/resnet18",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/squeezenet1_1",
    "timm/regnetx_002",
    "timm/convnext_atto",
    "timm/ecaresnet26t",
    "timm/vit_tiny_patch16_224",
)


@pytest.mark.parametrize("name", SOME)
def test_a_row_of_the_table_is_what_the_code_finds(name: str) -> None:
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    assert row(architecture) in PAGE.read_text().splitlines()


def test_every_architecture_has_its_row_and_there_are_enough() -> None:
    _, _, table = PAGE.read_text().partition("<!-- architectures")
    listed = re.findall(r"^\| (\w+/\w+) \| (\w+) \|", table, re.MULTILINE)
    assert listed == [(a.name, a.where) for a in ARCHITECTURES]
    assert len(listed) >= 40


def test_the_numbers_of_architectures_in_the_pages_are_those_of_the_table() -> None:
    gated = [a for a in ARCHITECTURES if a.expected == OK]
    assert f"In the {len(gated)} architectures below that take gates" in " ".join(PAGE.read_text().split())
    readme = " ".join((PAGE.parents[1] / "README.md").read_text().split())
    assert f"[What happens in {len(ARCHITECTURES)} architectures, and what is refused](docs/surgery.md)" in readme


def test_the_classes_are_those_of_the_code() -> None:
    assert class_tables() in PAGE.read_text()


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 9
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert "16 gates inserted: +86 parameters, +5,607,168 multiply-adds per sample" in capsys.readouterr().out
