"""Every gate against the paper's equations: values, gradients, types, layouts, sizes."""

import copy
import pickle
from collections.abc import Iterator

import equations
import pytest
import torch
from equations import GATES, GATES_OF_MEANS, WITH_BATCH_NORM
from torch import Tensor, nn

from ecanet.nn import CBAM, ECA, ECANS, LCT, SE, Gate, GaussianGCT, SEGroup, SEShift
from ecanet.ops import reference

CHANNELS = 32  # 16 groups of 2, 2 groups of 16, 4 groups of 8; SE's hidden layer has 2

all_gates = pytest.mark.parametrize("name", GATES)

# Relative error of the output. A half type may round twice, gate and product, each time by half of its eps.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
    torch.float16: torch.finfo(torch.float16).eps,
}
# Relative error of scale and shift themselves, which half types do not reach.
GATE_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 1e-6,
    torch.float16: 1e-6,
}
# A norm over a batch of two: where their styles are close, float32 has few digits of the difference, as in torch.
IN_TRAINING = {name: (torch.float64,) if name == "srm" else tuple(TOLERANCE) for name in GATES}
SPATIAL = {0: (), 1: (7,), 2: (5, 3), 3: (2, 3, 5)}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def feature_map(*shape: int, **kwargs) -> Tensor:
    """Random, with channel means far enough from 0 that their gates differ."""
    return torch.randn(shape, **kwargs) + 2 * torch.randn(*shape[:2], *[1] * (len(shape) - 2), **kwargs)


def layouts(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """A feature map of every rank in every memory format."""
    for rank, spatial in SPATIAL.items():
        x = feature_map(2, CHANNELS, *spatial, dtype=dtype, device=device)
        yield f"{rank}-D contiguous", x
        if rank in CHANNELS_LAST:
            yield f"{rank}-D channels last", x.to(memory_format=CHANNELS_LAST[rank])
        yield f"{rank}-D slice", feature_map(3, 2 * CHANNELS, *spatial, dtype=dtype, device=device)[1:, ::2]


def assert_matches_the_equations(gate: Gate, x: Tensor, case: str) -> None:
    """Output for every type; for float32 and float64 also the gradients of x and of every weight."""

    def close(what: str, got: Tensor, want: Tensor, tolerance: float, scale: float = 1.0) -> None:
        torch.testing.assert_close(
            got.detach().double().cpu(),
            want.detach(),
            rtol=tolerance,
            atol=min(tolerance, 1e-5) * scale,
            msg=lambda text: f"{case}, {what}: {text}",
        )

    x = x.detach().requires_grad_()  # keeps the strides
    out = gate(x)
    assert (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device), case
    if x.is_contiguous() or (x.dim() >= 4 and x.is_contiguous(memory_format=CHANNELS_LAST[x.dim() - 2])):
        assert out.stride() == x.stride(), case

    weights = equations.weights_of(gate)
    x64 = x.detach().double().cpu().requires_grad_()
    want = equations.forward(gate, weights, x64)
    close("output", out, want, TOLERANCE[x.dtype])

    if not gate.sees_map:
        pairs = zip(
            ("scale", "shift"),
            gate.scale_and_shift(gate.statistics(x)),
            equations.scale_and_shift(gate, weights, x64),
            strict=True,
        )
        for what, got, wanted in pairs:
            assert (got is None) == (wanted is None), case
            if got is not None:
                assert got.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32), case
                close(what, got, wanted, GATE_TOLERANCE[x.dtype])

    if x.dtype in (torch.float64, torch.float32):
        dout = torch.randn(out.shape, dtype=out.dtype)
        got_grads = torch.autograd.grad(out, [x, *gate.parameters()], dout.to(out.device))
        want_grads = torch.autograd.grad(want, [x64, *weights.values()], dout.double())
        for what, got, reference_grad in zip(["x", *weights], got_grads, want_grads, strict=True):
            # A weight's gradient is a sum over the whole map, with the terms' rounding: where they cancel, plain
            # PyTorch is as far off, and the order of the sum, which differs among CPUs, decides by how much.
            scale = 1.0 if what == "x" else max(1.0, reference_grad.abs().max().item())
            close(f"gradient of {what}", got, reference_grad, max(TOLERANCE[x.dtype], TOLERANCE[got.dtype]), scale)


@all_gates
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_rank_and_memory_format(name, dtype, device) -> None:
    gate = GATES[name](CHANNELS).to(device, dtype).train(dtype in IN_TRAINING[name])
    for layout, x in layouts(dtype, device):
        assert_matches_the_equations(gate, x, layout)


@pytest.mark.parametrize(
    ("name", "channels"),
    # The grouped gates of Table 2 need a multiple of 16 channels.
    [(name, channels) for name in GATES for channels in (1, 3, 48) if channels % 16 == 0 or "gc" not in name],
    ids=str,
)
def test_odd_sizes(name, channels, device) -> None:
    gate = GATES[name](channels).to(device, torch.float64)
    for n, *spatial in [(1, 1, 1), (3, 1, 1), (1, 7, 5), (2, 1, 4), (2, 1, 1, 1)]:
        x = feature_map(n, channels, *spatial, dtype=torch.float64, device=device)
        gate.train(not (name in WITH_BATCH_NORM and n == 1))  # one value a channel has no statistics of a batch
        assert_matches_the_equations(gate, x, f"{n} x {spatial}")


@pytest.mark.parametrize(
    ("cls", "channels", "arguments"),
    [
        (ECA, 3, {"kernel_size": 7}),
        (ECA, 1, {"kernel_size": 3}),
        (ECANS, 3, {"kernel_size": 7}),
        (ECA, 7, {"kernel_size": 7, "circular": True}),
        (ECANS, 7, {"kernel_size": 7, "circular": True}),
        (ECA, 16, {"kernel_size": 1}),
        (ECANS, 16, {"kernel_size": 1}),
        (SE, 8, {"reduction": 3}),
        (SE, 4, {"reduction": 16}),
        (SEGroup, 12, {"groups": 3}),
        (SEGroup, 12, {"groups": 12}),
        (SEGroup, 12, {"groups": 3, "activation": "hard_sigmoid"}),
        (SEShift, 8, {"reduction": 3}),
        (SEShift, 4, {"reduction": 16}),
        (LCT, 12, {"groups": 4}),
        (LCT, 12, {"groups": 12}),
        (GaussianGCT, 8, {"c": 1}),
        (CBAM, 8, {"reduction": 3}),
        (CBAM, 4, {"reduction": 16}),
    ],
)
def test_other_arguments(cls, channels, arguments, device) -> None:
    gate = equations.drawn(cls(channels, **arguments)).to(device, torch.float64)
    x = feature_map(2, channels, 3, 2, dtype=torch.float64, device=device)
    assert_matches_the_equations(gate, x, repr(gate))


@all_gates
def test_an_empty_batch_goes_forward_and_backward(name, device) -> None:
    gate = GATES[name](CHANNELS).to(device)
    for spatial in SPATIAL.values():
        x = torch.randn(0, CHANNELS, *spatial, device=device, requires_grad=True)
        out = gate(x)
        assert out.shape == x.shape
        gate.zero_grad()
        out.sum().backward()
        assert x.grad.shape == x.shape
        for weight in gate.parameters():
            assert torch.equal(weight.grad, torch.zeros_like(weight))
    if name in GATES_OF_MEANS:
        assert gate.gate(torch.randn(0, CHANNELS, device=device)).shape == (0, CHANNELS)


# --- types --------------------------------------------------------------------------------------------------------


HALF = {torch.float16: "half", torch.bfloat16: "bfloat16"}


@all_gates
def test_the_gate_of_a_half_module_is_float32(name, device) -> None:
    for half, convert in HALF.items():
        gate = getattr(GATES[name](CHANNELS).to(device), convert)()
        if name in GATES_OF_MEANS:
            s = feature_map(2, CHANNELS, device=device).to(half)
            assert gate.gate(s).dtype == torch.float32
        x = feature_map(2, CHANNELS, 3, 3, device=device).to(half).requires_grad_()
        gate(x).float().sum().backward()
        assert x.grad.dtype == half
        assert all(weight.grad.dtype == half for weight in gate.parameters())


@all_gates
def test_autocast_does_not_reach_the_gate(name, device) -> None:
    gate = GATES[name](CHANNELS).to(device)
    for half in HALF:
        x = feature_map(2, CHANNELS, 3, 3, device=device)
        want_out, want_half_out = gate(x), gate(x.to(half))
        with torch.autocast(device.type, half):
            out, half_out = gate(x), gate(x.to(half))
            if name in GATES_OF_MEANS:
                s = reference.squeeze(x, CHANNELS)
                got_gate = gate.gate(s)
                assert s.dtype == got_gate.dtype == torch.float32
        if name in GATES_OF_MEANS:
            assert torch.equal(got_gate, gate.gate(s))
        assert out.dtype == torch.float32
        assert half_out.dtype == half
        assert torch.equal(out, want_out)
        assert torch.equal(half_out, want_half_out)


@pytest.mark.parametrize(
    ("of_weights", "of_x"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_x_decides_the_type_when_the_weights_have_another(of_weights, of_x, device) -> None:
    for name, build in GATES.items():
        gate = build(CHANNELS).to(device, of_weights).train(of_x in IN_TRAINING[name])
        x = feature_map(2, CHANNELS, 3, 3, device=device, dtype=of_x)
        assert_matches_the_equations(gate, x, name)


# --- modules as modules -------------------------------------------------------------------------------------------


@all_gates
def test_repr_says_what_was_asked_for(name) -> None:
    gate = GATES[name](CHANNELS)
    text = repr(gate)
    assert text.startswith(type(gate).__name__ + "(")
    assert str(CHANNELS) in text
    assert ("kernel_size=3" in text) == name.startswith("eca")
    assert ("circular=True" in text) == name.endswith("circular")
    assert ("activation='hard_sigmoid'" in text) == name.endswith("hard")  # of ESE it is the usual one
    assert ("activation='sigmoid'" in text) == name.endswith("soft")
    assert ("c='learnable'" in text) == name.endswith("learnable")


@all_gates
def test_deep_and_pickled_copies_are_equal_and_independent(name) -> None:
    gate = GATES[name](CHANNELS)
    x = feature_map(2, CHANNELS, 3, 3)
    want = gate(x)
    copies = [copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))]
    for weight in gate.parameters():
        nn.init.constant_(weight, 7)
    for other in copies:
        assert repr(other) == repr(gate)
        assert torch.equal(other(x), want)


@all_gates
def test_meta_modules_know_shapes_and_take_weights_later(name) -> None:
    with torch.device("meta"):
        gate = GATES[name](CHANNELS)
        x = torch.empty(2, CHANNELS, 3, 3, dtype=torch.bfloat16)
    assert all(weight.is_meta for weight in gate.parameters())
    out = gate(x)
    assert (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device)
    source = GATES[name](CHANNELS)
    gate.load_state_dict(source.state_dict(), strict=True, assign=True)
    x = feature_map(2, CHANNELS, 3, 3)
    assert torch.equal(gate(x), source(x))


#: Weights that are the same for every channel at the start.
STARTS = {
    "lct": {"w": 0, "b": 1},
    "gct_gauss learnable": {"theta": 0},
    "srm": {"cfc": 0, "bn.weight": 1, "bn.bias": 0},
    "gct": {"alpha": 1, "gamma": 0, "beta": 0},
    "grn": {"weight": 0, "bias": 0},
    "cbam": {"spatial.conv.bn.weight": 1, "spatial.conv.bn.bias": 0},
}


@all_gates
def test_reset_parameters_redraws_every_weight_or_sets_its_start(name) -> None:
    gate = GATES[name](CHANNELS)
    for weight in gate.parameters():
        nn.init.constant_(weight, 7)
    gate.reset_parameters()
    for key, weight in gate.named_parameters():
        start = STARTS.get(name, {}).get(key)
        if start is not None:
            assert (weight == start).all(), key
            continue
        assert (weight.abs() <= 1).all(), key
        assert weight.unique().numel() > 1, key


def test_a_new_gate_needs_only_its_logits() -> None:
    class Twice(Gate):
        def logits(self, s: Tensor) -> Tensor:
            return 2 * s

    x = torch.tensor([[[1.0, 3.0], [0.0, 0.0]]])
    want = x * torch.tensor([[[1 / (1 + torch.exp(torch.tensor(-4.0)))], [0.5]]])
    torch.testing.assert_close(Twice(2)(x), want)
    with pytest.raises(TypeError, match="logits"):
        Gate(2)
