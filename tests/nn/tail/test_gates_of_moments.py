"""Gates that see variances, and gates with a shift, in the tail."""

import copy
import itertools
from typing import Any

import pytest
import torch
from tails import C, Tail, assert_as_one_after_another, build, feature_map, randomise_, relative_error
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn.utils import parametrize, prune

import ecanet
from ecanet.nn import GCT, GRN, SRM, MomentGate, norm_gate_add_act
from ecanet.nn.tail.maths import ScaleAndShift, Statistics
from tests.kernels_here import needs_kernels

CLOSED_FORMS = ["gct", "grn"]
NAMES = [*CLOSED_FORMS, "srm"]


def statistics(*, with_zeros: bool = False) -> Statistics:
    """Of random maps of 20 positions; with some maps of zeros."""
    means, variances = torch.randn(3, C, dtype=torch.float64), torch.rand(3, C, dtype=torch.float64)
    if with_zeros:
        means[:, ::3], variances[:, ::3] = 0, 0
    return Statistics(means, variances, 20)


@pytest.mark.parametrize("factor", [1.0, 2.5])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_the_closed_form_of_a_gates_gradient_is_what_autograd_finds(name, factor) -> None:
    gate = randomise_(build(name)).double()
    gate.factor = factor
    maths = gate.maths()
    for with_zeros in (False, True):
        means, variances, positions = statistics(with_zeros=with_zeros)
        leaves = [means.requires_grad_(), variances.requires_grad_(), *gate.parameters()]
        scale, shift = gate.scale_and_shift(Statistics(leaves[0], leaves[1], positions))
        at_scale, at_shift = torch.randn_like(scale), torch.randn_like(scale)
        loss = (scale * at_scale).sum() + (0 if shift is None else (shift * at_shift).sum())
        want = torch.autograd.grad(loss, leaves)
        seen = Statistics(means.detach(), variances.detach(), positions)
        with torch.no_grad():
            got = maths.backward(seen, tuple(gate.parameters()), factor * at_scale, at_shift)
        for g, w in zip((got.means, got.variances, *got.parameters), want, strict=True):
            assert not w.isnan().any()
            assert relative_error(g, w) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_maps_of_zeros_have_the_gradient_of_the_modules_and_no_nan(name) -> None:
    """``zero_init_residual`` starts the last norm of a block with a weight of 0."""
    norm = nn.BatchNorm2d(C)
    nn.init.zeros_(norm.weight)
    tail = Tail(norm, randomise_(build(name)), "relu").double()
    assert_as_one_after_another(tail, feature_map(3, C, 5, 4, dtype=torch.float64), torch.randn(3, C, 5, 4).double())
    x = torch.zeros(2, C, 5, 4, requires_grad=True)
    norm_gate_add_act(x, None, randomise_(build(name))).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_grn_passes_a_nan_to_all_channels_of_its_sample_whether_gradients_are_on_or_not(backend) -> None:
    gate, x = randomise_(GRN(C)), feature_map(3, C, 5, 4)
    x[1, 2, 0, 0] = float("nan")
    want = torch.tensor([False, True, False])[:, None, None, None].expand_as(x)
    with ecanet.backend(backend):
        for leaf in (x, x.clone().requires_grad_()):
            assert torch.equal(gate(leaf).isnan(), want)
        gate(leaf).sum().backward()
    assert torch.equal(leaf.grad.isnan(), want)


@pytest.mark.parametrize("act", [None, "relu", "silu"])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_a_gate_that_starts_as_the_identity_changes_no_bit_of_a_fused_tail(name, act) -> None:
    x, residual = feature_map(3, C, 5, 4), torch.randn(3, C, 5, 4)
    for norm, training in itertools.product((None, randomise_(nn.BatchNorm2d(C))), (True, False)):
        norms = [None if norm is None else copy.deepcopy(norm).train(training) for _ in range(2)]
        with torch.no_grad():  # without gate and norm, torch's own operations compute where a gradient is wanted
            want = norm_gate_add_act(x, norms[0], None, residual, act)
            got = norm_gate_add_act(x, norms[1], build(name), residual, act)
        assert torch.equal(got, want)


@needs_kernels
@pytest.mark.parametrize("name", [*NAMES, "eca"])
def test_the_backward_of_a_tail_keeps_x_and_out_and_little_more(name) -> None:
    tail, x = Tail(nn.BatchNorm2d(C), build(name), "relu"), feature_map(4, C, 20, 20).requires_grad_()
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = tail(x, torch.randn_like(x))
    per_map = out[0, 0].numel()
    assert sum(kept.values()) <= 2 * out.nbytes * (1 + 3.5 / per_map)  # x, out, and at most 7 numbers a map


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_the_gradient_is_that_of_the_parameters_of_the_forward_pass(name) -> None:
    gate, x = randomise_(build(name)), feature_map(3, C, 5, 4)

    def gradients(backend: str) -> tuple[Tensor, ...]:
        halves = {key: 0.5 * p for key, p in gate.named_parameters()}
        with ecanet.backend(backend):
            out = torch.func.functional_call(gate, halves, (x,))
        return torch.autograd.grad(out.square().sum(), list(gate.parameters()))

    for got, want in zip(gradients("auto"), gradients("reference"), strict=True):
        assert relative_error(got, want) < 1e-4
    out = gate(x.requires_grad_())
    with torch.no_grad():
        next(gate.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Halved(nn.Module):
    """What makes a weight of another."""

    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_gate_whose_weights_are_computed_from_others_has_the_gradients_of_the_modules(name, is_frozen) -> None:
    """A pruned or parametrized weight stands in another place among the parameters, or in none."""
    x = feature_map(3, C, 5, 4, dtype=torch.float64)
    for key, _ in build(name).named_parameters(recurse=False):
        for change in (
            lambda gate, key: prune.random_unstructured(gate, key, amount=0.4),
            lambda gate, key: parametrize.register_parametrization(gate, key, Halved()),
        ):
            gate = randomise_(build(name)).double().requires_grad_(not is_frozen)
            change(gate, key)
            found = []
            for backend in ("auto", "reference"):
                leaf = x.clone().requires_grad_()
                with ecanet.backend(backend):
                    out = norm_gate_add_act(gate(leaf), None, gate, leaf, "relu")
                leaves = [leaf, *(p for p in gate.parameters() if p.requires_grad)]
                found.append([out, *torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)])
            for got, want in zip(*found, strict=True):
                assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_second_derivatives(name) -> None:
    tail = Tail(nn.BatchNorm2d(4), randomise_(ecanet.nn.build_gate(name, 4)), "silu").double()
    x = feature_map(2, 4, 3, dtype=torch.float64).unsqueeze(-1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, *_: tail(x), (x, *tail.parameters()))


@needs_kernels
def test_a_gate_that_counts_batches_cannot_be_differentiated_twice_in_the_kernels() -> None:
    x = feature_map(3, C, 5, 4).requires_grad_()
    out = norm_gate_add_act(x, nn.BatchNorm2d(C), SRM(C))
    with pytest.raises(RuntimeError, match="SRM gate keeps more than weights: run its forward pass under"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_srm_counts_a_batch_once_and_refuses_a_single_sample_as_torch_does() -> None:
    gate, x = SRM(C), feature_map(3, C, 5, 4)
    norm_gate_add_act(x.requires_grad_(), nn.BatchNorm2d(C), gate).sum().backward()
    assert gate.bn.num_batches_tracked == 1
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        norm_gate_add_act(x[:1], nn.BatchNorm2d(C), gate)
    norm_gate_add_act(x[:1], nn.BatchNorm2d(C), gate.eval())


class OwnMoments(MomentGate):
    """A scale and a shift of mean and deviation, as somebody may write one."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.weight = nn.Parameter(torch.randn(channels, 2))

    def scale_and_shift(self, statistics: Statistics) -> ScaleAndShift:
        means, variances, positions = statistics
        deviation = (variances * positions / (positions - 1) + 1e-3).sqrt()
        return self.scaled(1 + self.weight[:, 0] * deviation), self.weight[:, 1] * means


@pytest.mark.parametrize("norm", ["BatchNorm2d", "evaluation", "none"])
def test_a_gate_of_ones_own_with_a_shift(norm) -> None:
    norm_module = None if norm == "none" else randomise_(nn.BatchNorm2d(C)).train(norm == "BatchNorm2d")
    tail = Tail(norm_module, OwnMoments(C), "relu").double()
    x = feature_map(3, C, 5, 4, dtype=torch.float64)
    assert_as_one_after_another(tail, x, torch.randn_like(x), steps=2)
    assert gradcheck(lambda x: tail(x), feature_map(2, C, 2, 1, dtype=torch.float64).requires_grad_())


@pytest.mark.parametrize("returned", [lambda s: s, lambda s: (2.0, None), lambda s: (s, None, None)])
def test_a_gate_that_returns_no_pair_says_so_for_two_samples_too(returned) -> None:
    """A lone scale of two samples would unpack into that of the first and that of the second."""
    torch._dynamo.reset()

    class Wrong(MomentGate):
        def scale_and_shift(self, statistics: Statistics) -> Any:
            return returned(statistics.means)

    x, gate = feature_map(2, C, 5, 4), Wrong(C)
    for backend in ("auto", "reference"):
        with ecanet.backend(backend), pytest.raises(TypeError, match="scale_and_shift must return two values"):
            gate(x)
    with pytest.raises(TypeError, match="scale_and_shift must return two values"):
        norm_gate_add_act(x.requires_grad_(), nn.BatchNorm2d(C), gate)
    with pytest.raises(Exception, match="scale_and_shift must return two values"):
        torch.compile(norm_gate_add_act, backend="eager")(x.detach(), nn.BatchNorm2d(C, affine=False), gate)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_torch_compile_gets_the_same_formula(name, training) -> None:
    torch._dynamo.reset()
    tail = Tail(randomise_(nn.BatchNorm2d(C)), randomise_(build(name)), "relu").double().train(training)
    x, residual = feature_map(3, C, 5, 4, dtype=torch.float64), torch.randn(3, C, 5, 4).double()
    compiled = copy.deepcopy(tail)
    graph: Any = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    results = []
    for run, owner in ((tail, tail), (graph, compiled)):
        leaf = x.clone().requires_grad_()
        run(leaf, residual).square().sum().backward()
        results.append([leaf.grad, *(p.grad for p in owner.parameters()), *(b.double() for b in owner.buffers())])
    for got, want in zip(results[1], results[0], strict=True):
        assert relative_error(got, want) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "layout"), [("gct", torch.channels_last), ("grn", torch.contiguous_format)])
def test_the_triton_kernels_do_the_same(name, layout, dtype) -> None:
    from ecanet.ops import gpu

    if gpu.why_not() is not None:
        pytest.skip(str(gpu.why_not()))
    tail = Tail(randomise_(nn.BatchNorm2d(C)), randomise_(build(name))).to(dtype)
    x, dout = feature_map(3, C, 5, 4, layout=layout, dtype=dtype), torch.randn(3, C, 5, 4).to(dtype)
    grads = {}
    for backend in ("triton", "reference"):
        leaf, mine = x.clone().requires_grad_(), copy.deepcopy(tail)
        with ecanet.backend(backend):
            out = mine(leaf, x)
            out.backward(dout)
        grads[backend] = [out, leaf.grad, *(p.grad for p in mine.parameters())]
    for got, want in zip(grads["triton"], grads["reference"], strict=True):
        assert relative_error(got, want) < (2e-5 if dtype is torch.float32 else 4e-2)


def test_gates_of_means_alone_say_that_variances_are_missing() -> None:
    for gate in (GCT(C), GRN(C), SRM(C)):
        with pytest.raises(TypeError, match=r"sees variances as well as means: call scale_and_shift"):
            gate.gate(torch.zeros(2, C))
