"""What a ``gate=`` argument accepts, and how ``build_gate`` fills it in."""

import functools

import pytest
import torch
from torch import Tensor, nn

from ecanet.nn import (
    CBAM,
    ECA,
    ECANS,
    ESE,
    GATES,
    GCT,
    GRN,
    LCT,
    SE,
    SRM,
    GaussianGCT,
    SEGroup,
    SEShift,
    SEVar1,
    SEVar2,
    SEVar3,
    SimAM,
    build_gate,
)
from ecanet.nn.build import gate_factory, gate_name
from ecanet.surgery.insertion_file import Insertion
from ecanet.train.config import ModelConfig


def test_the_names_of_table_2_and_of_other_gates() -> None:
    types = {name: type(build_gate(name, 64)) for name in GATES}
    known = {
        "eca": ECA,
        "eca_ns": ECANS,
        "se": SE,
        "se_var1": SEVar1,
        "se_var2": SEVar2,
        "se_var3": SEVar3,
        "se_gc1": SEGroup,
        "se_gc2": SEGroup,
        "se_gc3": SEGroup,
        "ese": ESE,
        "se_shift": SEShift,
        "lct": LCT,
        "gct_gauss": GaussianGCT,
        "srm": SRM,
        "gct": GCT,
        "grn": GRN,
        "cbam": CBAM,
        "simam": SimAM,
    }
    assert types == known
    assert {name: build_gate(name, 64).groups for name in GATES if types[name] is SEGroup} == {
        "se_gc1": 16,
        "se_gc2": 64 // 16,
        "se_gc3": 64 // 8,
    }


@pytest.mark.parametrize("name", ["eca", "eca_ns"])
def test_kernel_size_reaches_the_gates_that_have_one(name) -> None:
    assert build_gate(name, 64).kernel_size == 3
    assert build_gate(name, 64, "adaptive").kernel_size == 3
    assert build_gate(name, 64, kernel_size=9).kernel_size == 9


@pytest.mark.parametrize("name", [name for name in GATES if name not in ("eca", "eca_ns")])
def test_kernel_size_is_refused_by_the_gates_that_have_none(name) -> None:
    with pytest.raises(ValueError, match=f"kernel_size=3 was given, but gate='{name}' has no kernel size: leave it"):
        build_gate(name, 64, kernel_size=3)


class Half(nn.Module):
    """A gate of one's own need not derive from ours."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        (ECA, "ECA(64, kernel_size=3)"),
        (functools.partial(ECA, kernel_size=7), "ECA(64, kernel_size=7)"),
        (functools.partial(ECA, circular=True), "ECA(64, kernel_size=3, circular=True)"),
        (functools.partial(SE, reduction=8), "SE(64, reduction=8)"),
        (lambda channels: SEGroup(channels, groups=4), "SEGroup(64, groups=4)"),
        (Half, "Half()"),
    ],
    ids=["class", "partial of a kernel size", "partial of another argument", "partial of SE", "function", "own class"],
)
def test_a_class_or_a_function_keeps_its_own_defaults(gate, expected) -> None:
    built = build_gate(gate, 64)
    assert f"{type(built).__name__}({built.extra_repr()})" == expected


def test_a_kernel_size_that_was_asked_for_beats_the_one_of_a_partial() -> None:
    assert build_gate(functools.partial(ECANS, kernel_size=7), 64, kernel_size=5).kernel_size == 5


def test_every_call_builds_a_module_of_its_own() -> None:
    assert build_gate("eca", 64) is not build_gate("eca", 64)


@pytest.mark.parametrize("name", GATES)
def test_gate_name_undoes_gate_factory(name) -> None:
    assert gate_name(gate_factory(name)) == name
    assert gate_name(name) == name


def test_gate_name_leaves_alone_what_has_no_name() -> None:
    assert gate_name(Half) is Half
    assert gate_name(None) is None


# --- wrong arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ECA", "eca-ns", "transformer", ""])
def test_an_unknown_name_is_answered_with_the_known_ones(name) -> None:
    with pytest.raises(ValueError, match=f"gate must be one of .*got '{name}'") as error:
        build_gate(name, 64)
    for known in GATES:
        assert repr(known) in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("ECA", "eca"), ("eca-ns", "eca_ns"), ("CBMA", "cbam"), ("sim_am", "simam"), ("gctgauss", "gct_gauss")],
)
def test_a_name_that_is_almost_right_is_answered_with_the_right_one(wrong, meant) -> None:
    with pytest.raises(ValueError, match=f"got '{wrong}': did you mean '{meant}'\\?$"):
        build_gate(wrong, 64)


def test_a_name_that_is_like_none_is_not_answered_with_a_guess() -> None:
    with pytest.raises(ValueError, match=r"got 'transformer'$"):
        build_gate("transformer", 64)


def test_recipes_folders_and_insertion_files_answer_alike() -> None:
    for build in (
        lambda: ModelConfig(gate="seshift"),
        lambda: Insertion("torchvision/resnet18", gate="seshift").build(),
    ):
        with pytest.raises(ValueError, match=r"gate must be one of .*seshift.*: did you mean 'se_shift'\?$"):
            build()


@pytest.mark.parametrize("cls", [ECA, nn.Identity])
def test_a_module_is_refused_because_blocks_would_share_it(cls) -> None:
    with pytest.raises(TypeError, match=f"got {cls.__name__}.*every block needs a gate of its own"):
        build_gate(cls(64), 64)


@pytest.mark.parametrize("gate", [3, 1.5, ["eca"], torch.zeros(3)], ids=lambda gate: type(gate).__name__)
def test_what_is_neither_a_name_nor_callable_is_refused(gate) -> None:
    with pytest.raises(TypeError, match=f"gate must be a name, a class or a function.*got {type(gate).__name__}"):
        build_gate(gate, 64)


def test_a_function_must_return_a_module() -> None:
    with pytest.raises(TypeError, match=r"must return a torch\.nn\.Module, got float"):
        build_gate(lambda channels: 0.5, 64)
