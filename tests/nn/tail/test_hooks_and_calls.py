"""Which modules of a tail are called, and that hooks on them fire."""

from typing import Any

import pytest
import torch
from tails import TOLERANCE, C, GateWithDropout, Tail, assert_equal, feature_map, plain, step
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torchvision.ops import FrozenBatchNorm2d

import ecanet
from ecanet.nn import ECA, SE, norm_gate_add_act
from tests.kernels_here import needs_kernels


class NormOfOnesOwn(nn.BatchNorm2d):
    """A norm that does something more."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.fixture
def called(monkeypatch) -> list[str]:
    """Names of the classes of the modules that are called from now on."""
    names: list[str] = []
    original = nn.Module.__call__

    def record(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        names.append(type(self).__name__)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", record)
    return names


TAKEN_OVER = {
    "BatchNorm, ECA, ReLU": (nn.BatchNorm2d(C), ECA(C), nn.ReLU(inplace=True), []),
    "BatchNorm, SE, SiLU": (nn.BatchNorm2d(C), SE(C), nn.SiLU(), []),
    "BatchNorm in evaluation": (nn.BatchNorm2d(C).eval(), ECA(C), nn.Hardswish(), []),
    "BatchNorm alone": (nn.BatchNorm2d(C), None, nn.ReLU6(), []),
    "SyncBatchNorm": (nn.SyncBatchNorm(C), ECA(C), None, []),
    "FrozenBatchNorm2d": (FrozenBatchNorm2d(C), ECA(C), "relu", []),
    "a gate of one's own": (nn.BatchNorm2d(C), GateWithDropout(C), "relu", ["Dropout", "Linear"]),
    "a norm of one's own is called": (NormOfOnesOwn(C), ECA(C), "relu", ["NormOfOnesOwn"]),
    "GroupNorm is called": (nn.GroupNorm(4, C), ECA(C), "relu", ["GroupNorm"]),
    "GELU is called": (nn.BatchNorm2d(C), ECA(C), nn.GELU(), ["GELU"]),
    "what is no Gate is called": (nn.BatchNorm2d(C), nn.Identity(), "relu", ["Identity"]),
}


@needs_kernels
@pytest.mark.parametrize(("norm", "gate", "act", "modules"), TAKEN_OVER.values(), ids=TAKEN_OVER)
def test_the_kernels_take_over_what_they_know(norm, gate, act, modules, called) -> None:
    norm_gate_add_act(torch.randn(2, C, 4, 4, requires_grad=True), norm, gate, torch.randn(2, C, 4, 4), act)
    assert called == modules


def test_on_the_reference_the_modules_are_called(called) -> None:
    with ecanet.backend("reference"):
        norm_gate_add_act(torch.randn(2, C, 4, 4), nn.BatchNorm2d(C), ECA(C), None, nn.ReLU())
    assert called == ["BatchNorm2d", "ECA", "ReLU"]


def forward_hook(module: nn.Module, log: list[str]) -> Any:
    return module.register_forward_hook(lambda *_: log.append("forward"))


def forward_pre_hook(module: nn.Module, log: list[str]) -> Any:
    return module.register_forward_pre_hook(lambda *_: log.append("forward pre"))


def full_backward_hook(module: nn.Module, log: list[str]) -> Any:
    return module.register_full_backward_hook(lambda *_: log.append("backward"))


def full_backward_pre_hook(module: nn.Module, log: list[str]) -> Any:
    return module.register_full_backward_pre_hook(lambda *_: log.append("backward pre"))


def replaced_forward(module: nn.Module, log: list[str]) -> Any:
    original = module.forward

    def forward(x: Tensor) -> Tensor:
        log.append("replaced forward")
        return original(x)

    module.forward = forward


HOOKS = [forward_hook, forward_pre_hook, full_backward_hook, full_backward_pre_hook, replaced_forward]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("where", ["norm", "gate", "act"])
def test_hooks_fire_and_nothing_else_changes(where, hook) -> None:
    for gate in (ECA(C), SE(C)):
        tail = Tail(nn.BatchNorm2d(C), gate, nn.ReLU()).double()
        want = plain(tail)
        log: list[str] = []
        hook(getattr(tail, where), log)
        x = feature_map(3, C, 5, 4, dtype=torch.float64)
        got = step(tail, x, x)
        assert len(log) == 1
        assert_equal(got, step(want, x, x), TOLERANCE[torch.float64])


@pytest.mark.parametrize(
    "register",
    [
        module_hooks.register_module_forward_hook,
        module_hooks.register_module_forward_pre_hook,
        module_hooks.register_module_full_backward_hook,
    ],
)
def test_hooks_on_all_modules_see_every_module(register) -> None:
    seen: list[str] = []
    tail = Tail(nn.BatchNorm2d(C), ECA(C), nn.ReLU())
    handle = register(lambda module, *_: seen.append(type(module).__name__))
    try:
        step(tail, feature_map(3, C, 5, 4), torch.randn(3, C, 5, 4))
    finally:
        handle.remove()
    assert {"BatchNorm2d", "ECA", "ReLU"} <= set(seen)


def test_a_hook_that_changes_the_output_of_the_norm_is_obeyed() -> None:
    norm, gate, x = nn.BatchNorm2d(C), ECA(C), feature_map(3, C, 5, 4)
    norm.register_forward_hook(lambda module, args, out: out + 1)
    torch.testing.assert_close(norm_gate_add_act(x, norm, gate), gate(norm(x)))
