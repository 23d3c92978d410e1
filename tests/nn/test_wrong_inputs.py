"""A user's mistake gets an error that names the argument, what was given and what would be right."""

import inspect

import numpy as np
import pytest
import torch
from equations import GATES, GATES_OF_MEANS

from ecanet.nn import CBAM, ECA, ECANS, LCT, SE, GaussianGCT, SEGroup, SEShift, SimAM, se_gc2, se_gc3
from ecanet.nn import GATES as NAMED

BUILDERS = [*NAMED.values(), ECA.from_yolo]


@pytest.mark.parametrize(
    ("channels", "error", "message"),
    [
        (0, ValueError, "channels must be 1 or more, got 0"),
        (-1, ValueError, "channels must be 1 or more, got -1"),
        (1.5, TypeError, r"channels must be an integer, got 1\.5"),
        (64.0, TypeError, r"channels must be an integer, got 64\.0"),
        (True, TypeError, "channels must be an integer, got True"),
        ("64", TypeError, "channels must be an integer, got '64'"),
        (None, TypeError, "channels must be an integer, got None"),
    ],
    ids=repr,
)
def test_channels(channels, error, message) -> None:
    for build in BUILDERS:
        with pytest.raises(error, match=message):
            build(channels)


@pytest.mark.parametrize(
    ("kernel_size", "error", "message"),
    [
        (2, ValueError, "kernel_size must be odd.*got 2: try 1 or 3"),
        (4, ValueError, "kernel_size must be odd.*got 4: try 3 or 5"),
        (0, ValueError, "kernel_size must be a positive odd integer, got 0: try 3"),
        (-3, ValueError, "kernel_size must be a positive odd integer, got -3: try 3"),
        (3.0, TypeError, r"kernel_size must be an odd integer, got 3\.0"),
        (True, TypeError, "kernel_size must be an odd integer, got True"),
        (None, TypeError, "kernel_size must be an odd integer, got None"),
        ("3", ValueError, "kernel_size must be 'adaptive' or a positive odd integer, got '3'"),
        ("released", ValueError, "kernel_size must be 'adaptive' or a positive odd integer, got 'released'"),
    ],
    ids=repr,
)
def test_kernel_size(kernel_size, error, message) -> None:
    for build in (ECA, ECANS, lambda channels, k: ECA.from_yolo(channels, k_size=k)):
        with pytest.raises(error, match=message):
            build(64, kernel_size)


@pytest.mark.parametrize("cls", [ECA, ECANS])
def test_a_circular_band_may_not_overlap_itself(cls) -> None:
    with pytest.raises(ValueError, match="kernel_size must not exceed channels=3 with circular padding, got 5"):
        cls(3, kernel_size=5, circular=True)
    cls(5, kernel_size=5, circular=True)


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (5, ValueError, r"groups must divide channels=12, got 5: try one of \[1, 2, 3, 4, 6, 12\]"),
        (24, ValueError, "groups must divide channels=12, got 24"),
        (0, ValueError, "groups must divide channels=12, got 0"),
        (-3, ValueError, "groups must divide channels=12, got -3"),
        (2.0, TypeError, r"groups must be an integer, got 2\.0"),
        (True, TypeError, "groups must be an integer, got True"),
    ],
    ids=repr,
)
def test_groups(groups, error, message) -> None:
    for cls in (SEGroup, LCT):
        with pytest.raises(error, match=message):
            cls(12, groups=groups)


@pytest.mark.parametrize("activation", ["relu", "Sigmoid", "", "exp", 3], ids=repr)
def test_activation(activation) -> None:
    takers = [name for name, build in NAMED.items() if "activation" in inspect.signature(build).parameters]
    assert {"eca", "eca_ns", "se", "se_var1", "se_gc2", "ese", "se_shift", "lct", "cbam"} <= {*takers}
    for name in takers:
        with pytest.raises(ValueError, match=f"activation must be 'sigmoid' or 'hard_sigmoid', got {activation!r}"):
            NAMED[name](64, activation=activation)


@pytest.mark.parametrize(
    ("c", "error", "message"),
    [
        (0, ValueError, "c must be finite and above 0, got 0: such as 2"),
        (-2.0, ValueError, r"c must be finite and above 0, got -2\.0"),
        (float("nan"), ValueError, "c must be finite and above 0, got nan"),
        (None, TypeError, "c must be a number, got None"),
        (True, TypeError, "c must be a number, got True"),
        ("learned", ValueError, "c must be a number or 'learnable', got 'learned'"),
    ],
    ids=repr,
)
def test_the_width_of_a_gaussian(c, error, message) -> None:
    with pytest.raises(error, match=message):
        GaussianGCT(64, c)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [(0, ValueError, "must be finite and above 0, got 0"), ("1e-4", TypeError, "must be a number, got '1e-4'")],
    ids=repr,
)
def test_small_numbers_below_a_root_or_a_fraction(value, error, message) -> None:
    for build, name in ((LCT, "eps"), (GaussianGCT, "eps"), (SimAM, "e_lambda")):
        with pytest.raises(error, match=f"{name} {message}"):
            build(64, **{name: value})


@pytest.mark.parametrize(("build", "size"), [(se_gc2, 16), (se_gc3, 8)], ids=["se_gc2", "se_gc3"])
def test_groups_of_a_fixed_size(build, size) -> None:
    with pytest.raises(ValueError, match=f"channels must be a multiple of {size} .*got 20"):
        build(20)


@pytest.mark.parametrize(
    ("reduction", "error", "message"),
    [
        (0, ValueError, "reduction must be 1 or more, got 0: the paper uses 16"),
        (-16, ValueError, "reduction must be 1 or more, got -16"),
        (16.0, TypeError, r"reduction must be an integer, got 16\.0"),
        (True, TypeError, "reduction must be an integer, got True"),
    ],
    ids=repr,
)
def test_reduction(reduction, error, message) -> None:
    for cls in (SE, SEShift, CBAM):
        with pytest.raises(error, match=message):
            cls(64, reduction)


# --- feature maps -------------------------------------------------------------------------------------------------

C = 32
WRONG_X = {
    "0-D": (torch.zeros(()), ValueError, r"x must have shape \(N, 32, \*spatial\).*got \(\)"),
    "1-D": (torch.zeros(C), ValueError, r"x must have shape.*got \(32,\): a single sample needs x\.unsqueeze\(0\)"),
    "6-D": (torch.zeros(2, C, 1, 1, 1, 1), ValueError, r"0 to 3 spatial dimensions, got \(2, 32, 1, 1, 1, 1\)"),
    "too few channels": (torch.zeros(2, 31, 3, 3), ValueError, r"x has 31 channels.*built for 32.*channels=31"),
    "too many channels": (torch.zeros(2, 33), ValueError, r"x has 33 channels.*built for 32.*channels=33"),
    "no channels": (torch.zeros(2, 0, 3), ValueError, "x has 0 channels.*built for 32"),
    "channels at the end": (torch.zeros(2, 5, 7, C), ValueError, r"x has 5 channels.*permute x to \(N, C, \*spatial\)"),
    "no spatial position": (torch.zeros(2, C, 3, 0), ValueError, r"no spatial position.*\(2, 32, 3, 0\).*1 or more"),
    "int64": (torch.zeros(2, C, 3, 3, dtype=torch.int64), TypeError, r"x must be floating.*int64.*x\.float\(\)"),
    "uint8": (torch.zeros(2, C, 3, 3, dtype=torch.uint8), TypeError, r"x must be floating.*uint8.*x\.float\(\)"),
    "bool": (torch.zeros(2, C, 3, 3, dtype=torch.bool), TypeError, r"x must be floating.*bool.*x\.float\(\)"),
    "complex64": (torch.zeros(2, C, 3, dtype=torch.complex64), TypeError, "x must be floating.*complex64"),
    "ndarray": (np.zeros((2, C, 3, 3)), TypeError, r"x must be a tensor of shape \(N, 32, \*spatial\), got ndarray"),
    "None": (None, TypeError, "x must be a tensor.*got NoneType"),
}


@pytest.mark.parametrize(("x", "error", "message"), WRONG_X.values(), ids=WRONG_X)
def test_feature_maps_every_gate_refuses(x, error, message) -> None:
    for build in GATES.values():
        with pytest.raises(error, match=message):
            build(C)(x)


def test_no_spatial_position_is_refused_in_an_empty_batch_too() -> None:
    with pytest.raises(ValueError, match="no spatial position"):
        ECA(C)(torch.zeros(0, C, 0, 3))


WRONG_MEANS = {
    "1-D": (torch.zeros(C), ValueError, r"s must hold channel means of shape \(N, 32\), got \(32,\)"),
    "a feature map": (torch.zeros(2, C, 3, 3), ValueError, r"got \(2, 32, 3, 3\): call the module itself"),
    "wrong channels": (torch.zeros(2, 31), ValueError, r"s must hold channel means of shape \(N, 32\), got \(2, 31\)"),
    "int64": (torch.zeros(2, C, dtype=torch.int64), TypeError, "s must be a floating-point tensor.*int64"),
    "complex64": (torch.zeros(2, C, dtype=torch.complex64), TypeError, "s must be a floating-point.*complex64"),
    "ndarray": (np.zeros((2, C)), TypeError, "s must be a floating-point tensor.*ndarray"),
}


@pytest.mark.parametrize(("s", "error", "message"), WRONG_MEANS.values(), ids=WRONG_MEANS)
def test_channel_means_every_gate_refuses(s, error, message) -> None:
    for name in (*GATES_OF_MEANS, "se_shift"):
        with pytest.raises(error, match=message):
            GATES[name](C).gate(s)


def test_gates_that_need_more_than_means_say_what_to_call_instead() -> None:
    for name in [name for name in GATES if name not in (*GATES_OF_MEANS, "se_shift")]:
        gate = GATES[name](C)
        calls = [gate.gate, gate.logits] + [gate.scale_and_shift] * gate.sees_map
        instead = "call the module on the map" if gate.sees_map else r"call scale_and_shift\(gate\.statistics\(x\)\)"
        for call in calls:
            with pytest.raises(TypeError, match=f"{type(gate).__name__} .*{instead}"):
                call(torch.zeros(2, C))
