"""Gates stand where maps are scaled: not inside attention, not behind outputs, and of the channels that there are."""

import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.video import r3d_18

import ecanet
from ecanet import insert_gates_, replace_gates_


def conv(c_in: int, c_out: int, k: int = 3) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, k, padding=k // 2)


def group(c_in: int, c_out: int, act: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(conv(c_in, c_out), nn.BatchNorm2d(c_out), act or nn.ReLU())


def placed(model: nn.Module, where: Any = "conv", x: Tensor | None = None, **arguments: Any) -> dict[str, int | None]:
    """Where gates went, and that the network still computes what it computed."""
    model.eval()
    x = torch.randn(2, 3, 16, 16) if x is None else x
    want = model(x)
    report = insert_gates_(model, where=where, **arguments)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    return {row.where: row.channels for row in report.rows}


# Attention of classes that nobody knows


class Squeeze(nn.Module):
    """As the usual tutorials write it, with view() and expand_as()."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(conv(c, 4, 1), nn.ReLU(), conv(4, c, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        return x * self.fc(self.pool(x)).view(b, c, 1, 1).expand_as(x)


class WithoutPoolLayer(Squeeze):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul(self.fc(x.mean((2, 3), keepdim=True)))


class Functional(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.down, self.up = conv(c, 4, 1), conv(4, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.up(F.relu(self.down(s))))


class WithResidual(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class AvgAndMax(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.avg, self.max = nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)
        self.mlp = nn.Sequential(conv(c, 4, 1), nn.ReLU(), conv(4, c, 1))
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.sigmoid(self.mlp(self.avg(x)) + self.mlp(self.max(x))) * x


class Weights(nn.Module):
    """Returns the weights alone; the module around it multiplies."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.pool, self.fc1, self.act, self.fc2 = nn.AdaptiveAvgPool2d(1), conv(c, 4, 1), nn.ReLU(), conv(4, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc2(self.act(self.fc1(self.pool(x)))))


class Spatial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = conv(2, 1, 7), nn.BatchNorm2d(1), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return self.act(self.bn(self.conv(maps)))


class Both(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.ca, self.sa = Weights(c), Spatial()

    def forward(self, x: Tensor) -> Tensor:
        x = self.ca(x) * x
        return self.sa(x) * x


class Pixel(nn.Module):
    """Attention of every position, as in PAN."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.sigmoid = conv(c, c, 1), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return torch.mul(x, self.sigmoid(self.conv(x)))


class OfTwoInputs(nn.Module):
    """Attention U-Net's gate, with the decoder's map as a second input."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.g, self.x = (
            nn.Sequential(conv(c, 4, 1), nn.BatchNorm2d(4)),
            nn.Sequential(conv(c, 4, 1), nn.BatchNorm2d(4)),
        )
        self.psi = nn.Sequential(conv(4, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())

    def forward(self, x: Tensor, g: Tensor | None = None) -> Tensor:
        g = x if g is None else g
        return x * self.psi(F.relu(self.g(g) + self.x(x)))


class Coordinates(nn.Module):
    """Coordinate attention without its permutations: pooled along each side."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.bn, self.act = conv(c, 8, 1), nn.BatchNorm2d(8), nn.Hardswish()
        self.rows, self.columns = conv(8, c, 1), conv(8, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.act(self.bn(self.conv(x.mean(3, keepdim=True))))
        columns = self.act(self.bn(self.conv(x.mean(2, keepdim=True))))
        return x * self.rows(rows).sigmoid() * self.columns(columns).sigmoid()


ATTENTION: dict[str, Callable[[int], nn.Module]] = {
    "view and expand_as": Squeeze,
    "mean and mul": WithoutPoolLayer,
    "functions": Functional,
    "with a residual of its own": WithResidual,
    "average and maximum": AvgAndMax,
    "channels, then positions": Both,
    "pixels": Pixel,
    "two inputs": OfTwoInputs,
    "coordinates": Coordinates,
}
every_attention = pytest.mark.parametrize("make", ATTENTION.values(), ids=ATTENTION)


@every_attention
def test_no_gate_goes_inside_attention_of_unknown_class(make) -> None:
    model = nn.Sequential(group(3, 16), make(16), group(16, 8))
    model.eval()
    report = insert_gates_(model, where="conv")
    assert {row.where for row in report.rows} == {"0.2", "2.2"}
    assert any("1" in note and "attention" in note for note in report.notes), report.notes


class InlineAttention(nn.Module):
    """The block multiplies in its own code."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act = conv(c, c), nn.BatchNorm2d(c), nn.ReLU()
        self.conv2, self.bn2 = conv(c, c), nn.BatchNorm2d(c)
        self.pool, self.fc1, self.fc2 = nn.AdaptiveAvgPool2d(1), conv(c, 4, 1), conv(4, c, 1)
        self.sa = Spatial()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        y = y * torch.sigmoid(self.fc2(F.relu(self.fc1(self.pool(y)))))
        y = y * self.sa(y)
        return F.relu(x + y)


def test_no_gate_goes_inside_attention_in_a_blocks_own_code() -> None:
    assert placed(nn.Sequential(group(3, 16), InlineAttention(16))) == {"0.2": 16, "1.act": 16}


class Block(nn.Module):
    def __init__(self, c: int, attention: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.att = conv(c, c), nn.BatchNorm2d(c), attention

    def forward(self, x: Tensor) -> Tensor:
        return x + self.att(self.bn(self.conv(x)))


@every_attention
def test_a_block_that_ends_in_attention_is_left_out_and_told(make) -> None:
    model = nn.Sequential(group(3, 16), Block(16, make(16)), Block(16, nn.Identity()))
    report = insert_gates_(model, where="block")
    assert [row.where for row in report.rows] == ["2.bn"]
    assert any("1" in note and "attention" in note for note in report.notes), report.notes


def test_attention_in_a_blocks_own_code_is_told_too() -> None:
    report = insert_gates_(nn.Sequential(group(3, 16), InlineAttention(16), Block(16, nn.Identity())))
    assert [row.where for row in report.rows] == ["2.bn"]
    assert any("1" in note and "attention" in note for note in report.notes)


@pytest.mark.parametrize("name", ["regnet_y", "efficientnet"])
def test_networks_of_transformers_get_no_gate_inside_their_attention(name) -> None:
    transformers = pytest.importorskip("transformers")
    if name == "regnet_y":
        config = transformers.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8)
        model = transformers.RegNetModel(config)
    else:
        config = transformers.EfficientNetConfig(
            width_coefficient=0.25, depth_coefficient=0.1, image_size=32, num_block_repeats=[1] * 7
        )
        model = transformers.EfficientNetModel(config)
    report = insert_gates_(model.eval(), where="conv")
    inside = [
        n for n, m in model.named_modules() if type(m).__name__ in ("RegNetSELayer", "EfficientNetSqueezeExciteLayer")
    ]
    assert len(inside) >= 2
    assert report.rows
    assert not [row.where for row in report.rows if row.where.startswith(tuple(f"{n}." for n in inside))]
    assert sum("attention" in note for note in report.notes) >= 2


# Products that are no attention


class OwnSwish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Learnt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class WithAFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp_min(0).square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0].clamp_min(0) * grad


class SquaredRelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return WithAFunction.apply(x)


class OwnMish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul(F.softplus(x).tanh())


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(0, 6) if x.dim() == 4 else x.relu()


class HardSwish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu6 = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.relu6(x + 3) / 6


class OwnDrop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(len(x), 1, 1, 1) > 0.5) if self.training else x


class Blur(nn.Module):
    """Looks at neighbours: no activation."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, 1, 1)


@pytest.mark.parametrize("act", [OwnSwish, Learnt, SquaredRelu, OwnMish, Branching, HardSwish, nn.Mish, nn.GELU])
@pytest.mark.parametrize("kind", ["sequence", "graph"])
def test_activations_of_any_class_end_a_group(kind, act) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.act, self.last = conv(3, 16), nn.BatchNorm2d(16), act(), conv(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.act(self.bn(self.conv(x))))

    model = Layer() if kind == "graph" else nn.Sequential(group(3, 16, act()), conv(16, 4))
    assert placed(model) == {"act" if kind == "graph" else "0.2": 16}


def test_what_only_drops_at_random_is_passed_over() -> None:
    assert placed(nn.Sequential(conv(3, 16), nn.BatchNorm2d(16), OwnDrop(), nn.ReLU(), conv(16, 4))) == {"3": 16}


def test_what_looks_at_neighbours_is_no_activation() -> None:
    assert placed(nn.Sequential(conv(3, 16), Blur(), group(16, 8))) == {"2.2": 8}


# Shared activations


def shared_in_nested_sequences() -> nn.Module:
    act = nn.ReLU(inplace=True)
    return nn.Sequential(
        nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), act), nn.Sequential(conv(8, 16), nn.BatchNorm2d(16), act)
    )


def shared_with_dropout() -> nn.Module:
    act = nn.SiLU()
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.Dropout2d(0.1), act, conv(8, 16), nn.BatchNorm2d(16), nn.Dropout2d(0.1), act
    )


def shared_without_norm() -> nn.Module:
    act = nn.LeakyReLU(0.1)
    return nn.Sequential(conv(3, 8), act, conv(8, 16), act, conv(16, 4))


class SharedOfTheNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.a, self.b = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8)), nn.Sequential(conv(8, 16), nn.BatchNorm2d(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.b(self.act(self.a(x))))


class NormAndAct(nn.Sequential):
    pass


class WithFlags(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv, self.adn = conv(c_in, c_out), NormAndAct(nn.BatchNorm2d(c_out), nn.ELU())

    def forward(self, x: Tensor, plain: bool = False, mask: Tensor | None = None) -> Tensor:
        x = self.conv(x)
        if mask is not None:
            x = x * mask
        return x if plain else self.adn(x)


SHARED = {
    "nested sequences": (shared_in_nested_sequences, {"0.1": 8, "1.1": 16}),
    "with dropout between": (shared_with_dropout, {"1": 8, "5": 16}),
    "without norms": (shared_without_norm, {"0": 8, "2": 16}),
    "of the network": (SharedOfTheNetwork, {"a.1": 8, "b.1": 16}),
    "an own activation": (lambda: shared_own(OwnSwish()), {"1": 8, "4": 16}),
    "a flag and a mask": (lambda: nn.Sequential(WithFlags(3, 8), WithFlags(8, 16)), {"0": 8, "1": 16}),
}


def shared_own(act: nn.Module) -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), act, conv(8, 16), nn.BatchNorm2d(16), act)


def is_positively_homogeneous(name: str) -> bool:
    return name not in ("with dropout between", "an own activation")


@pytest.mark.parametrize("name", SHARED)
def test_groups_whose_activation_is_shared_are_found(name) -> None:
    make, expected = SHARED[name]
    assert placed(make()) == expected


# Outputs


class SigmoidOfTheHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = group(3, 16), conv(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.head(self.body(x)))


class Resized(SigmoidOfTheHead):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(conv(16, 1), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.head(self.body(x)), scale_factor=2).squeeze(1)


class TwoOutputs(SigmoidOfTheHead):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.edge = nn.Sequential(conv(16, 1), nn.Sigmoid()), nn.Sequential(conv(16, 2), nn.Hardsigmoid())

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return torch.cat([self.head(y), self.edge(y)], 1)


OUTPUTS = {
    "a sequence": lambda: nn.Sequential(*group(3, 16), conv(16, 3), nn.Tanh()),
    "a nested head": lambda: nn.Sequential(group(3, 16), nn.Sequential(conv(16, 8), nn.BatchNorm2d(8), nn.Sigmoid())),
    "a head and an up-sampler": lambda: nn.Sequential(
        group(3, 16), nn.Sequential(conv(16, 1), nn.Sigmoid()), nn.Upsample(scale_factor=2)
    ),
    "a function": SigmoidOfTheHead,
    "resized": Resized,
    "two of them": TwoOutputs,
}


@pytest.mark.parametrize("make", OUTPUTS.values(), ids=OUTPUTS)
def test_no_gate_goes_behind_the_networks_output(make) -> None:
    model = make().eval()
    report = insert_gates_(model, where="conv")
    assert [row.channels for row in report.rows] == [16]
    assert any("output" in note for note in report.notes)


def test_a_bounded_activation_inside_a_network_is_one_like_others() -> None:
    model = nn.Sequential(conv(3, 6, 5), nn.Sigmoid(), nn.AvgPool2d(2), conv(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
                          nn.Flatten(), nn.Linear(16 * 16, 4))  # fmt: skip
    assert placed(model) == {"1": 6, "4": 16}


def test_what_cannot_be_traced_is_told() -> None:
    class Padded(nn.Module):
        def __init__(self, c_in: int, c_out: int) -> None:
            super().__init__()
            self.conv, self.act = conv(c_in, c_out), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.conv(F.pad(x, (int(x.shape[-1] % 2), 0))))

    with pytest.raises(ValueError, match=r"where='conv' finds no convolution.*torch.fx cannot trace"):
        insert_gates_(nn.Sequential(Padded(3, 8), Padded(8, 8)), where="conv")
    report = insert_gates_(nn.Sequential(Padded(3, 8), group(8, 8)), where="conv")
    assert [row.where for row in report.rows] == ["1.2"]
    assert any("0" in note and "torch.fx cannot trace" in note for note in report.notes)


# Inputs of other ranks and channels


class Residual(nn.Module):
    def __init__(self, layer: Any, norm: Any, c: int) -> None:
        super().__init__()
        self.conv, self.bn = layer(c, c, 3, padding=1), norm(c)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn(self.conv(x))


RANKS = {
    "one channel, 1-D": (nn.Conv1d, nn.BatchNorm1d, 1),
    "twelve channels, 1-D": (nn.Conv1d, nn.BatchNorm1d, 12),
    "one channel, 2-D": (nn.Conv2d, nn.BatchNorm2d, 1),
    "six channels, 2-D": (nn.Conv2d, nn.BatchNorm2d, 6),
    "one channel, 3-D": (nn.Conv3d, nn.BatchNorm3d, 1),
    "three channels, 3-D": (nn.Conv3d, nn.BatchNorm3d, 3),
    "four channels, 3-D": (nn.Conv3d, nn.BatchNorm3d, 4),
}


@pytest.mark.parametrize("name", RANKS)
def test_the_input_follows_from_the_first_convolution(name) -> None:
    layer, norm, channels = RANKS[name]
    model = nn.Sequential(layer(channels, 16, 3, stride=4, padding=1), Residual(layer, norm, 16))
    report = insert_gates_(model)
    assert [row.channels for row in report.rows] == [16]
    assert report.multiply_adds is not None
    assert report.multiply_adds > 16


def test_a_network_of_films_has_its_multiply_adds() -> None:
    with torch.device("meta"):
        model = r3d_18()
    report = insert_gates_(model)
    assert len(report.rows) == 8
    assert report.multiply_adds is not None


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 32)], ids=str)
@pytest.mark.parametrize("surgery", [insert_gates_, lambda model, **a: replace_gates_(model, "se", **a)])
def test_the_shape_of_one_sample_is_refused(surgery, shape) -> None:
    rank = len(shape) - 1
    layer, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d))[rank - 1]
    model = nn.Sequential(layer(3, 16, 3), Residual(layer, norm, 16), ecanet.nn.ECA(16))
    with pytest.raises(ValueError, match=r"input_shape=\(3.*one sample.*\(N, C, \*spatial\)"):
        surgery(model, input_shape=shape)


class Ghost(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.primary, self.cheap = conv(c, c // 2), nn.Conv2d(c // 2, c // 2, 3, 1, 1, groups=c // 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.primary(x)
        return torch.cat([a, self.cheap(a)], 1)


class Shuffle(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.shuffle = conv(c, 4 * c), nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(self.conv(x))


class PastedECA(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        s = x.mean((2, 3))[:, None]
        return x * self.conv(s).sigmoid()[:, 0, :, None, None]


class Sides(nn.Module):
    """The registered order is not that of the calls."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.out, self.inner = conv(2 * c, c), conv(c, 2 * c)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x))


class Doubled(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = conv(c, c)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.cat([y, -y], 1)


class Chunked(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = conv(c, 2 * c)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).chunk(2, 1)
        return a * b.sigmoid()


@pytest.mark.parametrize("make", [Ghost, Shuffle, PastedECA, Sides, Doubled, Chunked])
def test_where_nothing_tells_the_channels_the_input_is_asked_for(make) -> None:
    class TakesTwo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.part = conv(3, 16), make(16)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.part(self.first(x + y))

    model = TakesTwo().eval()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=r"the number of channels at part.*input_shape="):
        insert_gates_(model, where="part")
    assert list(model.state_dict()) == before
    with pytest.raises(ValueError, match=r"the number of channels at part.*input_shape="):
        insert_gates_(model, where="part", input_shape=None)
    whole = nn.Sequential(conv(3, 16), make(16)).eval()
    report = insert_gates_(whole, where="1", input_shape=(1, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    assert report.rows[0].channels == whole(x).shape[1]


def test_norms_and_convolutions_tell_their_channels_without_a_run() -> None:
    model = nn.Sequential(group(3, 16), nn.Sequential(nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2)))
    report = insert_gates_(model, where=["0", "0.0", "0.1", "1.0"], input_shape=None, filter_fn=lambda m, n: n != "0")
    assert {row.where: row.channels for row in report.rows} == {"0.0": 16, "0.1": 16, "1.0": 16}


# Channels last


class Tokens(nn.Module):
    """A mixer of tokens (N, L, C) with a convolution inside, as in PVT and XCiT."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.dw, self.fc = nn.Conv1d(c, c, 3, padding=1), nn.Linear(c, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dw(x.transpose(1, 2)).transpose(1, 2))


class TokensWithDropout(Tokens):
    def __init__(self, c: int) -> None:
        super().__init__(c)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(super().forward(x))


class TokensOfPictures(nn.Module):
    """Works on (N, H, W, C), as Swin does."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.dw, self.fc = nn.Conv2d(c, c, 3, padding=1), nn.Sequential(nn.Linear(c, c), nn.GELU(), nn.Linear(c, c))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class NormedTokens(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.mix, self.extra = Tokens(c), nn.ModuleList([nn.LayerNorm(c)])

    def forward(self, x: Tensor) -> Tensor:
        return self.extra[0](self.mix(x))


@pytest.mark.parametrize("make", [Tokens, TokensWithDropout, TokensOfPictures, NormedTokens])
@pytest.mark.parametrize("where", ["block", "stage", "1.mix"])
def test_no_gate_scales_tokens(where, make) -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.proj = make(24), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mix(x)

    class ToTokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 24, 4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).permute(0, 2, 3, 1)
            return x if make is TokensOfPictures else x.flatten(1, 2)

    with pytest.raises(ValueError, match=r"has its 24 channels last"):
        insert_gates_(nn.Sequential(ToTokens(), Mixer()), where=where, input_shape=(1, 3, 16, 32))


def test_a_map_that_is_as_wide_as_a_layer_inside_has_channels() -> None:
    report = insert_gates_(nn.Sequential(conv(3, 16), Doubled(16)), where="1", input_shape=(1, 3, 16, 16))
    assert [row.channels for row in report.rows] == [32]


# Attention in other words: each member is the forward of a module with ``fc``, a sequence that ends in a sigmoid


def asserted(m: Any, x: Tensor) -> Tensor:
    assert x.shape[2] > 0
    return x * m.fc(x.mean((2, 3), keepdim=True))


def branched(m: Any, x: Tensor) -> Tensor:
    w = m.fc(x.mean((2, 3), keepdim=True))
    return x * w if x.shape[0] == 1 else w * x


def whole_numbers(m: Any, x: Tensor) -> Tensor:
    n = int(x.shape[2] * x.shape[3])
    return x * m.fc(x.sum((2, 3), keepdim=True) / n)


def einsum(m: Any, x: Tensor) -> Tensor:
    return torch.einsum("nchw,nc->nchw", x, m.fc(x.mean((2, 3), keepdim=True)).flatten(1))


def half(m: Any, x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    w = m.fc(x.mean((2, 3), keepdim=True)).chunk(2, 1)[0]
    return torch.cat([a * w, b], 1)


IN_OTHER_WORDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "assert": asserted,
    "if": branched,
    "int": whole_numbers,
    "torch.multiply": lambda m, x: torch.multiply(x, m.fc(x.mean((2, 3), keepdim=True))),
    "multiply": lambda m, x: x.multiply(m.fc(x.mean((2, 3), keepdim=True))),
    "einsum": einsum,
    "addcmul": lambda m, x: torch.addcmul(x, x, m.fc(x.mean((2, 3), keepdim=True))),
    "lerp": lambda m, x: torch.lerp(torch.zeros_like(x), x, m.fc(x.mean((2, 3), keepdim=True))),
    "division": lambda m, x: x / (1 + torch.exp(-m.fc(x.mean((2, 3), keepdim=True)))),
    "avg_pool2d": lambda m, x: x * m.fc(F.avg_pool2d(x, x.shape[2:])),
    "sum": lambda m, x: x * m.fc(x.sum((2, 3), keepdim=True) / 99),
    "norm": lambda m, x: x * m.fc(torch.norm(x, dim=(2, 3), keepdim=True)),
    "own pool": lambda m, x: x * m.own_sigmoid(m.fc[:3](m.own_pool(x)[..., None, None])),
    "clamp": lambda m, x: x * m.fc[2](m.fc[1](m.fc[0](x))).clamp(0, 1),
    "half of the channels": half,
    "interpolated": lambda m, x: x * F.interpolate(m.fc(F.avg_pool2d(x, 2)), size=x.shape[-2:]),
}


class OwnPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


class OwnSigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-x))


def in_other_words(name: str, c: int) -> nn.Module:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Sequential(conv(c, 4, 1), nn.ReLU(), conv(4, c, 1), nn.Sigmoid())
            self.own_pool, self.own_sigmoid = OwnPool(), OwnSigmoid()

        def forward(self, x: Tensor) -> Tensor:
            return IN_OTHER_WORDS[name](self, x)

    return Attention()


@pytest.mark.parametrize("name", IN_OTHER_WORDS)
@pytest.mark.parametrize("input_shape", ["auto", None], ids=["run", "no run"])
def test_attention_is_seen_however_its_code_is_written(name, input_shape) -> None:
    model = nn.Sequential(group(3, 16), in_other_words(name, 16), group(16, 8))
    report = insert_gates_(model.eval(), where="conv", input_shape=input_shape)
    assert {row.where for row in report.rows} == {"0.2", "2.2"}
    assert any("1 is attention" in note for note in report.notes), report.notes


@pytest.mark.parametrize("name", IN_OTHER_WORDS)
def test_a_block_that_ends_in_it_is_told(name) -> None:
    model = nn.Sequential(group(3, 16), Block(16, in_other_words(name, 16)), Block(16, nn.Identity()))
    report = insert_gates_(model.eval(), where="block")
    assert [row.where for row in report.rows] == ["2.bn"]
    assert any("1" in note and "attention" in note for note in report.notes), report.notes


class WithFactorOfTheSameInput(nn.Module):
    """GhostNetV2: what is scaled and what scales are both computed from x."""

    def __init__(self) -> None:
        super().__init__()
        self.main = group(16, 16)
        self.short, self.gate = (
            nn.Sequential(conv(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 16)),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        w = self.short(F.avg_pool2d(x, 2, 2))
        return self.main(x)[:, :16] * F.interpolate(self.gate(w), size=x.shape[-2:])


class Star(nn.Module):
    """StarNet: a product of two layers, none of which is a factor between 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.main = group(16, 16)
        self.short = nn.Sequential(conv(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU6())

    def forward(self, x: Tensor) -> Tensor:
        return self.short(x) * self.main(x)


def test_a_factor_of_the_same_input_is_one_too() -> None:
    assert placed(nn.Sequential(group(3, 16), WithFactorOfTheSameInput())) == {"0.2": 16, "1.main.2": 16}
    assert placed(nn.Sequential(group(3, 16), Star(), conv(16, 4))) == {"0.2": 16, "1.main.2": 16, "1.short.2": 16}


class UntraceableResidual(nn.Module):
    """Convolutions of maps beside attention, in code that cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.fc = group(16, 16), nn.Sequential(conv(16, 4, 1), nn.ReLU(), conv(4, 16, 1), nn.Sigmoid())
        self.sa = nn.Sequential(conv(16, 4), nn.ReLU(), conv(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[0] > 0
        y = self.main(x)
        return x + y * self.fc(y.mean((2, 3), keepdim=True)) * self.sa(y).sigmoid()


def test_code_that_cannot_be_traced_keeps_the_gates_of_its_maps() -> None:
    model = nn.Sequential(group(3, 16), UntraceableResidual())
    report = insert_gates_(model.eval(), where="conv")
    assert [row.where for row in report.rows] == ["0.2", "1.main.2"]
    assert sum("may be part of attention" in note for note in report.notes) == 2


# Outputs of activations that are the user's own


class ScaledTanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * 3


class SigmoidMethod(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid()


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(0, 1)


class Arctan(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.atan() / 2 if x.dim() == 4 else x


class HeldSigmoid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) * 2 - 1


@pytest.mark.parametrize("act", [OwnSigmoid, ScaledTanh, SigmoidMethod, Clamp, Arctan, HeldSigmoid])
def test_no_gate_goes_behind_an_output_that_an_own_activation_bounds(act) -> None:
    model = nn.Sequential(group(3, 16), nn.Sequential(conv(16, 3), act())).eval()
    report = insert_gates_(model, where="conv")
    assert [row.where for row in report.rows] == ["0.2"]
    assert any("output" in note for note in report.notes)


@pytest.mark.parametrize("function", [F.hardtanh, F.relu6, F.hardsigmoid, F.softsign, torch.sigmoid, torch.tanh])
def test_no_gate_goes_behind_an_output_that_a_function_bounds(function) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = group(3, 16), conv(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return function(self.head(self.body(x)))

    assert [row.where for row in insert_gates_(Head().eval(), where="conv").rows] == ["body.2"]


@pytest.mark.parametrize("act", [OwnSwish, OwnMish, SquaredRelu, nn.GELU, nn.PReLU, nn.ReLU])
def test_an_unbounded_activation_at_the_end_is_no_output(act) -> None:
    assert placed(nn.Sequential(group(3, 16), conv(16, 3), act())) == {"0.2": 16, "2": 3}


# What is pooled to one position is no map


class PooledInCode(nn.Module):
    def __init__(self, pool: Callable[[Tensor], Tensor], act: nn.Module) -> None:
        super().__init__()
        self.features, self.head, self.act, self.fc = group(3, 16), conv(16, 32, 1), act, nn.Linear(32, 3)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.head(self.pool(self.features(x)))).flatten(1))


class KeepingPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "mean, one side after the other": lambda x: x.mean(3, keepdim=True).mean(2, keepdim=True),
    "largest": lambda x: x.amax((-2, -1), keepdim=True),
    "sizes read": lambda x: F.avg_pool2d(x, x.shape[2:]),
    "flat, and back": lambda x: x.flatten(2).mean(2)[:, :, None, None],
    "two pools": lambda x: F.adaptive_avg_pool2d(x, 1) + F.adaptive_max_pool2d(x, 1),
}


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("act", [nn.Hardswish, nn.ReLU])
def test_no_gate_goes_behind_features_that_code_pools(act, name) -> None:
    report = insert_gates_(PooledInCode(POOLS[name], act()).eval(), where="conv", input_shape=(1, 3, 32, 32))
    assert [row.where for row in report.rows] == ["features.2"]


@pytest.mark.parametrize("pool", [KeepingPool, lambda: nn.AdaptiveAvgPool2d(1), lambda: nn.AvgPool2d(32)])
def test_no_gate_goes_behind_a_layer_that_pools(pool) -> None:
    model = nn.Sequential(group(3, 16), pool(), conv(16, 32, 1), nn.Hardswish(), nn.Flatten(), nn.Linear(32, 3))
    report = insert_gates_(model.eval(), where="conv", input_shape=(1, 3, 32, 32))
    assert [row.where for row in report.rows] == ["0.2"]


def test_what_is_small_since_the_picture_is_keeps_its_gate() -> None:
    model = nn.Sequential(group(3, 16), nn.MaxPool2d(8), group(16, 16), nn.MaxPool2d(2), group(16, 16))
    report = insert_gates_(model.eval(), where="conv", input_shape=(1, 3, 16, 16))
    assert [row.where for row in report.rows] == ["0.2", "2.2", "4.2"]


# Dry runs that come to no end


BEFORE_A_FAILURE: dict[str, Callable[[], nn.Module]] = {
    "PixelUnshuffle": lambda: nn.Sequential(nn.PixelUnshuffle(2), group(4, 8)),
    "joined": lambda: nn.Sequential(Joined(), group(12, 8)),
    "a pool": lambda: nn.Sequential(nn.Sequential(nn.PixelUnshuffle(2), nn.MaxPool2d(2)), group(4, 8)),
    "an own activation": lambda: nn.Sequential(nn.PixelUnshuffle(2), OwnSwish(), group(8, 8)),
    "padding": lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.ZeroPad2d(1), group(16, 8)),
    "a shuffle": lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.ChannelShuffle(2), group(4, 8)),
}


class Joined(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, -x], 1)


@pytest.mark.parametrize("name", BEFORE_A_FAILURE)
@pytest.mark.parametrize("input_shape", ["auto", (1, 5, 16, 16)], ids=str)
def test_a_run_that_fails_tells_no_channels(name, input_shape) -> None:
    model = BEFORE_A_FAILURE[name]()
    place = str(len(model) - 2)
    with pytest.raises(ValueError, match=r"the number of channels at .*does not run on an input.*input_shape="):
        insert_gates_(model, where=place, input_shape=input_shape)
    channels = model[-1][0].in_channels
    count = channels // 2 if name == "joined" else channels // 4
    report = insert_gates_(model, where=place, input_shape=(1, count, 32, 32))
    assert [row.channels for row in report.rows] == [channels]


class Holding(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.body, self.shuffle, self.what = group(3, 16), nn.PixelShuffle(2), what

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(self.body(x))


HELD: dict[str, Callable[[], Any]] = {
    "lock": threading.Lock,
    "condition": threading.Condition,
    "generator": lambda: (i for i in range(3)),
    "file": lambda: open(os.devnull),  # noqa: SIM115
    "socket": socket.socket,
    "module": lambda: torch,
}


@pytest.mark.parametrize("name", HELD)
def test_a_network_that_cannot_be_copied_says_so(name) -> None:
    held = HELD[name]()
    try:
        model = Holding(held)
        report = insert_gates_(model, where="body.1")
        assert [row.channels for row in report.rows] == [16]
        assert any("cannot be copied" in note and "TypeError" in note for note in report.notes), report.notes
        assert not any("does not run" in note for note in report.notes)
        with pytest.raises(ValueError, match=r"the number of channels at shuffle.*cannot be copied"):
            insert_gates_(model, where="shuffle", input_shape=(1, 3, 16, 16))
    finally:
        if hasattr(held, "close"):
            held.close()
