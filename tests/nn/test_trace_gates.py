"""Gates under torch.jit.trace, and in the ONNX files that its exporter makes of them: YOLO's export uses it."""

import io
import warnings

import pytest
import torch

from ecanet.nn import ECA, ECANS, GATES

FACTORIES = {
    **GATES,
    "eca circular": lambda channels: ECA(channels, circular=True),
    "eca_ns circular": lambda channels: ECANS(channels, circular=True),
    "eca of k = 1": lambda channels: ECA(channels, 1),
}
every_gate = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # float32


@every_gate
@pytest.mark.filterwarnings("ignore:`torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_a_traced_gate_computes_the_same_at_another_size(factory) -> None:
    gate = factory(64).eval()
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
    gate = factory(64).eval()
    x = torch.randn(3, 64, 9, 4)
    [got] = onnxruntime.InferenceSession(export(gate)).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), gate(x).detach(), **TOLERANCE)


def test_eca_is_one_conv_in_the_onnx_file() -> None:
    onnx = pytest.importorskip("onnx")
    operations = [node.op_type for node in onnx.load_from_string(export(ECA(64))).graph.node]
    assert operations.count("Conv") == 1
    assert not {"Pad", "Slice", "Concat"} & set(operations[: operations.index("Sigmoid")])
