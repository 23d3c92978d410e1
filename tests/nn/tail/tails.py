"""What the tests of the tail share: the tail, its modules called one after another, and how alike they must be."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecanet
from ecanet.nn import Gate, norm_gate_add_act

C = 32  # the grouped gates of Table 2 need a multiple of 16

# Error relative to the largest value: a half type is rounded by every module of the plain path, and once here.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}

LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
both_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


class Tail(nn.Module):
    """A block's tail, in the passes over the data that norm, residual and activation take."""

    def __init__(self, norm: Any = None, gate: Any = None, act: Any = None) -> None:
        super().__init__()
        self.norm, self.gate, self.act = norm, gate, act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return norm_gate_add_act(x, self.norm, self.gate, residual, self.act)


class OneAfterAnother(Tail):
    """The same modules, called."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        names = {"relu": nn.ReLU(), "relu6": nn.ReLU6(), "silu": nn.SiLU(), "hardswish": nn.Hardswish()}
        act = names.get(self.act, nn.Identity()) if self.act is None or isinstance(self.act, str) else self.act
        with ecanet.backend("reference"):
            x = x if self.norm is None else self.norm(x)
            x = x if self.gate is None else self.gate(x)
            return act(x if residual is None else x + residual)


def build(gate: str | None) -> nn.Module | None:
    """A gate by its name, or none."""
    if gate is None or gate == "with dropout":
        return None if gate is None else GateWithDropout(C)
    return ecanet.nn.build_gate(gate, C)


def plain(tail: Tail) -> OneAfterAnother:
    """The same modules, in the same state."""
    return OneAfterAnother(*copy.deepcopy((tail.norm, tail.gate, tail.act)))


def feature_map(*shape: int, layout: torch.memory_format = torch.contiguous_format, **kwargs: Any) -> Tensor:
    """Random, with channel means that differ and are not 0."""
    x = torch.randn(shape, **kwargs) + 2 * torch.randn(1, shape[1], *[1] * (len(shape) - 2), **kwargs)
    if layout is torch.channels_last and len(shape) in (4, 5):
        layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        return x.contiguous(memory_format=layout)
    return x


def randomise_(module: nn.Module | None) -> nn.Module | None:
    """Weights and running statistics as after some training."""
    for name, t in (*module.named_parameters(), *module.named_buffers()) if module is not None else ():
        if t.is_floating_point():
            t.detach().copy_(torch.rand_like(t) + 0.5 if name.endswith("var") else torch.randn_like(t))
    return module


def step(tail: Tail, x: Tensor, residual: Tensor | None = None, dout: Tensor | None = None) -> dict[str, Any]:
    """Everything that a step of training shows of the tail."""
    x, residual = (t if t is None else t.detach().clone().requires_grad_() for t in (x, residual))
    tail.zero_grad()
    out = tail(x, residual)
    out.backward(torch.ones_like(out) if dout is None else dout.to(out.dtype))
    return {
        "output": out.detach(),
        "gradient of x": x.grad,
        "gradient of the residual": None if residual is None else residual.grad,
        **{f"gradient of {name}": p.grad for name, p in tail.named_parameters()},
        **{name: t.clone() for name, t in tail.named_buffers()},
    }


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest error, relative to the largest value or to 1: what goes in is of that size."""
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1)).item()


def assert_equal(got: dict[str, Any], want: dict[str, Any], tolerance: float, case: str = "") -> None:
    assert got.keys() == want.keys()
    for name, w in want.items():
        g = got[name]
        assert (g is None) == (w is None), f"{case} {name}"
        if w is None:
            continue
        assert (g.shape, g.dtype) == (w.shape, w.dtype), f"{case} {name}"
        error = relative_error(g, w)
        assert error <= tolerance, f"{case} {name}: {error:.1e}"


def assert_as_one_after_another(
    tail: Tail, x: Tensor, residual: Tensor | None = None, steps: int = 1, tolerance: float | None = None
) -> None:
    """Output, strides, every gradient and every buffer, over some steps of training with other data in each."""
    other = plain(tail)
    for i in range(steps):
        dout = torch.randn_like(x)
        got = step(tail, (i + 1) * x - i, residual, dout)
        want = step(other, (i + 1) * x - i, residual, dout)
        assert_equal(got, want, tolerance or TOLERANCE[x.dtype], f"step {i}")
        assert got["output"].stride() == want["output"].stride()


class GateWithDropout(Gate):
    """Linear, with dropout inside."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.linear = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(0.5)

    def logits(self, s: Tensor) -> Tensor:
        return self.linear(self.dropout(s))
