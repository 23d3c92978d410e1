"""Benchmarks on feature maps: the operations, the module, the tail at inference and in training."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import EcaModule
from torch import Tensor, nn

import ecanet
from ecanet.nn import ECA, norm_gate_add_act
from ecanet.nn.tail import eager
from ecanet.nn.tail.statistics import update_running_statistics
from ecanet.ops import reference
from ecanet.ops.backend import choose
from ecanet.profile.turns import Competitor

#: ResNet-50's four stages, (C, H, W), and the numbers of samples.
STAGES = ((256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7))
BATCHES = (1, 8)
QUICK_STAGES, QUICK_BATCHES = ((16, 6, 6), (32, 3, 3)), (2,)
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_RELU = reference.ACTS.index("relu")


@dataclass(frozen=True)
class Setup:
    """Device, type and backend of a measurement.

    Attributes:
        device: ``cpu`` or ``cuda``.
        dtype: Type of the maps. Weights are float32; autocast is on for any other type.
        kernels: Backend of the competitor "ecanet".
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    kernels: str = "auto"

    @property
    def tolerance(self) -> float:
        """Largest difference of outputs, relative to their norms: half types are rounded."""
        return 1e-4 if self.dtype is torch.float32 else 2e-2

    def context(self, *, backend: str | None = None, grad: bool = False) -> AbstractContextManager[object]:
        """The context in which one turn of a competitor runs."""
        stack = ExitStack()
        stack.enter_context(ecanet.backend(backend or self.kernels))
        if not grad:
            stack.enter_context(torch.no_grad())
        if self.dtype is not torch.float32:
            stack.enter_context(torch.autocast(self.device, self.dtype, cache_enabled=False))  # for CUDA graphs
        return stack


@dataclass(frozen=True)
class Work:
    """What one case times.

    Attributes:
        competitors: By name. ``no gate`` does the same without attention; ``copy`` only moves two maps.
        agree: Groups of names whose outputs must agree; the first name of a group is the reference.
        tolerance: As :func:`benchmarks.measure.check_agreement` takes it.
        maps: Number of feature maps that must be read or written at least: the roofline.
        map_bytes: Bytes of one map.
        images: Number of images in a call, for networks.
        peak: Whether to measure the peak memory of a call: the allocator does not see that of a replayed CUDA graph.
        sets: How many times a call does the work, each time on tensors of its own.
        replayed: Whether calls on a GPU are captured in CUDA graphs and replayed. That measures the time of the GPU, as
            in a network where the CPU runs ahead, without the time that the CPU takes to launch.
        poison_bytes: As :func:`benchmarks.measure.check_agreement` takes it.
    """

    competitors: dict[str, Competitor]
    agree: tuple[tuple[str, ...], ...]
    tolerance: float
    maps: int | None = None
    map_bytes: int | None = None
    images: int | None = None
    peak: bool = True
    sets: int = 1
    replayed: bool = False
    poison_bytes: int = 0


@dataclass(frozen=True)
class SavedBytes:
    """Bytes that networks keep for the backward pass; counted, not timed."""

    count: dict[str, Callable[[], int]]


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Attributes:
        group: What ``--only`` selects: op, module, inference, training or network.
        name: Name of the case in its group.
        shape: Shape of the input.
        memory_format: ``contiguous`` or ``channels_last``.
        build: Makes tensors and modules, when it is the case's turn. On a GPU, ``only=`` names the competitors to make.
        device: ``cpu`` or ``cuda``.
    """

    group: str
    name: str
    shape: tuple[int, ...]
    memory_format: str
    build: Callable[..., Work | SavedBytes]
    device: str = "cpu"

    @property
    def key(self) -> str:
        """Its name in a result file."""
        return "/".join((self.group, self.name, "x".join(map(str, self.shape)), self.memory_format))


def map_cases(quick: bool, compiled: bool, setup: Setup = Setup()) -> Iterator[Case]:
    """Every case on feature maps, largest shapes first.

    Args:
        quick: Tiny shapes.
        compiled: Whether torch.compile competes.
        setup: Device and type.
    """
    stages, batches = (QUICK_STAGES, QUICK_BATCHES) if quick else (STAGES, BATCHES)
    shapes = [(n, *s) for s in stages for n in reversed(batches)]
    builders: list[tuple[str, str, Callable[..., Work]]] = [("op", name, partial(_op, name)) for name in CPU_OPS]
    builders += [
        ("module", "forward", partial(_module, compiled)),
        ("inference", "tail", partial(_inference, compiled)),
        ("training", "tail", partial(_training, compiled)),
        ("training", "tail-forward", partial(_training, compiled, backward=False)),
        ("inference", "factor", partial(_factor, False)),
        ("training", "factor", partial(_factor, True)),
    ]
    for group, name, build in builders:
        for shape in shapes:
            for memory_format in MEMORY_FORMATS:
                yield Case(group, name, shape, memory_format, partial(build, setup, shape, memory_format))


def gate_add_relu_(x: Tensor, gate: ECA, residual: Tensor) -> Tensor:
    """The library's tail at inference, in place; the one line to change when it has a public name."""
    return eager.gate_add_act_(choose(x), x, gate.maths(), residual, _RELU)


class Tail(nn.Module):
    """How torchvision's Bottleneck ends, with a gate or without."""

    def __init__(self, norm: nn.Module | None, gate: nn.Module | None) -> None:
        super().__init__()
        self.norm, self.gate = norm, gate

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Norm, gate, addition, ReLU: maps ``(N, C, H, W)``."""
        y = x if self.norm is None else self.norm(x)
        if self.gate is not None:
            y = self.gate(y)
        y += residual
        return torch.relu_(y)


class FusedTail(Tail):
    """The same tail by the library's fused function."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """As :class:`Tail`."""
        return norm_gate_add_act(x, self.norm, self.gate, residual, "relu")


class _GateOp(torch.autograd.Function):
    """Statistics of the batch, ECA and what follows from them for the tail, by the library's operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, eps: float) -> tuple[Tensor, ...]:
        means, mean, var, _ = torch.ops.ecanet.batch_moments(x)
        norm_and_band = mean, var, weight, bias, eps, kernel.reshape(-1), False
        _, gate, scale, shift = torch.ops.ecanet.eca_coefficients(means, *norm_and_band)
        ctx.save_for_backward(x, means, mean, var, weight, bias, kernel, gate)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return scale, shift, mean, var

    @staticmethod
    def backward(ctx: Any, grad_scale: Tensor, grad_shift: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, means, mean, var, weight, bias, kernel, gate = ctx.saved_tensors
        positions = x.shape[2:].numel()
        backward = torch.ops.ecanet.eca_coefficients_backward
        offset, grad_weight, grad_bias, grad_kernel, grad_mean, grad_var, _ = backward(
            grad_shift, grad_scale - mean * grad_shift, means, gate, None,
            mean, var, weight, bias, ctx.eps, kernel.reshape(-1), False, positions,
        )  # fmt: skip
        count = x.shape[0] * positions
        offset, slope, mean = (t[..., None, None] for t in (offset + grad_mean / count, grad_var * (2 / count), mean))
        grad_x = (offset + slope * (x - mean)).to(x.dtype)
        return grad_x, grad_weight, grad_bias, grad_kernel.reshape(kernel.shape), None


class OperationTail(FusedTail):
    """The whole tail as one operation, with its registered derivative."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """As :class:`Tail`."""
        norm, kernel = self.norm, self.gate.conv.weight
        out, _, mean, var, *_ = torch.ops.ecanet.batch_norm_eca_add_act(
            x, residual, norm.weight, norm.bias, norm.eps, kernel, False, _RELU
        )
        update_running_statistics(norm, mean.detach(), var.detach(), x.shape[0] * x.shape[2:].numel())
        return out


class GateOpTail(FusedTail):
    """The passes that write maps are left to a compiler; it sees what the operations between them return."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """As :class:`Tail`."""
        norm = self.norm
        scale, shift, mean, var = _GateOp.apply(x, norm.weight, norm.bias, self.gate.conv.weight, norm.eps)
        update_running_statistics(norm, mean, var, x.shape[0] * x.shape[2:].numel())
        return reference.apply(x, scale, shift, residual, _RELU)


def _randn(setup: Setup, shape: tuple[int, ...], memory_format: str) -> Tensor:
    return torch.randn(shape, device=setup.device, dtype=setup.dtype).contiguous(
        memory_format=MEMORY_FORMATS[memory_format]
    )


def _gates(setup: Setup, channels: int) -> tuple[ECA, EcaModule]:
    """The library's gate and timm's, with the same weights."""
    eca, timm = ECA(channels), EcaModule(channels)
    timm.load_state_dict(eca.state_dict())
    return eca.to(setup.device), timm.to(setup.device)


def _compile(module: nn.Module) -> Callable[..., Any]:
    return torch.compile(module, dynamic=False)


def _copy(x: Tensor) -> Competitor:
    source, destination = x.clone(), torch.zeros_like(x)
    return Competitor(lambda: destination.copy_(source))


#: Operations, and how many maps each must move.
OPS = {"squeeze": 1, "moments": 1, "batch_moments": 1, "apply_": 3, "apply_backward": 4, "input_backward": 3}
CPU_OPS = ("squeeze", "moments", "apply_", "apply_backward", "input_backward")


def op_arguments(name: str, setup: Setup, shape: tuple[int, ...], memory_format: str) -> tuple[Any, ...]:
    """Random arguments of one of :data:`OPS`, the map first."""
    n, c = shape[:2]
    randn = partial(_randn, setup, shape, memory_format)
    scale, offset = torch.rand(n, c, device=setup.device), torch.randn(n, c, device=setup.device)
    slope, center = torch.randn(c, device=setup.device), torch.randn(c, device=setup.device)
    if name == "apply_":
        return randn(), scale, None, randn(), _RELU
    if name == "apply_backward":
        return randn(), randn(), scale, None, center, torch.relu(randn()), _RELU, True
    if name == "input_backward":  # as after apply_backward: grad is already d
        return randn(), randn(), scale, None, None, 0, offset, slope, center
    return (randn(),)


def _op(name: str, setup: Setup, shape: tuple[int, ...], memory_format: str) -> Work:
    torch.manual_seed(0)
    x, *arguments = op_arguments(name, setup, shape, memory_format)
    op = getattr(torch.ops.ecanet, name)
    if name == "apply_":
        mine, other = x.clone(), x.clone()
        runs: tuple[Callable[[], Any], ...] = (
            lambda: (op(mine, *arguments), mine)[1],
            lambda: other.copy_(reference.apply(other, *arguments)),
        )
    elif name == "squeeze":
        runs = partial(op, x), partial(reference.squeeze, x, shape[1])
    else:
        runs = partial(op, x, *arguments), partial(getattr(reference, name), x, *arguments)
    competitors = {"ecanet": Competitor(runs[0], torch.no_grad), "plain": Competitor(runs[1], torch.no_grad)}
    return Work(competitors | {"copy": _copy(x)}, (("plain", "ecanet"),), setup.tolerance, OPS[name], x.nbytes)


def _module(compiled: bool, setup: Setup, shape: tuple[int, ...], memory_format: str) -> Work:
    torch.manual_seed(0)
    x = _randn(setup, shape, memory_format)
    eca, timm = _gates(setup, shape[1])
    plain = partial(setup.context, backend="reference")
    competitors = {
        "timm": Competitor(partial(timm, x), setup.context),
        "ecanet": Competitor(partial(eca, x), setup.context),
        "plain": Competitor(partial(eca, x), plain),
    }
    if compiled:
        torch.compiler.reset()
        competitors["timm compiled"] = Competitor(partial(_compile(timm), x), setup.context)
        competitors["plain compiled"] = Competitor(partial(_compile(eca), x), plain)
    agree = tuple(competitors)
    competitors |= {"clone": Competitor(x.clone, torch.no_grad), "copy": _copy(x)}
    return Work(competitors, (agree,), setup.tolerance, 2, x.nbytes)


def _inference(compiled: bool, setup: Setup, shape: tuple[int, ...], memory_format: str) -> Work:
    torch.manual_seed(0)
    x, residual = _randn(setup, shape, memory_format), _randn(setup, shape, memory_format)
    eca, timm = _gates(setup, shape[1])
    # Each in-place competitor has its own map; the values stay bounded, or grow linearly without a gate.
    mine, vanilla = x.clone(), x.clone()
    eager = Tail(None, timm)
    competitors = {
        "timm": Competitor(partial(eager, x, residual), setup.context),
        "ecanet": Competitor(partial(gate_add_relu_, mine, eca, residual), setup.context),
    }
    if compiled:
        torch.compiler.reset()
        competitors["timm compiled"] = Competitor(partial(_compile(eager), x, residual), setup.context)
    agree = tuple(competitors)
    competitors["no gate"] = Competitor(lambda: torch.relu_(vanilla.add_(residual)), torch.no_grad)
    competitors["copy"] = _copy(x)
    return Work(competitors, (agree,), setup.tolerance, 3, x.nbytes)


def _training(compiled: bool, setup: Setup, shape: tuple[int, ...], memory_format: str, backward: bool = True) -> Work:
    torch.manual_seed(0)
    x, residual = (_randn(setup, shape, memory_format).requires_grad_() for _ in range(2))
    grad = _randn(setup, shape, memory_format)
    eca, timm = _gates(setup, shape[1])

    norm = nn.BatchNorm2d(shape[1])
    with torch.no_grad():  # after a new norm, means of a single sample are 0: ECA's weight would not matter
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    norms = (copy.deepcopy(norm).to(setup.device) for _ in range(3))
    modules = {
        "timm": Tail(next(norms), timm),
        "ecanet": FusedTail(next(norms), eca),
        "no gate": Tail(next(norms), None),
    }
    forwards: dict[str, Callable[..., Any]] = dict(modules)
    if compiled:
        torch.compiler.reset()
        forwards |= {f"{name} compiled": _compile(module) for name, module in modules.items()}
        # Not the default on a CPU: the same formulas in plain PyTorch, for the compiler to fuse.
        modules["formula"] = copy.deepcopy(modules["ecanet"])
        forwards["formula compiled"] = _compile(modules["formula"])
        # Statistics and gate by the library's operations, and only what writes maps for the compiler to fuse.
        modules["gate op"] = GateOpTail(copy.deepcopy(norm).to(setup.device), copy.deepcopy(eca))
        forwards["gate op compiled"] = _compile(modules["gate op"])

    def step(name: str) -> tuple[Tensor, ...]:
        out = forwards[name](x, residual)
        if not backward:  # everything that a backward needs is still saved
            return (out,)
        # autograd.grad and not backward(): inside a network nothing is a leaf, so no gradient is copied into .grad.
        inputs = [x, residual, *modules[name.removesuffix(" compiled")].parameters()]
        return (out, *torch.autograd.grad(out, inputs, grad))

    def context(name: str) -> AbstractContextManager[object]:
        return setup.context(backend="reference" if name.startswith("formula") else None, grad=True)

    competitors = {name: Competitor(partial(step, name), partial(context, name)) for name in forwards}
    agree = (
        tuple(name for name in forwards if not name.startswith("no gate")),
        tuple(name for name in forwards if name.startswith("no gate")),
    )
    competitors["copy"] = _copy(x.detach())
    # Forward: moments read x; apply reads x and residual, writes out. Backward: the first pass reads the gradient, out
    # and x and writes d; the second reads d and x and writes the gradient of x.
    if not backward:
        return Work(competitors, agree, setup.tolerance, 4, x.nbytes)
    # A single ReLU that rounds differently changes a gradient by 6e-3.
    return Work(competitors, agree, max(2e-2, 5 * setup.tolerance), 4 + 4 + 3, x.nbytes)


def _factor(training: bool, setup: Setup, shape: tuple[int, ...], memory_format: str) -> Work:
    """What a gate's factor costs: the tail with a gate that is 1 by its factor 2, and with gates without a factor.

    There is no copy among the competitors: whatever runs after a copy is slower.
    """
    torch.manual_seed(0)
    x, residual, grad = (_randn(setup, shape, memory_format) for _ in range(3))
    eca = ECA(shape[1]).to(setup.device)
    neutral, constant = copy.deepcopy(eca), copy.deepcopy(eca)
    neutral.make_identity_()
    constant.make_neutral_()
    gates = {"ecanet": eca, "neutral": neutral, "constant": constant}
    if not training:  # in place: each has its own map, and the values stay bounded or grow linearly
        runs = {name: partial(gate_add_relu_, x.clone(), gate, residual) for name, gate in gates.items()}
        competitors = {name: Competitor(run, setup.context) for name, run in runs.items()}
        return Work(competitors, (), setup.tolerance)
    x.requires_grad_()
    residual.requires_grad_()
    norm = nn.BatchNorm2d(shape[1]).to(setup.device)
    tails = {name: FusedTail(copy.deepcopy(norm), gate) for name, gate in gates.items()}

    def step(tail: FusedTail) -> tuple[Tensor, ...]:
        out = tail(x, residual)
        return (out, *torch.autograd.grad(out, [x, residual, *tail.parameters()], grad))

    context = partial(setup.context, grad=True)
    competitors = {name: Competitor(partial(step, tail), context) for name, tail in tails.items()}
    return Work(competitors, (), setup.tolerance)
