"""A gate's factor: the same number in every path, in files as ``scale``, and never lost or doubled on the way."""

import copy
import math
import pickle

import pytest
import torch
from equations import GATES, NEVER_NEUTRAL
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import prune
from torchvision.ops import FrozenBatchNorm2d

import ecanet
from ecanet.inference import InferenceTail
from ecanet.nn import ECA, SE, Gate, SEVar1, build_gate, conv_norm_gate_add_act, norm_gate_add_act
from ecanet.nn.attached import attach_

N, C = 3, 32
FACTOR = 2.5


def pair(name: str) -> tuple[Gate, Gate]:
    """The same gate without a factor and with one, in float64."""
    plain = GATES[name](C).double()
    scaled = copy.deepcopy(plain)
    scaled.factor = FACTOR
    return plain, scaled


def times_factor(plain: Gate, y: Tensor) -> Tensor:
    """What the gate with the factor makes of a map: the factor multiplies the scale, and not a shift."""
    if plain.sees_map:
        return FACTOR * plain(y)
    scale, shift = plain.scale_and_shift(plain.statistics(y))
    out = FACTOR * scale[:, :, None, None] * y
    return out if shift is None else out + shift[:, :, None, None]


def x_and_residual() -> tuple[Tensor, Tensor]:
    x, residual = torch.randn(2, N, C, 5, 3, dtype=torch.float64).unbind()
    return x.requires_grad_(), residual.requires_grad_()


def norm() -> nn.Module:
    result = nn.BatchNorm2d(C).double()
    nn.init.uniform_(result.weight, 0.5, 1.5)
    nn.init.normal_(result.bias)
    return result


def by_module(x: Tensor, residual: Tensor, norm: nn.Module, gate: nn.Module) -> Tensor:
    return torch.relu(gate(norm(x)) + residual)


def by_tail(x: Tensor, residual: Tensor, norm: nn.Module, gate: nn.Module) -> Tensor:
    return norm_gate_add_act(x, norm, gate, residual, "relu")


def attached(x: Tensor, residual: Tensor, norm: nn.Module, gate: nn.Module) -> Tensor:
    if not norm._forward_hooks:
        attach_(norm, gate)
    return norm_gate_add_act(x, norm, None, residual, "relu")


def after_a_convolution(x: Tensor, residual: Tensor, norm: nn.Module, gate: nn.Module) -> Tensor:
    return conv_norm_gate_add_act(x, nn.Identity(), norm, gate, residual, "relu")


def compiled(x: Tensor, residual: Tensor, norm: nn.Module, gate: nn.Module) -> Tensor:
    return torch.compile(norm_gate_add_act, backend="aot_eager", fullgraph=True)(x, norm, gate, residual, "relu")


WAYS = [by_module, by_tail, attached, after_a_convolution, compiled]


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_path_multiplies_by_it(way, backend, training) -> None:
    if way is compiled:
        torch._dynamo.reset()
    for name in GATES if way is not compiled else ("eca", "se", "eca_ns", "eca hard", "se_shift", "grn", "cbam"):
        plain, scaled = pair(name)
        norms = norm().train(training), None
        norms = norms[0], copy.deepcopy(norms[0])
        x, residual = x_and_residual()
        wanted = [x, residual, *norms[0].parameters(), *plain.parameters()]
        want = torch.relu(times_factor(plain, norms[0](x)) + residual)
        dout = torch.randn_like(want)
        want_grads = torch.autograd.grad(want, wanted, dout, allow_unused=True)
        found = [x, residual, *norms[1].parameters(), *scaled.parameters()]
        with ecanet.backend(backend):
            got = way(x, residual, norms[1], scaled)
            grads = torch.autograd.grad(got, found, dout, allow_unused=True)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        for g, w in zip(grads, want_grads, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


def test_frozen_norms_and_tails_that_write_over_their_input() -> None:
    for name in GATES:
        plain, scaled = (gate.eval() for gate in pair(name))
        frozen = FrozenBatchNorm2d(C).double()
        frozen.weight.uniform_(0.5, 1.5)
        x, residual = (t.detach() for t in x_and_residual())
        want = torch.relu(times_factor(plain, frozen(x)) + residual)
        torch.testing.assert_close(by_tail(x, residual, frozen, scaled), want, rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            got = InferenceTail(scaled, 1, in_place=True)(frozen(x), residual)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["module", "tail"])
def test_gradcheck(kind) -> None:
    for name in ("eca", "se", "eca_ns"):
        _, gate = pair(name)
        batch_norm, (x, residual) = norm(), x_and_residual()
        weights = tuple(gate.parameters())

        def function(x: Tensor, residual: Tensor, *_: Tensor, gate=gate, batch_norm=batch_norm) -> Tensor:
            return gate(x) if kind == "module" else norm_gate_add_act(x, batch_norm, gate, residual, "silu")

        x, residual = x[:2, :, :2, :2].detach().requires_grad_(), residual[:2, :, :2, :2].detach().requires_grad_()
        assert torch.autograd.gradcheck(function, (x, residual, *weights), fast_mode=True)


def test_eca_stays_in_closed_form() -> None:
    maths = ECA(C, factor=FACTOR).maths()
    assert (maths.is_band, maths.factor) == (True, FACTOR)


def test_with_a_hard_sigmoid_eca_is_fused_like_any_other_gate() -> None:
    maths = ECA(C, activation="hard_sigmoid", factor=FACTOR).maths()
    assert maths is not None
    assert not maths.is_band


def test_one_function_compiled_for_gates_of_several_factors() -> None:
    torch._dynamo.reset()
    function = torch.compile(lambda x, norm, gate: norm_gate_add_act(x, norm, gate, x), backend="aot_eager")
    x, batch_norm = torch.randn(N, C, 4, 4), nn.BatchNorm2d(C).eval()
    for factor in (1.0, 2.0, 1.5, 3.0, 1.0):
        for gate in (ECA(C, factor=factor), SE(C, factor=factor)):
            torch.testing.assert_close(function(x, batch_norm, gate), gate(batch_norm(x)) + x)


# --- a gate that is 1 ---------------------------------------------------------------------------------------------

can_be_neutral = pytest.mark.parametrize("name", [name for name in GATES if name not in NEVER_NEUTRAL])


@can_be_neutral
def test_the_identity_gives_back_what_it_gets_and_its_gradient_bit_for_bit(name) -> None:
    gate = GATES[name](C)
    gate.make_identity_()
    assert gate.constant() == 1
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for backend in ("auto", "reference"):
            x = (100 * torch.randn(N, C, 5, 3)).to(dtype).requires_grad_()
            with ecanet.backend(backend):
                out = gate(x)
                dout = torch.randn_like(x)
                (grad,) = torch.autograd.grad(out, x, dout)
            assert torch.equal(out, x)
            assert torch.equal(grad, dout)


@can_be_neutral
@pytest.mark.parametrize("order", ["gate first", "layers first", "gate alone"])
def test_it_is_one_again_after_to_empty_and_reset_parameters(name, order) -> None:
    gate = GATES[name](C)
    gate.make_identity_()
    for twin in (gate, copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
        twin.to_empty(device="cpu")
        for t in (*twin.parameters(), *twin.buffers()):
            t.detach().fill_(math.nan if t.is_floating_point() else 7)
        modules = list(twin.modules()) if order != "gate alone" else [twin]
        for module in reversed(modules) if order == "layers first" else modules:
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        x = torch.randn(N, C, 5, 3)
        assert torch.equal(twin(x), x)
        assert twin.scale == (None if gate.neutral_value == 1 else 1 / gate.neutral_value)
        assert all(p.isfinite().all() for p in twin.parameters())


@pytest.mark.parametrize("name", GATES)
def test_reset_parameters_draws_other_gates_anew_and_keeps_their_factor(name) -> None:
    gate = GATES[name](C)
    gate.factor = 3.0
    state = gate.state_dict().items()
    before = {key: value.clone() for key, value in state if key != "scale" and value.is_floating_point()}
    gate.to_empty(device="cpu")
    gate.reset_parameters()
    assert gate.factor == 3
    assert all(not torch.equal(gate.state_dict()[key], value) for key, value in before.items())
    assert torch.isfinite(gate(torch.randn(N, C, 2, 2))).all()


# --- in files -----------------------------------------------------------------------------------------------------


def test_gates_of_factor_1_have_no_other_keys() -> None:
    assert list(ECA(C).state_dict()) == list(ECA(C, factor=1).state_dict()) == ["conv.weight"]
    assert list(ECA(C, factor=2).state_dict()) == ["scale", "conv.weight"]
    gate = ECA(C, factor=2)
    gate.factor = 1
    assert list(gate.state_dict()) == ["conv.weight"]
    assert gate.scale is None


@pytest.mark.parametrize("strict", [True, False])
def test_the_factor_comes_with_the_weights(strict) -> None:
    source, target = ECA(C, factor=3), ECA(C, factor=2)
    target.load_state_dict(source.state_dict(), strict=strict)
    x = torch.randn(N, C, 2, 2)
    assert torch.equal(target(x), source(x))
    assert target.factor == 3


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_type_that_rounds_does_not_change_it(dtype, assign) -> None:
    for factor in (2.0, 1 / 0.3, 0.7):
        gate = ECA(C, factor=factor)
        assert copy.deepcopy(gate).to(dtype).factor == factor
        file = copy.deepcopy(gate).to(dtype).state_dict()
        other = ECA(C, factor=factor)
        other.load_state_dict(file, assign=assign)
        assert other.factor == factor


WRONG_FILES = {
    "the authors' file into a neutral gate": (
        {"factor": 2.0}, lambda state: state.pop("scale"), r"a gate of factor 1.*the factor 2.*preserve=False"
    ),
    "a neutral gate's file into the authors' gate": (
        {}, lambda state: state.update(scale=torch.tensor(2.0)), r"a gate of factor 2, and this gate has the factor 1"
    ),
    "not a number": ({"factor": 2.0}, lambda state: state.update(scale=torch.tensor(math.nan)), "scale is nan"),
    "infinite": ({"factor": 2.0}, lambda state: state.update(scale=torch.tensor(math.inf)), "scale is inf"),
    "zero": ({"factor": 2.0}, lambda state: state.update(scale=torch.tensor(0.0)), "scale is 0"),
    "negative": ({"factor": 2.0}, lambda state: state.update(scale=torch.tensor(-2.0)), "scale is -2"),
    "many": ({"factor": 2.0}, lambda state: state.update(scale=torch.ones(C)), r"scale has the shape \(32,\)"),
    "complex": ({"factor": 2.0}, lambda state: state.update(scale=torch.tensor(1j)), "scale has the shape .*complex64"),
    "no tensor": ({"factor": 2.0}, lambda state: state.update(scale=2.0), "scale is a float"),
    "one into a gate that has none": ({}, lambda state: state.update(scale=torch.tensor(math.nan)), "scale is nan"),
}  # fmt: skip


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("arguments", "change", "says"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_weights_without_their_factor_are_an_error_strict_or_not(arguments, change, says, strict) -> None:
    for outer in (lambda gate: gate, lambda gate: nn.Sequential(gate)):
        target, state = outer(ECA(C, **arguments)), ECA(C, **arguments).state_dict()
        change(state)
        prefix = "0." if isinstance(target, nn.Sequential) else ""
        with pytest.raises(RuntimeError, match=says):
            target.load_state_dict({prefix + key: value for key, value in state.items()}, strict=strict)


def test_a_gate_without_weights_has_a_factor_too() -> None:
    target = SEVar1(C, factor=2.0)
    target.load_state_dict(SEVar1(C, factor=3.0).state_dict())
    assert target.factor == 3
    with pytest.raises(RuntimeError, match="Missing key"):
        target.load_state_dict({})
    target.load_state_dict({}, strict=False)
    assert target.factor == 3


def test_memory_that_is_given_to_a_missing_scale_is_filled() -> None:
    gate = ECA(C)
    gate.make_identity_()
    gate.load_state_dict({"scale": torch.full((), math.nan)}, strict=False, assign=True)  # as transformers does
    x = torch.randn(N, C, 2, 2)
    assert torch.equal(gate(x), x)
    assert gate.scale == 2


# --- where something writes into the buffer -----------------------------------------------------------------------


def swapped(gate: Gate, value: float) -> None:
    gate.scale = torch.tensor(value)


def put_into_buffers(gate: Gate, value: float) -> None:
    gate._buffers["scale"] = torch.tensor(value)


def registered(gate: Gate, value: float) -> None:
    gate.register_buffer("scale", torch.tensor(value))


def copied(gate: Gate, value: float) -> None:
    gate.scale.copy_(torch.tensor(value))


@pytest.mark.parametrize("write", [swapped, put_into_buffers, registered, copied], ids=lambda write: write.__name__)
def test_the_factor_follows(write) -> None:
    gate, x = ECA(C, factor=2.0), torch.randn(N, C, 3, 3)
    plain = ECA(C)
    plain.conv.weight = gate.conv.weight
    for value in (3.0, 0.5, 2.0):
        write(gate, value)
        torch.testing.assert_close(gate(x), value * plain(x))
        torch.testing.assert_close(norm_gate_add_act(x, None, gate, x), value * plain(x) + x)
        assert (gate.factor, f"factor={value:g}" in repr(gate)) == (value, True)


def test_a_scale_that_is_taken_out_takes_the_factor_along() -> None:
    gate, x = ECA(C, factor=2.0), torch.randn(N, C, 3, 3)
    want = gate(x) / 2
    gate.scale = None
    torch.testing.assert_close(gate(x), want)
    assert gate.factor == 1


def test_memory_without_values_is_an_error_that_says_what_to_do() -> None:
    gate = ECA(C, factor=2.0).to_empty(device="cpu")
    gate.scale.fill_(math.nan)
    with pytest.raises(RuntimeError, match=r"scale of a ECA gate is nan.*reset_parameters\(\)"):
        gate(torch.randn(N, C, 2, 2))
    repr(gate)


def drifted(decay: float) -> Tensor:
    """What is left of 2 after many steps of an average in float32."""
    average = torch.tensor(2.0)
    for _ in range(20_000):
        average *= decay
        average += (1 - decay) * torch.tensor(2.0)
    return average


def test_an_average_that_drifts_does_not_change_it() -> None:
    gate = ECA(C)
    gate.make_identity_()
    value = drifted(0.9999)
    gate.scale.copy_(value)
    assert gate.factor == 2
    other = ECA(C, factor=2.0)
    other.load_state_dict(gate.state_dict())
    assert other.factor == 2


def test_averages_of_networks_keep_it() -> None:
    for use_buffers in (True, False):
        gate = ECA(C, factor=FACTOR)
        average = torch.optim.swa_utils.AveragedModel(gate, use_buffers=use_buffers)
        for _ in range(3):
            average.update_parameters(gate)
        x = torch.randn(N, C, 2, 2)
        torch.testing.assert_close(average(x), gate(x))
        assert average.module.factor == FACTOR


def test_copies_and_pickles_keep_it() -> None:
    gate = SE(C, factor=FACTOR)
    for twin in (copy.deepcopy(gate), copy.copy(gate), pickle.loads(pickle.dumps(gate))):
        assert twin.factor == FACTOR
        assert torch.equal(twin(torch.ones(1, C)), gate(torch.ones(1, C)))


def test_functional_calls_keep_it() -> None:
    gates = [ECA(C, factor=2.0) for _ in range(3)]
    x = torch.randn(N, C, 2, 2)
    parameters, buffers = stack_module_state(gates)
    got = vmap(lambda p, b: functional_call(gates[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(got, torch.stack([gate(x) for gate in gates]))
    with torch.inference_mode():
        gates[0].scale = torch.tensor(3.0)
        assert gates[0].factor == 3
        gates[0].factor = 2.0
    torch.testing.assert_close(gates[0](x), got[0])


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        gate = ECA(C, factor=2.0)
    assert gate.scale.is_meta
    assert gate.factor == 2
    assert gate(torch.empty(N, C, 2, 2, device="meta")).shape == (N, C, 2, 2)
    gate.load_state_dict(ECA(C, factor=3.0).state_dict(), assign=True)
    assert gate.factor == 3


@pytest.mark.parametrize(
    ("factor", "error"),
    [("2", TypeError), (None, TypeError), (True, TypeError), (0, ValueError), (-1.0, ValueError),
     (math.nan, ValueError), (math.inf, ValueError), (torch.tensor(2.0), TypeError)],
    ids=str,
)  # fmt: skip
def test_mistakes_are_named(factor, error) -> None:
    for build in (lambda: ECA(C, factor=factor), lambda: setattr(ECA(C), "factor", factor)):
        with pytest.raises(error, match="factor must be"):
            build()


def test_something_that_is_no_gate_has_no_factor() -> None:
    with pytest.raises(ValueError, match=r"factor=2.0 was given.*makes a Identity, which has no factor"):
        build_gate(lambda channels: nn.Identity(), C, factor=2.0)


def test_nothing_is_asked_of_a_tensor_on_the_way() -> None:
    """What a step costs: a number in Python, and no value that a GPU would be waited for."""
    gate = ECA(C, factor=2.0)
    gate(torch.randn(N, C, 2, 2))
    gate._read_factor = lambda scale: pytest.fail("the buffer was read")
    for _ in range(3):
        gate(torch.randn(N, C, 2, 2))
        norm_gate_add_act(torch.randn(N, C, 2, 2), nn.BatchNorm2d(C), gate)


def written_into(factor: float) -> ECA:
    """A gate into which something wrote another factor, and nothing ran since."""
    gate = ECA(C, factor=2.0)
    gate.scale.copy_(torch.tensor(factor))
    return gate


@pytest.mark.parametrize(
    "run",
    [
        lambda gate, x: torch.compile(gate, backend="eager", fullgraph=True)(x),
        lambda gate, x: torch.compile(norm_gate_add_act, backend="aot_eager", fullgraph=True)(x, None, gate),
        lambda gate, x: vmap(lambda t: gate(t[None])[0])(x),
    ],
    ids=["compiled", "compiled tail", "vmap"],
)
def test_what_runs_first_sees_what_was_written(run) -> None:
    torch._dynamo.reset()
    x, gate = torch.randn(N, C, 2, 2), written_into(3.0)
    want = copy.deepcopy(gate)(x)
    torch.testing.assert_close(run(gate, x), want)
    assert gate.factor == 3


def test_writing_under_inference_mode_is_seen() -> None:
    with torch.inference_mode():
        gate = ECA(C, factor=2.0)
        for value in (3.0, 4.0):
            gate.scale.fill_(value)
            assert gate.factor == value


def test_factors_that_are_close_are_told_apart() -> None:
    gate = ECA(C, factor=2.0)
    gate.load_state_dict(ECA(C, factor=2.006).state_dict())
    assert gate.factor == pytest.approx(2.006)
    with pytest.raises(RuntimeError, match=r"a gate of factor 1\.003"):
        ECA(C).load_state_dict(ECA(C, factor=1.003).state_dict(), strict=False)


def test_a_file_of_factor_1_takes_the_record_away() -> None:
    gate = ECA(C, factor=2.0)
    gate.load_state_dict({**gate.state_dict(), "scale": torch.tensor(1.0)})
    assert (gate.factor, gate.scale) == (1, None)


@pytest.mark.parametrize(
    "change", [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrizations.spectral_norm]
)
def test_gates_whose_weights_are_computed_cannot_be_neutral(change) -> None:
    for gate, layer in ((ECA(C), "conv"), (SE(C), "fc2")):
        change(getattr(gate, layer))
        with pytest.raises(ValueError, match="its weights are computed from others"):
            gate.make_identity_()


def test_pruned_gates_can() -> None:
    x = torch.randn(N, C, 2, 2)
    for gate, layer in ((ECA(C), "conv"), (SE(C), "fc2"), (SE(C), "fc1")):
        prune.l1_unstructured(getattr(gate, layer), "weight", 0.25)
        gate.make_identity_()
        assert torch.equal(gate(x), x)
