"""docs/studies/README.md says what the numbers of its studies say."""

import json
from pathlib import Path

import pytest

STUDIES = Path(__file__).parents[2] / "docs" / "studies"


@pytest.mark.parametrize("study", sorted(path.stem for path in STUDIES.glob("*.json")))
def test_each_row_of_a_table_is_that_of_the_study(study: str) -> None:
    text = (STUDIES / "README.md").read_text(encoding="utf-8")
    [part] = [part for part in text.split("\n## ") if f"({study}.json)" in part]
    summary = json.loads((STUDIES / f"{study}.json").read_text())
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in part.splitlines() if line.startswith("| ")
    ]
    found = {row[0]: row[1:] for row in rows[1:]}
    assert list(found) == list(summary["conditions"])
    for name, numbers in summary["conditions"].items():
        expected = [f"{numbers['mean']:.2f}"]
        if name != summary["baseline"]:
            expected.append(f"{numbers['difference']:+.2f}")
            expected.append(f"{numbers['low']:+.2f} to {numbers['high']:+.2f}")
            expected.append(f"{numbers['p_holm']:.2g}")
        assert [cell for cell in found[name] if cell] == expected


@pytest.mark.parametrize("study", sorted(path.stem for path in STUDIES.glob("*.html")))
def test_a_report_that_is_kept_holds_the_verdict_of_its_numbers_and_no_path_of_a_machine(study: str) -> None:
    page = (STUDIES / f"{study}.html").read_text(encoding="utf-8")
    summary = json.loads((STUDIES / f"{study}.json").read_text())
    for name in summary["conditions"]:
        assert name in page
    assert "/home/" not in page
    assert "/tmp/" not in page
