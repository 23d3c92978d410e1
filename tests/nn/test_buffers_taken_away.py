"""A norm whose running buffers somebody set to None trains and evaluates as torch's own does."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ecanet.nn import build_gate, norm_gate_add_act

C = 16


def taken(*names: str) -> Any:
    def take(norm: Any) -> None:
        for name in names:
            setattr(norm, name, None)

    return take


def switched_off(norm: Any) -> None:
    norm.track_running_stats = False
    taken("running_mean", "running_var", "num_batches_tracked")(norm)


AWAY = {
    "mean and variance": taken("running_mean", "running_var"),
    "all three": taken("running_mean", "running_var", "num_batches_tracked"),
    "the count of batches": taken("num_batches_tracked"),
    "the mean alone": taken("running_mean"),
    "the variance alone": taken("running_var"),
    "all, and no tracking": switched_off,
}
NORMS: dict[str, Any] = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(C),
    "BatchNorm2d": lambda: nn.BatchNorm2d(C),
    "cumulative average": lambda: nn.BatchNorm2d(C, momentum=None),
    "BatchNorm3d, not affine": lambda: nn.BatchNorm3d(C, affine=False),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(C),
}


def outcome(run: Any, norm: Any, x: Tensor) -> Any:
    """Outputs, gradients and buffers of two steps and an evaluation; or the type of what is raised."""
    try:
        seen = []
        for _ in range(2):
            y = run(x)
            seen += [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *norm.parameters()])]
        norm.eval()
        seen.append(run(x).detach())
        return [*seen, *(t for t in norm._buffers.values() if t is not None)]
    except (AssertionError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        return type(error)


@pytest.mark.parametrize("gate", [None, "eca", "se"], ids=str)
@pytest.mark.parametrize("take", AWAY.values(), ids=AWAY)
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_without_buffers_does_what_torch_does(name, take, gate) -> None:
    norm = NORMS[name]().double()
    take(norm)
    other, module = copy.deepcopy(norm), None if gate is None else build_gate(gate, C).double()
    sizes = {"BatchNorm1d": (7,), "BatchNorm3d, not affine": (2, 3, 2)}.get(name, (5, 3))
    x = torch.randn(4, C, *sizes, dtype=torch.float64, requires_grad=True)
    want = outcome(lambda x: torch.relu(other(x) if module is None else module(other(x))), other, x)
    got = outcome(lambda x: norm_gate_add_act(x, norm, module, None, "relu"), norm, x)
    if isinstance(want, type):
        assert got is want
    else:
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)
