"""Random tails are as close to float64 as their modules called one after another; the command draws 3,000."""

import random

import pytest
import torch

from scripts import random_tails


@pytest.mark.parametrize("seed", range(4))
def test_random_tails_are_as_close_to_float64_as_eager_pytorch(seed) -> None:
    rng = random.Random(seed)
    for _ in range(40):
        case = random_tails.draw(rng)
        assert not list(random_tails.problems(case)), case


def test_a_wrong_tail_would_be_seen(monkeypatch) -> None:
    right = random_tails.norm_gate_add_act
    monkeypatch.setattr(random_tails, "norm_gate_add_act", lambda *args: 1.001 * right(*args))
    rng = random.Random(0)
    cases = [case for case in (random_tails.draw(rng) for _ in range(40)) if case.dtype is torch.float32]
    assert cases
    assert all(list(random_tails.problems(case)) for case in cases)


def test_the_command_counts(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["random_tails", "--count", "3"])
    with pytest.raises(SystemExit) as stopped:
        random_tails.main()
    assert stopped.value.code == 0
    assert "3 tails, 0 of them" in capsys.readouterr().out
