"""Which collective a process takes part in depends on nothing that is its own: all ways to run go together."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ecanet
from ecanet.nn import ECA, norm_gate_add_act
from ecanet.ops.reference import accumulation_dtype
from tests.nn.protocol_processes import CASES, SLOW_WAYS, WAYS, plan, run_in_processes, training_step

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="this torch has no gloo"
)


def test_every_way_to_run_trains_beside_every_other(tmp_path) -> None:
    joined = {
        (world, name): training_step(case, "reference", world) for world in (2, 3) for name, case in CASES.items()
    }
    for world, case, ways, each in run_in_processes(tmp_path):
        for name, want in joined[world, case].items():
            if name.startswith("sum"):  # what DistributedDataParallel adds up
                got = torch.stack([seen[name] for seen in each]).sum(0)
            elif name.startswith("mean"):  # what it has added up and divided
                got, want = each[-1][name], want / world
            elif name.startswith("same"):
                got = each[0][name]
                torch.testing.assert_close(each[1][name], got, rtol=1e-12, atol=1e-12)
            else:
                got = torch.cat([seen[name] for seen in each])
            torch.testing.assert_close(
                got, want, rtol=1e-9, atol=1e-9, msg=lambda text, at=(case, ways, name): f"{at}: {text}"
            )


def test_all_pairs_of_ways_and_all_cases_are_tried() -> None:
    pairs = [ways for _, ways in plan(2)]
    assert {(a, b) for a in WAYS for b in WAYS} <= set(pairs)
    assert set(SLOW_WAYS) <= {way for ways in pairs for way in ways}
    for world in (2, 3):
        assert {case for case, _ in plan(world)} == set(CASES)
    assert {way for _, ways in plan(3) for way in ways} == set(WAYS)


class Alone:
    """A group of two processes of which the other sends what this one sends."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, tuple[int, ...], torch.dtype]] = []

    def _get_backend_name(self) -> str:
        return "gloo"

    def all_gather(self, parts: list[torch.Tensor], mine: torch.Tensor, group: Any) -> None:
        self.sent.append(("all_gather", tuple(mine.shape), mine.dtype))
        for part in parts:
            part.copy_(mine)

    def all_reduce(self, sums: torch.Tensor, group: Any) -> None:
        self.sent.append(("all_reduce", tuple(sums.shape), sums.dtype))
        sums.mul_(2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("samples", [3, 0])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_what_is_sent_is_what_torch_sends(backend, samples, dtype, monkeypatch) -> None:
    group = Alone()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_gather", group.all_gather)
    monkeypatch.setattr(dist, "all_reduce", group.all_reduce)
    norm = nn.SyncBatchNorm(8, process_group=group)
    gate = ECA(8)
    if dtype is torch.float64:
        norm, gate = norm.double(), gate.double()
    x = torch.randn(samples, 8, 3, 3).to(dtype).requires_grad_()
    with ecanet.backend(backend):
        norm_gate_add_act(x, norm, gate, act="relu").sum().backward()
    wire = accumulation_dtype(dtype)
    assert group.sent == [("all_gather", (17,), wire), ("all_reduce", (16,), wire)]
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert norm.num_batches_tracked == 1


def test_hooks_see_the_norm_itself_and_a_hook_that_raises_leaves_it_as_it_was(monkeypatch) -> None:
    group = Alone()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_gather", group.all_gather)
    norm, seen = nn.SyncBatchNorm(8, process_group=group), []
    norm.register_forward_hook(lambda module, args, out: seen.append(module))
    norm_gate_add_act(torch.randn(2, 8, 3, 3), norm)
    assert seen == [norm]

    def refuse(module: nn.Module, args: Any, out: Any) -> None:
        raise KeyError

    norm.register_forward_hook(refuse)
    with pytest.raises(KeyError):
        norm_gate_add_act(torch.randn(2, 8, 3, 3), norm)
    assert "forward" not in vars(norm)
