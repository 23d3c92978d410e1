"""What each option of ``optim`` and ``trainer`` changes, and that a run with it goes on to the same bits."""

import math
import re
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from ecanet.cli import main
from ecanet.inspect import gates
from ecanet.models import SmallECAResNet
from ecanet.nn import GATES
from ecanet.train import DataConfig, ModelConfig, OptimConfig, Recipe, TrainerConfig, fit
from ecanet.train.checkpoint import SafeCheckpointIO, load_trained, read_checkpoint
from ecanet.train.classifier import Classifier, learning_rate_factor
from ecanet.train.data.loading import Augmented, train_transform
from ecanet.train.data.loading import test_transform as evaluation_transform
from ecanet.train.find_lr import RateSearch, find_learning_rate
from ecanet.train.parameters import build_optimizer, freeze_, parameter_groups

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))


class KilledError(Exception):
    pass


def killed_at(monkeypatch: pytest.MonkeyPatch, batch: int, recipe: Recipe, out: Path) -> None:
    """Train until this many batches are done, and go down with the next."""
    training_step, seen = Classifier.training_step, []

    def step(self: Classifier, *args: Any) -> Tensor:
        seen.append(args)
        if len(seen) > batch:
            raise KilledError
        return training_step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", step)
        with pytest.raises(KilledError):
            fit(recipe, out, progress=False)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def assert_same_run(one: Path, other: Path) -> None:
    first, second = (read_checkpoint(folder / "last.ckpt") for folder in (one, other))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert same(first[part], second[part]), part
    top1 = [[record["val/top1"] for record in c["ecanet"]["history"]] for c in (first, second)]
    assert top1[0] == top1[1]


# --- which parameters, and how ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
def test_norms_biases_and_gates_are_spared_by_weight_decay_as_asked(gate: str) -> None:
    network = SmallECAResNet(widths=[32], gate=gate)
    every = {id(p): name for name, p in network.named_parameters()}
    within = list(gates(network).values())
    kinds = {
        "gates": {id(p) for gated in within for p in gated.parameters()},
        "biases": {id(p) for name, p in network.named_parameters() if name.endswith("bias")},
        "norms": {id(p) for m in network.modules() if "Norm" in type(m).__name__ for p in m.parameters(recurse=False)},
    }
    for chosen in ([], ["norms"], ["biases"], ["gates"], ["norms", "biases", "gates"], "norms, gates"):
        groups = parameter_groups(network, OptimConfig(no_decay=chosen, weight_decay=0.5))
        decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}  # type: ignore[attr-defined]
        names = chosen.split(", ") if isinstance(chosen, str) else chosen
        spared = set().union(*(kinds[name] for name in names))
        assert decay == {key: 0.0 if key in spared else 0.5 for key in every}
        assert len(groups) == (2 if spared else 1)


def test_weight_decay_shrinks_what_it_does_not_spare_and_nothing_else(tiny: Callable[..., Recipe]) -> None:
    network = SmallECAResNet(widths=[8])
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for name in ("sgd", "adamw"):
        optimizer = build_optimizer(network, OptimConfig(name=name, lr=0.5, weight_decay=0.5, no_decay=["norms"]))  # type: ignore[arg-type]
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    factors = {name: (p / before[name]).detach() for name, p in network.named_parameters()}
    assert factors["conv1.weight"].mean() == pytest.approx(0.75**2)
    assert torch.equal(network.bn1.weight, before["bn1.weight"])


@pytest.mark.parametrize(
    ("said", "kind", "lr", "decay", "more"),
    [
        ({}, torch.optim.SGD, 0.1, 1e-4, {"momentum": 0.9, "nesterov": False}),
        ({"momentum": 0.8, "nesterov": True}, torch.optim.SGD, 0.1, 1e-4, {"momentum": 0.8, "nesterov": True}),
        ({"name": "adamw"}, torch.optim.AdamW, 1e-3, 1e-2, {"betas": (0.9, 0.999)}),
        ({"name": "adamw", "momentum": 0.8, "lr": 3e-4}, torch.optim.AdamW, 3e-4, 1e-2, {"betas": (0.8, 0.999)}),
        ({"name": "adamw", "weight_decay": 0.05}, torch.optim.AdamW, 1e-3, 0.05, {}),
        ({"lr": 0, "weight_decay": 0}, torch.optim.SGD, 0, 0, {}),
    ],
)
def test_the_optimizer_is_the_one_that_is_named_with_the_values_usual_for_it(said, kind, lr, decay, more) -> None:
    optimizer = build_optimizer(SmallECAResNet(widths=[8]), OptimConfig(**said))
    (group,) = optimizer.param_groups
    assert type(optimizer) is kind
    assert (group["lr"], group["weight_decay"]) == (lr, decay)
    assert more.items() <= group.items()


def test_the_command_line_and_a_changed_recipe_have_the_values_usual_for_their_optimizer(monkeypatch) -> None:
    recipes: list[Recipe] = []

    def look(recipe: Recipe, *_: object, **__: object) -> None:
        recipes.append(recipe)
        raise ValueError

    monkeypatch.setattr("ecanet.cli.fit.fit", look)
    for words in (["--optim.name", "adamw"], ["--optim.name=adamw", "--optim.lr=0.3"], []):
        with pytest.raises(SystemExit):
            main(["fit", *words])
    assert [recipe.optim.rate for recipe in recipes] == [1e-3, 0.3, 0.1]
    assert [recipe.optim.decay for recipe in recipes] == [1e-2, 1e-2, 1e-4]
    assert replace(recipes[2].optim, name="adamw").rate == 1e-3


@pytest.mark.parametrize(
    ("block", "said", "error", "message"),
    [
        (OptimConfig, {"name": "adam"}, ValueError, "optim.name must be one of sgd, adamw, got 'adam'"),
        (OptimConfig, {"no_decay": "norm"}, ValueError, "optim.no_decay must be some of norms, biases, gates, got"),
        (OptimConfig, {"no_decay": {"norms": 1}}, TypeError, "optim.no_decay must be names separated by commas"),
        (OptimConfig, {"freeze": [1]}, TypeError, "optim.freeze must be names"),
        (OptimConfig, {"freeze": "a,,b"}, ValueError, "optim.freeze must be names or patterns such as layer1.*"),
        (OptimConfig, {"accumulate": 0}, ValueError, "optim.accumulate must be 1 or more, got 0"),
        (OptimConfig, {"gate_lr_scale": math.nan}, ValueError, "optim.gate_lr_scale must be a finite number"),
        (OptimConfig, {"early_stopping": 0}, ValueError, "optim.early_stopping must be 1 or more"),
        (OptimConfig, {"name": "adamw", "nesterov": True}, ValueError, "optim.nesterov is for optim.name=sgd"),
        (TrainerConfig, {"loggers": "csv,comet"}, ValueError, "trainer.loggers must be some of csv, tensorboard"),
        (DataConfig, {"randaugment": -1}, ValueError, "data.randaugment must be 0 or more"),
        (DataConfig, {"color_jitter": 1.5}, ValueError, "data.color_jitter must be at most 1"),
    ],
)  # fmt: skip
def test_what_an_option_cannot_be_is_said_with_its_name_and_what_would_be_right(block, said, error, message) -> None:
    with pytest.raises(error, match=re.escape(message)):
        block(**said)


@pytest.mark.parametrize("said", ["norms, biases", ["norms", "biases"], "norms,biases,norms"])
def test_names_may_be_a_list_or_a_text_with_commas(said) -> None:
    assert OptimConfig(no_decay=said).no_decay == ["norms", "biases"]
    assert OptimConfig(no_decay="").no_decay == TrainerConfig(loggers="").loggers == []


def test_gates_learn_at_their_own_rate_all_along_the_schedule() -> None:
    network = SmallECAResNet(widths=[8], gate="se")
    optim = OptimConfig(epochs=4, lr=0.2, gate_lr_scale=5, warmup_epochs=1)
    made: Any = Classifier(network, 3, [0.5] * 3, [0.5] * 3, optim, batches_per_epoch=2).configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    of_gates = {id(p) for gated in gates(network).values() for p in gated.parameters()}
    for step in range(8):
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        rate = 0.2 * learning_rate_factor(optim, step / 2)
        assert rates == pytest.approx({key: 5 * rate if key in of_gates else rate for key in rates})
        optimizer.step()
        schedule.step()


FROZEN = {
    "a module": (["layer1"], r"layer1\..*"),
    "a pattern": (["layer?.0.*"], r"layer\d\.0\..*"),
    "norms": (["*.bn?", "bn1"], r"(.*\.)?bn\d\..*"),
    "a parameter": ("conv1.weight", r"conv1\.weight"),
    "several": ("conv1, bn1,fc", r"(conv1|bn1|fc)\..*"),
    "all but gates and head": ("*,!*.eca,!fc", r"(?!.*\.eca\.|fc\.).*"),
    "later ones override": (["layer1", "!layer1.0.conv1", "layer1.0.*"], r"layer1\..*"),
}


@pytest.mark.parametrize(("patterns", "frozen"), FROZEN.values(), ids=FROZEN)
def test_what_a_name_or_a_pattern_fits_is_frozen_with_all_that_is_in_it(patterns, frozen: str) -> None:
    network = SmallECAResNet(widths=[8, 8])
    optim = OptimConfig(freeze=patterns)
    norms = freeze_(network, list(optim.freeze))
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad is not bool(re.fullmatch(frozen, name)), name
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert any(module is norm for norm in norms) is bool(re.fullmatch(frozen, f"{name}.weight")), name
    trained = {id(p) for group in parameter_groups(network, optim) for p in group["params"]}  # type: ignore[attr-defined]
    assert trained == {id(p) for p in network.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["layer11"], r"'layer11' matches no module and no parameter of the network, the closest are 'layer1'"),
        (["conv1", "!layer9.*"], r"'layer9\.\*' matches no module"),
        (["*"], r"optim\.freeze=\* leaves nothing to train: add what to train, such as !fc"),
        (["!fc"], r"optim\.freeze=!fc freezes nothing: begin with what to freeze, such as \*"),
        (["\x1b[2J"], r"'\\\\x1b\[2J' matches no module"),
        (["*.ecaa"], r"'\*\.ecaa' matches no module .* closest are 'layer1\.0\.eca'"),
        (["Layer1"], r"'Layer1' matches no module .* closest are 'layer1'"),
        (["*a" * 400], r"matches no module"),
    ],
)
def test_a_pattern_that_fits_nothing_or_leaves_nothing_is_an_error_with_the_closest_names(patterns, message) -> None:
    with pytest.raises(ValueError, match=message):
        Classifier(SmallECAResNet(widths=[8]), 3, [0.5] * 3, [0.5] * 3, OptimConfig(freeze=patterns))


def test_frozen_layers_keep_every_bit_and_their_statistics_and_the_others_learn(tiny, tmp_path: Path) -> None:
    # The moving average, validation after each epoch and decay must not touch them either.
    for name, lr in (("trained", 0.1), ("started", 0.0)):
        optim = {"lr": lr, "freeze": "conv1,bn1,layer1", "ema": 0.9, "weight_decay": 0.5}
        fit(tiny(epochs=2, checkpoint_steps=None, **optim), tmp_path / name, progress=False)
    trained, started = (read_checkpoint(tmp_path / name / "last.ckpt")["state_dict"] for name in ("trained", "started"))
    for name, value in trained.items():
        if name.startswith(("network.conv1.", "network.bn1.", "network.layer1.")):
            assert torch.equal(value, started[name]), name
        elif value.is_floating_point():
            assert not torch.equal(value, started[name]), name
    assert torch.equal(trained["network.bn1.running_mean"], torch.zeros(8))
    assert torch.equal(trained["network.bn1.running_var"], torch.ones(8))
    assert trained["network.bn1.num_batches_tracked"] == 0
    assert load_trained(tmp_path / "trained").recipe["model"]["name"] == "small_eca_resnet"


# --- accumulation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "accumulate"), [(8, 2), (2, 4), (7, 2), (60, 3)])
def test_a_step_of_several_batches_is_a_step_of_one_that_holds_their_images(
    tiny, monkeypatch, tmp_path: Path, batch: int, accumulate: int
) -> None:
    """Also at the end of an epoch, where batches are missing or smaller."""

    def plain(*_: object) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 3))

    monkeypatch.setattr(sys.modules["ecanet.train.fit"], "build_network", plain)
    recipe = tiny(epochs=2, mixing=0.0, checkpoint_steps=None, lr=0.01, accumulate=accumulate)
    recipe = replace(recipe, data=replace(recipe.data, batch_size=batch))
    at_once = replace(
        recipe,
        data=replace(recipe.data, batch_size=batch * accumulate),
        optim=replace(recipe.optim, accumulate=1),
    )
    for name, of in (("batches", recipe), ("whole", at_once)):
        fit(of, tmp_path / name, progress=False)
    a, b = (read_checkpoint(tmp_path / name / "last.ckpt") for name in ("batches", "whole"))
    assert a["global_step"] == b["global_step"]
    assert a["lr_schedulers"] == b["lr_schedulers"]
    for name, value in a["state_dict"].items():
        torch.testing.assert_close(value, b["state_dict"][name], rtol=1e-5, atol=1e-6)


def test_every_batch_of_a_step_draws_its_own_numbers(tiny, monkeypatch) -> None:
    training_step, seeds = Classifier.training_step, []

    def step(self: Classifier, *args: Any) -> Tensor:
        seeds.append(torch.initial_seed())
        return training_step(self, *args)

    monkeypatch.setattr(Classifier, "training_step", step)
    fit(tiny(epochs=2, accumulate=3), None, progress=False)
    assert len(set(seeds)) == len(seeds) == 16


# --- a run goes on to the same bits ----------------------------------------------------------------------------------

EXACT: dict[str, tuple[dict[str, Any], list[int]]] = {
    "AdamW in groups, part of it frozen, averaged": (
        {"name": "adamw", "lr": 0.01, "no_decay": "norms,gates", "gate_lr_scale": 3, "freeze": "conv1,bn1", "ema": 0.9},
        [5, 12],
    ),
    "accumulated, clipped, averaged": ({"accumulate": 3, "clip_norm": 0.5, "ema": 0.9}, [4, 14]),
    "AdamW accumulated": ({"name": "adamw", "accumulate": 2, "early_stopping": 1}, [7]),
}


@pytest.mark.parametrize(("optim", "batches"), EXACT.values(), ids=EXACT)
def test_a_killed_run_goes_on_to_the_same_bits(tiny, tmp_path, monkeypatch, optim, batches) -> None:
    recipe = tiny(epochs=2, checkpoint_steps=1, **optim)
    recipe = replace(recipe, data=replace(recipe.data, randaugment=9, color_jitter=0.4))
    fit(recipe, tmp_path / "whole", progress=False)
    for batch in batches:
        killed_at(monkeypatch, batch, recipe, tmp_path / str(batch))
        done = read_checkpoint(tmp_path / str(batch) / "last.ckpt")["global_step"]
        assert 0 < done < read_checkpoint(tmp_path / "whole" / "last.ckpt")["global_step"]
        fit(recipe, tmp_path / str(batch), resume=True, progress=False)
        assert_same_run(tmp_path / "whole", tmp_path / str(batch))


def test_a_compiled_network_runs_in_graphs_of_fixed_shapes_and_goes_on_to_the_same_bits(
    tiny, tmp_path, monkeypatch
) -> None:
    """With a backend that runs the graph as it was traced, in place of Inductor."""
    batches, asked, compile_ = [], [], nn.Module.compile

    def as_traced(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        batches.append({x.shape[0] for x in inputs if isinstance(x, Tensor) and x.shape[1:] == (3, 12, 12)})
        return graph.forward

    def compiled(self: nn.Module, **options: Any) -> None:
        asked.append(options)
        compile_(self, backend=as_traced, dynamic=options["dynamic"])

    monkeypatch.setattr(nn.Module, "compile", compiled)
    recipe = tiny(epochs=2, checkpoint_steps=None, ema=0.9)
    recipe = replace(
        recipe,
        model=replace(recipe.model, options={"widths": [8]}),
        data=replace(recipe.data, batch_size=16),
        trainer=replace(recipe.trainer, compile=True),
    )
    fit(recipe, tmp_path / "whole", progress=False)
    assert asked == [{"dynamic": False, "options": {"deterministic": True}}]
    assert {size for sizes in batches for size in sizes} == {16, 12, 2}, "full, last, last of validation"
    killed_at(monkeypatch, 6, recipe, tmp_path / "killed")
    fit(recipe, tmp_path / "killed", resume=True, progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert load_trained(tmp_path / "whole").network(torch.zeros(1, 3, 12, 12)).shape == (1, 3)


def test_a_run_from_before_an_option_goes_on_as_one_that_leaves_it_at_its_default(tiny, tmp_path, monkeypatch) -> None:
    recipe = tiny(epochs=2)
    fit(recipe, tmp_path / "whole", progress=False)
    killed_at(monkeypatch, 12, recipe, tmp_path / "killed")
    checkpoint = read_checkpoint(tmp_path / "killed" / "last.ckpt")
    for block, names in {
        "optim": ("name", "no_decay", "freeze", "gate_lr_scale", "accumulate", "early_stopping"),
        "data": ("randaugment", "color_jitter"),
        "trainer": ("compile", "loggers"),
    }.items():
        for name in names:
            del checkpoint["ecanet"]["recipe"][block][name]
    SafeCheckpointIO().save_checkpoint(checkpoint, tmp_path / "killed" / "last.ckpt")
    with pytest.raises(ValueError, match=r"optim\.accumulate: 1 then, 2 now"):
        fit(tiny(epochs=2, accumulate=2), tmp_path / "killed", resume=True, progress=False)
    fit(recipe, tmp_path / "killed", resume=True, progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.fixture(scope="module")
def adamw(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, dict[str, Any]]:
    """A run with AdamW of one epoch of two, and its checkpoint."""
    recipe = Recipe(
        ModelConfig("small_eca_resnet", options={"widths": [8]}),
        DataConfig("image_folder", root=image_folder, image_size=12, resize=12, batch_size=30),
        OptimConfig(epochs=2, name="adamw", gate_lr_scale=2.0),
        TrainerConfig(accelerator="cpu", loggers=[]),
    )

    def stop(record: dict[str, float]) -> None:
        if record["epoch"] == 2:
            raise KilledError

    out = tmp_path_factory.mktemp("adamw") / "run"
    with pytest.raises(KilledError):
        fit(recipe, out, progress=False, on_epoch=stop)
    return recipe, read_checkpoint(out / "last.ckpt")


def entry(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda c: c["optimizer_states"][0]["state"][0].update(values)


HOSTILE = {
    "another shape": (entry(exp_avg=torch.ones(77)), r"exp_avg of shape \(77,\), and the parameter has \(8, 3, 3, 3\)"),
    "the shape of another parameter": (entry(exp_avg_sq=torch.ones(8)), r"exp_avg_sq of shape \(8,\)"),
    "NaN": (entry(exp_avg=torch.full((8, 3, 3, 3), math.nan)), "exp_avg with values that are not finite"),
    "a negative square": (
        entry(exp_avg_sq=-torch.ones(8, 3, 3, 3)),
        "exp_avg_sq with values that are not finite, or negative",
    ),
    "more steps than were done": (entry(step=torch.tensor(1e9)), "counts 1e.09 steps, and the run has done 2"),
    "no step": (entry(step=torch.tensor(0.0)), "counts 0 steps"),
    "steps that are no tensor": (entry(step=3), "has no floating-point tensor step"),
    "integers": (entry(exp_avg=torch.ones(8, 3, 3, 3, dtype=torch.int64)), "no floating-point tensor exp_avg"),
    "SGD's": (
        lambda c: c["optimizer_states"][0]["state"].update({0: {"momentum_buffer": torch.ones(8, 3, 3, 3)}}),
        "is not that of adamw: it has momentum_buffer",
    ),
    "a key with escape codes": (entry(**{"\x1b[2J": torch.ones(1)}), r"it has .*\\x1b\[2J"),
    "a parameter that is not there": (
        lambda c: c["optimizer_states"][0]["state"].update({99: {}}),
        "has a parameter 99, and there are",
    ),
    "a parameter by name": (lambda c: c["optimizer_states"][0]["state"].update(x={}), "has a parameter x"),
    "other groups": (lambda c: c["optimizer_states"][0]["param_groups"].pop(), "has other groups of parameters"),
    "groups that are none": (lambda c: c["optimizer_states"][0].update(param_groups=3), "no groups of parameters"),
    "no state": (lambda c: c["optimizer_states"][0].pop("state"), "its optimizer has no state"),
    "two optimizers": (lambda c: c["optimizer_states"].append({}), "does not hold the state of one optimizer"),
    "no optimizer": (lambda c: c.pop("optimizer_states"), "does not hold the state of one optimizer"),
    "other steps": (lambda c: c.update(global_step=7), "it says that it has done 7 steps, and 2"),
    "an optimizer that is none": (
        lambda c: c["ecanet"]["recipe"]["optim"].update(name=["sgd"]),
        "its optim.name is a list",
    ),
    "an accuracy that is none": (
        lambda c: c["ecanet"]["history"][0].update({"val/top1": 500}),
        "val/top1 in its history must be at most 100, got 500",
    ),
}


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_checkpoint_with_another_state_of_its_optimizer_is_refused(adamw, tmp_path, change, message) -> None:
    recipe, checkpoint = adamw
    last = tmp_path / "last.ckpt"
    SafeCheckpointIO().save_checkpoint(checkpoint, last)
    changed = read_checkpoint(last)
    change(changed)
    SafeCheckpointIO().save_checkpoint(changed, last)
    before = last.read_bytes()
    with pytest.raises(ValueError, match=message) as refused:
        fit(recipe, tmp_path, resume=True, progress=False)
    assert re.match(rf"{re.escape(str(last))} cannot be resumed, .*: start again in another --out", str(refused.value))
    assert "\x1b" not in str(refused.value)
    assert last.read_bytes() == before
    assert not (tmp_path / "best.ckpt").exists()


def test_rates_decays_and_switches_come_from_the_recipe_whatever_the_checkpoint_says(adamw, tmp_path) -> None:
    recipe, checkpoint = adamw
    for name in ("as it is", "changed"):
        SafeCheckpointIO().save_checkpoint(checkpoint, tmp_path / name / "last.ckpt")
    changed = read_checkpoint(tmp_path / "changed" / "last.ckpt")
    for group in changed["optimizer_states"][0]["param_groups"]:
        group.update(lr=1e9, initial_lr=1e9, weight_decay=1e9, betas=(0.0, 0.0), maximize=True, amsgrad=True)
    changed["lr_schedulers"] = [{"base_lrs": [1e9, 1e9], "last_epoch": -7, "_last_lr": [1e9], "_step_count": 0}]
    SafeCheckpointIO().save_checkpoint(changed, tmp_path / "changed" / "last.ckpt")
    for name in ("as it is", "changed"):
        fit(recipe, tmp_path / name, resume=True, progress=False)
    assert_same_run(tmp_path / "as it is", tmp_path / "changed")


# --- early stopping and warm-up --------------------------------------------------------------------------------------


def test_a_run_stops_where_its_accuracy_has_not_risen_for_so_long_and_stays_so(tiny, tmp_path, monkeypatch) -> None:
    # At a learning rate of 0 the accuracy can rise by the norms' statistics alone.
    recipe = tiny(epochs=9, early_stopping=2, lr=0.0, schedule="constant", checkpoint_steps=None)
    result = fit(recipe, tmp_path / "whole", progress=False)
    accuracies = [record["val/top1"] for record in result.history]
    stop = next(e for e in range(1, 10) if e - 1 - accuracies[:e].index(max(accuracies[:e])) >= 2)
    assert len(accuracies) == stop < 9
    before = (tmp_path / "whole" / "last.ckpt").read_bytes()
    assert fit(recipe, tmp_path / "whole", resume=True, progress=False).history == result.history
    assert (tmp_path / "whole" / "last.ckpt").read_bytes() == before, "nothing was trained"
    killed_at(monkeypatch, 8 * (stop - 1) + 3, recipe, tmp_path / "killed")
    assert len(fit(recipe, tmp_path / "killed", resume=True, progress=False).history) == stop
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    with pytest.raises(ValueError, match=rf"it stopped early, after {stop} of 9 epochs.* larger optim\.early_stopping"):
        fit(replace(recipe, optim=replace(recipe.optim, epochs=12)), tmp_path / "whole", resume=True, progress=False)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_trains_for_one_epoch_with_its_full_rate_in_it(path: Path) -> None:
    optim = OptimConfig(**yaml.safe_load(path.read_text())["optim"] | {"epochs": 1})
    factors = [learning_rate_factor(optim, step / 99) for step in range(99)]
    assert 0 < min(factors) < 1.001
    assert max(factors) == pytest.approx(1)
    assert factors.index(max(factors)) <= 33, "a third of it is warm-up at most"


@pytest.mark.parametrize(
    ("epochs", "asked", "given"), [(1, 1, 1 / 3), (1, 0.5, 0.5), (3, 3, 1), (3, 2.5, 2.5), (10, 20, 10 / 3), (5, 0, 0)]
)
def test_a_warm_up_that_would_take_the_whole_run_takes_a_third_of_it(epochs, asked, given) -> None:
    optim = OptimConfig(epochs=epochs, warmup_epochs=asked, schedule="constant")
    assert optim.warmup == pytest.approx(given)
    assert learning_rate_factor(optim, given) == 1
    assert given == 0 or learning_rate_factor(optim, given / 2) == pytest.approx(0.5)


def test_a_shortened_warm_up_is_said_and_a_run_on_the_way_is_not_extended(tiny, tmp_path, monkeypatch) -> None:
    def recipe(epochs: int) -> Recipe:
        made = tiny(epochs=epochs, schedule="constant", checkpoint_steps=2)
        return replace(made, optim=replace(made.optim, warmup_epochs=1.0))

    said = r"optim\.warmup_epochs=1 is not below optim\.epochs=1: the warm-up takes 0\.33 epochs"
    with pytest.warns(UserWarning, match=said):
        killed_at(monkeypatch, 4, recipe(1), tmp_path)
    with pytest.raises(
        ValueError, match=r"0 of 1 epochs of a schedule whose warm-up depends on them, and its learning"
    ):
        fit(recipe(2), tmp_path, resume=True, progress=False)
    with pytest.warns(UserWarning, match=said):
        fit(recipe(1), tmp_path, resume=True, progress=False)
    assert len(fit(recipe(2), tmp_path, resume=True, progress=False).history) == 2


# --- where it is logged ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loggers", "files"),
    [
        ([], []),
        ("csv", ["metrics.csv"]),
        (["tensorboard"], ["events.*"]),
        ("tensorboard,csv", ["events.*", "metrics.csv"]),
    ],
)
def test_each_logger_writes_its_own_file(tiny, tmp_path, loggers, files) -> None:
    recipe = tiny(epochs=1)
    fit(replace(recipe, trainer=replace(recipe.trainer, loggers=loggers)), tmp_path, progress=False)
    written = sorted(p.name for p in (tmp_path / "logs").rglob("*") if p.is_file() and p.suffix != ".yaml")
    assert len(written) == len(files)
    assert all(re.fullmatch(pattern, name) for pattern, name in zip(files, written, strict=True))


def with_wandb(recipe: Recipe) -> Recipe:
    return replace(recipe, trainer=replace(recipe.trainer, loggers=["wandb"]))


def test_weights_and_biases_that_is_not_installed_is_named_before_anything_is_done(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"trainer\.loggers=wandb needs wandb: pip install 'ecanet\[wandb\]'"):
        fit(with_wandb(tiny(epochs=1)), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_weights_and_biases_offline_needs_no_account_and_writes_into_the_runs_folder(
    tiny, tmp_path, monkeypatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    fit(with_wandb(tiny(epochs=1)), tmp_path / "run", progress=False)
    assert list((tmp_path / "run" / "logs" / "session_0" / "wandb").glob("offline-run-*/*.wandb"))
    assert wandb.run is None, "the next run gets one of its own"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


class RefusingLogger(Logger):
    """Weights & Biases without an account."""

    name = version = None

    def __init__(self, name: str, save_dir: Path, project: str) -> None:
        super().__init__()
        self.save_dir = save_dir  # type: ignore[misc]

    @property
    def experiment(self) -> None:
        raise NoAccountError("no API key")

    save_dir = None
    log_metrics = log_hyperparams = None


class NoAccountError(Exception):
    pass


def test_weights_and_biases_without_an_account_says_what_to_do_before_training(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Error=NoAccountError))
    monkeypatch.setattr("ecanet.train.loggers.WandbLogger", RefusingLogger)
    with pytest.raises(ValueError, match=r"does not begin a run \(no API key\): `wandb login`, or WANDB_MODE=offline"):
        fit(with_wandb(tiny(epochs=1)), tmp_path, progress=False)
    assert not list(tmp_path.glob("*.ckpt"))


# --- the learning-rate finder ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optim",
    [{"accumulate": 2, "gate_lr_scale": 3.0}, {"name": "adamw", "ema": 0.9}, {"accumulate": 3}],
    ids=["two batches a step", "AdamW", "more batches a step than there are"],
)
def test_the_finder_raises_the_rate_and_suggests_where_the_loss_falls_and_writes_nothing(
    tiny, tmp_path, monkeypatch, optim
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ecanet.train.find_lr._STEPS", 30)
    recipe = tiny(epochs=1, **optim)
    found = find_learning_rate(replace(recipe, data=replace(recipe.data, batch_size=30)))
    assert found.rates == sorted(found.rates)
    assert found.rates[0] == pytest.approx(1e-6)
    assert len(found.rates) == len(found.losses) > 12
    falls = [after - before for before, after in zip(found.losses[9:-2], found.losses[11:], strict=True)]
    assert found.suggestion in found.rates[10:]
    assert found.losses[0] == pytest.approx(math.log(3), rel=0.5), "that of a network that has not learned"
    assert min(falls) < 0
    assert not list(tmp_path.iterdir())
    axes = found.plot().axes[0]
    assert list(axes.lines[0].get_xdata()) == found.rates
    assert list(axes.lines[0].get_ydata()) == found.losses
    assert axes.get_xscale() == "log"
    assert axes.texts[0].get_text() == f"suggested: {found.suggestion:.2g}"


def test_the_verb_prints_the_suggestion_and_draws_it_beside_no_run(image_folder, tmp_path, monkeypatch, capsys) -> None:
    rate = RateSearch(0.0344, [0.001 * 2**i for i in range(12)], [2.0 - 0.1 * i for i in range(12)])
    monkeypatch.setattr("ecanet.cli.fit.find_learning_rate", lambda recipe: rate)
    main(["fit", "--find-lr", "--out", str(tmp_path / "run"), "--optim.name", "adamw"])
    assert "suggested: --optim.lr 0.034" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["learning_rate.png"]
    with pytest.raises(SystemExit, match=r"--find-lr searches before a run: leave out --resume"):
        main(["fit", "--find-lr", "--resume", "--out", str(tmp_path / "run")])


def test_a_loss_that_diverges_at_once_is_no_suggestion(tiny) -> None:
    recipe = tiny(epochs=1)
    diverging = replace(recipe, optim=replace(recipe.optim, name="sgd", weight_decay=1e6))
    with pytest.raises(
        ValueError, match=r"no learning rate can be suggested: the loss diverged after \d+ of 100 steps"
    ):
        find_learning_rate(diverging)


# --- more varied pictures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", ["none", "crop", "resized_crop"])
@pytest.mark.parametrize("option", [{"randaugment": 9}, {"randaugment": 30}, {"color_jitter": 0.4}])
def test_pictures_are_more_varied_and_depend_on_seed_epoch_and_index_alone(option, augment, channels) -> None:
    picture = torch.randint(0, 256, (channels, 28, 28), dtype=torch.uint8)
    without = DataConfig(augment=augment)
    changed = 0
    for index in range(12):
        images = [(picture, 0)] * 12
        several = [
            Augmented(images, train_transform(config), seed=3)[0, index][0]  # type: ignore[arg-type]
            for config in (without, replace(without, **option), replace(without, **option))
        ]
        assert all(image.shape == (3, 28, 28) and image.dtype == torch.uint8 for image in several)
        assert torch.equal(several[1], several[2])
        changed += not torch.equal(several[0], several[1])
    assert changed >= 6


def test_colour_jitter_multiplies_brightness_within_its_strength() -> None:
    grey = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    transform = train_transform(DataConfig(augment="none", image_size=8, color_jitter=0.3))
    values = torch.stack([transform(grey).float().mean() for _ in range(50)])
    assert 69 <= values.min() < 85
    assert 115 < values.max() <= 131


def test_test_pictures_are_as_they_were() -> None:
    picture = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8)
    varied = DataConfig(randaugment=30, color_jitter=1.0)
    assert torch.equal(evaluation_transform(varied)(picture), evaluation_transform(DataConfig())(picture))
