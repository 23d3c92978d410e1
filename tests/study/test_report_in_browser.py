"""A study's report in headless Chromium: silent, saying what is pointed at, readable on narrow and on dark screens."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_up_studies import CONDITIONS, trained_study
from test_html_report import HOSTILE, hostile_study

from ecanet.inspect.style import contrast
from ecanet.study.html_report.page import render
from ecanet.study.html_report.reading import read_folder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

#: Of every text that is seen: what it says, its colour, that of what is behind it, and where it stands.
TEXTS = """() => {
  const hex = (color) => "#" + color.match(/\\d+/g).slice(0, 3).map((c) => (+c).toString(16).padStart(2, "0")).join("");
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if (!/, 0\\)$/.test(color)) return hex(color);
    }
    return null;
  };
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, box = element.getBoundingClientRect();
    if (!walker.currentNode.data.trim() || element.closest("script, style") || !box.width) continue;
    const style = getComputedStyle(element);
    const color = hex(element.closest("svg") ? style.fill : style.color);
    found.push([walker.currentNode.data, color, behind(element), box.left, box.right, !!element.closest(".scroll")]);
  }
  return found;
}"""
MARKS = """() => [...document.querySelectorAll(".mark, .curve.main, .span")].map((mark) => {
  const style = getComputedStyle(mark), color = style.getPropertyValue("--c").trim();
  return color.toLowerCase();
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A study that has everything, and one whose every text is an attack."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("trained", "hostile")}
    trained_study(folders["trained"], seeds=5, epochs=6)
    hostile_study(folders["hostile"], lambda i: HOSTILE[i % len(HOSTILE)])
    for folder in folders.values():
        (folder / "report.html").write_text(render(read_folder(folder)), encoding="utf-8")
    return {name: folder / "report.html" for name, folder in folders.items()}


@pytest.fixture
def show(browser: Any, reports: dict[str, Path]) -> Iterator[Callable[..., Any]]:
    """Opens a report, and says at the end whether anything was logged, asked for or opened."""
    wrong: list[str] = []
    contexts = []

    def opened(name: str, width: int = 1200, **more: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, **more)
        contexts.append(context)
        page = context.new_page()
        address = reports[name].as_uri()
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("popup", lambda popup: wrong.append("popup"))
        page.on("request", lambda request: _is_own(request.url, address) or wrong.append(request.url))
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def _is_own(url: str, address: str) -> bool:
    return url in (address, "data:,") or url.startswith("data:image/png;base64,")


def unfold(page: Any) -> None:
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")


@pytest.mark.parametrize("name", ["trained", "hostile"])
def test_nothing_is_logged_asked_for_or_run_whatever_is_pointed_at(show: Callable[..., Any], name: str) -> None:
    page = show(name)
    unfold(page)
    for mark in page.locator("[data-tip], [data-cells]").all()[::25]:
        mark.hover(force=True)
    page.locator("summary").first.click()
    page.locator("nav a").last.click()
    assert page.url.endswith("#settings")
    assert page.evaluate("document.scripts.length") == 1


def bring_into_view(what: Any) -> None:
    """Scroll, which hides what was said, and wait until the page has been told: it is before the second frame."""
    what.scroll_into_view_if_needed()
    what.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def test_pointing_at_a_dot_a_curve_or_a_cell_says_whose_it_is(show: Callable[..., Any]) -> None:
    page = show("trained")
    tip = page.locator("#tip")
    assert not tip.is_visible()
    for section in ("cost", "differences", "sweep"):
        dot = page.locator(f"section[aria-labelledby={section}] use.dot[data-tip^='ECA, k = 9, seed 3']").first
        bring_into_view(dot)
        dot.hover(force=True)
        assert tip.is_visible()
        assert tip.inner_text().startswith("ECA, k = 9, seed 3: ")
        box, screen = tip.bounding_box(), page.viewport_size
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= screen["width"]
    curve = page.locator("section[aria-labelledby=curves] polyline.main.c1").first
    bring_into_view(curve)
    x, y = curve.evaluate(
        "(line) => { const box = line.closest('[role=img]').getBoundingClientRect(), last = line.points.getItem(1);"
        " return [box.left + (last.x / 1000) * box.width, box.top + last.y]; }"
    )
    page.mouse.move(x, y)
    assert "val/top1" in tip.inner_text()
    heat = page.locator(".heat img").first
    bring_into_view(heat)
    box = heat.bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + 9)
    text, order = tip.inner_text(), heat.get_attribute("data-order").split()
    assert text.startswith(f"T-shirt, channel {order[0]}: 0.")
    page.mouse.move(box["x"] + 5, box["y"] + 8 * 18 + 9)
    assert tip.inner_text() == f"Bag, channel {order[0]}: no images"
    page.keyboard.press("Escape")
    assert not tip.is_visible()


@pytest.mark.parametrize("name", ["trained", "hostile"])
def test_a_screen_of_400_pixels_shows_all_without_scrolling_sideways(show: Callable[..., Any], name: str) -> None:
    page = show(name, width=400)
    unfold(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    texts = page.evaluate(TEXTS)
    assert len(texts) > 100
    for text, _, _, left, right, is_in_a_table in texts:
        assert is_in_a_table or (left >= 0 and right <= 400), text
    for chart in page.locator(".plot svg[role=img]").all():
        assert chart.bounding_box()["width"] > 280


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_and_mark_stands_out_from_the_paper(show: Callable[..., Any], scheme: str) -> None:
    page = show("trained", color_scheme=scheme)
    unfold(page)
    page.locator("use.dot").first.hover(force=True)
    texts = page.evaluate(TEXTS)
    papers = {paper for _, _, paper, *_ in texts}
    assert len(papers) >= 2
    assert all((contrast(paper, "#000000") < 2) == (scheme == "dark") for paper in papers if paper != texts[-1][2])
    for text, colour, paper, *_ in texts:
        assert contrast(colour.upper(), paper.upper()) >= 4.5, (text, colour, paper)
    marks = set(page.evaluate(MARKS))
    assert len(marks) == len({*CONDITIONS}) - 3, "ECA and its kernel sizes have one colour"
    if scheme == "dark":
        assert all(contrast(colour, texts[0][2]) >= 3 for colour in marks)


def test_a_screen_reader_finds_tables_and_figures_by_name(show: Callable[..., Any]) -> None:
    page = show("trained")
    assert page.get_by_role("table", name="top1 of each condition").count() == 1
    assert page.get_by_role("columnheader", name="95 % interval").count() == 1
    assert page.get_by_role("rowheader", name="ECA, neutral start").count() >= 1
    assert page.get_by_role("img", name="top1 against training step (ms), means: none").count() == 1
    assert page.get_by_role("img", name="ECA minus none in top1: +").count() == 1
    assert page.get_by_role("heading", level=2).count() == 9
    assert page.get_by_role("navigation").get_by_role("link").count() == 9
