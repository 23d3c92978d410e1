"""Residual blocks and groups of layers are found by what they are, in code that no table knows."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import randomise_
from torch import Tensor, nn

from ecanet import insert_gates_
from ecanet.surgery.find.blocks import find_blocks
from ecanet.surgery.find.groups import find_groups
from ecanet.surgery.find.layers import names_of

C = 8


def conv(out: int = C, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(C, out, size, padding=size // 2)


class Block(nn.Module):
    """A residual block whose ``forward`` a test chooses."""

    def __init__(self, forward: "Callable[[Block, Tensor], Tensor]") -> None:
        super().__init__()
        self.conv, self.norm, self.second, self.norm2 = conv(), nn.BatchNorm2d(C), conv(), nn.BatchNorm2d(C)
        self.shortcut = nn.Sequential(conv(size=1), nn.BatchNorm2d(C))
        self.act, self.drop, self.inside = nn.ReLU(), nn.Dropout(0.1), nn.Sequential(conv(), nn.BatchNorm2d(C))
        self.scale = nn.Parameter(torch.ones(C))
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def in_place(b: Block, x: Tensor) -> Tensor:
    y = b.norm2(b.second(b.act(b.norm(b.conv(x)))))
    y += x
    return b.act(y)


RESIDUAL = {
    "in place": (in_place, "norm2"),
    "the shortcut first": (lambda b, x: x + b.norm(b.conv(x)), "norm"),
    "by torch.add": (lambda b, x: torch.add(b.norm(b.conv(x)), x), "norm"),
    "by a method": (lambda b, x: b.norm(b.conv(x)).add_(x), "norm"),
    "a projected shortcut": (lambda b, x: b.norm2(b.second(b.norm(b.conv(x)))) + b.shortcut(x), "norm2"),
    "dropout behind the norm": (lambda b, x: b.drop(b.norm(b.conv(x))) + x, "norm"),
    "a function that drops": (lambda b, x: F.dropout(b.norm(b.conv(x)), 0.1, b.training) + x, "norm"),
    "a learned scale": (lambda b, x: b.scale.view(1, -1, 1, 1) * b.norm(b.conv(x)) + x, "norm"),
    "a constant factor": (lambda b, x: 0.2 * b.conv(x) + x, "conv"),
    "a sequence": (lambda b, x: b.inside(x) + x, "inside.1"),
    "the norm first": (lambda b, x: x + b.second(F.relu(b.norm(b.conv(b.act(b.norm2(x)))))), "second"),
    "an activation at the end of the branch": (lambda b, x: x + b.act(b.norm(b.conv(x))), "act"),
}
NOT_RESIDUAL = {
    "no addition": lambda b, x: b.norm(b.conv(x)),
    "two equal branches": lambda b, x: b.conv(x) + b.second(x),
    "no convolution": lambda b, x: b.norm(x) + x,
    "a concatenation": lambda b, x: torch.cat([x, b.conv(x)], 1),
}


@pytest.mark.parametrize("name", RESIDUAL)
def test_a_residual_block_is_found_and_so_is_the_end_of_its_branch(name) -> None:
    forward, end = RESIDUAL[name]
    model = nn.Sequential(nn.Conv2d(3, C, 1), Block(forward))
    branches, untraced = find_blocks(model)
    assert [(b.block, b.end, b.channels, b.why_not) for b in branches] == [("1", f"1.{end}", C, None)]
    assert not untraced


@pytest.mark.parametrize("name", RESIDUAL)
def test_a_gate_there_preserves_the_function(name) -> None:
    model = randomise_(nn.Sequential(nn.Conv2d(3, C, 1), Block(RESIDUAL[name][0]))).eval()
    x = torch.randn(2, 3, 5, 5)
    before = model(x)
    insert_gates_(model)
    assert torch.allclose(model(x), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NOT_RESIDUAL)
def test_other_code_is_no_residual_block(name) -> None:
    assert find_blocks(nn.Sequential(Block(NOT_RESIDUAL[name])))[0] == []


def test_blocks_in_a_block_are_the_blocks() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(Block(in_place), Block(in_place), conv())

        def forward(self, x: Tensor) -> Tensor:
            return x + self.body(x)

    assert [b.end for b in find_blocks(nn.Sequential(Skip()))[0]] == ["0.body.0.norm2", "0.body.1.norm2"]


def test_a_network_in_one_piece_has_as_many_blocks_as_additions() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = nn.Conv2d(3, C, 1), conv(), conv()
            self.norm1, self.norm2 = nn.BatchNorm2d(C), nn.BatchNorm2d(C)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.norm1(self.one(x))
            return x + self.norm2(self.two(x))

    assert [b.end for b in find_blocks(Flat())[0]] == ["norm1", "norm2"]
    with pytest.raises(ValueError, match=r"where='stage' needs blocks that are modules of their own, and norm1"):
        insert_gates_(Flat(), where="stage")


def test_additions_along_a_branch_belong_to_it() -> None:
    def forward(b: Block, x: Tensor) -> Tensor:
        y = b.norm(b.conv(x))
        y = b.act(b.second(y)) + y
        return b.norm2(b.inside(y)) + x

    assert [b.end for b in find_blocks(nn.Sequential(Block(forward)))[0]] == ["0.norm2"]


def test_a_shortcut_that_is_handed_in() -> None:
    class Tree(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = conv(), nn.BatchNorm2d(C)

        def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
            if shortcut is None:
                shortcut = x
            return self.norm(self.conv(x)) + shortcut

    assert [b.end for b in find_blocks(nn.Sequential(Tree()))[0]] == ["0.norm"]


@pytest.mark.parametrize(
    ("forward", "says"),
    [
        (lambda b, x: b.act(b.second(b.act(b.conv(x)))) + x, "calls several times"),
        (lambda b, x: b.conv(x).flip(1) + x, "ends in flip, which is not a module"),
    ],
)
def test_an_end_that_a_gate_cannot_follow_says_why(forward, says) -> None:
    model = nn.Sequential(Block(forward))
    assert says in str(find_blocks(model)[0][0].why_not)
    with pytest.raises(ValueError, match=says):
        insert_gates_(model)


def test_what_is_left_out_is_noted_where_others_get_a_gate() -> None:
    model = nn.Sequential(Block(in_place), Block(lambda b, x: b.conv(x).flip(1) + x))
    report = insert_gates_(model, input_shape=(1, C, 4, 4))
    assert len(report.rows) == 1
    assert report.notes == ("left out: 1: its branch ends in flip, which is not a module: name a module before it",)


def test_code_that_cannot_be_traced_is_noted_where_others_get_a_gate() -> None:
    class Untraceable(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.run(self, x) if x.sum() > -1e9 else x

    report = insert_gates_(nn.Sequential(Block(in_place), Untraceable(in_place)), input_shape=(1, C, 4, 4))
    assert len(report.rows) == 1
    assert any(
        note.startswith("not looked into: 1: torch.fx cannot trace its code (TraceError") for note in report.notes
    )


class Functional(nn.Module):
    """A plain network whose activations are functions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.head = conv(), conv(), conv(), conv(2)
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.one(x)))
        x = self.two(x).relu()
        return self.head(torch.sigmoid(self.three(x)))


class Unit(nn.Module):
    """Convolution, norm and activation in one module, as YOLO's Conv and timm's ConvNormAct."""

    shared = nn.SiLU()

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = conv(), nn.BatchNorm2d(C), self.shared

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


GROUPS = {
    "functions as activations": (lambda: nn.Sequential(Functional()), ["0.norm", "0.two", "0.three"]),
    "a sequence": (lambda: nn.Sequential(conv(), nn.BatchNorm2d(C), nn.ReLU(), conv(), nn.GELU()), ["2", "4"]),
    "dropout in between": (lambda: nn.Sequential(conv(), nn.Dropout2d(), nn.ReLU()), ["2"]),
    "no activation": (lambda: nn.Sequential(conv(), nn.BatchNorm2d(C), nn.MaxPool2d(2)), []),
    "a module of the three": (lambda: nn.Sequential(Unit(), Unit()), ["0", "1"]),
    "a head and a pool": (lambda: nn.Sequential(conv(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), ["1"]),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_of_convolution_norm_and_activation(name) -> None:
    make, ends = GROUPS[name]
    model = make()
    assert list(find_groups(model, names_of(model)).ends) == ends


@pytest.mark.parametrize("name", [name for name in GROUPS if GROUPS[name][1]])
def test_gates_after_groups_preserve_the_function(name) -> None:
    model = randomise_(GROUPS[name][0]()).eval()
    x = torch.randn(2, C, 6, 6)
    before = model(x)
    insert_gates_(model, where="conv", input_shape=x.shape)
    assert torch.allclose(model(x), before, rtol=1e-6, atol=1e-6)
