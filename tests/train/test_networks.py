"""The network of a recipe: any of torchvision's or timm's, a file of ``ecanet insert``, a function of one's own."""

import copy
import sys
import urllib.error
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from ecanet import surgery
from ecanet.cli import main
from ecanet.inspect import gates
from ecanet.surgery import Insertion
from ecanet.train import ModelConfig, Recipe, build_network, fit, load_trained, validate
from ecanet.train.checkpoint import read_checkpoint
from ecanet.train.classifier import AUXILIARY, Classifier
from ecanet.train.networks import check_classifies, without_insertion_file
from ecanet.train.recipes import read_recipe

timm = pytest.importorskip("timm")

OWN = """
from torch import nn
calls = []
def make(classes):
    calls.append(classes)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8, classes))
def wider(classes):
    return make(classes + 1)
def number(classes):
    return 3
def no_argument():
    return make(3)
def fails(classes):
    return make(classes // 0)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a function in a module of the working folder."""
    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("own_networks", None)
    return "own_networks:make"


# --- trained, and built again by its checkpoint -------------------------------------------------------------------

MODELS = {
    "torchvision's, gates at some places": ModelConfig("torchvision/shufflenet_v2_x0_5", where=["stage4.*.branch2"]),
    "timm's, as it is": ModelConfig("timm/test_resnet", gate=None),
    "timm's, a gate at each stage, on the fused tail": ModelConfig(
        "timm/test_resnet", "se", where="stage", preserve=True, options={"fuse": True}
    ),
    "one's own, with gates": ModelConfig(where="conv", kernel_size=3, build="own_networks:make"),
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_checkpoint_builds_its_network_again_with_what_it_learned(
    model: ModelConfig, tiny: Callable[..., Recipe], own: str, tmp_path: Path
) -> None:
    recipe = replace(tiny(epochs=1, mixing=0.0, checkpoint_steps=None, lr=0.01, ema=0.5), model=model)
    recipe = replace(recipe, data=replace(recipe.data, image_size=32, resize=32))
    result = fit(recipe, tmp_path / "run", progress=False)
    trained = load_trained(tmp_path / "run", model.build)
    kept = read_checkpoint(tmp_path / "run" / "best.ckpt")["state_dict"]
    assert all(torch.equal(kept[f"network.{key}"], value) for key, value in trained.network.state_dict().items())
    assert bool(gates(trained.network)) == (model.gate is not None)
    assert not trained.network.training
    found = validate(tmp_path / "run", None, "cpu", model.build)
    assert found.metrics["val/loss"] == pytest.approx(result.history[0]["val/loss"], rel=1e-5)
    more = replace(recipe, optim=replace(recipe.optim, epochs=2))
    assert len(fit(more, tmp_path / "run", resume=True, progress=False).history) == 2


def test_the_network_of_a_function_is_built_by_the_one_that_the_user_names_again(
    tiny: Callable[..., Recipe], own: str, tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, pictures = tmp_path / "run", str(image_folder / "val" / "bag")
    words = ["--data.source=image_folder", f"--data.root={image_folder}", "--data.image_size=12", "--data.resize=12"]
    words += ["--model.where=conv", "--trainer.accelerator=cpu", "--optim.warmup_epochs=0", "--optim.epochs=1"]
    main(["fit", f"--model.build={own}", *words, "--out", str(out)])
    calls = sys.modules["own_networks"].calls
    called = len(calls)
    for verb in (["validate", str(out)], ["predict", str(out), pictures], ["fit", "--resume", "--out", str(out)]):
        with pytest.raises(SystemExit, match=rf"--model\.build {own}"):
            main(verb)
        assert len(calls) == called, "nothing was called"
        main([*verb, "--model.build", own])
        assert set(calls[called:]) == {3}
        called = len(calls)
    assert "bag" in capsys.readouterr().out
    for build, says in {
        "own_networks:wider": r"do not fit .*own_networks:wider.*5\.weight \(3, 8\) instead of \(4, 8\)",
        "own_networks:number": r"model\.build=own_networks:number, called with .*3: model must be a torch\.nn\.Module",
        "own_networks:no_argument": r"model\.build=own_networks:no_argument, called with the number of classes, 3",
        "own_networks:fails": r"own_networks:fails, called with the number of classes, 3: ZeroDivisionError",
        "own_networks:none": "own_networks has no function none",
        "no_such_package:make": "model.build=no_such_package:make: no_such_package cannot be imported",
        "own_networks.make": "model.build must be module:function",
    }.items():
        with pytest.raises((ImportError, TypeError, ValueError, RuntimeError), match=says):
            load_trained(out, build)


def test_a_function_is_not_given_for_a_network_that_has_a_name(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    fit(tiny(epochs=1), tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"model\.build=os:getcwd was given, but .* describes small_eca_resnet"):
        load_trained(tmp_path, "os:getcwd")
    with pytest.raises(ValueError, match=r"two networks: give only one"):
        ModelConfig("eca_resnet18", build="os:getcwd")


def test_runs_and_recipes_from_when_preserve_was_called_neutral_go_on(
    tiny: Callable[..., Recipe], tmp_path: Path, image_folder: Path
) -> None:
    recipe = tiny(epochs=1)
    for neutral in (False, True):
        out = tmp_path / str(neutral)
        own = replace(recipe, model=replace(recipe.model, preserve=neutral or None))
        fit(own, out, progress=False)
        for file in (out / "best.ckpt", out / "last.ckpt"):
            checkpoint = torch.load(file, weights_only=True)
            model = checkpoint["ecanet"]["recipe"]["model"]
            for name in ("preserve", "where", "build"):
                del model[name]
            model["neutral"] = neutral
            torch.save(checkpoint, file)
        network = load_trained(out).network
        assert {gate.factor for gate in gates(network).values()} == {2.0 if neutral else 1.0}
        longer = replace(own, optim=replace(own.optim, epochs=2))
        with pytest.raises(ValueError, match=r"another recipe \(model\.preserve"):
            fit(replace(longer, model=replace(longer.model, preserve=None if neutral else True)), out, True, False)
        assert len(fit(longer, out, resume=True, progress=False).history) == 2


# --- weights to start from ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of timm's test_resnet for 1000 classes, whose norms are not as in a new network."""
    torch.manual_seed(1)
    model = timm.create_model("test_resnet")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("weights") / "plain.pth"
    torch.save(model.state_dict(), path)
    return path


def features(network: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network.eval().forward_features(torch.ones(2, 3, 32, 32))  # type: ignore[operator]


def test_weights_of_other_classes_keep_the_function_up_to_the_head(plain: Path) -> None:
    reference = timm.create_model("test_resnet")
    reference.load_state_dict(torch.load(plain, weights_only=True))
    for preserve, same in ((None, True), (True, True), (False, False)):
        network = build_network(ModelConfig("timm/test_resnet", weights=str(plain), preserve=preserve), 7)
        assert network.training
        assert torch.allclose(features(network), features(reference), rtol=1e-5) == same
        assert network.get_classifier().out_features == 7  # type: ignore[operator]
    whole = build_network(ModelConfig("timm/test_resnet", weights=str(plain)), 1000)
    assert torch.equal(whole.get_classifier().weight, reference.get_classifier().weight)  # type: ignore[operator]


def test_weights_of_another_network_are_refused_by_their_keys(plain: Path) -> None:
    with pytest.raises(ValueError, match=r"plain\.pth does not fit timm/test_efficientnet .*missing: .*unexpected: "):
        build_network(ModelConfig("timm/test_efficientnet", weights=str(plain)), 7)


def test_a_library_downloads_its_weights_by_its_own_names_and_offline_says_what_to_do(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def create(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        asked.append(name)
        if not pretrained:
            return original(name, **kwargs)
        if name.endswith(".r160_in1k"):
            raise urllib.error.URLError("no address associated with hostname")
        model = original(name)
        model.load_state_dict(torch.load(plain, weights_only=True))
        return model

    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(OSError, match=r"weights='r160_in1k' of timm/test_resnet could not be .*a file's path"):
        build_network(ModelConfig("timm/test_resnet", weights="r160_in1k"), 7)
    network = build_network(ModelConfig("timm/test_resnet", weights="DEFAULT"), 7)
    held = torch.load(plain, weights_only=True)
    assert torch.equal(network.state_dict()["layer1.0.bn1.weight"], held["layer1.0.bn1.weight"])
    assert set(asked) == {"test_resnet", "test_resnet.r160_in1k"}
    for name, says in {
        "timm/test_resnet": "weights='V1' is neither a file nor a name of weights for timm/test_resnet: r160_in1k",
        "torchvision/resnet18": "weights='V1' is neither .* torchvision's weights for resnet18: IMAGENET1K_V1",
    }.items():
        with pytest.raises(ValueError, match=says):
            build_network(ModelConfig(name, weights="V1"), 7)


def test_a_file_of_insert_brings_its_gates_and_weights_and_nothing_else_is_asked_of_it(tmp_path: Path) -> None:
    file = tmp_path / "gated.pt"
    insertion = Insertion("timm/test_resnet", "gct", ("layer1.0.bn2", "layer2.*.bn2"), preserve=False, fuse=True)
    model, _ = insertion.build()
    with torch.no_grad():
        for gate in gates(model).values():
            for parameter in gate.parameters():
                parameter.normal_()
    surgery.save(model, insertion, file)
    network = build_network(ModelConfig(str(file)), 5)
    assert torch.equal(features(network), features(model))
    assert network.get_classifier().out_features == 5  # type: ignore[operator]
    named = without_insertion_file(ModelConfig(str(file)))
    assert (named.name, named.gate, named.where) == ("timm/test_resnet", "gct", ["layer1.0.bn2", "layer2.*.bn2"])
    assert (named.preserve, named.weights, named.options) == (False, str(file), {"fuse": True})
    for change in ({"gate": "se"}, {"gate": None}, {"where": "stage"}, {"preserve": True}, {"kernel_size": 3}):
        with pytest.raises(ValueError, match=rf"model\.{next(iter(change))}=.* is not what .*gated\.pt holds"):
            build_network(ModelConfig(str(file), **change), 5)  # type: ignore[arg-type]
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.pt is not a checkpoint"):
        build_network(ModelConfig(str(tmp_path / "text.pt")), 5)


# --- what cannot be trained, said before anything is --------------------------------------------------------------


def test_places_of_gates_may_be_a_list_or_a_text_with_commas(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {name: torchvision/resnet18, where: 'layer1.*.bn2,fc'}")
    said: list[Any] = [["layer1.*.bn2", "fc"], "layer1.*.bn2, fc", read_recipe(recipe)["model"]["where"]]
    for where in said:
        assert ModelConfig("torchvision/resnet18", where=where).where == ["layer1.*.bn2", "fc"]
    with pytest.raises(ValueError, match=r"model\.where must be names or patterns"):
        ModelConfig("torchvision/resnet18", where="fc,")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "resnet50"}, r"'resnet50': did you mean .*eca_resnet50.*torchvision/resnet50, timm/resnet50"),
        ({"name": "torchvision/resnet5"}, "torchvision has no 'resnet5'; close to it: torchvision/resnet50"),
        ({"name": "timm/resnet18.v9"}, "timm/resnet18 has no weights with the tag of .*, but a1_in1k"),
        ({"name": "torchvision/fcn_resnet50"}, "model.name=torchvision/fcn_resnet50 does not classify pictures"),
        ({"name": "torchvision/raft_small", "gate": None}, "raft_small does not classify pictures"),
        ({"name": "nowhere/gated.pt"}, "`ecanet insert --save`, got 'nowhere/gated.pt': there is no such file"),
        ({"name": "/"}, "got '/', which is a folder"),
        ({"name": "torchvision/resnet18", "kernel_size": "released"}, "kernel_size must be adaptive or an odd"),
        ({"name": "torchvision/resnet18", "options": {"widths": [8]}}, "has widths, and the network takes fold, fuse"),
        ({"where": "stage"}, "model.where must be block in small_eca_resnet"),
        ({"preserve": False, "weights": "x.pth"}, "model.preserve=false cannot go with model.weights"),
        ({"where": 3}, "where must be a name or a list"),
        ({"preserve": "yes"}, "preserve must be true or false"),
        ({"build": "os.system"}, "model.build must be module:function"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_mistake_in_the_block_is_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        ModelConfig(**changes)


def test_a_network_that_does_not_classify_such_pictures_is_named_before_training(
    tiny: Callable[..., Recipe], own: str, tmp_path: Path
) -> None:
    class Dict(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"out": x}

    class OnlyOne(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((1, 2, 3))[:, None] if self.training else x.mean((2, 3))

    for network, says in (
        (Dict(), r"the network \(Dict\) must return logits \(N, 3\), got a dict"),
        (OnlyOne(), r"must return logits \(N, 3\), got \(2, 1\) for N = 2"),
        (nn.Flatten(), r"must return logits \(N, 3\), got \(2, 768\)"),
        (nn.Linear(4, 3), r"does not take pictures of shape \(2, 3, 16, 16\) \(RuntimeError: .*set data\.image_size"),
    ):
        with pytest.raises(ValueError, match=says):
            check_classifies(network, 3, 16)
    recipe = replace(tiny(epochs=1), model=ModelConfig(gate=None, build="own_networks:wider"))
    with pytest.raises(ValueError, match=r"must return logits \(N, 3\), got \(2, 4\)"):
        fit(recipe, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "last.ckpt").exists()


def test_looking_at_a_network_changes_neither_it_nor_chance() -> None:
    network = timm.create_model("test_resnet", num_classes=3)
    before, chance = copy.deepcopy(network.state_dict()), torch.random.get_rng_state()
    check_classifies(network, 3, 32)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), chance)
    assert network.training


def test_auxiliary_heads_add_their_share_of_the_loss_and_are_not_there_in_validation() -> None:
    network = torchvision.models.googlenet(num_classes=3, init_weights=False)
    check_classifies(network, 3, 32)
    fixed = torch.tensor([[1.0, 2.0, 3.0]])
    labels = torch.tensor([1])
    out = torchvision.models.GoogLeNetOutputs(fixed, fixed + 1, fixed.flip(1))
    classifier = Classifier(nn.Identity(), 3, [0.5] * 3, [0.5] * 3)
    classifier.forward = lambda images: out  # type: ignore[method-assign]
    classifier.log = lambda *_, **__: None  # type: ignore[method-assign]
    classifier._trainer = SimpleNamespace(global_step=0)  # type: ignore[assignment]
    loss = classifier.training_step((torch.zeros(1, 3, 4, 4), labels), 0)
    each = [F.cross_entropy(logits, labels) for logits in out]
    assert loss.item() == pytest.approx(float(each[0] + AUXILIARY * (each[1] + each[2])))
