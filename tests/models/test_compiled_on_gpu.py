"""Whole networks under torch.compile on a GPU that need not be there: one graph, and the form of the tail in it."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ecanet
from ecanet.ops import backend, gpu


def not_to_be_asked() -> None:
    """In the place of what looks into the environment, where a compiler that traces cannot follow."""
    assert not torch.compiler.is_dynamo_compiling()


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("form", ["operation", "formula"])
def test_a_network_is_one_graph_with_the_form_that_was_chosen(form, training, monkeypatch) -> None:
    """The operation once a block, or nothing of the library where Inductor gets the formula."""
    operations: list[Counter[str]] = []

    def look(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        operations.append(Counter(name.removeprefix("ecanet.") for name in names if name.startswith("ecanet.")))
        return graph.forward

    monkeypatch.setattr(gpu, "IS_COMPLETE", True)
    monkeypatch.setattr(gpu, "why_not", not_to_be_asked)
    monkeypatch.setattr(backend, "FORMS_ON_GPU", {"training": form, "inference": form})
    torch._dynamo.reset()
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():  # for gradients torch asks the driver
        network = ecanet.models.small_eca_resnet(widths=[8, 16], blocks=2).train(training)  # a projection in one of 4
        torch.compile(network, fullgraph=True, dynamic=False, backend=look)(torch.empty(2, 3, 8, 8))
    torch._dynamo.reset()
    found = Counter({"batch_norm_eca_add_act" if training else "norm_eca_add_act": 4} if form == "operation" else {})
    assert operations == [found]
