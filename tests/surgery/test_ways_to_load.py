"""Every way weights come into a network with gates: the plain function, or an error, and never something else."""

import copy
import datetime
import functools
import importlib.util
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from networks import NarrowResNet, images, randomise_
from safetensors.torch import load_model, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models.resnet import BasicBlock

import ecanet
from ecanet import insert_gates_
from ecanet.inspect import gates
from tests import fresh

State = dict[str, Tensor]


def resnet(seed: int) -> nn.Module:
    """A small ResNet whose norms hold more than ones and zeros."""
    torch.manual_seed(seed)
    return randomise_(NarrowResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)).eval()


def inserted(**arguments: Any) -> nn.Module:
    network = resnet(1)
    insert_gates_(network, **arguments)
    return network


inserted_once = functools.cache(inserted)


def gated(trained: bool = False, **arguments: Any) -> nn.Module:
    """A copy of a network with gates: insertion takes longer than all that a test does with it."""
    network = copy.deepcopy(inserted_once(**arguments))
    if trained:
        train_(network)
    return network


def train_(network: nn.Module) -> None:
    for gate in gates(network).values():
        for weight in gate.parameters():
            nn.init.normal_(weight)


# --- roads ---------------------------------------------------------------------------------------------------------


def strictly(model: nn.Module, plain: State, folder: Path) -> None:
    assert model.load_state_dict(plain) == ([], [])


def not_strictly(model: nn.Module, plain: State, folder: Path) -> None:
    assert model.load_state_dict(plain, strict=False) == ([], [])


def assigned(model: nn.Module, plain: State, folder: Path) -> None:
    torch.save(plain, folder / "plain.pth")
    model.load_state_dict(torch.load(folder / "plain.pth", mmap=True, weights_only=True), assign=True)


def part_by_part(model: nn.Module, plain: State, folder: Path) -> None:
    for name, part in model.named_children():
        state = {key.removeprefix(f"{name}."): value for key, value in plain.items() if key.startswith(f"{name}.")}
        if state:
            part.load_state_dict(state)


def without_the_head(model: nn.Module, plain: State, folder: Path) -> None:
    model.load_state_dict({key: value for key, value in plain.items() if not key.startswith("fc.")}, strict=False)
    model.fc.load_state_dict({"weight": plain["fc.weight"], "bias": plain["fc.bias"]})


def from_before_batches_were_counted(model: nn.Module, plain: State, folder: Path) -> None:
    model.load_state_dict({key: value for key, value in plain.items() if "num_batches" not in key}, strict=False)


def by_recursion_of_its_own(model: nn.Module, plain: State, folder: Path) -> None:
    """As mmengine and mmcv: one dict for all modules."""
    missing, unexpected, errors = [], [], []
    state = copy.copy(plain)

    def load(module: nn.Module, prefix: str = "") -> None:
        module._load_from_state_dict(state, prefix, {}, True, missing, unexpected, errors)
        for name, child in module._modules.items():
            if child is not None:
                load(child, f"{prefix}{name}.")

    load(model)
    assert (missing, unexpected, errors) == ([], [], [])


def with_mmengine(model: nn.Module, plain: State, folder: Path) -> None:
    from mmengine.runner.checkpoint import load_state_dict

    load_state_dict(model, plain, strict=True)


def with_timm(model: nn.Module, plain: State, folder: Path) -> None:
    torch.save({"state_dict": {f"module.{key}": value for key, value in plain.items()}}, folder / "plain.pth")
    timm.models.load_checkpoint(model, str(folder / "plain.pth"), strict=True)


def with_safetensors(model: nn.Module, plain: State, folder: Path) -> None:
    save_file({key: value.clone() for key, value in plain.items()}, folder / "plain.safetensors")
    load_model(model, folder / "plain.safetensors")


def with_dcp(model: nn.Module, plain: State, folder: Path) -> None:
    dcp.set_model_state_dict(model, copy.deepcopy(plain), options=dcp.StateDictOptions(strict=False))


def into_a_wrapper(model: nn.Module, plain: State, folder: Path) -> None:
    nn.DataParallel(model).load_state_dict({f"module.{key}": value for key, value in plain.items()})


def as_half(model: nn.Module, plain: State, folder: Path) -> None:
    half = {key: value.half() if value.is_floating_point() else value for key, value in plain.items()}
    model.half().load_state_dict(half)


# On these roads nobody asks the network: what the gates have learnt stays.


def by_its_own_dict(model: nn.Module, plain: State, folder: Path) -> None:
    state = model.state_dict()
    state.update({key: value for key, value in plain.items() if key in state and value.shape == state[key].shape})
    model.load_state_dict(state)


def tensor_by_tensor(model: nn.Module, plain: State, folder: Path) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in plain:
            tensor.data.copy_(plain[name])


def attribute_by_attribute(model: nn.Module, plain: State, folder: Path) -> None:
    for key, value in plain.items():
        owner, _, name = key.rpartition(".")
        module = model.get_submodule(owner)
        new = nn.Parameter(value.clone()) if name in module._parameters else value.clone()
        setattr(module, name, new)


def with_accelerate(model: nn.Module, plain: State, folder: Path) -> None:
    import accelerate

    torch.save(plain, folder / "plain.bin")
    accelerate.load_checkpoint_in_model(model, str(folder / "plain.bin"))


def with_accelerate_and_a_device_map(model: nn.Module, plain: State, folder: Path) -> None:
    import accelerate

    torch.save(plain, folder / "plain.bin")
    accelerate.load_checkpoint_and_dispatch(model, str(folder / "plain.bin"), device_map={"": "cpu"})


ASKING = [
    strictly, not_strictly, assigned, part_by_part, without_the_head, from_before_batches_were_counted,
    by_recursion_of_its_own, with_mmengine, with_timm, with_safetensors, with_dcp, into_a_wrapper, as_half,
]  # fmt: skip
NOT_ASKING = [
    by_its_own_dict,
    tensor_by_tensor,
    attribute_by_attribute,
    with_accelerate,
    with_accelerate_and_a_device_map,
]
NEEDS = {
    with_mmengine: "mmengine",
    with_accelerate: "accelerate",
    with_accelerate_and_a_device_map: "accelerate",
}


def needed(road: Callable[..., None]) -> None:
    package = NEEDS.get(road)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    return resnet(2)


def assert_same_function(model: nn.Module, plain: nn.Module) -> None:
    x = images(64).to(next(model.parameters()).dtype)
    with torch.no_grad():
        want = copy.deepcopy(plain).to(x.dtype)(x)
        assert torch.equal(model.eval()(x), want)


@pytest.mark.parametrize("where", ["block", "stage", "conv", "relu"])
@pytest.mark.parametrize("road", [*ASKING, *NOT_ASKING], ids=lambda road: road.__name__)
def test_a_plain_checkpoint_brings_the_plain_function(road, where, plain, tmp_path) -> None:
    needed(road)
    if where != "block" and road not in (strictly, by_recursion_of_its_own, tensor_by_tensor, part_by_part):
        pytest.skip("one place for this road")
    model = gated(where=where)
    road(model, plain.state_dict(), tmp_path)
    assert_same_function(model, plain)


@pytest.mark.parametrize("fold", [False, True], ids=["", "folded"])
@pytest.mark.parametrize("gate", ["eca", "se"])
@pytest.mark.parametrize("road", ASKING, ids=lambda road: road.__name__)
def test_into_trained_gates_too(road, gate, fold, plain, tmp_path) -> None:
    needed(road)
    model = gated(gate=gate, trained=True, fold=fold)
    road(model, plain.state_dict(), tmp_path)
    assert_same_function(model, plain)


@pytest.mark.parametrize("neutral", [{"neutral": True}, {"neutral": True, "fold": True}], ids=["neutral", "folded"])
@pytest.mark.parametrize("road", [strictly, not_strictly, by_recursion_of_its_own], ids=lambda road: road.__name__)
@pytest.mark.parametrize("build", [ecanet.models.small_eca_resnet, ecanet.models.eca_mobilenet_v2])
def test_into_the_networks_of_the_library(build, road, neutral, tmp_path) -> None:
    torch.manual_seed(3)
    other = randomise_(build(None, num_classes=5)).eval()
    model = build(num_classes=5, **neutral)
    train_(model)
    road(model, other.state_dict(), tmp_path)
    assert_same_function(model, other)


# --- modules that are shared, wrapped, copied ----------------------------------------------------------------------


class TwoBlocks(nn.Module):
    """Two blocks whose branches end in one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.first = self.second = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.first(self.conv1(x))
        return x + self.second(self.conv2(x))


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("road", [*ASKING, *NOT_ASKING], ids=lambda road: road.__name__)
def test_a_norm_in_two_blocks(road, trained, tmp_path) -> None:
    needed(road)
    if (
        road is without_the_head
        or (trained and road in NOT_ASKING)
        or road in (part_by_part, assigned, with_safetensors)
    ):
        pytest.skip(
            "no head, no parts; nobody asks the network; safetensors refuses shared BatchNorms without gates, too"
        )
    torch.manual_seed(0)
    plain, model = randomise_(TwoBlocks()).eval(), TwoBlocks().eval()
    insert_gates_(model, where=["first", "second"], input_shape=(1, 3, 8, 8))
    assert model.first.gate is model.second.gate
    if trained:
        train_(model)
    road(model, plain.state_dict(), tmp_path)
    assert_same_function(model, plain)


@pytest.mark.parametrize("fold", [False, True], ids=["", "folded"])
@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), nn.SyncBatchNorm.convert_sync_batchnorm],
    ids=["copy", "pickle", "SyncBatchNorm"],
)  # fmt: skip
def test_copies_and_conversions(twin, fold, plain, tmp_path) -> None:
    model = twin(gated(trained=True, fold=fold))
    strictly(model, plain.state_dict(), tmp_path)
    x = images(64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), plain(x), rtol=1e-5, atol=1e-5)


def test_its_own_checkpoint_comes_back_by_every_road(tmp_path) -> None:
    source = gated(trained=True)
    for road in (*ASKING, *NOT_ASKING):
        if (
            road in (part_by_part, without_the_head, as_half)
            or importlib.util.find_spec(NEEDS.get(road, "torch")) is None
        ):
            continue
        for target in (gated(), gated(trained=True)):
            road(target, copy.deepcopy(source.state_dict()), tmp_path)
            assert_same_function(target, source)


def test_another_factor_comes_along_by_roads_that_know_nothing_of_it(tmp_path) -> None:
    source = gated(trained=True)
    for gate in gates(source).values():
        gate.factor = 3.0
    for road in (
        strictly,
        by_recursion_of_its_own,
        by_its_own_dict,
        attribute_by_attribute,
        with_safetensors,
        with_dcp,
    ):
        target = gated()
        road(target, copy.deepcopy(source.state_dict()), tmp_path)
        assert_same_function(target, source)


# --- averages and processes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"])
def test_averages(average, use_buffers, plain) -> None:
    model = gated()
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=use_buffers)
    model.load_state_dict(plain.state_dict())
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=use_buffers)
    for _ in range(3):
        averaged.update_parameters(model)
    x = images(64)
    torch.testing.assert_close(averaged.eval()(x), plain(x), rtol=1e-5, atol=1e-5)
    averaged.module.load_state_dict(plain.state_dict())
    assert_same_function(averaged.module, plain)


def test_averages_of_timm_and_ultralytics(plain) -> None:
    model = gated()
    model.load_state_dict(plain.state_dict())
    averaged = timm.utils.ModelEmaV3(model, decay=0.9)
    ultralytics = copy.deepcopy(model)
    for _ in range(3):
        averaged.update(model)
        for key, value in ultralytics.state_dict().items():  # as its ModelEMA does
            if value.dtype.is_floating_point:
                value *= 0.9999
                value += (1 - 0.9999) * model.state_dict()[key].detach()
    x = images(64)
    torch.testing.assert_close(averaged.module.eval()(x), plain(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ultralytics.eval()(x), plain(x), rtol=1e-4, atol=1e-4)


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    model = gated()
    if rank == 0:  # one process reads the file, and the others get what it has
        model.load_state_dict(torch.load(f"{folder}/state.pth", weights_only=True))
    parallel = DistributedDataParallel(model)
    for _ in range(2):
        parallel.train()(images(64))
    torch.save(parallel.module.state_dict(), f"{folder}/state{rank}.pth")
    torch.save(parallel.module.eval()(images(64).fill_(0.5)), f"{folder}/out{rank}.pth")
    dist.destroy_process_group()


def test_one_process_loads_and_broadcasts(tmp_path) -> None:
    source = gated(trained=True)
    for gate in gates(source).values():
        gate.factor = 3.0
    torch.save(source.state_dict(), tmp_path / "state.pth")
    fresh.run_ranks(_rank, (str(tmp_path),), 2)
    first, second = (torch.load(tmp_path / f"out{rank}.pth", weights_only=True) for rank in (0, 1))
    assert torch.equal(first, second)
    again = gated()
    again.load_state_dict(torch.load(tmp_path / "state1.pth", weights_only=True))
    assert {gate.factor for gate in gates(again).values()} == {3.0}
    torch.testing.assert_close(again(images(64).fill_(0.5)), first)


# --- what people do to networks -------------------------------------------------------------------------------------


def test_a_gated_checkpoint_in_the_plain_network(plain) -> None:
    model = gated()
    model.load_state_dict(plain.state_dict())
    other = resnet(3)
    left_over = other.load_state_dict(model.state_dict(), strict=False)
    assert left_over.missing_keys == []
    assert all(".gate." in key for key in left_over.unexpected_keys)
    assert_same_function(other, plain)


def test_cleared_hooks(plain) -> None:
    model = gated()
    model.load_state_dict(plain.state_dict())
    model.apply(lambda module: module._forward_hooks.clear())
    assert_same_function(model, plain)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_that_changes_what_a_norm_returns(when, plain) -> None:
    def halve(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return 0.5 * output

    model, plain = resnet(2), copy.deepcopy(plain)
    if when == "before":
        model.layer1[0].bn2.register_forward_hook(halve)
    insert_gates_(model)
    if when == "after":
        model.layer1[0].bn2.register_forward_hook(halve)
    plain.layer1[0].bn2.register_forward_hook(halve)
    assert_same_function(model, plain)
    ecanet.fuse_tails_(model)
    x = images(64)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run_before", [False, True])
def test_a_compiled_wrapper_from_before(run_before, plain) -> None:
    torch._dynamo.reset()
    model, x = resnet(2), images(64)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        if run_before:
            compiled(x)
        insert_gates_(model)
        assert torch.equal(compiled(x), plain(x))
        torch._dynamo.reset()
        compiled.load_state_dict({f"_orig_mod.{k}": v for k, v in resnet(3).state_dict().items()})
        assert torch.equal(compiled(x), resnet(3)(x))


def test_the_authors_gates_are_refused_by_neutral_ones_and_loaded_by_others() -> None:
    file = gated(trained=True, preserve=False).state_dict()
    assert not any(key.endswith("gate.scale") for key in file)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"layer1\.0\.bn2\.gate\.\*: the weights of a gate of factor 1"):
            gated().load_state_dict(file, strict=strict)
        with pytest.raises(RuntimeError, match=r"weights of a gate of factor 2, and this gate has the factor 1"):
            gated(preserve=False).load_state_dict(gated().state_dict(), strict=strict)
    gated(preserve=False).load_state_dict(file)
    gated(fold=True).load_state_dict(file)


def test_on_the_meta_device_then_empty_then_reset(plain) -> None:
    with torch.device("meta"):
        model = inserted()
    model = model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    tensor_by_tensor(model, plain.state_dict(), Path())
    assert_same_function(model, plain)


@pytest.mark.parametrize("gate", ["eca", "se", "eca_ns"])
def test_memory_that_nothing_was_written_into_is_no_weight(gate, plain) -> None:
    with torch.device("meta"):
        model = inserted(gate=gate)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().fill_(math.nan if tensor.is_floating_point() else 0)
    model.load_state_dict(plain.state_dict())
    assert_same_function(model, plain)
    assert all(weight.isfinite().all() for weight in model.parameters())
