"""The tail of a residual branch on a GPU: norm, gate, addition, ReLU; eager and compiled, training and inference."""

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from timm.layers import EcaModule
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from benchmarks.cases import MEMORY_FORMATS, STAGES, Case, FusedTail, GateOpTail, OperationTail, Setup, Tail, Work
from benchmarks.gpu.kernels import QUICK_SHAPES, sets_of
from ecanet.nn import ECA
from ecanet.nn.tail.compiled import formula
from ecanet.nn.tail.maths import NormMaths
from ecanet.ops import reference
from ecanet.profile.turns import Competitor

_BATCH = 128
#: Shapes so small that the GPU waits for the CPU: the time of launching.
_CALLED, _QUICK_CALLED = (8, 256, 14, 14), (2, 16, 3, 3)
#: Maps that must be read or written in a step, and in a call at inference.
_TRAINING_MAPS, _INFERENCE_MAPS = 4 + 4 + 3, 1 + 3


class FormulaTail(FusedTail):
    """The formulas in plain PyTorch, all left to a compiler."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """As :class:`Tail`."""
        norm, gate = self.norm, self.gate.maths()
        if norm.training:
            read = NormMaths(norm, None, None, norm.weight, norm.bias, norm.eps)
            return torch.relu(formula(x, read, gate, residual, 0, None))
        read = NormMaths(norm, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
        return formula(x, read, gate, residual, reference.ACTS.index("relu"), None)


class InferenceOperationTail(FusedTail):
    """The tail of a trained norm in one operation."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """As :class:`Tail`."""
        norm, kernel = self.norm, self.gate.conv.weight
        given = norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps, kernel, False
        return torch.ops.ecanet.norm_eca_add_act(x, residual, *given, reference.ACTS.index("relu"))


#: Competitors, each also compiled; "ecanet" is what users get. The forms in ``_FORMS`` are only compiled.
_EAGER = ("no gate", "ecanet", "timm", "SE")
_FORMS = {"training": ("formula", "operation", "gate op"), "inference": ("formula", "operation")}


def tail_cases(quick: bool, compiled: bool, setup: Setup, memory_format: str) -> Iterator[Case]:
    """Training steps of the four stages of a ResNet-50, then their inference.

    Args:
        quick: Tiny shapes.
        compiled: Whether torch.compile competes.
        setup: Device and type.
        memory_format: ``channels_last`` or ``contiguous``.
    """
    shapes = QUICK_SHAPES if quick else tuple((_BATCH, *stage) for stage in STAGES)
    for group in _FORMS:
        for shape in shapes:
            build = partial(_tail, group == "training", compiled, setup, shape, memory_format)
            yield Case(group, "tail", shape, memory_format, build, setup.device)
    for group in _FORMS:
        shape = _QUICK_CALLED if quick else _CALLED
        build = partial(_tail, group == "training", compiled, setup, shape, memory_format, replayed=False)
        yield Case("calls", group, shape, memory_format, build, setup.device)


def _tail(
    training: bool,
    compiled: bool,
    setup: Setup,
    shape: tuple[int, ...],
    memory_format: str,
    only: Collection[str] | None = None,
    replayed: bool = True,
) -> Work:
    group = "training" if training else "inference"
    names = [*_EAGER, *(f"{name} compiled" for name in (*_EAGER, *_FORMS[group]) if compiled)]
    wanted = [name for name in names if only is None or name in only]
    build_module = _modules(training, setup, shape[1])
    if any(name.endswith("compiled") for name in wanted):
        torch.compiler.reset()
    modules, calls = {}, {}
    for name in wanted:
        modules[name] = build_module(name.removesuffix(" compiled"))
        is_compiled = name.endswith(" compiled")
        calls[name] = torch.compile(modules[name], dynamic=False) if is_compiled else modules[name]

    def new_map() -> Tensor:
        x = torch.randn(shape, device=setup.device, dtype=setup.dtype)
        return x.contiguous(memory_format=MEMORY_FORMATS[memory_format]).requires_grad_(training)

    map_bytes = shape[0] * shape[1] * shape[2] * shape[3] * setup.dtype.itemsize
    sets = [(new_map(), new_map(), new_map().detach()) for _ in range(sets_of(map_bytes, 3 if training else 2))]

    def step(name: str) -> tuple[Tensor, ...]:
        # All outputs before all gradients: as in a network, what a backward reads has then left the cache.
        outs = [calls[name](x, residual) for x, residual, _ in sets]
        if not training:
            return (outs[0],)
        parameters, first = list(modules[name].parameters()), None
        for out, (x, residual, grad) in zip(outs, sets, strict=True):
            grads = torch.autograd.grad(out, [x, residual, *parameters], grad)
            first = first or (out, *grads)
        return first or ()

    def context(name: str) -> AbstractContextManager[object]:
        return setup.context(grad=training)

    competitors = {name: Competitor(partial(step, name), partial(context, name)) for name in wanted}
    # Not SE: in half types, rounding decides whether a hidden unit is 0.
    kinds = (("no gate",), ("timm", "ecanet", *_FORMS[group]))
    agree = tuple(tuple(n for n in wanted if n.removesuffix(" compiled") in kind) for kind in kinds)
    if only is None:
        pairs = [(x.detach(), torch.empty_like(x).detach()) for x, _, _ in sets]
        competitors["copy"] = Competitor(partial(_copy, pairs), torch.no_grad)
    return Work(
        competitors,
        agree,
        # In half types one sum in 200 is rounded to the other side of 0, and its gradient passes or not: 0.1 in all.
        max(2e-2, 10 * setup.tolerance),
        _TRAINING_MAPS if training else _INFERENCE_MAPS,
        map_bytes,
        sets=len(sets),
        replayed=replayed,
        poison_bytes=16 * map_bytes if setup.device == "cuda" else 0,
    )


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for source, target in pairs:
        target.copy_(source)


def _modules(training: bool, setup: Setup, channels: int) -> Callable[[str], nn.Module]:
    """A function that makes a tail by its name; all have the same weights."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(channels).train(training)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    eca, timm, se = ECA(channels), EcaModule(channels), SqueezeExcitation(channels, max(1, channels // 16))
    timm.load_state_dict(eca.state_dict())
    operation: Any = OperationTail if training else InferenceOperationTail
    parts: dict[str, tuple[Any, nn.Module | None]] = {
        "no gate": (Tail, None),
        "timm": (Tail, timm),
        "SE": (Tail, se),
        "ecanet": (FusedTail, eca),
        "formula": (FormulaTail, eca),
        "operation": (operation, eca),
        "gate op": (GateOpTail, eca),
    }

    def build(name: str) -> nn.Module:
        kind, gate = parts[name]
        module = kind(copy.deepcopy(norm), copy.deepcopy(gate))
        return module.to(setup.device).train(training)

    return build
