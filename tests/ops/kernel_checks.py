"""The Triton kernels against the formulas in float64, without pytest: for the tests and for ``benchmarks.gpu``."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import op_cases as op
import torch
from torch import Tensor, nn

import ecanet
from ecanet.nn import ECA, SE, norm_gate_add_act
from ecanet.ops import gpu, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts a float32 off where a GPU rounds it to the nearest bfloat16.
ROUNDING = {**op.MAP_TOLERANCE, torch.bfloat16: op.MAP_TOLERANCE[torch.bfloat16] * (2 if gpu.interpreting() else 1)}
#: Maps of a ResNet; odd ones; rows of every alignment, and shorter than a vector; several tiles and splits.
_SHAPES = [
    (3, 64, 56, 56), (4, 256, 14, 14), (2, 3, 5, 7), (3, 1, 4, 4), (2, 17, 1, 3), (2, 33, 1, 1), (1, 531, 2, 3),
    (3, 19, 7, 7), (2, 5, 13, 13), (1, 3, 63, 67), (2, 2, 150, 151), (2, 72, 28, 28),
]  # fmt: skip
_MAKES = {"contiguous": op.dense, "channels last": op.channels_last}
_TYPES = (torch.float32, torch.bfloat16, torch.float16)

_MEANS = ("squeeze", "moments", "batch_moments")
Checks = Iterator[tuple[str, Callable[[], None]]]


def launch(name: str, args: list[Any]) -> Any:
    """Run the kernels, on the GPU if there is one; an in-place operation writes over its first argument."""
    moved = [a.to(DEVICE) if isinstance(a, Tensor) else a for a in args]
    outputs = getattr(gpu, name)(*moved)
    if outputs is None:
        return args[0].copy_(moved[0])
    return tuple(t.cpu() for t in op.as_tuple(outputs))


def assert_values(name: str, args: list[Any], case: str = "") -> None:
    """The operation gives what the formula gives."""
    x = args[0]
    small = reference.accumulation_dtype(x.dtype)
    positions = math.prod(x.shape[2:])
    for i, (g, w) in enumerate(zip(launch(name, args), op.as_tuple(op.NAIVE[name](*args)), strict=True)):
        is_map = (name, i) in op.MAP_OUTPUTS
        assert (g.shape, g.dtype) == (w.shape, x.dtype if is_map else small), case
        if is_map:
            op.assert_close(g, w, ROUNDING[x.dtype], 30, case)
        else:  # sums over positions, or means of them
            size = 30 / math.sqrt(positions) if name in _MEANS else 30 * math.sqrt(positions)
            op.assert_close(g, w, op.TOLERANCE[small], size, case)


def assert_values_of_means(name: str, args: list[Any], case: str = "") -> tuple[Tensor, ...]:
    """Likewise for the operations on ``(N, C)`` means; returns what they give."""
    dtype, got = args[0].dtype, launch(name, args)
    for g, w in zip(got, op.NAIVE[name](*args), strict=True):
        assert (g.shape, g.dtype) == (w.shape, dtype), case
        op.assert_close(g, w, op.TOLERANCE[dtype], 100, case)
    return got


def assert_in_place(name: str, args: list[Any]) -> None:
    """Written over x is what the operation out of place returns, whatever the strides of x."""
    want = launch(name[:-1], args)[0]
    assert torch.equal(launch(name, args), want)
    sliced = torch.randn(5, 19, 7, 11)[1::2, 1::2, 1::2, 1::2]
    want = launch(name[:-1], [sliced, *args[1:]])[0]
    assert torch.equal(launch(name, [sliced, *args[1:]]), want)


def assert_repeats(name: str, args: list[Any], times: int = 2) -> None:
    """The same bits every time."""
    runs = [launch(name, [a.clone() if isinstance(a, Tensor) else a for a in args]) for _ in range(times)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(op.as_tuple(runs[0]), op.as_tuple(again), strict=True))


def tail_step(norm: nn.Module, gate: nn.Module | None, act: str | None, make: Callable[..., Tensor]) -> list[Tensor]:
    """Output, gradients and statistics of a step with a residual."""
    torch.random.manual_seed(1)
    x, residual, dout = (make((3, 16, 4, 5), torch.float32).to(DEVICE) for _ in range(3))
    norm, gate = norm.to(DEVICE), None if gate is None else gate.to(DEVICE)
    inputs = [x.requires_grad_(), residual.requires_grad_(), *norm.parameters()]
    inputs += [] if gate is None else list(gate.parameters())
    out = norm_gate_add_act(x, norm, gate, residual, act)
    statistics = [t.detach().clone() for t in norm.buffers()]
    return [out.detach(), *torch.autograd.grad(out, inputs, dout), *statistics]


def assert_tail(training: bool, gate: str | None, act: str | None, make: Callable[..., Tensor]) -> None:
    """The tail is its modules one after another: output, gradients, running statistics."""
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(16).train(training)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        module = {None: None, "eca": ECA(16, 5), "se": SE(16, 4)}[gate]
        with ecanet.backend(backend):
            results.append(tail_step(norm, module, act, make))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def assert_running_statistics(momentum: float | None) -> None:
    """They move as in torch, three steps."""
    norms = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(16, momentum=momentum).to(DEVICE)
        with ecanet.backend(backend):
            for _ in range(3):
                norm_gate_add_act(torch.randn(3, 16, 4, 4, device=DEVICE), norm, ECA(16).to(DEVICE))
        norms.append(norm.state_dict())
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-6, atol=1e-6)


def assert_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    """As torch rounds."""
    scale = torch.randn(1, 300) * torch.logspace(-9, 9, 300)
    x = torch.ones(1, 300, 2, dtype=dtype)
    assert torch.equal(launch("apply", [x, scale, None, None, 0])[0][0, :, 0], scale[0].to(dtype))


def assert_captured_in_a_cuda_graph(gate: type[nn.Module]) -> None:
    """A step of training replays on other values."""
    norm, module = nn.BatchNorm2d(16).to(DEVICE), gate(16).to(DEVICE)
    x = torch.randn(3, 16, 4, 5, device=DEVICE).requires_grad_()

    def step() -> tuple[Tensor, ...]:
        out = norm_gate_add_act(x, norm, module, x, "relu")
        return out, *torch.autograd.grad(out.square().sum(), [x, *norm.parameters(), *module.parameters()])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        torch.testing.assert_close(got, want)


# --- what a GPU is asked first --------------------------------------------------------------------------------------


def _on_maps(name: str) -> Checks:
    def values(shape: tuple[int, ...], dtype: torch.dtype, make: Callable[..., Tensor], o: op.Options) -> None:
        assert_values(name, op.arguments(name, shape, dtype, make, o))

    def case(*args: Any) -> Callable[[], None]:
        return lambda: values(*args)

    for shape in _SHAPES:
        for layout, make in _MAKES.items():
            for dtype in _TYPES:
                if dtype is torch.float16 and shape[0] == 2:
                    continue
                yield f"{shape} {dtype} {layout}", case(shape, dtype, make, op.Options(op.RELU))
    for layout, make in _MAKES.items():
        yield f"float64 {layout}", case((2, 19, 3, 5), torch.float64, make, op.Options(op.SILU))
        args = op.arguments(name, (4, 96, 28, 28), torch.bfloat16, make, op.Options(op.RELU))
        yield f"again and again {layout}", lambda args=args: assert_repeats(name, args, times=5)
    for o in op.every_option(name)[:12]:
        yield str(o), case((2, 9, 2, 3), torch.float32, op.dense, o)
    for layout, (rank, make) in op.LAYOUTS.items():
        if rank in (1, 2, 3):
            shape = {1: (2, 3, 7), 2: (2, 3, 5, 7), 3: (2, 5, 3, 2, 5)}[rank]
            yield layout, case(shape, torch.float32, make, op.Options(op.RELU))


def _on_means(name: str) -> Checks:
    for dtype in op.TOLERANCE:
        for shape in [(3, 5), (1, 1), (40, 35), (128, 2048)]:
            for o in op.every_option(name) if shape == (3, 5) else [op.Options(), op.Options(kernel=9, norm="none")]:
                args = op.arguments(name, shape, dtype, op.dense, o)
                yield f"{shape} {dtype} {o}", lambda args=args: assert_values_of_means(name, args)


def _in_place(name: str) -> Checks:
    for layout, make in _MAKES.items():
        for act in op.ACTS:
            args = op.arguments(name, (2, 9, 3, 5), torch.float32, make, op.Options(act))
            yield f"{layout}, activation {act}", lambda args=args: assert_in_place(name, args)
        for dtype in _TYPES:
            for shape in ((3, 19, 7, 7), (4, 64, 28, 28)):
                args = op.arguments(name, shape, dtype, make, op.Options(op.RELU))
                yield f"{shape} {dtype} {layout}", lambda args=args: assert_repeats(name, args)


def _tail() -> Checks:
    for training in (True, False):
        for gate in (None, "eca", "se"):
            for act in (None, "relu", "silu"):
                for layout, make in _MAKES.items():
                    yield (
                        f"training={training} {gate} {act} {layout}",
                        lambda args=(training, gate, act, make): assert_tail(*args),
                    )
    for momentum in (0.1, 0.7, None):
        yield f"running statistics, momentum {momentum}", lambda m=momentum: assert_running_statistics(m)
    if DEVICE == "cuda":
        for dtype in (torch.bfloat16, torch.float16):
            yield f"rounding {dtype}", lambda dtype=dtype: assert_rounded_to_nearest_even(dtype)
        for kind in (ECA, SE):
            yield f"CUDA graph {kind.__name__}", lambda kind=kind: assert_captured_in_a_cuda_graph(kind)


#: By operation: a name and a check each, which raises.
CHECKS: dict[str, Callable[[], Checks]] = {
    **{name: (lambda name=name: _on_maps(name)) for name in op.ON_MAPS},
    **{name: (lambda name=name: _on_means(name)) for name in op.ON_MEANS},
    **{name: (lambda name=name: _in_place(name)) for name in op.IN_PLACE},
    "tail": _tail,
}
assert set(op.EVERY) < set(CHECKS)
