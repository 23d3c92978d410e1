"""Surgery on networks that were trained on ImageNet, judged on real photographs.

The weights and the photographs are those of installed packages (benchmarks/finetune/pretrained.py says which): nothing
here runs without them.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

from benchmarks.finetune import pretrained
from benchmarks.finetune.pretrained import NETWORKS
from ecanet import fuse_tails_, insert_gates_, remove_gates_, replace_gates_
from ecanet.nn import Gate

MISSING = pretrained.missing(*NETWORKS)
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
#: In float64 and for places beside the paper's a few photographs will do.
FEW = slice(0, 20, 5)

each_network = pytest.mark.parametrize("name", NETWORKS)


@pytest.fixture(scope="module")
def trained() -> dict[str, nn.Module]:
    return {name: pretrained.load(name) for name in NETWORKS}


@pytest.fixture(scope="module")
def logits(trained: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Of every photograph, in float32, before anything is put in."""
    return {name: _logits(network, pretrained.photographs(name)[0]) for name, network in trained.items()}


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return network(images)


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def _randomise_gates_(network: nn.Module) -> None:
    for gate in network.modules():
        if isinstance(gate, Gate):
            for parameter in gate.parameters():
                nn.init.normal_(parameter, std=3)


def _assert_same_state(network: nn.Module, expected: dict[str, Tensor]) -> None:
    state = network.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], value) for key, value in expected.items())


@each_network
def test_the_weights_are_trained(name: str, logits: dict[str, Tensor]) -> None:
    """Shorter side 256, bicubic; central 224; ImageNet's mean and std, Lite0's its own, 0.498 and 0.502."""
    _, labels = pretrained.photographs(name)
    assert (logits[name].argmax(1) == labels).sum() == NETWORKS[name].right
    assert {"mobilenet_v2": 17, "tf_efficientnet_lite0": 18}[name] == NETWORKS[name].right


@pytest.mark.parametrize(
    ("where", "dtype", "gates"),
    [
        ("block", torch.float32, (17, 16)),
        ("stage", torch.float32, (7, 7)),
        ("conv", torch.float32, (35, 33)),
        ("block", torch.float64, (17, 16)),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
@each_network
def test_gates_leave_logits_and_predictions(
    name: str,
    where: str,
    dtype: torch.dtype,
    gates: tuple[int, int],
    trained: dict[str, nn.Module],
    logits: dict[str, Tensor],
) -> None:
    images, labels = pretrained.photographs(name)
    network = copy.deepcopy(trained[name]).to(dtype)
    if (where, dtype) == ("block", torch.float32):
        before = logits[name]
    else:
        images, labels = images[FEW].to(dtype), labels[FEW]
        before = _logits(network, images)
    report = insert_gates_(network, where=where)
    assert len(report.rows) == gates[list(NETWORKS).index(name)]
    after = _logits(network, images)
    assert _difference(after, before) < TOLERANCE[dtype]
    assert torch.equal(after.argmax(1), before.argmax(1))
    if len(labels) == 20:
        assert (after.argmax(1) == labels).sum() == NETWORKS[name].right
    _randomise_gates_(network)
    assert _difference(_logits(network, images[:4]), before[:4]) > 0.1  # the gates are in the network's way


@each_network
def test_a_random_gate_pasted_in_loses_what_was_learned(
    name: str, trained: dict[str, nn.Module], logits: dict[str, Tensor]
) -> None:
    images, labels = pretrained.photographs(name)
    network = copy.deepcopy(trained[name])
    insert_gates_(network, preserve=False)
    after = _logits(network, images)
    assert (after.argmax(1) == labels).sum() <= 2  # 17 and 18 before
    assert _difference(after, logits[name]) > 0.5


@each_network
def test_the_plain_file_still_loads_strictly(
    name: str, trained: dict[str, nn.Module], logits: dict[str, Tensor]
) -> None:
    network = NETWORKS[name].build().eval()
    insert_gates_(network)
    _randomise_gates_(network)
    assert network.load_state_dict(pretrained.weights(name, trained[name]), strict=True).missing_keys == []
    images, _ = pretrained.photographs(name)
    after = _logits(network, images[FEW])
    assert _difference(after, logits[name][FEW]) < TOLERANCE[torch.float32]
    assert torch.equal(after.argmax(1), logits[name][FEW].argmax(1))


@pytest.mark.parametrize("gates", ["none", "neutral", "random"])
@each_network
def test_fused_tails_leave_logits_and_keys(
    name: str, gates: str, trained: dict[str, nn.Module], logits: dict[str, Tensor]
) -> None:
    # What random gates make of a trained network is badly conditioned: float64 tells rounding from a fault.
    dtype = torch.float64 if gates == "random" else torch.float32
    images, _ = pretrained.photographs(name)
    network = copy.deepcopy(trained[name]).to(dtype)
    before = logits[name][FEW]
    if gates != "none":
        insert_gates_(network)
    if gates == "random":
        _randomise_gates_(network)
        before = _logits(network, images[FEW].to(dtype))
    state = copy.deepcopy(network.state_dict())
    assert fuse_tails_(network).rows
    _assert_same_state(network, state)
    after = _logits(network, images[FEW].to(dtype))
    assert _difference(after, before) < TOLERANCE[dtype]
    assert torch.equal(after.argmax(1), before.argmax(1))


@each_network
def test_fused_tails_train_alike(name: str, trained: dict[str, nn.Module]) -> None:
    images = pretrained.photographs(name)[0][FEW, :, ::3, ::3].double()
    networks = [copy.deepcopy(trained[name]).double() for _ in range(2)]
    for network in networks:
        insert_gates_(network)
    fuse_tails_(networks[1])
    for network in networks:
        torch.manual_seed(0)  # dropout
        network.train()(images).logsumexp(1).sum().backward()
    for (key, expected), (_, parameter) in zip(*(network.named_parameters() for network in networks), strict=True):
        assert expected.grad is not None, key
        assert parameter.grad is not None, key
        scale = max(float(expected.grad.abs().max()), 1e-3)
        assert float((parameter.grad - expected.grad).abs().max()) < 1e-8 * scale, key
    for (key, expected), (_, buffer) in zip(*(network.named_buffers() for network in networks), strict=True):
        assert torch.allclose(buffer, expected, rtol=1e-10, atol=1e-12), key


@each_network
def test_gates_that_are_replaced_and_removed_leave_the_file_as_it_was(name: str, trained: dict[str, nn.Module]) -> None:
    plain = trained[name].state_dict()
    network = copy.deepcopy(trained[name])
    insert_gates_(network)
    with_eca = copy.deepcopy(network.state_dict())
    swapped = replace_gates_(network, "se")
    assert swapped.parameters > 10_000
    images, _ = pretrained.photographs(name)
    assert _difference(_logits(network, images[FEW]), _logits(trained[name], images[FEW])) < TOLERANCE[torch.float32]
    replace_gates_(network, swapped.replaced)
    _assert_same_state(network, with_eca)
    assert len(remove_gates_(network).rows) == len(swapped.rows)
    _assert_same_state(network, plain)
