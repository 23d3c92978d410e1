"""Gates under torch.jit.trace, torch.export and torch.fx, and in the ONNX files of both exporters."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from ecanet.nn import ECA, ECANS, GATES

FACTORIES = {
    **GATES,
    "eca circular": lambda channels: ECA(channels, circular=True),
    "eca_ns circular": lambda channels: ECANS(channels, circular=True),
    "eca of k = 1": lambda channels: ECA(channels, 1),
}
every_gate = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # float32


def trained(gate: nn.Module) -> nn.Module:
    """The gate with random weights and running statistics: many gates start as a constant, which hides their maths."""
    with torch.no_grad():
        for t in (*gate.parameters(), *gate.buffers()):
            if t.is_floating_point():
                t.uniform_(0.1, 0.9)
    return gate


@every_gate
@pytest.mark.filterwarnings("ignore:`torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_a_traced_gate_computes_the_same_at_another_size(factory) -> None:
    gate = trained(factory(64))
    traced = torch.jit.trace(gate, torch.randn(2, 64, 5, 7), check_trace=False)
    x, y = torch.randn(3, 64, 9, 4, requires_grad=True), torch.randn(3, 64, 9, 4)
    torch.testing.assert_close(traced(x), gate(x), **TOLERANCE)
    grads = [torch.autograd.grad((f(x) * y).sum(), [x, *gate.parameters()]) for f in (traced, gate)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def export(gate: torch.nn.Module) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter is deprecated, traces shapes, and says so
        torch.onnx.export(
            gate,
            torch.randn(2, gate.channels, 5, 7),
            file,
            dynamo=False,
            input_names=["x"],
            dynamic_axes={"x": {0: "n", 2: "h", 3: "w"}},
        )
    return file.getvalue()


@every_gate
def test_the_onnx_file_of_a_traced_gate_computes_the_same_at_another_size(factory) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    gate = trained(factory(64)).eval()
    x = torch.randn(3, 64, 9, 4)
    [got] = onnxruntime.InferenceSession(export(gate)).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), gate(x).detach(), **TOLERANCE)


def every_gate_in_a_row() -> nn.Module:
    return nn.Sequential(*(trained(factory(64)) for factory in FACTORIES.values())).eval()


def test_the_exported_and_the_onnx_program_of_every_gate_in_a_row_compute_the_same_at_another_size(tmp_path) -> None:
    gates, x = every_gate_in_a_row(), torch.randn(3, 64, 9, 4)
    n, h, w = (torch.export.Dim(dim) for dim in "nhw")
    sizes, example = ({0: n, 2: h, 3: w},), (torch.randn(2, 64, 5, 7),)
    program = torch.export.export(gates, example, dynamic_shapes=sizes)
    torch.testing.assert_close(program.module()(x), gates(x), rtol=1e-4, atol=1e-6)
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        torch.onnx.export(program, (), tmp_path / "gates.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "gates.onnx")
    [got] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), gates(x).detach(), rtol=1e-4, atol=1e-6)


@every_gate
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_graph_of_torch_fx_computes_the_same_on_maps_of_other_ranks(factory, training) -> None:
    gate = trained(factory(64)).train(training)
    traced = copy.deepcopy(torch.fx.symbolic_trace(gate))
    for spatial in ((5, 7), (6,), (2, 3, 4), ()):
        x = torch.randn(3, 64, *spatial)
        torch.testing.assert_close(traced(x), gate(x), **TOLERANCE)


def test_eca_is_one_conv_in_the_onnx_file() -> None:
    onnx = pytest.importorskip("onnx")
    operations = [node.op_type for node in onnx.load_from_string(export(ECA(64))).graph.node]
    assert operations.count("Conv") == 1
    assert not {"Pad", "Slice", "Concat"} & set(operations[: operations.index("Sigmoid")])
