"""Random tails over all gates, norms, factors, activations, types and layouts against float64: `--count 3000`.

Each tail is computed three times: fused, by calling its modules one after another, and so in float64. What is fused may
be as wrong as the modules are, times two, and a few roundings of the largest value, or of 1. Gradients are compared
where the activation has no kink nearby, on whose two sides rounding may put a value.
"""

import argparse
import copy
import math
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from ecanet.nn import ECA, ECANS, GATES, build_gate, describe_gates, norm_gate_add_act
from ecanet.nn.attached import attach_

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ACTS: dict[str | None, tuple[float, ...]] = {  # and where their slope jumps
    None: (),
    "relu": (0,),
    "relu6": (0, 6),
    "silu": (),
    "hardswish": (-3, 3),
}
MODULES_OF_ACTS = {
    None: nn.Identity(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
}
GATE_NAMES = [None, *GATES, "eca circular", "eca_ns circular"]
NEVER_NEUTRAL = [description.name for description in describe_gates() if description.neutral is None]
NORMS = ["none", "training", "evaluation", "not affine", "no statistics", "cumulative", "frozen"]
LAYOUTS = ["contiguous", "channels last", "strided"]
RESIDUALS = ["none", "another map", "itself", "one value a channel"]


class Case(NamedTuple):
    """A tail, in words: ``repr`` is enough to make it again."""

    seed: int
    gate: str | None
    norm: str
    act: str | None
    residual: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    factor: float
    neutral: bool
    is_attached: bool


def draw(rng: random.Random) -> Case:
    """One case; sizes are odd as often as not."""
    gate = rng.choice(GATE_NAMES)
    channels = rng.choice([16, 32, 48, 64]) if gate and "se_gc" in gate else rng.choice([1, 3, 5, 8, 16, 17, 33, 64])
    norm = rng.choice(NORMS)
    spatial = [rng.randint(1, 9) for _ in range(2 if norm == "frozen" else rng.choice([0, 1, 2, 2, 2, 3]))]
    shape = (rng.randint(2, 5), channels, *spatial)
    if shape[0] * math.prod(spatial) < 8:  # statistics of two values cost any digits of the gradient
        shape = (8, channels, *spatial)
    return Case(
        rng.randrange(2**31),
        gate,
        norm,
        rng.choice(list(ACTS)),
        rng.choice(RESIDUALS),
        shape,
        rng.choice(DTYPES),
        rng.choice(LAYOUTS) if len(shape) == 4 else rng.choice(["contiguous", "strided"]),
        rng.choice([1.0, 2.0, round(rng.uniform(0.2, 4), 3)]),
        rng.random() < 0.2 and gate not in NEVER_NEUTRAL,
        rng.random() < 0.2,
    )


def modules(case: Case) -> tuple[nn.Module | None, nn.Module | None]:
    """Norm and gate, in float64 of values that the case's type has."""
    channels, rank = case.shape[1], len(case.shape)
    norm: Any = None
    if case.norm == "frozen":
        norm = FrozenBatchNorm2d(channels)
    elif case.norm != "none":
        settings: dict[str, dict[str, Any]] = {
            "not affine": {"affine": False},
            "no statistics": {"track_running_stats": False},
            "cumulative": {"momentum": None},
        }
        cls = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(rank, nn.BatchNorm1d)
        norm = cls(channels, **settings.get(case.norm, {})).train(case.norm != "evaluation")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(t := getattr(norm, name, None), Tensor):
            t.data.copy_(torch.rand(channels) + 0.5 if name in ("weight", "running_var") else torch.randn(channels))
    gate: Any = None
    if case.gate is not None:
        circular = {"eca circular": ECA, "eca_ns circular": ECANS}.get(case.gate)
        if circular is None:
            gate = build_gate(case.gate, channels)
        else:
            gate = circular(channels, kernel_size=1 if channels < 3 else 3, circular=True)
        for p in gate.parameters():
            if bool((p == p.flatten()[0]).all()):  # 0 or 1 at the start
                nn.init.uniform_(p, 0.5, 1.5)
        gate.train(case.gate not in ("srm", "cbam"))  # a norm of theirs over a few values costs any digits, as above
        gate.factor = case.factor
        if case.neutral:
            gate.make_identity_()
    return tuple(m if m is None else m.to(case.dtype).double() for m in (norm, gate))


def residual_of(case: Case, x: Tensor, other: Tensor) -> Tensor | None:
    """What is added to the branch: nothing, x, or a leaf made of another map."""
    if case.residual == "none":
        return None
    if case.residual == "itself":
        return x
    if case.residual == "another map":
        return other.requires_grad_()
    values = other.flatten(2).mean(2).to(x.dtype) if x.dim() > 2 else other[:1]
    return values.reshape(*values.shape, *[1] * (x.dim() - values.dim())).detach().requires_grad_()


def run(case: Case, dtype: torch.dtype, fused: bool, dout: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
    """Output, gradients and running statistics; and what went into the activation."""
    torch.manual_seed(case.seed)
    norm, gate = modules(case)
    size = (*case.shape[:-1], 2 * case.shape[-1]) if case.layout == "strided" else case.shape
    x, other = ((2 * torch.randn(size, dtype=torch.float64)).to(case.dtype).to(dtype) for _ in range(2))
    if case.layout == "strided":
        x, other = x[..., ::2], other[..., ::2]
    elif case.layout == "channels last":
        x, other = (t.to(memory_format=torch.channels_last) for t in (x, other))
    norm, gate = (m if m is None else copy.deepcopy(m).to(dtype) for m in (norm, gate))
    inputs = {"x": x.requires_grad_()}
    residual = residual_of(case, x, other)
    if residual is not None and residual is not x:
        inputs["residual"] = residual
    for kind, module in (("norm", norm), ("gate", gate)):
        if module is not None:
            inputs |= {f"{kind}.{name}": p for name, p in module.named_parameters()}
    y = x if norm is None else norm(x)
    y = y if gate is None else gate(y)
    before_act = y if residual is None else y + residual
    if fused:
        if norm is not None and norm.training:
            norm.load_state_dict(copy.deepcopy(modules_again(case, dtype)[0]).state_dict())
        attached = norm is not None and gate is not None and case.is_attached
        if attached:
            attach_(norm, gate)
        out = norm_gate_add_act(x, norm, None if attached else gate, residual, case.act)
    else:
        out = MODULES_OF_ACTS[case.act](before_act)
    found = {"output": out.detach()}
    if dout is not None:
        grads = torch.autograd.grad(out, list(inputs.values()), dout.to(out.dtype), allow_unused=True)
        found |= {f"gradient of {name}": g for name, g in zip(inputs, grads, strict=True) if g is not None}
    if norm is not None:
        found |= {name: t for name, t in norm.named_buffers() if name.startswith("running")}
    return {name: t.detach().double() for name, t in found.items()}, before_act.detach().double()


def modules_again(case: Case, dtype: torch.dtype) -> tuple[nn.Module | None, nn.Module | None]:
    """The modules as they were, for a second forward pass."""
    torch.manual_seed(case.seed)
    norm, gate = modules(case)
    return (norm if norm is None else norm.to(dtype)), gate


def problems(case: Case) -> Iterator[str]:
    """What is further from float64 than the modules are."""
    _, before_act = run(case, torch.float64, False, None)
    eps = torch.finfo(case.dtype).eps
    scale = before_act.abs().max().clamp_min(1.0)
    dout = torch.randn(before_act.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(case.seed))
    for kink in ACTS[case.act]:
        dout = dout.masked_fill((before_act - kink).abs() < 64 * eps * scale, 0)
    dout = dout.to(case.dtype).double()
    truth, _ = run(case, torch.float64, False, dout)
    eager, _ = run(case, case.dtype, False, dout)
    fused, _ = run(case, case.dtype, True, dout)
    for name, want in truth.items():
        got, theirs = fused[name], eager[name]
        if got.shape != want.shape:
            yield f"{name} has the shape {tuple(got.shape)}, not {tuple(want.shape)}"
            continue
        if not want.numel():
            continue
        # In float64 the modules are the truth, so theirs is no bound.
        roundings = 1e-10 if case.dtype is torch.float64 else 8 * eps
        error, bound = (
            (got - want).abs().max(),
            2 * (theirs - want).abs().max() + roundings * want.abs().max().clamp_min(1),
        )
        if not error <= bound + 1e-30:
            yield f"{name} is {error:.3g} from float64, the modules {(theirs - want).abs().max():.3g}"


def main() -> None:
    """Draw tails, print what is wrong with any, and end with 1 if something is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3000, help="so many tails")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    arguments = parser.parse_args()
    rng, wrong = random.Random(arguments.seed), 0
    for _ in range(arguments.count):
        case = draw(rng)
        found = list(problems(case))
        wrong += bool(found)
        if found:
            print(case, *found, sep="\n  ")
    print(f"{arguments.count} tails, {wrong} of them further from float64 than eager PyTorch")
    raise SystemExit(int(wrong > 0))


if __name__ == "__main__":
    main()
