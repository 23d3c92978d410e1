"""Parameter counts of the paper's tables. Its M is 2^20; the counts are those of networks with 1000 classes."""

import functools
from collections.abc import Callable

import pytest
import torch

from ecanet.models import build_model

# Output channels of ResNet-50's blocks.
RESNET50 = [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3

TABLE_2: dict[str | None, Callable[[int], int]] = {
    None: lambda c: 0,
    "se": lambda c: 2 * c * c // 16,
    "se_var1": lambda c: 0,
    "se_var2": lambda c: c,
    "se_var3": lambda c: c * c,
    "se_gc1": lambda c: c * c // 16,
    "se_gc2": lambda c: 16 * c,
    "se_gc3": lambda c: 8 * c,
    "eca_ns": lambda c: 3 * c,
    "eca": lambda c: 3,
}

# In units of 2^20, as printed. ResNet-18 and 34 are in the official README.
TABLE_3 = {
    ("eca_resnet18", "eca"): "11.15",
    ("eca_resnet34", "eca"): "20.79",
    ("eca_resnet50", None): "24.37",
    ("eca_resnet50", "se"): "26.77",
    ("eca_resnet50", "eca"): "24.37",
    ("eca_resnet101", None): "42.49",
    ("eca_resnet101", "se"): "47.01",
    ("eca_resnet101", "eca"): "42.49",
    ("eca_resnet152", None): "57.40",
    ("eca_resnet152", "se"): "63.68",
    ("eca_resnet152", "eca"): "57.40",
    ("eca_mobilenet_v2", None): "3.34",
    ("eca_mobilenet_v2", "se"): "3.40",
    ("eca_mobilenet_v2", "eca"): "3.34",
}

# Attention parameters with the released weights' kernel sizes, and with those of Eq. (12).
ECA_WEIGHTS = {
    "eca_resnet18": (44, 36),
    "eca_resnet34": (72, 74),
    "eca_resnet50": (80, 86),
    "eca_resnet101": (157, 171),
    "eca_resnet152": (234, 256),
    "eca_mobilenet_v2": (31, 59),
}


@functools.cache
def total(name: str, gate: str | None, **kwargs) -> int:
    with torch.device("meta"):
        model = build_model(name, gate=gate, **kwargs)
    return sum(p.numel() for p in model.parameters())


def attention(name: str, gate: str | None, **kwargs) -> int:
    return total(name, gate, **kwargs) - total(name, None)


@pytest.mark.parametrize("gate", TABLE_2, ids=str)
def test_table_2(gate):
    kernel = {"kernel_size": 3} if gate in ("eca", "eca_ns") else {}
    assert attention("eca_resnet50", gate, **kernel) == sum(map(TABLE_2[gate], RESNET50))


@pytest.mark.parametrize(("name", "gate"), TABLE_3, ids=lambda part: str(part))
def test_table_3(name, gate):
    kernel = {"kernel_size": "released"} if gate == "eca" else {}
    assert f"{total(name, gate, **kernel) / 2**20:.2f}" == TABLE_3[name, gate]


@pytest.mark.parametrize("name", ECA_WEIGHTS)
def test_released_and_adaptive_kernels(name):
    released, adaptive = ECA_WEIGHTS[name]
    assert attention(name, "eca", kernel_size="released") == released
    assert attention(name, "eca", kernel_size="adaptive") == adaptive
