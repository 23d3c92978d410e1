"""Which modules of a tail are called, and that hooks on them fire."""

from typing import Any

import pytest
import torch
from tails import TOLERANCE, C, GateWithDropout, Tail, assert_equal, feature_map, plain, step
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torchvision.ops import FrozenBatchNorm2d

import ecanet
from ecanet.nn import ECA, SE, Gate, norm_gate_add_act
from ecanet.nn.tail import shared_norm
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


class NormWithItsOwnCall(nn.BatchNorm2d):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class ECAWithItsOwnCall(ECA):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("norm", "gate"),
    [(NormWithItsOwnCall(C), SE(C)), (nn.BatchNorm2d(C), ECAWithItsOwnCall(C))],
    ids=["norm", "gate"],
)
def test_the_call_of_a_class_is_obeyed(norm, gate, compiles) -> None:
    x = feature_map(3, C, 5, 4)
    torch._dynamo.reset()
    run = torch.compile(norm_gate_add_act, backend="eager") if compiles else norm_gate_add_act
    torch.testing.assert_close(run(x, norm, gate, x, "relu"), torch.relu(gate(norm(x)) + x))


REPLACED: dict[str, tuple[type, str, Any, Any]] = {
    "forward of the norm": (nn.BatchNorm2d, "forward", nn.BatchNorm2d, ECA),
    "call of the norm": (nn.BatchNorm2d, "__call__", nn.BatchNorm2d, ECA),
    "forward of the frozen norm": (FrozenBatchNorm2d, "forward", FrozenBatchNorm2d, SE),
    "forward of the activation": (nn.ReLU, "forward", nn.BatchNorm2d, ECA),
    "forward of every gate": (Gate, "forward", nn.BatchNorm2d, SE),
    "call of the gate": (ECA, "__call__", nn.BatchNorm2d, ECA),
    "forward of the layer inside ECA": (nn.Conv1d, "forward", nn.BatchNorm2d, ECA),
    "maths of the layer inside ECA": (nn.Conv1d, "_conv_forward", nn.BatchNorm2d, ECA),
    "forward of the layers inside SE": (nn.Linear, "forward", nn.BatchNorm2d, SE),
}


@pytest.mark.parametrize(("cls", "method", "norm", "gate"), REPLACED.values(), ids=REPLACED)
def test_a_method_that_somebody_puts_into_a_class_runs(cls, method, norm, gate, monkeypatch) -> None:
    x, tail = feature_map(3, C, 5, 4), Tail(norm(C), gate(C), nn.ReLU())
    before, original, calls = tail(x, x), getattr(cls, method), []

    def instead(self: nn.Module, *args: Any) -> Any:
        calls.append(method)
        return original(self, *args) - 1

    monkeypatch.setattr(cls, method, instead)
    got = tail(x, x)
    assert calls
    assert not torch.allclose(got, before)
    assert_equal({"out": got}, {"out": plain(tail)(x, x)}, TOLERANCE[torch.float32])


def test_a_forward_that_somebody_puts_into_timms_norm_runs(monkeypatch) -> None:
    norm_act = pytest.importorskip("timm.layers.norm_act")
    x, norm, gate = feature_map(3, C, 5, 4), norm_act.BatchNormAct2d(C, apply_act=False), ECA(C)
    monkeypatch.setattr(norm_act.BatchNormAct2d, "forward", lambda self, x: x - 1)
    torch.testing.assert_close(norm_gate_add_act(x, norm, gate), gate(x - 1))


def test_a_forward_that_somebody_puts_into_sync_batch_norm_is_not_ours(monkeypatch) -> None:
    monkeypatch.setattr(shared_norm, "process_group", lambda norm: "some processes")
    norm, x = nn.SyncBatchNorm(C), torch.randn(2, C, 3, 3)
    assert shared_norm.needs_our_forward(norm, x)
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda self, x: x)
    assert not shared_norm.needs_our_forward(norm, x)
