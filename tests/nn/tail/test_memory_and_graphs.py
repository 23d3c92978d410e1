"""The tail under transforms of torch.func and checkpointing, what its graph keeps, and how long."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from tails import (
    TOLERANCE,
    C,
    OneAfterAnother,
    Tail,
    assert_equal,
    both_layouts,
    build,
    feature_map,
    plain,
    randomise_,
    step,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import ecanet
from ecanet.nn import ECA, SE, norm_gate_add_act
from ecanet.ops import cpu
from tests.kernels_here import needs_kernels


def test_functional_derivatives_take_the_plain_path() -> None:
    tail = Tail(randomise_(nn.BatchNorm2d(C)).eval(), SE(C), "relu").double()
    parameters = dict(tail.named_parameters())
    x = feature_map(3, C, 5, 4, dtype=torch.float64)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(tail, weights, (x, x)).square().sum()

    got = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    want = step(plain(tail), x, x, 2 * plain(tail)(x, x).detach())
    for name in parameters:
        torch.testing.assert_close(got[0][name], want[f"gradient of {name}"])
    torch.testing.assert_close(got[1], want["gradient of x"] + want["gradient of the residual"])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_forward_derivatives_take_the_plain_path(training) -> None:
    tail = Tail(nn.BatchNorm2d(C, track_running_stats=not training), ECA(C), "silu").double().train(training)
    x, tangent = feature_map(3, C, 5, 4, dtype=torch.float64), torch.randn(3, C, 5, 4, dtype=torch.float64)
    _, want = torch.func.jvp(plain(tail), (x,), (tangent,))
    _, got = torch.func.jvp(tail, (x,), (tangent,))
    torch.testing.assert_close(got, want)
    with forward_ad.dual_level():
        torch.testing.assert_close(forward_ad.unpack_dual(tail(forward_ad.make_dual(x, tangent))).tangent, want)


def test_vmap_over_sets_of_maps() -> None:
    tail = Tail(randomise_(nn.BatchNorm2d(C)).eval(), ECA(C), "relu")
    x = feature_map(6, C, 5, 4)
    torch.testing.assert_close(torch.vmap(tail)(x.unflatten(0, (3, 2))), tail(x).unflatten(0, (3, 2)))


def test_subclasses_of_tensor_see_torch_functions() -> None:
    seen = []

    class Logged(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(getattr(func, "__name__", ""))
            return super().__torch_function__(func, types, args, kwargs)

    x = feature_map(3, C, 5, 4)
    tail = Tail(nn.BatchNorm2d(C).eval(), ECA(C), "relu")
    out = tail(x.as_subclass(Logged))
    assert isinstance(out, Logged)
    assert "batch_norm" in seen
    torch.testing.assert_close(out.as_subclass(Tensor), tail(x))


@pytest.mark.parametrize("gate", [None, "eca", "se", "with dropout"], ids=str)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_activation_checkpointing(gate, reentrant) -> None:
    tail = Tail(nn.BatchNorm2d(C), build(gate), "relu").double()
    other = plain(tail)
    x = feature_map(3, C, 5, 4, dtype=torch.float64)

    class Checkpointed(Tail):
        def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
            inside = OneAfterAnother.forward if self.is_plain else Tail.forward
            return checkpoint(inside, self, x, residual, use_reentrant=reentrant)

    results = []
    for module in (tail, other):
        wrapped = Checkpointed(module.norm, module.gate, module.act)
        wrapped.is_plain = module is other
        torch.manual_seed(1)
        results.append(step(wrapped, x, x))
    assert_equal(*results, TOLERANCE[torch.float64])


@pytest.mark.parametrize("gate", [None, "eca", "se", "with dropout"], ids=str)
def test_a_kept_graph_gives_the_same_gradients_again(gate) -> None:
    tail = Tail(nn.BatchNorm2d(C), build(gate), "relu")
    x = feature_map(3, C, 5, 4).requires_grad_()
    out = tail(x, x).square().sum()
    inputs = [x, *tail.parameters()]
    first, second = (torch.autograd.grad(out, inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.autograd.grad(out, inputs)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, inputs)


@pytest.mark.parametrize("gate", [None, "eca", "se", "with dropout"], ids=str)
def test_saved_tensors_may_be_stored_elsewhere(gate) -> None:
    tail = Tail(nn.BatchNorm2d(C), build(gate))
    x = feature_map(3, C, 5, 4).requires_grad_()
    grads = []
    for pack in (lambda t: t, lambda t: t.clone()):
        torch.manual_seed(1)
        with saved_tensors_hooks(pack, lambda t: t):
            out = tail(x, x)
        grads.append(torch.autograd.grad(out.square().sum(), [x, *tail.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("gate", [None, "eca", "se"], ids=str)
def test_nothing_is_kept_alive_by_a_circle(gate) -> None:
    tail = Tail(nn.BatchNorm2d(C), build(gate), "relu")
    gc.disable()
    try:
        for backward in (False, True):
            x = feature_map(3, C, 5, 4).requires_grad_()
            out = tail(x)
            if backward:
                out.sum().backward()
            alive = [weakref.ref(x), weakref.ref(out)]
            del x, out
            assert [reference() for reference in alive] == [None, None]
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("gate", [None, "eca", "se"], ids=str)
def test_several_gradients_at_once(gate) -> None:
    tail = Tail(nn.BatchNorm2d(C), build(gate), "relu")
    x = feature_map(3, C, 5, 4).requires_grad_()
    out = tail(x, x)
    dout = torch.randn(4, *out.shape)
    (got,) = torch.autograd.grad(out, x, dout, retain_graph=True, is_grads_batched=True)
    want = [torch.autograd.grad(out, x, one, retain_graph=True)[0] for one in dout]
    torch.testing.assert_close(got, torch.stack(want))


def test_deterministic_algorithms_are_good_enough_and_repeat_themselves() -> None:
    torch.use_deterministic_algorithms(True)  # no warn_only: an operation without a deterministic way would raise
    x = feature_map(3, C, 5, 4)
    tail = Tail(nn.BatchNorm2d(C, track_running_stats=False), ECA(C), "relu")
    results = [step(tail, x, x) for _ in range(2)]
    assert_equal(*results, 0.0)


def saved_bytes(function: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward pass, every storage counted once; parameters are not counted."""
    storages = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        out = function()
    assert out.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("act", [None, "relu", "relu6", "silu"], ids=str)
def test_an_addition_alone_keeps_no_more_than_torchs_own(act) -> None:
    x, residual = (torch.randn(2, C, 28, 28, requires_grad=True) for _ in range(2))
    functions = {"relu": torch.relu_, "relu6": nn.functional.relu6, "silu": nn.functional.silu}
    want = saved_bytes(lambda: functions.get(act, lambda y: y)(x + residual))
    assert saved_bytes(lambda: norm_gate_add_act(x, residual=residual, act=act)) == want


@needs_kernels
@both_layouts
@pytest.mark.parametrize("act", ["relu", "relu6"])
@pytest.mark.parametrize("gate", [None, "eca", "se", "eca_ns"], ids=str)
def test_a_gate_costs_no_memory_in_training(gate, act, layout) -> None:
    norm, gate_module = nn.BatchNorm2d(C), build(gate)
    x = feature_map(2, C, 28, 28, layout=layout).requires_grad_()
    residual = torch.randn_like(x).requires_grad_()
    in_place = {"relu": nn.ReLU(inplace=True), "relu6": nn.ReLU6(inplace=True)}[act]
    want = saved_bytes(lambda: in_place(norm(x) + residual))
    got = saved_bytes(lambda: norm_gate_add_act(x, norm, gate_module, residual, act))
    assert want >= 2 * x.numel() * 4
    if cpu.why_not() is None:
        assert got <= 1.02 * want


@needs_kernels
def test_a_step_of_eca_resnet50_keeps_what_resnet50_keeps() -> None:
    x = torch.randn(1, 3, 224, 224)
    plain_network, with_gates = torchvision.models.resnet50(), ecanet.models.eca_resnet50()
    want = saved_bytes(lambda: plain_network(x).sum())
    assert saved_bytes(lambda: with_gates(x).sum()) <= 1.02 * want
