"""Gates through torch.compile, torch.export and torch.fx: the same numbers, in one graph."""

import copy

import pytest
import torch
from equations import GATES, GATES_OF_MEANS

import ecanet
from ecanet.ops import reference

CHANNELS = 32
pytestmark = pytest.mark.usefixtures("_nothing_compiled_before")


@pytest.mark.parametrize("name", GATES)
def test_compiles_to_one_graph_with_the_same_gradients(name) -> None:
    gate = GATES[name](CHANNELS)
    twin = copy.deepcopy(gate)  # running statistics of one in the graph count as another's change of it
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, CHANNELS, 3, 3, requires_grad=True)
    want, got = gate(x), compiled(x)
    torch.testing.assert_close(got, want)
    dout = torch.randn_like(want)
    grads = (torch.autograd.grad(out, [x, *m.parameters()], dout) for out, m in ((got, twin), (want, gate)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["eca", "eca circular", "eca_ns", "se", "se_gc1"])
def test_compiles_under_autocast_without_reaching_the_gate(name) -> None:
    gate = GATES[name](CHANNELS)
    s = torch.randn(2, CHANNELS)
    compiled = torch.compile(gate.gate, fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        got = compiled(s)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, gate.gate(s))


@pytest.mark.parametrize("name", GATES)
def test_exports_with_dynamic_batch_and_spatial_size(name) -> None:
    gate = GATES[name](CHANNELS).eval()
    n, h, w = (torch.export.Dim(dim) for dim in "nhw")
    program = torch.export.export(gate, (torch.randn(2, CHANNELS, 3, 4),), dynamic_shapes=({0: n, 2: h, 3: w},))
    x = torch.randn(5, CHANNELS, 7, 6)
    torch.testing.assert_close(program.module()(x), gate(x))


@pytest.mark.parametrize("name", GATES)
def test_fx_traces_to_operations_of_the_library(name) -> None:
    gate = GATES[name](CHANNELS)
    traced = torch.fx.symbolic_trace(gate)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    if name in GATES_OF_MEANS:
        assert {reference.squeeze, reference.check_means, reference.scale} <= set(called)
    else:  # what depends on rank or size is one operation
        assert {reference.squeeze, reference.check_map} & set(called)
    for shape in [(2, CHANNELS, 3, 3), (3, CHANNELS, 5)]:  # what was traced fixes neither size nor rank
        x = torch.randn(shape)
        with ecanet.backend("reference"):
            assert torch.equal(traced(x), gate(x))
    with pytest.raises(ValueError, match="channels"):
        traced(torch.randn(2, CHANNELS + 1, 3, 3))


def test_the_gate_of_every_sample_under_vmap() -> None:
    gate = GATES["eca"](CHANNELS)
    x = torch.randn(4, 2, CHANNELS, 3, 3)
    torch.testing.assert_close(torch.vmap(gate)(x), gate(x.flatten(0, 1)).unflatten(0, (4, 2)))
