"""The matrix W behind every gate but SE: entries, structure and the parameter counts of Table 2."""

import equations
import pytest
import torch
from equations import GATES, LINEAR_GATES

from ecanet.nn import ECA, ECANS, SE, SEGroup, SEVar1, SEVar3, build_gate

CHANNELS = 32


@pytest.mark.parametrize("name", LINEAR_GATES)
def test_matrix_has_the_entries_of_the_equations(name, device) -> None:
    gate = GATES[name](CHANNELS).to(device)
    want = equations.matrix(gate, equations.weights_of(gate))
    assert torch.equal(gate.matrix().double().cpu(), want)


@pytest.mark.parametrize("name", LINEAR_GATES)
def test_the_activation_of_the_matrix_times_the_means_is_the_gate(name, device) -> None:
    gate = GATES[name](CHANNELS).to(device, torch.float64)
    y = torch.randn(CHANNELS, dtype=torch.float64, device=device)
    logits = gate.matrix().to(y) @ y
    want = (logits / 6 + 0.5).clamp(0, 1) if name.endswith("hard") else torch.sigmoid(logits)
    torch.testing.assert_close(gate.gate(y[None])[0], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in LINEAR_GATES if not name.startswith("se_var1")])
def test_matrix_is_differentiable_in_the_weights(name) -> None:
    gate = GATES[name](CHANNELS).double()
    weights = equations.weights_of(gate)
    upstream = torch.randn(CHANNELS, CHANNELS, dtype=torch.float64)
    got = torch.autograd.grad(gate.matrix(), list(gate.parameters()), upstream)
    want = torch.autograd.grad(equations.matrix(gate, weights), list(weights.values()), upstream)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("stored", "computed"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_matrix_comes_in_the_type_gates_are_computed_in(stored, computed) -> None:
    assert ECA(8).to(stored).matrix().dtype == computed


# --- structure ----------------------------------------------------------------------------------------------------


def test_eca_is_a_toeplitz_band() -> None:
    gate = ECA(9, kernel_size=5)
    W = gate.matrix()
    for offset in range(-8, 9):
        diagonal = W.diagonal(offset)
        assert (diagonal == (gate.conv.weight[0, 0, offset + 2] if abs(offset) <= 2 else 0)).all()


@pytest.mark.parametrize(("channels", "kernel_size"), [(9, 5), (5, 5)])
def test_circular_eca_is_circulant(channels, kernel_size) -> None:
    gate = ECA(channels, kernel_size, circular=True)
    W = gate.matrix()
    for i in range(1, channels):
        assert torch.equal(W[i], W[i - 1].roll(1))
    # Channels have no first and no last: rotating the means rotates the gates.
    s = torch.randn(3, channels)
    torch.testing.assert_close(gate.gate(s.roll(2, dims=1)), gate.gate(s).roll(2, dims=1))


@pytest.mark.parametrize("circular", [False, True], ids=["zeros", "circular"])
def test_eca_ns_with_equal_rows_is_eca(circular) -> None:
    eca, eca_ns = ECA(9, 5, circular=circular).double(), ECANS(9, 5, circular=circular).double()
    with torch.no_grad():
        eca_ns.weight.copy_(eca.conv.weight.flatten().expand(9, 5))
    x = torch.randn(2, 9, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(eca_ns(x), eca(x), rtol=1e-14, atol=1e-14)


def test_eca_of_kernel_size_1_scales_every_channel_mean_alike() -> None:
    gate = ECA(4, kernel_size=1)
    assert torch.equal(gate.matrix(), gate.conv.weight.flatten() * torch.eye(4))


def test_se_var1_is_the_identity() -> None:
    assert torch.equal(SEVar1(4).matrix(), torch.eye(4))


def test_se_var3_is_one_full_block_and_groups_of_one_channel_are_se_var2() -> None:
    full = SEVar3(6)
    assert torch.equal(full.matrix(), full.weight[0])
    var2, groups = build_gate("se_var2", 6), SEGroup(6, groups=6)
    with torch.no_grad():
        groups.weight.copy_(var2.weight.reshape(6, 1, 1))
    assert torch.equal(groups.matrix(), var2.matrix())


def test_se_group_does_not_mix_groups() -> None:
    gate = SEGroup(12, groups=3)
    assert torch.equal(gate.matrix(), torch.block_diag(*gate.weight))


def test_se_has_no_matrix() -> None:
    assert not hasattr(SE(8), "matrix")


# --- Table 2: parameters ------------------------------------------------------------------------------------------


KERNEL_SIZE = {64: 3, 256: 5, 2048: 7}  # the paper's, for these numbers of channels


@pytest.mark.parametrize(
    ("name", "count"),
    {
        "se": lambda c: 2 * c**2 // 16,
        "se_var1": lambda c: 0,
        "se_var2": lambda c: c,
        "se_var3": lambda c: c**2,
        "se_gc1": lambda c: c**2 // 16,
        "se_gc2": lambda c: 16 * c,
        "se_gc3": lambda c: 8 * c,
        "eca_ns": lambda c: KERNEL_SIZE[c] * c,
        "eca": lambda c: KERNEL_SIZE[c],
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parameter_counts_of_table_2(name, count) -> None:
    for channels in KERNEL_SIZE:
        with torch.device("meta"):
            gate = build_gate(name, channels)
        assert sum(weight.numel() for weight in gate.parameters()) == count(channels), channels
        assert all(weight.requires_grad for weight in gate.parameters())
        assert not list(gate.buffers())


@pytest.mark.parametrize(
    ("name", "channels", "inputs"),
    [("eca", 2048, 7), ("eca_ns", 512, 5), ("se_gc1", 256, 16), ("se_var3", 64, 64), ("se_var2", 2048, 1)],
)
def test_weights_start_uniform_within_one_over_the_root_of_the_inputs(name, channels, inputs) -> None:
    """As torch's own layers do, whatever way the weights are stored."""
    (weights,), bound = build_gate(name, channels).parameters(), inputs**-0.5
    assert weights.abs().max() <= bound
    assert weights.unique().numel() > 1
    if weights.numel() > 1000:
        assert weights.min() < -0.99 * bound
        assert weights.max() > 0.99 * bound
        assert abs(weights.mean()) < 0.1 * bound
