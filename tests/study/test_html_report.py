"""A study's report: one file that says what its data says and no more, whoever wrote the data."""

import base64
import csv
import hashlib
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from html_elements import Element, read_html
from made_up_studies import CONDITIONS, trained_study, write_made_up_run, write_summary

from ecanet.cli import main
from ecanet.inspect.style import IDEAS, OTHERS, contrast, on_dark
from ecanet.study import write_report
from ecanet.study.about import About
from ecanet.study.html_report.charts import curve_charts, sweep_chart
from ecanet.study.html_report.page import DARK_PAPER, render
from ecanet.study.html_report.pictures import draw
from ecanet.study.html_report.reading import StudyFolder, read_folder
from ecanet.study.html_report.series import curves, kernel_sweep, split_settings
from ecanet.study.results import FinishedRun, Study
from tests import fresh
from tests.inspect.readable import assert_readable


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that has everything to show."""
    return trained_study(tmp_path_factory.mktemp("study"), seeds=9, epochs=8)


@pytest.fixture(scope="module")
def page(trained: Path) -> Element:
    return read_html(render(read_folder(trained)))


def small(folder: Path, values: dict[str, list[float]], metric: str = "mAP") -> Path:
    """A study of a user's own function, by an earlier version: runs and a summary."""
    for name, of in values.items():
        for seed, value in enumerate(of):
            write_made_up_run(folder, name, seed, {metric: value, "loss": 1.0 / (1 + seed)})
    write_summary(folder, list(values), metric)
    return folder


def sections(page: Element) -> list[str]:
    return [heading.attributes["id"] or "" for heading in page.all("h2")]


def cells(table: Element) -> list[list[str]]:
    return [[cell.text for cell in row.children] for row in table.all("tr")]


def table(page: Element, caption: str) -> list[list[str]]:
    [found] = [each for each in page.all("table") if each.all("caption")[0].text.startswith(caption)]
    return cells(found)


# --- what it says -------------------------------------------------------------------------------------------------


def test_the_verdict_comes_first_then_every_section_that_there_is_data_for(page: Element, trained: Path) -> None:
    body = page.all("main")[0]
    first = body.children[0]
    assert first.all("li")[0].text.startswith("SE is 0.")
    assert sections(page) == [
        *("cost", "differences", "curves", "sweep", "gates", "profile", "failed", "runs", "settings"),
    ]
    [headline] = page.all("h1")
    assert headline.text.startswith("Compared with none, top1 is higher with ECA; ")
    assert headline.text.endswith("and lower with SE.")
    links = [link.attributes["href"] for link in page.all("nav")[0].all("a")]
    assert links == [f"#{name}" for name in sections(page)]


def test_its_numbers_are_those_of_the_summary(page: Element, trained: Path) -> None:
    rows = table(page, "top1 of each condition")
    summary = read_folder(trained).study.summary
    assert [row[0] for row in rows[1:]] == list(CONDITIONS)
    for name, seeds, mean, _, difference, interval, *_ in rows[2:]:
        found = summary.conditions[name]
        assert int(seeds) == found.seeds == 9
        assert float(mean) == pytest.approx(found.mean, abs=0.005)
        assert float(difference) == pytest.approx(found.difference, abs=0.005)
        assert [float(end) for end in interval.split(" to ")] == pytest.approx([found.low, found.high], abs=0.005)


def test_every_run_is_a_dot_that_names_it_and_every_mean_one(page: Element) -> None:
    tips = Counter(mark.attributes.get("data-tip", "").partition(":")[0] for mark in page.all("use"))
    for name in CONDITIONS:
        for seed in range(9):
            in_sweep = name.startswith("ECA") and "neutral" not in name
            assert tips[f"{name}, seed {seed}"] == 1 + (name != "none") + in_sweep
        assert tips[f"{name}, mean"] == 1 + (name != "none")


def test_failed_runs_and_runs_to_come_are_named(page: Element) -> None:
    assert table(page, "Runs that are not counted")[1:] == [
        ["SE", "9", "RuntimeError: out of memory", "se-seed9.json"],
    ]
    assert [note.text for note in page.all("p") if note.attributes.get("class") == "warning"] == [
        "1 run failed and is not counted: see Failed runs.",
        "The study is not finished: 7 of 80 runs are still to come.",
    ]


def test_the_command_that_makes_it_again_versions_commit_and_settings_are_told(page: Element) -> None:
    assert page.all("code")[0].text == "ecanet study my_study.yaml --seeds 9"
    made = dict(map(tuple, table(page, "How it was made")[1:]))
    assert made["commit"].startswith("0123456789abcdef")
    assert made["trained with"] == "ecanet 0.1.0, torch 2.14.1, device cpu"
    shared = dict(map(tuple, table(page, "Settings that all")[1:]))
    assert shared == {"model.name": "small_eca_resnet", "optim.lr": "0.1"}
    differing = table(page, "Settings in which the conditions differ")
    assert differing[0] == ["condition", "model.kernel_size", "model.neutral", "model.gate"]
    assert ["ECA, k = 3", "3", "false", "eca"] in differing


def test_the_profile_is_that_of_the_conditions_and_what_ecanet_profile_wrote_beside_them(page: Element) -> None:
    costs = table(page, "Cost of each condition")
    assert costs[2] == ["SE", "9", "6,064", "23.8", "x 1.05"]
    networks = table(page, "Networks by ecanet profile")
    assert networks == [["network", "parameters"], ["ResNet-18", "11689512"], ["SE", "11778592"]], "no empty column"


def test_a_study_of_a_users_own_function_by_an_earlier_version_has_its_sections_and_no_others(tmp_path: Path) -> None:
    folder = small(tmp_path, {"plain": [40.0, 41.0, 42.5], "gated": [41.0, 41.5, 44.0]})
    page = read_html(write_report(folder).read_text())
    assert sections(page) == ["cost", "differences", "runs", "settings"]
    assert page.all("h1")[0].text == "No difference from plain is shown in mAP."
    assert page.all("pre") == []
    assert table(page, "Every finished run")[0] == ["condition", "seed", "mAP", "loss", "seconds"]
    assert not list((folder / "figures").glob("curve*"))


@pytest.mark.parametrize(
    ("values", "says", "there"),
    [
        ({"only": [1.0]}, "One condition: nothing is compared.", ["cost", "runs", "settings"]),
        ({"a": [1.0], "b": [2.0]}, "No difference from a", ["cost", "differences", "runs", "settings"]),
        ({"a": [5.0] * 3, "b": [5.0] * 3}, "No difference from", ["cost", "differences", "runs", "settings"]),
        ({"a": [-1e99, 1e99], "b": [1e-99, 0.0]}, "No difference from", ["cost", "differences", "runs", "settings"]),
        ({"a": [math.nan], "b": [math.nan]}, "No difference from", ["failed", "runs", "settings"]),
        ({"a": [1.0], "b": [math.inf]}, "No difference from", ["cost", "failed", "runs", "settings"]),
    ],
    ids=["one condition", "one seed", "all equal", "large and small", "none counted", "one counted"],
)
def test_a_study_of_little_has_a_report_of_little(
    tmp_path: Path, values: dict[str, list[float]], says: str, there: list[str]
) -> None:
    page = read_html(render(read_folder(small(tmp_path, values))))
    assert page.all("h1")[0].text.startswith(says)
    assert sections(page) == there


def test_only_the_seeds_of_the_last_call_count_and_runs_without_a_file_are_named(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    shutil.copytree(trained, folder)
    about = json.loads((folder / "study.json").read_text())
    about |= {"seeds": [0, 2, 19], "lost": [["ECA", 19, "its process was killed by signal 9"]]}
    (folder / "study.json").write_text(json.dumps(about))
    found = read_folder(folder)
    assert {name: [run.seed for run in runs] for name, runs in found.study.runs.items()} == {
        name: [0, 2] for name in CONDITIONS
    }
    assert [(run.condition, run.seed, run.reason) for run in found.study.failed] == [
        ("ECA", 19, "its process was killed by signal 9")
    ]
    assert sorted(found.to_come) == sorted((name, 19) for name in CONDITIONS if name != "ECA")


def test_another_metric_is_compared_and_an_unknown_one_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = small(tmp_path, {"a": [1.0, 2.0], "b": [2.0, 4.0]})
    main(["report", str(folder), "--metric", "loss"])
    assert capsys.readouterr().out == f"wrote {folder / 'report.html'}\n"
    assert "No difference from a is shown in loss." in (folder / "report.html").read_text()
    with pytest.raises(ValueError, match=r"metric must be one that the runs in .* have \(mAP, loss\), got top1"):
        write_report(folder, "top1")


# --- how it is made -----------------------------------------------------------------------------------------------


def test_it_is_one_file_that_loads_nothing_and_runs_no_script_but_its_own(page: Element, trained: Path) -> None:
    [script] = page.all("script")
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    [policy] = [meta for meta in page.all("meta") if meta.attributes.get("http-equiv") == "Content-Security-Policy"]
    allowed = policy.attributes["content"] or ""
    assert f"script-src 'sha256-{digest}'" in allowed
    assert "default-src 'none'" in allowed
    addresses = [value for each in page.walk() for name, value in each.attributes.items() if name in ("src", "href")]
    assert all(str(address).startswith(("#", "data:")) for address in addresses)
    assert "url(" not in page.all("style")[0].text
    assert not any(name.startswith("on") for each in page.walk() for name in each.attributes)


def test_it_can_be_read_by_a_screen_reader(page: Element) -> None:
    ids = [each.attributes["id"] for each in page.walk() if "id" in each.attributes]
    assert len(set(ids)) == len(ids)
    assert page.all("html")[0].attributes["lang"] == "en"
    for each in page.all("table"):
        head, *rows = each.all("tr")
        assert each.all("caption")[0].text
        assert {cell.attributes["scope"] for cell in head.children} == {"col"}
        assert [row.children[0].attributes.get("scope") for row in rows] == ["row"] * len(rows)
        assert {len(row.children) for row in rows} <= {len(head.children)}
    pictures = [each for each in page.all("svg") if each.attributes.get("role") == "img"]
    assert len(pictures) == 1 + 7 + 3 + 1, "cost, differences, curves, kernel sizes"
    assert all(len(each.attributes["aria-label"] or "") > 20 for each in pictures)
    images = page.all("img")
    assert len(images) == 1 + 2 * 3, "a scale, and three stages of two conditions"
    assert all(len(each.attributes["alt"] or "") > 20 for each in images)
    assert all(section.attributes.keys() & {"aria-label", "aria-labelledby"} for section in page.all("section"))


def test_colours_are_those_of_all_figures_and_stand_out_on_dark_paper(page: Element) -> None:
    style = page.all("style")[0].text
    light, dark = style.rsplit("@media (prefers-color-scheme: dark)", 1)
    own = re.findall(r"\.c(\d+) \{ --c: (#\w+); \}", light)
    assert {colour for _, colour in own[:3]} == {IDEAS["none"], IDEAS["SE"], IDEAS["ECA"]}
    assert len(own) == len(CONDITIONS)
    assert f"--paper: {DARK_PAPER.lower()}" in style
    for colour in (*IDEAS.values(), *OTHERS):
        assert contrast(on_dark(colour, DARK_PAPER), DARK_PAPER) >= 4.5
    assert {colour for _, colour in re.findall(r"\.c(\d+) \{ --c: (#\w+); \}", dark)} == {
        on_dark(colour, DARK_PAPER) for _, colour in own
    }


def test_a_study_of_thousands_of_runs_takes_less_than_5_mb_and_leaves_out_dots_not_conditions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "ecanet.study.statistics.seeds_needed", lambda *_: 9
    )  # half a minute, and nothing to do with it
    values = [[70.0 + (i * j) % 13 for j in range(60)] for i in range(7)]
    runs = {
        name: [
            FinishedRun(name, seed, {"acc": 70.0 + (i * seed) % 17}, {"acc": values[(i + seed) % 7]}, 1.0, Path())
            for seed in range(10)
        ]
        for i, name in enumerate(f"condition number {i}" for i in range(320))
    }
    text = render(StudyFolder(Path("large"), Study("acc", runs, []), About()))
    assert len(text.encode()) < 5e6
    assert text.count('data-tip="') == 319 + 320 + 320, "differences, cost and curves: means alone"
    assert "(the first " in text


# --- curves, sweeps, settings, pictures ---------------------------------------------------------------------------


def a_run(seed: int = 0, **details: Any) -> FinishedRun:
    return FinishedRun("a", seed, {"acc": 1.0 + seed}, details, 1.0, Path())


def of_runs(*runs: FinishedRun) -> StudyFolder:
    return StudyFolder(Path("study"), Study("acc", {"a": list(runs)}, []), About())


def test_curves_are_lists_of_numbers_and_columns_of_records_the_metrics_own_first() -> None:
    history = [{"epoch": e, "val/acc": e, "z": 2.0 * e, "lr": 0.1, "note": "text"} for e in range(3)]
    other = [{**record, "z": 0.5} for record in history]
    found = of_runs(a_run(0, history=history, loss=[2.0, 1.0], one=[1.0]), a_run(1, history=other, loss=[3.0, 1]))
    assert list(curves(found)) == ["loss", "z"], "val/acc and lr are the same in both runs"
    other[2]["val/acc"] = 9
    assert list(curves(found)) == ["val/acc", "loss", "z"]
    assert curves(found)["val/acc"]["a"] == {0: [0.0, 1.0, 2.0], 1: [0.0, 1.0, 9.0]}


def test_a_curve_has_a_gap_where_it_has_no_number_and_long_ones_are_thinned() -> None:
    gap = [1.0, 2.0, math.nan, 3.0, 4.0, math.inf]
    [line] = curve_charts(of_runs(a_run(acc=gap)))["acc"].lines
    assert [len(stretch.split()) for stretch in line.points] == [2, 2]
    [line] = curve_charts(of_runs(a_run(acc=[float(i) for i in range(10_000)])))["acc"].lines
    assert len(line.points[0].split()) <= 201
    assert line.tip == "a, mean: acc 9999 at the end"


def test_a_sweep_is_of_conditions_that_differ_in_nothing_but_their_kernel_size(trained: Path) -> None:
    found = read_folder(trained)
    assert kernel_sweep(found) == {"1": "ECA, k = 1", "3": "ECA, k = 3", "9": "ECA, k = 9", "adaptive": "ECA"}
    chart = sweep_chart(found)
    assert chart is not None
    assert [text for _, text in chart.x_ticks] == ["1", "3", "9", "adaptive"]
    assert chart.zero is not None
    del found.study.runs["ECA, k = 9"][:], found.study.runs["ECA, k = 3"][:]
    assert kernel_sweep(found) == {}, "two are no sweep"


def test_settings_of_any_kind_are_shown(tmp_path: Path) -> None:
    found = of_runs(a_run(recipe={"model": {"widths": [1, 2], "deep": [[1]], "gate": None}, "seed": 4, "x": {}}))
    shared, differing = split_settings(found)
    assert shared == {"model.widths": "[1, 2]", "model.deep": "[...]", "model.gate": "none", "x": "{}"}
    assert differing == {}
    found.about.conditions = {"a": True}
    assert split_settings(found)[0] == {"value": "true"}


def test_pictures_can_be_read_and_so_can_those_of_names_that_are_no_names(trained: Path, tmp_path: Path) -> None:
    names = [name for name, figure in draw(read_folder(trained)) if assert_readable(figure) is None]
    assert names == [
        *("differences.png", "cost.png", "kernel_sweep.png", "curve-val-top1.png", "gates-se.png", "gates-eca.png"),
    ]
    folder = small(tmp_path, {"$x^{": [1.0, 2.0], "_hidden $\\frac$" + "y" * 90: [2.0, 4.0]}, "a$b$_{")
    for _, figure in draw(read_folder(folder)):
        assert_readable(figure)


def test_the_tables_are_there_as_parquet_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    polars = pytest.importorskip("polars")
    monkeypatch.setattr("ecanet.study.html_report.draw", lambda found: ())
    folder = small(tmp_path, {"a": [1.0, 2.0], "b": [2.0]})
    write_made_up_run(folder, "b", 7, {"mAP": 3.0, "seed": 5.0})
    write_report(folder)
    frame = polars.read_parquet(folder / "results.parquet")
    assert frame.columns == ["condition", "seed", "seconds", "mAP", "loss"]
    assert frame.rows()[-1] == ("b", 7, 27.0, 3.0, None)


# --- what strangers write -----------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x=\'',
    "</style></title></textarea>--><svg onload=alert(1)>",
    "{{ 7 * 7 }}{% raw %}${alert(1)}",
    "\u202egnp.exe\u2066\u200f",
    "a\nb\r\x00\x1b[2J\ud800",
    "javascript:alert(1)//&lt;b&gt;",
]


def hostile_study(folder: Path, text: Callable[[int], str]) -> Path:
    """A study in which everything that can be a text is one of these."""
    names = [f"{text(i)} {i}" for i in range(4)]
    metric = text(1)
    for name in names:
        for seed in (0, 1):
            details = {
                "history": [{text(5): e + seed, text(2): e * 2.0 + seed} for e in range(3)],
                "recipe": {text(3): {"kernel_size": names.index(name), text(0): text(4)}},
                "versions": [{text(0): text(1)}],
            }
            write_made_up_run(folder, name, seed, {metric: 1.0 + seed * names.index(name), text(2): 3.0}, details)
    write_made_up_run(folder, names[2], 5, {}, error=text(0))
    write_summary(folder, names, metric)
    gates = {text(3): [[0.2, 0.4], [0.1, None]]}
    learned = {names[1]: {"seed": 0, "classes": [text(0), text(5)], "gates": gates}}
    (folder / "gates.json").write_text(json.dumps(learned))
    (folder / "costs.json").write_text(
        json.dumps({name: {"parameters": 1, "multiply_adds": 2, "seconds": 0.5} for name in names})
    )
    about = {"metric": metric, "seeds": [0, 1, 5], "conditions": {name: {text(0): text(1)} for name in names}}
    about |= {"command": text(2), "commit": text(0), "date": text(1), "machine": text(3)}
    about["versions"] = {text(4): text(5)}
    (folder / "study.json").write_text(json.dumps(about))
    with (folder / "profile.csv").open("w", encoding="utf-8", errors="replace", newline="") as file:
        csv.writer(file).writerows([[text(0), text(1)], [text(2), text(3)]])
    return folder


@pytest.mark.parametrize("first", range(len(HOSTILE)))
def test_a_text_of_a_stranger_stays_a_text_wherever_it_stands(tmp_path: Path, first: int) -> None:
    tame = read_html(render(read_folder(hostile_study(tmp_path / "tame", lambda i: f"text {i}"))))
    folder = hostile_study(tmp_path / "hostile", lambda i: HOSTILE[(first + i) % len(HOSTILE)])
    text = render(read_folder(folder))
    page = read_html(text)
    assert Counter(each.tag for each in page.walk()) == Counter(each.tag for each in tame.walk())
    assert {name for each in page.walk() for name in each.attributes} == {
        name for each in tame.walk() for name in each.attributes
    }
    assert page.all("script")[0].text == tame.all("script")[0].text
    assert all(c.isprintable() or c == "\n" for c in text)
    used = {HOSTILE[(first + i) % len(HOSTILE)] for i in range(6)}
    for known in used & {*HOSTILE[:5], HOSTILE[7]}:  # as it was written, where it can be printed
        assert known in page.text


def test_damaged_files_of_runs_are_named_and_the_others_compared(tmp_path: Path) -> None:
    folder = small(tmp_path, {"a": [1.0, 2.0], "b": [2.0, 4.0]})
    runs = folder / "runs"
    (runs / "b-seed7.json").write_text("[" * 100_000)
    (runs / "b-seed8.json").write_text((runs / "b-seed1.json").read_text().replace("4.0", "9.0"))
    (runs / "b-seed9.json").write_bytes((runs / "b-seed1.json").read_bytes())
    (runs / "c.json").symlink_to("/dev/zero")
    found = read_folder(folder)
    assert [(run.condition, run.seed) for run in found.study.failed] == [("b", 7), ("b", 8), ("b", 9), ("c", 0)]
    reasons = [run.reason for run in found.study.failed]
    assert "nested too deeply" in reasons[0]
    assert "damaged or edited" in reasons[1]
    assert "b-seed9.json has the condition and seed of b-seed1.json" in reasons[2]
    assert "not a regular file" in reasons[3]
    assert found.study.summary.conditions["b"].seeds == 2
    assert sections(read_html(render(found))) == ["cost", "differences", "failed", "runs", "settings"]


GATES = {"seed": 0, "classes": ["x", "y"], "gates": {"g": [[0.1, 0.2], [0.3, 0.4]]}}
WRONG_FILES: list[tuple[str, Any, str]] = [
    ("study.json", [], "study.json does not say how a study was made (it is not a JSON object)"),
    ("study.json", {"seeds": "9", "conditions": {}, "versions": {}}, "its seeds are not a list of integers"),
    ("study.json", {"seeds": [], "conditions": [1], "versions": {}}, "its conditions are not settings by name"),
    ("study.json", {"seeds": [], "conditions": {}, "versions": {"a": 1}}, "its versions are not texts by name"),
    ("study.json", {"seeds": [], "conditions": {}, "versions": {}, "command": ["rm"]}, "its command is not a text"),
    ("study.json", {"seeds": [], "conditions": {}, "versions": {}, "lost": [1]}, "its lost runs are not"),
    ("costs.json", {"a": {"parameters": 1, "multiply_adds": 2}}, "costs.json does not say what a costs"),
    ("costs.json", {"a": {"parameters": 1, "multiply_adds": 2, "seconds": True}}, "does not say what a costs"),
    ("costs.json", {"a": {"parameters": 1, "multiply_adds": 2, "seconds": math.inf}}, "does not say what a costs"),
    (
        "profile.csv",
        "a,b\n1,2,3",
        "profile.csv is not a table of ecanet profile (its rows have different numbers of cells)",
    ),
    ("profile.csv", "\x00" * 3 + "\udcff", "profile.csv is not a table of ecanet profile"),
    ("gates.json", {"a": 3}, "gates.json does not say what a learned (no seed)"),
    ("gates.json", {"a": GATES | {"classes": [1, 2]}}, "its classes are not texts"),
    ("gates.json", {"a": GATES | {"classes": ["x"] * 41}}, "more than 40 classes"),
    ("gates.json", {"a": GATES | {"gates": {"g": [[1.0], [1.0, 2.0]]}}}, "what a learned"),
    ("gates.json", {"a": GATES | {"gates": {"g": [["1"], ["2"]]}}}, "what a learned"),
    ("gates.json", {"a": GATES | {"gates": {"g": [[1e300], [0.0]]}}}, "a gate is larger than 1e6"),
    ("gates.json", {"a": GATES | {"gates": {"g": 7}}}, "what a learned"),
    ("gates.json", {"a": GATES | {"gates": {"g": [[0.5] * 200_001] * 2}}}, "has more than 400,000 gates"),
]


@pytest.mark.parametrize(("name", "content", "says"), WRONG_FILES, ids=range(len(WRONG_FILES)))
def test_another_file_that_is_wrong_is_refused_by_name(tmp_path: Path, name: str, content: Any, says: str) -> None:
    folder = small(tmp_path, {"a": [1.0, 2.0]})
    text = content if name.endswith(".csv") else json.dumps(content)
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(says)) as refusal:
        write_report(folder)
    assert str(folder / name) in str(refusal.value)
    assert str(refusal.value).endswith("delete it")
    assert not (folder / "report.html").exists()


def test_a_folder_without_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no study"):
        write_report(tmp_path)
    with pytest.raises(SystemExit, match="holds no study"):
        main(["report", str(tmp_path)])
    write_made_up_run(tmp_path, "a", 0, {"x": 1.0})
    with pytest.raises(ValueError, match=r"holds no study: .* no summary"):
        write_report(tmp_path)


def test_a_missing_package_is_named_before_a_study_runs(tmp_path: Path) -> None:
    code = """import sys
sys.modules["jinja2"] = None
from ecanet.study import run
run(print, {"none": 0.0}, [0], sys.argv[1], "acc")
"""
    last = fresh.run(code, tmp_path / "out").stderr.splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert last.endswith("needs jinja2: pip install 'ecanet[study]'")
    assert not (tmp_path / "out").exists()
