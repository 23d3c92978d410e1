"""Whole networks under torch.compile and AOTInductor give the same numbers as without."""

from pathlib import Path

import pytest
import torch

import ecanet
from ecanet.models import small_eca_resnet


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch.compiler.reset()


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 10, 10)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_training_step_of_a_network_in_one_graph(backend: str) -> None:
    network, x = small_eca_resnet(widths=[8]), images(3)
    weights = list(network.parameters())
    gradients = []
    for compiled in (False, True):
        run = torch.compile(network, fullgraph=True, mode="reduce-overhead") if compiled else network
        network.load_state_dict(network.state_dict() | {"bn1.num_batches_tracked": torch.tensor(0)})
        with ecanet.backend(backend):
            loss = run(x).square().sum()
            gradients.append(torch.autograd.grad(loss, weights))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert network.bn1.num_batches_tracked == 1


def test_an_exported_network_compiled_ahead_of_time_needs_no_ecanet(tmp_path: Path) -> None:
    network = small_eca_resnet(widths=[8]).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(network, (images(2),), dynamic_shapes=({0: batch},))
        assert not [node for node in program.graph.nodes if "ecanet" in str(node.target)]
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "network.pt2"))
        run = torch._inductor.aoti_load_package(package)
        for count in (2, 5):
            x = images(count)
            torch.testing.assert_close(run(x), network(x), rtol=1e-5, atol=1e-5)
