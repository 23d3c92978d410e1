"""The Triton kernels against the formulas in float64: in Triton's interpreter, or on the GPU if there is one.

The interpreter takes milliseconds for every program, so maps are small; tiles are made smaller too, where what happens
between tiles is the question.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kernel_checks as checks
import op_cases as op
import pytest
import torch
from marks import of_type
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

import ecanet
from ecanet.nn import ECA, SE, norm_gate_add_act
from ecanet.ops import gpu, gpu_maps

pytestmark = pytest.mark.skipif(gpu.why_not() is not None, reason=str(gpu.why_not()))

SHAPES = {0: [(3, 5)], 1: [(2, 3, 7)], 2: [(2, 3, 5, 7), (3, 1, 4, 4), (2, 17, 1, 3)], 3: [(2, 5, 3, 2, 5)]}
#: norm_eca_add_act alone is squeeze, what is done with means, and apply: how they walk a map is tested with them.
WALKING = [name for name in op.ON_MAPS if name != "norm_eca_add_act"]
both_layouts = pytest.mark.parametrize("make", [op.dense, op.channels_last])

if gpu.why_not() is None:
    import triton
    import triton.language as tl

    from ecanet.ops import triton_kernels as kernels

    @triton.jit
    def offsets_of(
        tile_out, elements_out, row_out, tile, program, at, samples, channels, positions,
        rows: tl.constexpr, at_once: tl.constexpr, last: tl.constexpr, align: tl.constexpr, total: tl.constexpr,
        first: tl.constexpr,
    ):  # fmt: skip
        """Where the kernels would read a map of that size: a tile of rows, and a tile element by element."""
        here = tl.arange(0, rows)[:, None] * at_once + tl.arange(0, at_once)[None, :]
        start, lead, row, _, exists, step = kernels._rows(
            tile, samples, channels, positions, rows, last, align, first, tl.int64
        )
        size = kernels._size(samples, channels, positions, total, tl.int64)
        place, _, _ = kernels._tile(start, lead, exists, step, at, positions, positions, size, at_once, first, tl.int64)
        tl.store(tile_out + here, place)
        tl.store(row_out + tl.arange(0, rows), row)
        place, _, _, _, _ = kernels._elements(
            program, samples, channels, positions, rows, at_once, last, align, total, tl.int64
        )
        tl.store(elements_out + here, place)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and splits even of a small map."""
    monkeypatch.setattr(gpu_maps, "SIZES", {what: gpu_maps.Size(32, 1, 2048) for what in gpu_maps.SIZES})


@pytest.mark.parametrize(("rank", "make"), op.LAYOUTS.values(), ids=op.LAYOUTS)
@pytest.mark.parametrize("name", op.ON_MAPS)
def test_values_in_every_layout(name, rank, make) -> None:
    options = {op.RELU: op.Options(op.RELU), op.SILU: op.Options(op.SILU, residual=False, d=False, kernel=5)}
    for shape in SHAPES[rank]:
        for o in [options[act] for act in op.acts(name, *options)]:
            checks.assert_values(name, op.arguments(name, shape, torch.float32, make, o), f"{shape} {o}")


@of_type(torch.float64, torch.bfloat16, torch.float16)
@both_layouts
@pytest.mark.parametrize("name", op.ON_MAPS)
def test_values_of_every_type(name, make, dtype) -> None:
    for act in op.acts(name, op.RELU, op.SILU):
        checks.assert_values(name, op.arguments(name, (2, 19, 3, 5), dtype, make, op.Options(act)))


@both_layouts
@pytest.mark.parametrize("name", op.ON_MAPS)
def test_values_with_every_option(name, make) -> None:
    for o in op.every_option(name):
        checks.assert_values(name, op.arguments(name, (2, 9, 2, 3), torch.float32, make, o), str(o))


@of_type(*op.TOLERANCE)
@pytest.mark.parametrize(
    ("rank", "make"), [op.LAYOUTS["2-D"], op.LAYOUTS["2-D transposed"]], ids=["dense", "transposed"]
)
@pytest.mark.parametrize("name", op.ON_MEANS)
def test_values_of_operations_on_means(name, rank, make, dtype) -> None:
    for shape in [(3, 5), (1, 1), (33, 34)]:
        for o in op.every_option(name) if shape == (3, 5) else [op.Options(), op.Options(kernel=9, norm="none")]:
            args = op.arguments(name, shape, dtype, make, o)
            promised = getattr(torch.ops.ecanet, name)(*(op.without_data(a) for a in args))
            got = checks.assert_values_of_means(name, args, f"{shape} {o}")
            assert [op.significant(t) for t in got] == [op.significant(t) for t in promised]


@pytest.mark.usefixtures("small_tiles")
@both_layouts
@pytest.mark.parametrize(
    ("shape", "act"),
    [((1, 3, 27, 19), op.RELU), ((2, 11, 8, 8), op.SILU), ((2, 70, 3, 3), op.RELU), ((3, 5, 9, 9), op.SILU)],
    ids=str,
)
@pytest.mark.parametrize("name", WALKING)
def test_positions_and_channels_of_many_programs(name, shape, act, make) -> None:
    checks.assert_values(name, op.arguments(name, shape, torch.float32, make, op.Options(act, kernel=5)))


@pytest.mark.parametrize("size", range(1, 21))
@pytest.mark.parametrize("name", WALKING)
def test_contiguous_rows_of_every_alignment(name, size) -> None:
    """Runs of neighbours that lie in two rows; rows that begin between two multiples of 16 bytes."""
    for dtype in (torch.float32, torch.bfloat16):
        for shape in [(3, 5, size), (2, 4, 7, size)]:
            for act in op.acts(name, op.RELU, op.SILU):
                checks.assert_values(
                    name, op.arguments(name, shape, dtype, op.dense, op.Options(act)), f"{shape} {dtype} {act}"
                )


@both_layouts
@pytest.mark.parametrize("name", ["squeeze", "batch_moments", "apply", "apply_backward", "input_backward"])
def test_offsets_of_64_bits(name, make, monkeypatch) -> None:
    monkeypatch.setattr(gpu_maps, "LONGEST_INT32", 0)
    checks.assert_values(name, op.arguments(name, (2, 19, 3, 5), torch.float32, make, op.Options(op.RELU)))


def test_without_a_c_compiler_they_cannot_run_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(gpu, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert "install gcc, or set CC" in gpu.why_not.__wrapped__()
    monkeypatch.setenv("CC", "cc")
    assert gpu.why_not.__wrapped__() is None


BILLIONS = [  # samples, channels, positions; number of a tile of 4 rows, and of one of 4 x 8 elements
    (2**12, 2**10, 2**10, 2**20 - 1, 2**27 - 1),
    (3, 5, 2**28 + 3, 3, 120_000_000),
    (2**14 + 1, 257, 1023, 1_052_000, 134_000_000),
    (1, 64, 2**26, 5, 130_000_000),
]


@pytest.mark.skipif(not gpu.interpreting(), reason="counts in the interpreter, without the maps")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # would be seen in what comes out
@pytest.mark.parametrize(("samples", "channels", "positions", "tile", "program"), BILLIONS)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_offsets_beyond_2_31_elements(last, samples, channels, positions, tile, program) -> None:
    """Of maps that no machine of ours could hold: what the kernels would read, in whole numbers of Python's."""
    rows, at_once, start = 4, 8, 1 if last else 8
    tile_out, elements_out = (torch.full((rows, at_once), -1, dtype=torch.int64) for _ in range(2))
    row_out = torch.full((rows,), -1, dtype=torch.int64)
    at = positions - 5
    offsets_of[(1,)](
        tile_out, elements_out, row_out, tile, program, at, samples, channels, positions,
        rows=rows, at_once=at_once, last=last, align=math.gcd(channels if last else positions, 16),
        total=math.gcd(samples * channels * positions, 16), first=start,
    )  # fmt: skip
    blocks, tiles = -(-channels // rows), -(-positions // at_once)
    step = channels if last else 1
    for r in range(rows):
        sample, channel = divmod(tile, blocks)[0], tile % blocks * rows + r
        index = sample * channels + channel if last else tile * rows + r
        first = sample * positions * channels + channel if last else index * positions // start * start
        block, places = divmod(program, tiles)
        begin = (block // blocks * positions + places * at_once) * channels + block % blocks * rows + r
        begin = begin if last else (program * rows + r) * at_once
        assert row_out[r] == index
        assert tile_out[r].tolist() == [first + (at + p) * step for p in range(at_once)]
        assert elements_out[r].tolist() == [begin + p * step for p in range(at_once)]


def test_more_than_2_31_means() -> None:
    """The first program of a launch for 2^16 samples of 2^16 channels."""
    means = torch.randn(256)
    s, scale, shift = (torch.full((256,), float("nan")) for _ in range(3))
    triton_kernels = gpu_maps.kernels_of_triton()
    triton_kernels.coefficients[(1,)](
        means, None, None, None, None, None, s, s, scale, shift, 2**16, 2**16,
        eps=0.0, factor=1.0, K=0, CIRCULAR=False, BLOCK=256, INDEX=triton_kernels.tl.int64,
        ACC=triton_kernels.tl.float32,
    )  # fmt: skip
    assert torch.equal(s, means)
    assert torch.equal(scale, torch.ones(256))


@pytest.mark.parametrize("name", op.ON_MAPS)
@both_layouts
def test_shapes_and_strides_are_those_of_the_fake(name, make) -> None:
    args = op.arguments(name, (2, 19, 3, 5), torch.float32, make, op.Options(op.RELU))
    promised = op.as_tuple(getattr(torch.ops.ecanet, name)(*(op.without_data(a) for a in args)))
    assert [op.significant(t) for t in checks.launch(name, args)] == [op.significant(t) for t in promised]


@both_layouts
@pytest.mark.parametrize("name", op.IN_PLACE)
def test_in_place_is_out_of_place_written_over_x(name, make) -> None:
    for act in op.ACTS:
        checks.assert_in_place(name, op.arguments(name, (2, 9, 3, 5), torch.float32, make, op.Options(act)))


@pytest.mark.parametrize("overlap", [-7, 0, 8])
@pytest.mark.parametrize("name", op.IN_PLACE)
def test_the_residual_may_lie_partly_under_the_map_that_is_written(name, overlap) -> None:
    args = op.arguments(name, (2, 9, 3, 5), torch.float32, op.dense, op.Options(op.RELU))
    size, at = args[0].numel(), 3 if name == "apply_" else 1
    memory = torch.randn(3 * size, device=checks.DEVICE)
    x = memory[size : 2 * size].view(2, 9, 3, 5)
    residual = memory[size + overlap : 2 * size + overlap].view(2, 9, 3, 5)
    others = [a.to(checks.DEVICE) if isinstance(a, Tensor) else a for a in args]
    others[0], others[at] = x.clone(), residual.clone()
    want = getattr(gpu, name[:-1])(*others)
    others[0], others[at] = x, residual
    getattr(gpu, name)(*others)
    assert torch.equal(x, want)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@both_layouts
@pytest.mark.parametrize("name", op.ON_MAPS)
def test_nan_and_inf_propagate_as_in_the_reference(name, make, value) -> None:
    for o in [op.Options(act) for act in op.acts(name, *op.ACTS)]:
        args = op.arguments(name, (2, 5, 3, 3), torch.float32, make, o)
        args[0] = args[0].clone()
        args[0][1, 2, 1, 1] = value
        for g, w in zip(checks.launch(name, args), op.as_tuple(op.call_reference(name, args)), strict=True):
            if name == "batch_moments" and math.isinf(value):  # torch's own mean of such a batch is not its var's
                assert torch.equal(g.isfinite(), w.isfinite())
            else:
                assert torch.equal(g.isnan(), w.isnan()), o
                assert torch.equal(
                    g.nan_to_num(7, 8, 9).isclose(w.nan_to_num(7, 8, 9), 1e-4, 1e-4), g.new_ones(g.shape) > 0
                )


@pytest.mark.skipif(gpu.interpreting(), reason="the interpreter cuts off instead of rounding")
@of_type(*op.HALF_TYPES)
def test_results_are_rounded_to_nearest_even_as_torch_does(dtype) -> None:
    checks.assert_rounded_to_nearest_even(dtype)


@pytest.mark.usefixtures("small_tiles")
@both_layouts
@pytest.mark.parametrize("shape", [(4, 6, 14, 14), (9, 5, 3, 3)], ids=str)
def test_a_mean_of_10000_deviations_costs_no_more_digits_than_in_torch(shape, make) -> None:
    x = (1e4 + make(shape, torch.float64)).float()
    want_mean, want_var = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), correction=0)
    _, torch_mean, torch_inverse = torch.native_batch_norm(x, None, None, None, None, True, 0.1, 0.0)
    _, mean, var, _ = checks.launch("batch_moments", [x])

    def error(got: Tensor, want: Tensor) -> float:
        return ((got.double() - want) / want).abs().max().item()

    eps = torch.finfo(torch.float32).eps
    assert error(mean, want_mean) <= max(2 * error(torch_mean, want_mean), eps)
    assert error(var, want_var) <= max(2 * error(torch_inverse.double() ** -2, want_var), 4 * eps)


@pytest.mark.usefixtures("small_tiles")
@both_layouts
@pytest.mark.parametrize("name", op.EVERY)
def test_results_repeat_themselves_bit_by_bit(name, make) -> None:
    checks.assert_repeats(name, op.arguments(name, (2, 3, 13, 10), torch.float32, make, op.Options(op.SILU)))


X, ONES, C = torch.ones(2, 3, 4, 4), torch.ones(2, 3), torch.ones(3)
NO_NORM = (None, None, None, None, 0.0)
MISTAKES = [
    ("squeeze", [X.long()], "x must be float32, float64, bfloat16 or float16"),
    ("squeeze", [X[0, 0, 0]], r"x must have shape \(N, C, \*spatial\)"),
    ("apply", [X, ONES.T, None, None, op.NONE], r"scale must have shape \(2, 3\)"),
    ("apply", [X, ONES, C, None, op.NONE], r"shift must have shape \(2, 3\)"),
    ("apply", [X, ONES, None, X[:1], op.NONE], "residual must have the shape, the type and the device of x"),
    ("apply", [X, ONES, None, X.double(), op.NONE], "residual must have the shape, the type"),
    ("apply_", [X, ONES, None, None, 5], "act must be 0 to 4, got 5"),
    ("apply_backward", [X, X, ONES, None, None, None, op.RELU, True], "ReLU and ReLU6 need saved=out; got None"),
    ("apply_backward", [X, X, ONES, None, ONES, None, op.NONE, True], r"center must have shape \(3\)"),
    ("input_backward", [X, X, ONES, None, None, op.NONE, ONES, C[:2], None], r"slope must have shape \(3\)"),
    ("input_backward", [X, X, ONES, None, None, op.NONE, ONES, ONES.T, None], r"slope must have shape \(2, 3\)"),
    ("eca_coefficients", [X, *NO_NORM, C, False], r"map_means must have shape \(N, C\)"),
    (
        "eca_coefficients",
        [ONES, C, None, None, None, 0.0, C, False],
        r"norm_mean and norm_var .* got norm_mean alone",
    ),
    ("eca_coefficients", [ONES, *NO_NORM, C[:2], False], "kernel must have an odd size"),
    ("eca_coefficients", [ONES, *NO_NORM, torch.ones(5), True], "kernel must have .* at most C if circular"),
    (
        "eca_coefficients_backward",
        [ONES, ONES, ONES, None, None, *NO_NORM, C, False, 16],
        "needs its gate; got gate=None",
    ),
    (
        "eca_coefficients_backward",
        [ONES, ONES, ONES, None, None, *NO_NORM, None, False, 16, 1.0, None, ONES],
        "grad_v needs m2; got m2=None",
    ),
    ("norm_eca_add_act_", [X, None, *NO_NORM, C, False, 7], "act must be 0 to 4, got 7"),
]


@pytest.mark.parametrize(("name", "args", "message"), MISTAKES)
def test_wrong_arguments_are_refused_with_the_name_and_what_would_be_right(name, args, message) -> None:
    before = X.clone()
    with pytest.raises(RuntimeError, match=message):
        checks.launch(name, args)
    assert torch.equal(X, before)


# --- the tail -----------------------------------------------------------------------------------------------------


@both_layouts
@pytest.mark.parametrize("act", [None, "relu", "silu"], ids=str)
@pytest.mark.parametrize("gate", [None, "eca", "se"], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_tail_is_its_modules_one_after_another(training, gate, act, make) -> None:
    checks.assert_tail(training, gate, act, make)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None], ids=str)
def test_running_statistics_move_as_in_torch(momentum) -> None:
    checks.assert_running_statistics(momentum)


def test_running_statistics_of_float64_move_in_float64() -> None:
    x, norms = torch.randn(3, 16, 4, 4, dtype=torch.float64, device=checks.DEVICE), []
    for backend in ("triton", "reference"):
        norms.append(nn.BatchNorm2d(16, dtype=torch.float64, device=checks.DEVICE))
        with ecanet.backend(backend):
            norm_gate_add_act(x, norms[-1], ECA(16).to(checks.DEVICE, torch.float64))
    torch.testing.assert_close(norms[0].state_dict(), norms[1].state_dict(), rtol=1e-14, atol=1e-14)


def test_inference_in_place_and_in_a_network() -> None:
    torch.manual_seed(0)
    network = ecanet.models.small_eca_resnet(widths=[8, 16]).eval().to(checks.DEVICE)
    x = torch.randn(2, 3, 12, 12, device=checks.DEVICE)
    fast = ecanet.optimize_for_inference(network)
    with torch.no_grad():
        with ecanet.backend("reference"):
            want = network(x)
        with ecanet.backend("triton"):
            torch.testing.assert_close(network(x), want, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(fast(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", op.HALF_TYPES, ids=str)
def test_autocast_keeps_maps_in_half_types(dtype) -> None:
    torch.manual_seed(0)
    norm, gate = nn.BatchNorm2d(16).to(checks.DEVICE), ECA(16).to(checks.DEVICE)
    x = torch.randn(3, 16, 4, 5, device=checks.DEVICE, dtype=dtype).requires_grad_()
    with ecanet.backend("triton"), torch.autocast(checks.DEVICE, dtype):
        out = norm_gate_add_act(x, norm, gate, x, "relu")
    (grad,) = torch.autograd.grad(out.float().square().sum(), x)
    assert out.dtype == grad.dtype == dtype
    with ecanet.backend("reference"):
        want = torch.relu(gate(norm(x.float())) + x.float())
    torch.testing.assert_close(out.float(), want, rtol=0.02, atol=0.02)


@pytest.mark.skipif(checks.DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("gate", [ECA, SE])
def test_a_step_of_training_can_be_captured_in_a_cuda_graph(gate) -> None:
    checks.assert_captured_in_a_cuda_graph(gate)


# --- every kernel compiles for GPUs that are not here, and Inductor sees it ------------------------------------------


def of_script(name: str) -> dict[str, list[str]]:
    """What a script beside this file prints, outside the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name(name)
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_every_kernel_compiles_for_nvidia_and_amd_and_walks_maps_16_bytes_at_a_time() -> None:
    """Contiguous maps of 7 x 7, too, whose rows are not aligned; and without spilling registers."""
    compiled = of_script("compile_triton.py")
    names = {
        name for name, value in vars(gpu_maps.kernels_of_triton()).items() if hasattr(value, "fn") and name[0] != "_"
    }
    assert {(k, t) for k in names for t in ("cuda:90", "hip:gfx942")} == {(c["kernel"], c["target"]) for c in compiled}
    walks = [c for c in compiled if c["kernel"] in op.WALKS and c["target"] == "cuda:90"]
    assert {c["kernel"] for c in walks if c["wide"]} == op.WALKS
    for c in walks:
        assert c["spilled_bytes"] == 0, c
        if c["wide"]:  # less wide are means, scales and sums: float32, or float64 for the moments of a batch
            assert 16 in c["access_bytes"], c
            assert set(c["access_bytes"]) <= {4, 8, 16}, c


def test_inductor_launches_the_kernels_itself_and_copies_nothing() -> None:
    launches = {
        "squeeze": ["moments"],
        "moments": ["moments", "merge"],
        "batch_moments": ["moments", "statistics"],
        "apply": ["apply"],
        "apply_backward": ["reduce"],
        "input_backward": ["input_grad"],
        "eca_coefficients": ["coefficients"],
        "eca_coefficients_backward": ["coefficients_backward", "finish"],
        "norm_eca_add_act": ["moments", "coefficients", "apply"],
        "batch_norm_eca_add_act": ["moments", "statistics", "coefficients", "apply"],
    }
    want = {name: [f"{kernel}_{i}" for i, kernel in enumerate(kernels)] for name, kernels in launches.items()}
    want |= {name: [f"torch.ops.ecanet.{name}"] for name in op.IN_PLACE}
    want = {f"{n} {m}": want[n] for n in want for m in ("dense", "channels_last")}
    want["apply_backward channels_last"] = ["reduce_0", "add_splits_1"]  # a warp at a time, more programs
    assert of_script("inductor_triton.py") == want


class Apply(nn.Module):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return torch.ops.ecanet.apply(x, scale, None, None, op.RELU)


@pytest.mark.parametrize("how", ["on the CPU", "sizes as symbols", "exported"])
def test_the_operation_stays_one_node(how, monkeypatch) -> None:
    """Elsewhere than on a GPU, where launches are not known yet, and in what must be saved and loaded."""
    graphs = []

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(gpu, "why_not", lambda: None)
    monkeypatch.setattr(gpu, "interpreting", lambda: False)
    torch._dynamo.reset()
    with FakeTensorMode(), torch.device("cpu" if how == "on the CPU" else "cuda"), torch.no_grad():
        args = torch.empty(2, 8, 4, 4), torch.empty(2, 8)
        if how == "exported":
            graphs.append(torch.export.export(Apply(), args).run_decompositions().graph_module)
        else:
            backend = aot_autograd(fw_compiler=look)
            torch.compile(Apply(), fullgraph=True, dynamic=how == "sizes as symbols", backend=backend)(*args)
    (graph,) = graphs
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [torch.ops.ecanet.apply.default]
