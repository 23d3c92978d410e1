"""The Chinese pages say what the English ones say; the explanation's tables say what the code says."""

import hashlib
import math
import re
from pathlib import Path

import pytest
import torch

from ecanet import ECA, SE, adaptive_kernel_size
from ecanet.inspect import gate_parameters
from ecanet.models import eca_resnet50
from tests.test_readme import ROOT, blocks

ENGLISH, CHINESE = ROOT / "docs/eca-explained.md", ROOT / "docs/eca-explained.zh-CN.md"
README, README_CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"


def sections(page: str) -> list[str]:
    """What begins with a heading of the second level, and before it what comes first."""
    return re.split(r"^(?=## )", re.sub(r"^<!--.*?-->\n", "", page), flags=re.MULTILINE)


def numbers(text: str) -> set[str]:
    """In running text and tables, without those of addresses."""
    return set(re.findall(r"\d+(?:[.,]\d+)*", re.sub(r"\]\([^)]*\)", "]", text)))


def structure(section: str) -> dict[str, object]:
    """What a translation must not change."""
    lines = section.splitlines()
    return {
        "headings": re.findall(r"^#+", section, re.MULTILINE),
        "numbers": numbers(section),
        "blocks of code": re.findall(r"^```.*?^```", section, re.MULTILINE | re.DOTALL),
        "formulas": [line for line in lines if line.startswith("    ")],
        "pictures": re.findall(r"!\[.+?\]\((.*?)\)", section),
        "links": {link for link in re.findall(r"\]\((.*?)\)", section) if "eca-explained" not in link},
        "rows of tables": [re.findall(r"\d+(?:[.,]\d+)*", line) for line in lines if line.startswith("|")],
        "items of lists": [line[:2] for line in lines if re.match(r"- |\d\. ", line)],
        "bold": len(re.findall(r"\*\*.+?\*\*", section, re.DOTALL)),
    }


def faults(english: str, chinese: str) -> list[str]:
    """Where two pages differ in more than their language."""
    pairs = list(zip(sections(english), sections(chinese), strict=False))
    found = [f"{len(sections(english))} sections, not {len(sections(chinese))}"] * (
        len(sections(english)) != len(sections(chinese))
    )
    for ours, theirs in pairs:
        title, a, b = ours.splitlines()[0], structure(ours), structure(theirs)
        found += [f"{title}: {name}: {a[name]} is {b[name]}" for name in a if a[name] != b[name]]
    return found


def first_screen(readme: str) -> str:
    """What comes before the first heading of the second level, which is what README.zh-CN.md translates."""
    return readme.partition("\n## ")[0]


def digest(page: str) -> str:
    return hashlib.sha256(page.encode()).hexdigest()[:16]


def test_the_chinese_explanation_has_the_sections_numbers_code_formulas_pictures_and_tables_of_the_english_one() -> (
    None
):
    assert faults(ENGLISH.read_text(), CHINESE.read_text()) == []


@pytest.mark.parametrize(
    ("translation", "name", "original"),
    [
        (CHINESE, "eca-explained.md", ENGLISH.read_text()),
        (README_CHINESE, "the first screen of README.md", first_screen(README.read_text())),
    ],
    ids=["explanation", "readme"],
)
def test_a_chinese_page_was_looked_at_after_the_last_change_of_the_english_one(
    translation: Path, name: str, original: str
) -> None:
    assert translation.read_text().splitlines()[0] == f"<!-- Translation of {name}, sha256 {digest(original)} -->", (
        f"{name} has changed: bring {translation.name} up to date, then change its first line"
    )


def test_only_a_change_of_the_first_screen_of_the_readme_asks_for_a_look_at_its_translation() -> None:
    before, _, after = (readme := README.read_text()).partition("\n## ")
    assert digest(first_screen(f"{before}?\n## {after}")) != digest(first_screen(readme))
    assert digest(first_screen(f"{before}\n## {after}?")) == digest(first_screen(readme))


def test_a_change_of_one_language_alone_is_noticed() -> None:
    english, chinese = ENGLISH.read_text(), CHINESE.read_text()
    for old, new in (
        ("| 512 | 9 | 5.0 | 5 | 5 |", "| 512 | 9 | 5.0 | 5 | 7 |"),
        ("padding=k // 2", "padding=k"),
        ("images/se_and_eca.png", "images/matrices.png"),
        ("## 8. ", "### 8. "),
        ("    g = sigmoid(C1D_k(s))", "    g = sigmoid(C1D_3(s))"),
        ("(performance.md)", "(gpu.md)"),
        ("7. ", "- "),
    ):
        for page, other in ((english, chinese), (chinese, english)):
            assert old in page
            assert faults(page.replace(old, new), other)
    assert digest(english) != digest(english.replace("Why not", "Whether to"))


def test_the_chinese_readme_has_the_numbers_links_and_code_of_the_english_first_screen() -> None:
    (chinese,) = sections(README_CHINESE.read_text())
    ours, mine = structure(first_screen(README.read_text())), structure(chinese)
    for name in ("numbers", "blocks of code", "pictures"):
        assert mine[name] == ours[name], name
    pages = {link for link in mine["links"] if link.startswith("docs/")}
    assert pages == {link for link in ours["links"] if link.startswith("docs/")}
    assert {"make demo", "make test"} <= set(re.findall(r"`(make \w+)`", chinese))


@pytest.mark.parametrize(
    ("page", "target"),
    [
        (README, "README.zh-CN.md"),
        (README_CHINESE, "README.md"),
        (README, "docs/eca-explained.md"),
        (README_CHINESE, "docs/eca-explained.zh-CN.md"),
        (ENGLISH, "eca-explained.zh-CN.md"),
        (CHINESE, "eca-explained.md"),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else value,
)
def test_the_languages_are_linked_both_ways_from_the_first_lines(page: Path, target: str) -> None:
    assert f"]({target})" in "\n".join(page.read_text().splitlines()[:6])


def table(page: Path, columns: int) -> list[list[str]]:
    """Rows with so many cells, numbers as Python writes them."""
    rows = [
        [c.strip() for c in line.strip("|").split("|")] for line in page.read_text().splitlines() if line[:1] == "|"
    ]
    return [[cell.replace(",", "") for cell in row] for row in rows if len(row) == columns]


def test_the_table_of_kernel_sizes_is_what_the_formula_and_the_code_give() -> None:
    rows = [row for row in table(ENGLISH, 5) if row[0].isdigit()]
    assert [int(row[0]) for row in rows] == [2**p for p in range(4, 13)]
    for c, log, t, cut, k in rows:
        assert float(log) == math.log2(int(c))
        assert float(t) == (float(log) + 1) / 2
        assert int(cut) == int(float(t))
        assert int(k) == adaptive_kernel_size(int(c)) == ECA(int(c)).kernel_size


def test_the_parameters_of_se_and_eca_are_those_of_the_modules() -> None:
    rows = {row[0]: row[1:] for row in table(ENGLISH, 3)}
    for channels in (256, 2048):
        counts = [sum(p.numel() for p in gate(channels).parameters()) for gate in (SE, ECA)]
        assert rows[f"parameters C = {channels}"] == [str(n) for n in counts]
    with torch.device("meta"):
        counts = [gate_parameters(eca_resnet50(gate=gate)) for gate in ("se", "eca")]
    assert rows["parameters added to ResNet-50"] == [str(n) for n in counts] == ["2514944", "86"]
    sums = re.findall(r"^    (?:SE|ECA) +([\dx+, ]+) = ([\d,]+)$", ENGLISH.read_text(), re.MULTILINE)
    assert [eval(terms.replace("x", "*").replace(",", "")) for terms, _ in sums] == [counts[1], counts[0]]
    assert [int(total.replace(",", "")) for _, total in sums] == [counts[1], counts[0]]


def test_blocks_of_code_are_there_to_run() -> None:
    assert len(blocks(ENGLISH, "python")) == len(blocks(CHINESE, "python")) == 8
