"""What a profile measures: networks in turn, bytes that can be worked out by hand, intervals around medians."""

import csv
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from ecanet.models import small_eca_resnet
from ecanet.profile import Profile, profile_models, turns
from ecanet.profile import measure as measuring
from ecanet.profile.memory import peak_bytes
from ecanet.profile.turns import Competitor, Ratio, take_turns
from ecanet.profile.work import loss_of, settle

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def profiled() -> tuple[Profile, list[str]]:
    lines: list[str] = []
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    profile = profile_models(
        ["small_eca_resnet"], ["none", "se", "eca"], batch_size=2, image_size=8, rounds=2, on_progress=lines.append
    )
    assert torch.equal(torch.rand(3), expected), "the random generator is where it was"
    assert torch.get_num_threads() == threads
    return profile, lines


def test_every_network_has_a_time_for_each_round_and_its_median_lies_in_its_interval(profiled) -> None:
    for row in profiled[0].rows:
        found = row.measured
        assert {phase: len(seconds) for phase, seconds in found.seconds.items()} == {
            "training": 2, "inference": 2, "latency": 2
        }  # fmt: skip
        for ratio in (found.training, found.inference, found.latency):
            assert 0 < ratio.low <= ratio.value <= ratio.high
    first = profiled[0].rows[0].measured
    slowest, fastest = (2 / pick(first.seconds["training"]) for pick in (max, min))
    assert slowest <= first.training.value <= fastest


def test_the_share_of_gates_is_what_goes_without_them_and_a_network_without_gates_has_none(profiled) -> None:
    none, se, _ = (row.measured for row in profiled[0].rows)
    assert none.share_of_training is None
    assert none.share_of_inference is None
    with_gates, without = ([*sorted(x.seconds["training"])] for x in (se, none))
    assert se.share_of_training.value == pytest.approx(1 - sum(without) / sum(with_gates))  # of two, a median is a mean
    assert measuring._share([4.0] * 5, [3.0] * 5) == Ratio(0.25, 0.25, 0.25)


def test_networks_take_turns_with_the_same_network_without_gates_even_if_nobody_asked_for_it(monkeypatch) -> None:
    turns: list[list[str]] = []

    def see(competitors, *arguments, **named):
        turns.append(list(competitors))
        return take_turns(competitors, *arguments, **named)

    monkeypatch.setattr(measuring, "take_turns", see)
    profile = profile_models(["small_eca_resnet"], batch_size=2, image_size=8, rounds=1)
    assert turns == [["small_eca_resnet", "small_eca_resnet without gates"]] * 3
    assert [row.name for row in profile.rows] == ["small_eca_resnet"]


def test_a_step_holds_at_least_what_it_saves_and_a_gate_of_means_saves_no_map(profiled) -> None:
    none, se, eca = (row.measured for row in profiled[0].rows)
    for found in (none, se, eca):
        assert found.peak_of_training > found.saved_bytes
        assert found.peak_of_training > found.peak_of_inference > 0
    smallest_map = 4 * 2 * 128 * 2 * 2
    assert 0 < eca.saved_bytes - none.saved_bytes < 3 * smallest_map


def test_the_peak_is_the_most_that_is_held_at_a_time_beside_what_was_there(device: torch.device) -> None:
    kept = torch.ones(2**18, device=device)

    def run() -> None:
        first = kept + 1  # 1 MiB
        second = first + first  # 2 MiB held
        del first
        second.mul_(2)
        (second + 1).sum()  # 2 MiB again, and a number

    peak = peak_bytes(run, device)
    assert 2 * 2**20 <= peak < 2 * 2**20 + 4096


def test_what_torchs_profiler_prints_is_not_seen_and_what_is_printed_later_is(capfd) -> None:
    peak_bytes(lambda: torch.ones(3), CPU)
    assert capfd.readouterr().err == ""
    peak_bytes(lambda: torch.ones(3), CPU)
    os.write(2, b"later")
    assert capfd.readouterr().err == "later"


def test_a_loss_starts_from_logits_or_from_every_tensor_of_a_nested_output() -> None:
    logits = torch.zeros(2, 4, requires_grad=True)
    assert loss_of(logits, torch.tensor([1, 7])).item() == pytest.approx(torch.tensor(4.0).log().item())
    a, b = torch.full((2, 3, 4, 4), 2.0, requires_grad=True), torch.full((5,), 3.0, requires_grad=True)
    assert loss_of({"a": [a, torch.ones(2)], "b": (b, None)}, torch.zeros(2)).item() == pytest.approx(4 + 9)
    with pytest.raises(ValueError, match="returns no floating-point tensor that requires a gradient"):
        loss_of([torch.ones(2)], torch.zeros(2))


def test_progress_names_networks_and_rounds(profiled) -> None:
    lines = profiled[1]
    assert "small_eca_resnet + se: counts, network 2 of 3" in lines
    assert "small_eca_resnet + se: memory" in lines
    assert "latency: round 2 of 2, 3 networks" in lines


def test_files_hold_every_number_and_the_settings(profiled, tmp_path: Path) -> None:
    profile = profiled[0]
    profile.write(tmp_path / "new")
    assert (tmp_path / "new" / "profile.md").read_text() == f"{profile}\n"
    document = json.loads((tmp_path / "new" / "profile.json").read_text())
    assert document["settings"] == {"batch_size": 2, "rounds": 2, "threads": 1, "device": "cpu", "dtype": "float32"}
    assert document["machine"]["versions"]["torch"] == torch.__version__
    with (tmp_path / "new" / "profile.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, written, line in zip(profile.rows, document["rows"], rows, strict=True):
        assert written["measured"]["seconds"]["training"] == list(row.measured.seconds["training"])
        assert int(line["parameters"]) == written["counts"]["parameters"] == row.counts.parameters
        assert float(line["training_low"]) == row.measured.training.low
        share = row.measured.share_of_training
        assert line["share_of_training"] == ("" if share is None else str(share.value))


def test_networks_that_do_not_train_on_the_pictures_are_named_before_anything_is_timed(monkeypatch) -> None:
    monkeypatch.setattr(measuring, "take_turns", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(ValueError, match=r"alexnet does not run on pictures of shape \(1, 3, 16, 16\): "):
        profile_models(["small_eca_resnet", "torchvision/alexnet"], image_size=16, rounds=1)


def test_norms_have_the_statistics_of_the_pictures_and_their_own_momentum_before_they_are_timed() -> None:
    norms = [nn.BatchNorm1d(3, momentum=0.01), nn.BatchNorm1d(3, momentum=None)]
    x = torch.randn(4, 3, 5) + 7
    settle(nn.Sequential(*norms), x)
    torch.testing.assert_close(norms[0].running_mean, x.mean((0, 2)))
    assert [norm.momentum for norm in norms] == [0.01, None]


def test_where_the_system_counts_no_page_faults_there_is_no_number_of_them(monkeypatch) -> None:
    monkeypatch.setattr(turns, "resource", None)  # as on Windows
    timing = take_turns({"nothing": Competitor(lambda: None)}, rounds=1, turn_seconds=0.001)["nothing"]
    assert timing.page_faults is None
    assert len(timing.seconds) == 1


def test_the_costs_of_a_study_are_steps_timed_in_the_same_turns(monkeypatch) -> None:
    from ecanet.study.costs import measure_costs

    asked: list[tuple[list[str], int]] = []

    def pretend(competitors, rounds, **_):
        asked.append((list(competitors), rounds))
        return {name: type("Timing", (), {"seconds": (3.0, 1.0, 2.0)}) for name in competitors}

    monkeypatch.setattr(measuring, "take_turns", pretend)
    networks: dict[str, nn.Module] = {"none": small_eca_resnet(None), "ECA": small_eca_resnet("eca")}
    costs = measure_costs(networks, image_size=8, batch_size=2, rounds=3)
    assert asked == [(["none", "ECA"], 3)]
    assert costs["ECA"].seconds == 2.0
