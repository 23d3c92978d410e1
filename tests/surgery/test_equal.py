"""Blocks that are equal are looked into once; any difference that code can see makes two blocks unequal."""

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn

from ecanet import insert_gates_
from ecanet.networks.running import running_without_data
from ecanet.surgery.find.blocks import find_blocks
from ecanet.surgery.find.equal import Answer, cached_by_module, caching_answers, description_of

C = 4


class Block(nn.Module):
    """What it adds depends on what it holds; with no flag on, it adds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.Conv2d(C, C, 1)
        self.adds, self.settings, self.way = False, {"adds": [False]}, abs
        self.register_buffer("switch", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        adds = self.adds or self.settings["adds"][0] or self.way is max or self.conv.kernel_size == (3, 3)
        adds = adds or hasattr(self.other, "bottleneck") or "late" in self._modules or self.conv is self.other
        return y + x if adds or len(self._forward_pre_hooks) else y


class SwitchedBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return y + x if self.switch else y


class InverseBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + x


def set_(block: nn.Module, name: str, value: object) -> None:
    setattr(block, name, value)


DIFFERENCES: dict[str, Callable[[Block], object]] = {
    "a flag": lambda b: set_(b, "adds", True),
    "a value deep in a dict": lambda b: b.settings["adds"].insert(0, True),
    "a function": lambda b: set_(b, "way", max),
    "a setting of a child": lambda b: set_(b, "conv", nn.Conv2d(C, C, 3, padding=1)),
    "an attribute of a child": lambda b: set_(b.other, "bottleneck", None),
    "one more child": lambda b: b.add_module("late", None),
    "one layer for two": lambda b: set_(b, "other", b.conv),
    "a hook": lambda b: b.register_forward_pre_hook(lambda *_: None),
    "its class": lambda b: set_(b, "__class__", InverseBlock),
}


@pytest.fixture
def traced(monkeypatch) -> list[str]:
    """The classes that torch.fx traces, one for each trace."""
    classes: list[str] = []
    trace = fx.Tracer.trace

    def counting(tracer: fx.Tracer, root: nn.Module, *args: object, **kwargs: object) -> fx.Graph:
        classes.append(type(root).__name__)
        return trace(tracer, root, *args, **kwargs)

    monkeypatch.setattr(fx.Tracer, "trace", counting)
    return classes


@pytest.mark.parametrize("change", DIFFERENCES.values(), ids=DIFFERENCES)
@pytest.mark.parametrize("which", [0, 1])
def test_a_block_is_found_by_what_it_holds_itself_though_its_neighbour_differs_in_one_thing_only(change, which) -> None:
    model = nn.Sequential(Block(), Block())
    with caching_answers():
        assert find_blocks(model)[0] == []
    change(model[which])
    assert description_of(model[0]) != description_of(model[1])
    with caching_answers():
        assert [branch.block for branch in find_blocks(model)[0]] == [str(which)]


@pytest.mark.parametrize("which", [0, 1])
def test_values_of_buffers_are_not_compared_and_code_that_reads_one_is_looked_into_in_each_block(which, traced) -> None:
    model = nn.Sequential(SwitchedBlock(), SwitchedBlock(), Block(), Block())
    model[which].switch.fill_(True)
    assert description_of(model[0]) == description_of(model[1])
    with caching_answers():
        assert [branch.block for branch in find_blocks(model)[0]] == [str(which)]
    assert traced.count("SwitchedBlock") > traced.count("Block")


def test_copies_and_blocks_built_alike_are_equal_whatever_their_weights() -> None:
    built = torchvision.models.resnet18().layer3
    assert description_of(built[1]) == description_of(copy.deepcopy(built[1])) != description_of(built[0])
    assert description_of(Block()) == description_of(Block())


def test_what_cannot_be_compared_is_equal_to_itself_alone() -> None:
    a, b = Block(), Block()
    a.settings = b.settings = {"itself": None, "lock": object()}
    a.settings["itself"] = a.settings
    assert description_of(a) == description_of(b)
    b.settings = {"itself": None, "lock": object()}
    assert description_of(a) != description_of(b)
    a, b = Block(), Block()
    a.mask, b.mask = torch.zeros(1), torch.zeros(1)  # no buffer, so that code reads its values unseen
    assert description_of(a) != description_of(b)
    assert description_of(nn.Sequential(*(nn.ReLU() for _ in range(200)))) is None


def test_insertion_traces_equal_blocks_once(traced) -> None:
    report = insert_gates_(torchvision.models.resnet50(), input_shape=None)
    assert len(report.rows) == 16
    assert traced.count("Bottleneck") == 8  # the first and the other blocks of each of four stages


def test_outside_of_caching_answers_and_in_the_next_nothing_is_remembered() -> None:
    asked: list[nn.Module] = []

    @cached_by_module
    def ask(module: nn.Module) -> Answer:
        asked.append(module)
        return Answer(len(asked), holds_for_equal_ones=type(module) is Block)

    equal, not_shared = (Block(), Block()), (SwitchedBlock(), SwitchedBlock())
    assert [ask(equal[0]), ask(equal[0])] == [1, 2]
    for _ in range(2):
        asked.clear()
        with caching_answers():
            assert [ask(module) for module in (*equal, *not_shared, *equal, *not_shared)] == [1, 1, 2, 3] * 2


BATCH_NORMS: dict[str, tuple[nn.Module, Tensor]] = {
    "2d": (nn.BatchNorm2d(C), torch.zeros(2, C, 3, 3)),
    "no weights, channels last": (
        nn.BatchNorm2d(C, affine=False),
        torch.zeros(2, C, 3, 3).to(memory_format=torch.channels_last),
    ),
    "no statistics": (nn.BatchNorm2d(C, track_running_stats=False), torch.zeros(2, C, 3, 3)),
    "vectors": (nn.BatchNorm1d(C), torch.zeros(2, C)),
    "video in half precision": (nn.BatchNorm3d(C), torch.zeros(2, C, 3, 3, 3, dtype=torch.bfloat16)),
    "instances": (nn.InstanceNorm2d(C, track_running_stats=True), torch.zeros(2, C, 3, 3)),
}


@pytest.mark.parametrize(("norm", "x"), BATCH_NORMS.values(), ids=BATCH_NORMS)
def test_a_run_without_data_gives_a_norm_s_output_the_shape_type_and_strides_that_it_has(norm, x) -> None:
    want = norm.eval()(x)
    with running_without_data(norm):
        got = norm(torch.empty_like(x))
    assert (got.shape, got.dtype, got.stride(), got.device) == (want.shape, want.dtype, want.stride(), want.device)


@pytest.mark.parametrize("x", [torch.zeros(2, C + 1, 3, 3), torch.zeros(2, C, 3, 3, device="meta")])
def test_a_run_without_data_refuses_what_a_norm_refuses(x) -> None:
    norm = nn.BatchNorm2d(C).eval()
    with running_without_data(norm), pytest.raises(RuntimeError, match=r"running_mean should contain|same device"):
        norm(torch.empty_like(x))
