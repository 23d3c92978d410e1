"""Networks of transformers that insert gates in their constructor: plain checkpoints, their own, one in another."""

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecanet
from ecanet import ECA, SE
from ecanet.inspect import gates

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def config() -> Any:
    return transformers.ResNetConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 32, 64], embedding_size=16, num_labels=5, layer_type="basic"
    )


class Gated(transformers.ResNetForImageClassification):
    """Gates in the whole network."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        ecanet.insert_gates_(self)


class GatedInside(transformers.ResNetForImageClassification):
    """Gates in a part that is a network of transformers itself."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        ecanet.insert_gates_(self.resnet, "se")


class GatedInAPart(transformers.ResNetForImageClassification):
    """Gates in a part that is none, of a network inside the network."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        ecanet.insert_gates_(self.resnet.encoder, "eca_ns", input_shape=(1, 16, 32, 32))


class GatedBeforeTheEnd(transformers.ResNetForImageClassification):
    """Weights are initialised once more after the gates are there."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        ecanet.insert_gates_(self)
        self.post_init()


class GatedAtRandom(transformers.ResNetForImageClassification):
    """Gates as the authors' files have them."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        ecanet.insert_gates_(self, preserve=False)


class GatedByMoments(transformers.ResNetForImageClassification):
    """One gate of every kind that sees variances, with a norm inside, and with and without a factor."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for name, stage in zip(("srm", "gct", "grn", "gct"), self.resnet.encoder.stages, strict=True):
            ecanet.insert_gates_(self, name, filter_fn=lambda module, _, stage=stage: module in stage.modules())


NETWORKS = [Gated, GatedInside, GatedInAPart, GatedBeforeTheEnd, GatedByMoments]
every_network = pytest.mark.parametrize("cls", NETWORKS, ids=lambda cls: cls.__name__)


@torch.no_grad()
def randomise_(model: nn.Module) -> nn.Module:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "normalization" in name and tensor.is_floating_point() and ".gate." not in name:
            tensor.uniform_(0.5, 1.5)
    return model.eval()


def train_(model: nn.Module) -> None:
    for gate in gates(model).values():
        for weight in gate.parameters():
            nn.init.normal_(weight)


def loaded(cls: Any, folder: Path, **arguments: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return cls.from_pretrained(folder, **arguments).eval()


def logits(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x.to(model.dtype)).logits


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain")
    model = randomise_(transformers.ResNetForImageClassification(config()))
    model.save_pretrained(folder)
    return folder, model


@every_network
def test_a_plain_checkpoint_brings_the_plain_function(cls, plain) -> None:
    folder, model = plain
    x = torch.randn(2, 3, 32, 32)
    gated = loaded(cls, folder)
    assert len(gates(gated)) == 4
    assert torch.equal(logits(gated, x), logits(model, x))
    assert all(gate.constant() == 1 and gate.factor == 1 / gate.neutral_value for gate in gates(gated).values())


@every_network
def test_a_fresh_network_starts_as_the_plain_one(cls) -> None:
    assert all(gate.constant() == 1 for gate in gates(cls(config())).values())


@every_network
@pytest.mark.parametrize("factor", [2.0, 3.0])
def test_its_own_checkpoint_comes_back(cls, factor, tmp_path) -> None:
    model = randomise_(cls(config()))
    train_(model)
    for gate in gates(model).values():
        if gate.scale is not None:  # otherwise a file with a factor is refused
            gate.factor = factor
    x = torch.randn(2, 3, 32, 32)
    model.save_pretrained(tmp_path)
    again = loaded(cls, tmp_path)
    assert torch.equal(logits(again, x), logits(model, x))
    assert {gate.factor for gate in gates(again).values() if gate.scale is not None} == {factor}


def test_half_types(plain) -> None:
    folder, _ = plain
    x = torch.randn(2, 3, 32, 32)
    gated = loaded(Gated, folder, dtype=torch.bfloat16)
    want = logits(loaded(transformers.ResNetForImageClassification, folder, dtype=torch.bfloat16), x)
    assert torch.equal(logits(gated, x), want)


def test_another_head_leaves_the_rest_as_it_was(plain) -> None:
    folder, model = plain
    x = torch.randn(2, 3, 32, 32)
    gated = loaded(Gated, folder, num_labels=7, ignore_mismatched_sizes=True)
    with torch.no_grad():
        assert torch.equal(gated.resnet(x).pooler_output, model.resnet(x).pooler_output)


def test_gates_without_their_factor_are_refused(tmp_path) -> None:
    model = randomise_(GatedAtRandom(config()))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights of a ECA gate without a factor"):
        loaded(Gated, tmp_path)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(logits(loaded(GatedAtRandom, tmp_path), x), logits(model, x))


class Backbone(transformers.PreTrainedModel):
    """Any network of the library or of torch in a network of transformers, as people wrap their own."""

    config_class = transformers.ResNetConfig

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.net = self.build()
        self.post_init()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Plain(Backbone):
    def build(self) -> nn.Module:
        return ecanet.models.small_eca_resnet(None)


class Neutral(Backbone):
    def build(self) -> nn.Module:
        return ecanet.models.small_eca_resnet("se", neutral=True)


class ByHand(Backbone):
    def build(self) -> nn.Module:
        net = ecanet.models.small_eca_resnet("eca_ns")
        for gate in gates(net).values():
            gate.make_identity_()
        return net


@pytest.mark.parametrize("cls", [Neutral, ByHand], ids=lambda cls: cls.__name__)
def test_a_network_of_the_library_as_a_backbone(cls, tmp_path) -> None:
    plain, x = randomise_(Plain(config())), torch.randn(2, 3, 32, 32)
    plain.save_pretrained(tmp_path)
    for _ in range(3):  # memory that happens to hold the right thing once
        with torch.no_grad():
            assert torch.equal(loaded(cls, tmp_path)(x), plain(x))


def test_gates_with_a_factor_are_refused_by_those_without(tmp_path) -> None:
    Gated(config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the checkpoint has gates with a factor"):
        loaded(GatedAtRandom, tmp_path)


def test_networks_without_gates_are_initialised_as_ever(plain) -> None:
    folder, model = plain
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(logits(loaded(transformers.ResNetForImageClassification, folder), x), logits(model, x))
    head = loaded(transformers.ResNetForImageClassification, folder, num_labels=7, ignore_mismatched_sizes=True)
    assert head.classifier[1].weight.std() > 0


def test_gates_have_the_classes_that_were_asked_for() -> None:
    assert {type(gate) for gate in gates(Gated(config())).values()} == {ECA}
    assert {type(gate) for gate in gates(GatedInside(config())).values()} == {SE}
