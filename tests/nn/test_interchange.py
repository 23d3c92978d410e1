"""State dicts go both ways between ECA and every implementation that people have weights from."""

import pytest
import torch
from torch import Tensor, nn

from ecanet.nn import ECA


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
