"""State dicts of every implementation that people have weights from load; ECA's and CBAM's go both ways."""

from collections.abc import Callable

import pytest
import torch
from equations import drawn
from torch import Tensor, nn

from ecanet.nn import CBAM, ECA, ESE, GCT, GRN, SRM


class Official(nn.Module):
    """The layer of the official repository."""

    def __init__(self, channel: int, k_size: int = 3) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv = nn.Conv1d(1, 1, kernel_size=k_size, padding=(k_size - 1) // 2, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        y = self.avg_pool(x)
        y = self.conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * self.sigmoid(y).expand_as(x)


class Yolo(Official):
    """The module pasted into YOLO repositories: the number of output channels comes second and is not used."""

    def __init__(self, c1: int, c2: int, k_size: int = 3) -> None:
        super().__init__(c1, k_size)


def timm_eca(channels: int, k: int) -> nn.Module:
    return pytest.importorskip("timm.layers").EcaModule(kernel_size=k)


def timm_ceca(channels: int, k: int) -> nn.Module:
    return pytest.importorskip("timm.layers").CecaModule(kernel_size=k)


PARTNERS = {
    "official": (Official, ECA),
    "yolo": (lambda c, k: Yolo(c, c, k), lambda c, k: ECA.from_yolo(c, c, k)),
    "timm EcaModule": (timm_eca, ECA),
    "timm CecaModule": (timm_ceca, lambda c, k: ECA(c, k, circular=True)),
}
partners = pytest.mark.parametrize(("other", "ours"), PARTNERS.values(), ids=PARTNERS)


@partners
@pytest.mark.parametrize("k", [1, 3, 5, 7], ids="k={}".format)
def test_weights_load_both_ways_and_give_the_same_outputs(other, ours, k) -> None:
    theirs, mine = other(16, k), ours(16, k)
    assert mine.state_dict().keys() == theirs.state_dict().keys() == {"conv.weight"}
    x = torch.randn(2, 16, 5, 5)
    assert k == 1 or not torch.allclose(mine(x), theirs(x))
    mine.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(mine(x), theirs(x))
    nn.init.normal_(mine.conv.weight)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    torch.testing.assert_close(theirs(x), mine(x))


@partners
def test_gradients_agree(other, ours) -> None:
    theirs, mine = other(16, 5).double(), ours(16, 5).double()
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64, requires_grad=True)
    got = torch.autograd.grad(mine(x).square().sum(), [x, mine.conv.weight])
    want = torch.autograd.grad(theirs(x).square().sum(), [x, theirs.conv.weight])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["EcaModule", "CecaModule"])
def test_timm_chooses_the_same_kernel_size_from_8_channels_on(name) -> None:
    layers = pytest.importorskip("timm.layers")
    for channels in (8, 24, 64, 96, 128, 160, 256, 512, 1024, 2048):
        assert ECA(channels).conv.weight.shape == getattr(layers, name)(channels).conv.weight.shape, channels


def test_weights_of_another_kernel_size_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"conv\.weight"):
        ECA(64, kernel_size=3).load_state_dict(Official(64, k_size=5).state_dict())


@pytest.mark.parametrize(
    ("arguments", "k"),
    [((64,), 3), ((64, 64), 3), ((64, 64, 5), 5), ((256, 256), 3), ((64, None, 7), 7)],
    ids=str,
)
def test_from_yolo_takes_the_arguments_of_the_pasted_module(arguments, k) -> None:
    eca = ECA.from_yolo(*arguments)
    assert type(eca) is ECA
    assert (eca.channels, eca.kernel_size, eca.circular) == (arguments[0], k, False)
    assert ECA.from_yolo(c1=arguments[0], c2=arguments[0], k_size=k).kernel_size == k


def test_from_yolo_refuses_to_change_the_number_of_channels() -> None:
    with pytest.raises(ValueError, match=r"c2 must equal c1=64, got 128.*does not change the number of channels"):
        ECA.from_yolo(64, 128)


def test_from_yolo_builds_subclasses() -> None:
    class Mine(ECA):
        pass

    assert type(Mine.from_yolo(64)) is Mine


# --- other gates --------------------------------------------------------------------------------------------------


class AuthorsGCT(nn.Module):
    """The layer of the authors' repository, in its l2 mode."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        embedding = (x.pow(2).sum((2, 3), keepdim=True) + 1e-5).pow(0.5) * self.alpha
        norm = self.gamma / (embedding.pow(2).mean(dim=1, keepdim=True) + 1e-5).pow(0.5)
        return x * (1 + torch.tanh(embedding * norm + self.beta))


class AuthorsSRM(nn.Module):
    """The layer of the authors' repository."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cfc = nn.Parameter(torch.zeros(channels, 2))
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        style = torch.stack([flat.mean(2), (flat.var(dim=2) + 1e-5).sqrt()], dim=2)
        z = (style * self.cfc[None]).sum(2)[:, :, None, None]
        return x * torch.sigmoid(self.bn(z))


def timm_layer(file: str, name: str, **arguments: object) -> Callable[[int], nn.Module]:
    return lambda channels: getattr(pytest.importorskip(f"timm.layers.{file}"), name)(channels, **arguments)


OTHERS = {
    "timm GlobalResponseNorm": (timm_layer("grn", "GlobalResponseNorm", channels_last=False), GRN),
    "timm EffectiveSEModule": (timm_layer("squeeze_excite", "EffectiveSEModule"), ESE),
    "timm CbamModule": (timm_layer("cbam", "CbamModule"), CBAM),
    "GCT of the authors": (AuthorsGCT, GCT),
    "SRM of the authors": (AuthorsSRM, SRM),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("channels", [16, 24, 100])
@pytest.mark.parametrize(("other", "ours"), OTHERS.values(), ids=OTHERS)
def test_their_checkpoints_load_strictly_and_give_their_values(other, ours, channels, training) -> None:
    theirs, mine = drawn(other(channels)).double().train(training), ours(channels).double().train(training)
    x = torch.randn(4, channels, 5, 3, dtype=torch.float64) + torch.randn(4, channels, 1, 1, dtype=torch.float64)
    assert not torch.allclose(mine(x), theirs(x))
    file = theirs.state_dict()
    shapes = {key: value.shape for key, value in file.items()}
    mine.load_state_dict(file, strict=True)
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-12, atol=1e-12)
    assert {key: value.shape for key, value in file.items()} == shapes  # the file is as it was
    for (key, got), want in zip(mine.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=key)


@pytest.mark.parametrize("channels", [16, 24, 100])
def test_weights_of_cbam_load_into_timms_module_too(channels) -> None:
    theirs, mine = timm_layer("cbam", "CbamModule")(channels).eval(), drawn(CBAM(channels)).eval()
    theirs.load_state_dict(mine.state_dict(), strict=True)
    x = torch.randn(2, channels, 9, 9)
    torch.testing.assert_close(theirs(x), mine(x))


@pytest.mark.parametrize(
    ("gate", "key", "shape"),
    [(GCT(16), "alpha", (1, 32, 1, 1)), (GCT(16), "alpha", (4, 4)), (ESE(16), "fc.weight", (32, 8, 1, 1))],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_of_other_sizes_are_refused(gate, key, shape) -> None:
    file = {**gate.state_dict(), key: torch.ones(shape)}
    with pytest.raises(RuntimeError, match=f"size mismatch for {key}"):
        gate.load_state_dict(file)
