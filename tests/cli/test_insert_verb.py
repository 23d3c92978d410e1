"""``ecanet insert``: the table, the file it writes, and what it says when something is wrong."""

import errno
import os
from pathlib import Path

import pytest
import torch
import torchvision

from ecanet import insert_gates_, surgery
from ecanet.cli import main
from ecanet.models import read_state_dict
from ecanet.surgery import Insertion
from tests import fresh

RESNET = ["insert", "--model", "torchvision/resnet18"]


def said_by(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    main(arguments)
    return capsys.readouterr().out


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code not in (0, None)
    return f"{stopped.value.code} {capsys.readouterr().err}"


# --- the table ----------------------------------------------------------------------------------------------------


def test_the_table_is_that_of_insert_gates(capsys: pytest.CaptureFixture[str]) -> None:
    report = insert_gates_(torchvision.models.resnet18(), where="block")
    assert len(report.rows) == 8
    assert said_by([*RESNET, "--where", "block", "--report"], capsys) == f"{report}\n"
    assert said_by(RESNET, capsys) == f"{report}\n", "the report is the default"


def test_options_reach_insert_gates(capsys: pytest.CaptureFixture[str]) -> None:
    where = ["layer4.*.bn2", "layer3.1.bn2"]
    report = insert_gates_(
        torchvision.models.resnet18(num_classes=7), "eca_ns", where, kernel_size=7, input_shape=(1, 3, 96, 96)
    )
    options = ["--gate", "eca_ns", "--kernel-size", "7", "--where", *where, "--num-classes", "7", "--input-size", "96"]
    assert said_by([*RESNET, *options], capsys) == f"{report}\n"


def test_timm_says_what_size_its_networks_take(capsys: pytest.CaptureFixture[str]) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_resnet")
    assert model.default_cfg["input_size"] == (3, 160, 160)
    report = insert_gates_(model, input_shape=(1, 3, 160, 160))
    assert said_by(["insert", "--model", "timm/test_resnet"], capsys) == f"{report}\n"


@pytest.mark.parametrize("gate", ["srm", "gct", "grn"])
def test_a_file_with_gates_of_moments_builds_the_same_network_again(gate, tmp_path) -> None:
    file = tmp_path / "model.pt"
    main([*RESNET, "--gate", gate, "--num-classes", "2", "--fuse", "--save", str(file)])
    model, _ = Insertion("torchvision/resnet18", gate, num_classes=2, fuse=True).build()
    loaded = surgery.load(file)
    kinds = [type(module) for module in model.modules()]
    assert [type(module) for module in loaded.modules()] == kinds
    assert list(loaded.state_dict()) == list(model.state_dict())
    model.load_state_dict(loaded.state_dict())
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))


def test_fuse_adds_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    said = said_by([*RESNET, "--fuse"], capsys)
    assert "8 gates inserted: +36 parameters" in said
    assert said.endswith("\n8 tails fused\n")


# --- what is written ----------------------------------------------------------------------------------------------

LOAD_IN_A_FRESH_PROCESS = """
import sys, torch, ecanet
model = ecanet.surgery.load(sys.argv[1])
assert not model.training
torch.save(model(torch.load(sys.argv[2], weights_only=True)), sys.argv[3])
"""


def varied_resnet(seed: int = 3) -> torch.nn.Module:
    """Norms have other weights and statistics than a new network, and so does the function."""
    torch.manual_seed(seed)
    model = torchvision.models.resnet18(num_classes=5).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return model


def test_weights_in_gates_saved_and_loaded_in_a_fresh_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = varied_resnet()
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    target = tmp_path / "new folder" / "gated.pt"
    weights = ["--weights", str(tmp_path / "plain.pth"), "--num-classes", "5"]
    said = said_by([*RESNET, *weights, "--save", str(target), "--fuse"], capsys)
    assert "8 gates inserted" in said
    assert "layer1.0.bn2" not in said, "the table is not asked for"
    assert f"wrote {target}: torchvision/resnet18 with the weights {tmp_path / 'plain.pth'}" in said
    assert f"next: ecanet fit --model.name '{target}' --data.root " in said
    assert said.endswith(f"or in Python: model = ecanet.surgery.load({str(target)!r})\n")
    assert [path.name for path in target.parent.iterdir()] == ["gated.pt"]

    x = torch.randn(2, 3, 64, 64)
    torch.save(x, tmp_path / "x.pt")
    arguments = [str(path) for path in (target, tmp_path / "x.pt", tmp_path / "y.pt")]
    done = fresh.run(LOAD_IN_A_FRESH_PROCESS, *arguments)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        y = torch.load(tmp_path / "y.pt", weights_only=True)
        torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-4)  # float32
    assert len(read_state_dict(target)) == len(plain.state_dict()) + 2 * 8


def test_a_network_trained_since_is_saved_with_what_it_learned(tmp_path: Path) -> None:
    insertion = Insertion("torchvision/mnasnet0_5", where=("layers.8.*.*", "layers.9.*"), preserve=False, num_classes=3)
    model, _ = insertion.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    surgery.save(model, insertion, tmp_path / "model.pt")
    chance = torch.random.get_rng_state()
    again = surgery.load(tmp_path / "model.pt")
    assert torch.equal(torch.random.get_rng_state(), chance), "loading draws no random numbers"
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), again(x))
    assert any(".gate." in key for key in again.state_dict())


def test_only_plain_values_and_tensors_are_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = said_by([*RESNET, "--where", "stage", "--no-preserve", "--save", str(tmp_path / "model.pt")], capsys)
    assert "with random weights" in said
    held = torch.load(tmp_path / "model.pt", weights_only=True)
    assert set(held) == {"ecanet_insertion", "versions", "state_dict"}
    assert held["ecanet_insertion"]["where"] == "stage"
    assert held["ecanet_insertion"]["preserve"] is False
    assert held["versions"]["torch"].startswith(torch.__version__.split("+")[0])


def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "model.pt"
    target.write_text("old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    said = complaint([*RESNET, "--save", str(target)], capsys)
    assert f"cannot write the checkpoint {target} (No space left on device; " in said
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def rewritten(tmp_path: Path, **changes: object) -> Path:
    insertion = Insertion("torchvision/squeezenet1_1", where="features.0", num_classes=2)
    model, _ = insertion.build()
    surgery.save(model, insertion, tmp_path / "model.pt")
    held = torch.load(tmp_path / "model.pt", weights_only=True)
    held["ecanet_insertion"].update(changes)
    torch.save(held, tmp_path / "changed.pt")
    return tmp_path / "changed.pt"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_classes": 4}, r"the weights in .*changed\.pt do not fit .*written with ecanet .*classifier\.1\.weight"),
        ({"where": "features.3"}, r"do not fit .*missing: features\.3.*\.gate\.conv\.weight.*features\.0\.gate"),
        ({"model": "torchvision/squeezenet9"}, r"changed\.pt .*cannot be built: model: torchvision has no"),
        ({"colour": "red"}, r"the network in .*changed\.pt \(written with ecanet .*torch .*colour"),
    ],
    ids=["classes", "where", "model", "unknown_field"],
)
def test_a_file_that_does_not_fit_is_named(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        surgery.load(rewritten(tmp_path, **changes))


def test_weights_without_gates_do_not_pass_for_weights_with_gates(tmp_path: Path) -> None:
    held = torch.load(rewritten(tmp_path), weights_only=True)
    held["state_dict"] = {key: value for key, value in held["state_dict"].items() if ".gate." not in key}
    torch.save(held, tmp_path / "plain.pt")
    with pytest.raises(ValueError, match=r"missing: features\.0\.gate\.scale, features\.0\.gate\.conv\.weight"):
        surgery.load(tmp_path / "plain.pt")


def test_other_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing\.pt"):
        surgery.load(tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.pt is not a checkpoint"):
        surgery.load(tmp_path / "text.pt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "plain.pt")
    with pytest.raises(ValueError, match=r"plain\.pt .*not one that `ecanet insert --save` wrote"):
        surgery.load(tmp_path / "plain.pt")
    torch.save(torchvision.models.resnet18(), tmp_path / "code.pt")
    with pytest.raises(ValueError, match=r"code\.pt was refused: it holds torchvision"):
        surgery.load(tmp_path / "code.pt")


# --- mistakes -----------------------------------------------------------------------------------------------------


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["insert", "--help"])
    assert stopped.value.code == 0
    assert "Example: ecanet insert --model torchvision/resnet50" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--model"]),
        (["--model", "resnet50"], ["torchvision/NAME or timm/NAME", "got 'resnet50'"]),
        (["--model", "keras/resnet50"], ["torchvision/NAME or timm/NAME"]),
        (["--model", "torchvision/resnet5"], ["torchvision has no 'resnet5'", "torchvision/resnet50"]),
        (["--model", "torchvision/qqqqqq"], ["torchvision has no 'qqqqqq'", "see ecanet list"]),
        (["--model", "timm/resnet1x"], ["timm has no 'resnet1x'", "timm/resnet18"]),
        ([*RESNET[1:], "--gate", "cbm"], ["gate must be one of 'eca', ", "'cbm'", "did you mean 'cbam'"]),
        ([*RESNET[1:], "--kernel-size", "4"], ["kernel_size must be odd", "4"]),
        ([*RESNET[1:], "--kernel-size", "wide"], ["--kernel-size", "'wide' is neither an odd integer nor adaptive"]),
        ([*RESNET[1:], "--where", "layer9.bn2"], ["where='layer9.bn2'", "close to it: layer4.1.bn2"]),
        ([*RESNET[1:], "--where", "conv", "bn1"], ["'conv' stands alone"]),
        ([*RESNET[1:], "--num-classes", "0"], ["num_classes must be 1 or more, got 0"]),
        ([*RESNET[1:], "--input-size", "0"], ["input_size must be 1 or more, got 0"]),
        ([*RESNET[1:], "--weights", "nothing.pth"], ["no checkpoint at nothing.pth"]),
        ([*RESNET[1:], "--save", "model.safetensors"], ["name it model.pt"]),
        ([*RESNET[1:], "--save", "."], ["it is a folder"]),
        (["--model", "torchvision/squeezenet1_1"], ["finds no residual block", "try where='conv'"]),
        (["--model", "torchvision/squeezenet1_1", "--where", "conv", "--fuse"], ["no block with a fused tail"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_named(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    said = complaint(["insert", *arguments], capsys)
    for word in words:
        assert word in said
    assert not list(tmp_path.iterdir())


def test_weights_of_another_head_say_what_sets_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(varied_resnet().state_dict(), tmp_path / "plain.pth")
    said = complaint([*RESNET, "--weights", str(tmp_path / "plain.pth")], capsys)
    assert "plain.pth does not fit torchvision/resnet18 (num_classes sets the head's classes)" in said
    assert "fc.weight (5, 512) instead of (1000, 512)" in said


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
def test_networks_that_ask_for_the_version_of_their_weights(
    wrapped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model: torch.nn.Module = torchvision.models.mnasnet0_5()
    state = (torch.nn.DataParallel(model) if wrapped else model).state_dict()
    torch.save(state, tmp_path / "mnasnet.pth")
    said = said_by(["insert", "--model", "torchvision/mnasnet0_5", "--weights", str(tmp_path / "mnasnet.pth")], capsys)
    assert "16 gates inserted" in said


def test_checkpoints_from_before_batches_were_counted_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {k: v for k, v in torchvision.models.resnet18().state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "old.pth")
    assert "8 gates inserted" in said_by([*RESNET, "--weights", str(tmp_path / "old.pth")], capsys)


def test_needs_torch_and_torchvision_alone(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('timm', 'jsonargparse', 'lightning', 'safetensors', 'huggingface_hub', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'timm' else find(name, *a)\n"
        "from ecanet.cli import main\n"
        f"main({[*RESNET, '--save', str(tmp_path / 'model.pt')]!r})\n"
        "main(['insert', '--model', 'timm/resnet18'])\n"
    )
    done = fresh.run(code)
    assert "8 gates inserted" in done.stdout
    assert done.stderr.startswith("ecanet insert: ImportError: timm/resnet18 needs timm: pip install 'ecanet[timm]'"), (
        done.stderr
    )
    assert (tmp_path / "model.pt").is_file()
