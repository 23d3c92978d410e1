"""What the tests of studies share."""

import importlib
import multiprocessing

import pytest

from tests import fresh  # noqa: F401  what the server of forks imports


@pytest.fixture(autouse=True)
def _reports_without_pictures_and_long_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study's report comes without its PNG files, which take a second each, and times a step of few pictures once."""
    # The module that is imported: a test that imports the package anew leaves it without this attribute.
    monkeypatch.setattr(importlib.import_module("ecanet.study.html_report"), "draw", lambda found: ())
    evidence = importlib.import_module("ecanet.study.evidence")
    monkeypatch.setattr(evidence, "_ROUNDS", 1)
    monkeypatch.setattr(evidence, "_PIXELS", 2 * 28 * 28)


@pytest.fixture(autouse=True)
def _workers_need_not_import_torch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers get pickles and know nothing of ecanet, as spawned ones."""
    if "capfd" in request.fixturenames:  # what they say would come out of the server
        return
    context = multiprocessing.get_context
    monkeypatch.setattr(
        multiprocessing, "get_context", lambda method=None: context("forkserver" if method == "spawn" else method)
    )
