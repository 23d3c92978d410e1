"""Checkpoints, folders of the Hub, saved insertions from anywhere: an error that names the file, or a network."""

import copy
import io
import json
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ecanet import surgery
from ecanet.cli import main
from ecanet.files.state_dicts import safe_load, safe_save
from ecanet.models import ECAResNet, SmallECAResNet, eca_resnet18, load_official, read_state_dict
from ecanet.train import fit, load_trained
from ecanet.train.checkpoint import read_checkpoint
from tests import fresh

State = dict[str, Any]


@pytest.fixture(scope="module")
def official() -> State:
    torch.manual_seed(0)
    return eca_resnet18(num_classes=5).state_dict()


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def changed(key: str, value: Any) -> Callable[[State], State]:
    return lambda state: {**state, key: value(state[key]) if callable(value) else value}


HOSTILE_STATES: dict[str, tuple[Callable[[State], Any], str]] = {
    "stride 0": (changed("fc.weight", torch.zeros(1).expand(10_000_000, 512)), "claims 5,120,000,000 values"),
    "stride 0 in a kernel": (changed("layer1.0.eca.conv.weight", torch.zeros(1).expand(1, 1, 10**9 + 1)), "claims"),
    "ten million classes without features": (changed("fc.weight", torch.zeros(10_000_000, 0)), r"\(10000000, 0\)"),
    "no dimension": (changed("fc.weight", torch.tensor(1.0)), r"fc\.weight \(\) instead of"),
    "sparse": (changed("fc.weight", lambda t: t.to_sparse()), "hostile.pth was refused: it holds .*sparse"),
    "without values": (changed("fc.weight", lambda t: t.to("meta")), "fc.weight has no values"),
    "complex": (changed("fc.weight", lambda t: t.to(torch.complex64)), "fc.weight is complex"),
    "integer": (changed("fc.weight", lambda t: t.to(torch.int64)), "1 of another kind: fc.weight torch.int64"),
    "NaN": (changed("bn1.weight", lambda t: t * float("nan")), "bn1.weight has values that are NaN"),
    "infinite": (changed("bn1.running_var", lambda t: t + float("inf")), "bn1.running_var has values that are"),
    "a number for a tensor": (changed("fc.weight", 3), "found int at 'fc.weight'"),
    "a key that is a number": (lambda state: {**state, 1: torch.ones(1)}, "found Tensor at 1"),
    "a key of a million characters": (lambda state: {**state, "\x1b[2J" * 200_000: torch.ones(1)}, "a key has 800,000"),
    "a key with escape codes": (lambda state: {**state, "\x1b[2J\n": torch.ones(1)}, r"1 unexpected: \\x1b\[2J\\n"),
    "module. 20,000 times": (lambda state: {"module." * 20_000 + k: v for k, v in state.items()}, "a key has 140"),
    "module. 100 times": (lambda state: {"module." * 100 + k: v for k, v in state.items()}, "found|missing|no ECA"),
    "a hundred thousand keys": (lambda state: {f"k{i}": torch.ones(1) for i in range(100_001)}, "parts, more than"),
    "too many keys": (lambda state: dict.fromkeys((f"k{i}" for i in range(30_000)), torch.ones(1)), "30,000 keys"),
    "thousands of views of a large tensor": (
        lambda state: dict.fromkeys((f"k{i}" for i in range(19_000)), torch.zeros(1_000_000)), "no ECA weights"
    ),
    "nothing": (lambda state: {}, "found nothing"),
    "a list": (lambda state: [], "holds no state dict"),
    "a state dict in a state dict": (lambda state: {"state_dict": {"model": {"state_dict": 3}}}, "found (int|dict)"),
    "versions that are none": (lambda state: with_metadata(state, "x"), ""),
    "a module's kernel larger than it can be": (
        changed("layer1.0.eca.conv.weight", torch.zeros(1, 1, 4097)), "kernel sizes|kernel_size must be at most"
    ),
    "code": (lambda state: {"state_dict": Evil()}, "was refused: it holds"),
    "code beside": (lambda state: {"state_dict": state, "optimizer": Evil()}, "was refused: it holds"),
}  # fmt: skip


def with_metadata(state: State, beside: Any) -> State:
    result: Any = OrderedDict(state)
    result._metadata = beside
    return result


@pytest.fixture(scope="module")
def hostile_files(official: State, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each of them in a file."""
    files = {name: tmp_path_factory.mktemp("hostile") / "hostile.pth" for name in HOSTILE_STATES}
    for name, path in files.items():
        torch.save(HOSTILE_STATES[name][0](official), path)
    return files


@pytest.mark.parametrize("name", HOSTILE_STATES)
def test_a_hostile_state_dict_is_an_error_that_names_the_file(name, hostile_files, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, says = hostile_files[name], HOSTILE_STATES[name][1]
    if not says:
        assert load_official(path).fc.out_features == 5
        return
    with pytest.raises(ValueError, match=says) as refused:
        load_official(path)
    assert "hostile.pth" in str(refused.value)
    assert len(str(refused.value)) < 3000
    assert "\x1b" not in str(refused.value)
    assert not (tmp_path / "executed").exists()


def packed_again(raw: bytes, compression: int = zipfile.ZIP_STORED, pickle_name: str = "data.pkl") -> bytes:
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(raw)) as source,
        zipfile.ZipFile(packed, "w", compression, compresslevel=1) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename.replace("data.pkl", pickle_name), source.read(entry))
    return packed.getvalue()


def deflated(raw: bytes) -> bytes:
    return packed_again(raw, zipfile.ZIP_DEFLATED)


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def legacy(numel: int) -> bytes:
    """A file of the old format that claims a storage of so many floats."""
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(3)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue().replace(b"K\x03Nt", b"\x8a\x08" + numel.to_bytes(8, "little") + b"Nt")


class Makes:
    """Something that torch makes when it reads a file, of a size that the file says."""

    def __init__(self, what: Any, *arguments: Any) -> None:
        self.what, self.arguments = what, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.what, self.arguments


def doubled(times: int) -> Any:
    import _codecs

    value: Any = "x" * 100
    for _ in range(times):
        value = Makes(_codecs.encode, value, "hex")
    return value


def legacy_without_keys() -> bytes:
    """A storage of the old format that nothing in the file would fill."""
    return legacy(3 * 10**8).replace(b"]q\x00X", b"]q\x00.X", 1)


class Storage:
    """A tensor of one value, in storage 0 of the old format, which has so many floats."""

    def __init__(self, numel: int) -> None:
        self.numel = numel

    def __reduce__(self) -> tuple[Any, ...]:
        storage = ("storage", torch.FloatStorage, "0", "cpu", self.numel, None)
        return torch._utils._rebuild_tensor_v2, (storage, 0, (1,), (1,), False, {})


class StoragePickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value if isinstance(value, tuple) and value[:1] == ("storage",) else None


def storage_named_twice() -> bytes:
    """Large the first time, when torch makes it, and of one value the second time."""
    file = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(value, file, 2)
    StoragePickler(file, 2).dump({"a": Storage(3 * 10**9), "b": Storage(1)})
    pickle.dump(["0"], file, 2)
    return file.getvalue() + (1).to_bytes(8, "little") + bytes(4)


DAMAGED_FILES: dict[str, bytes] = {
    "a storage of two sizes": storage_named_twice(),
    "a tensor of a size of its own": saved({"w": Makes(torch.Tensor, 1_500_000_000)}),
    "a storage of a size of its own": saved({"w": Makes(torch.UntypedStorage, 4_000_000_000)}),
    "four billion bytes": saved({"w": Makes(bytearray, 4_000_000_000)}),
    "four billion bytes in capitals": packed_again(
        saved({"w": Makes(bytearray, 4_000_000_000)}), pickle_name="DATA.PKL"
    ),
    "texts that double": saved({"w": doubled(30)}),
    "the old format without its storages": legacy_without_keys(),
    "empty": b"",
    "a letter": b"a",
    "a text": b"hello world\n" * 100,
    "JSON": b"{}",
    "a list in JSON": b"[]",
    "brackets": b"[" * 100_000,
    "the start of a zip file": b"PK\x03\x04",
    "an empty zip file": b"PK\x05\x06" + bytes(18),
    "a compressed archive": deflated(saved({"w": torch.zeros(1000)})),
    "a pickle of another kind": pickle.dumps({"w": [1, 2]}),
    "a pickle with code": pickle.dumps(Evil()),
    "a pickle that stops": pickle.dumps({"w": [1, 2]})[:-5],
    "a storage of a terabyte": legacy(2**38),
    "a storage of two exabytes": legacy(2**59),
    "zeros": bytes(10_000),
    "a cut legacy file": legacy(3)[:150],
}


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("content", DAMAGED_FILES.values(), ids=DAMAGED_FILES)
def test_a_file_that_is_no_checkpoint_is_named(content, suffix, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    for read in (read_state_dict, load_official, surgery.load, load_trained):
        with pytest.raises(ValueError, match=rf"file\{suffix}"):
            read(path)
    assert not (tmp_path / "executed").exists()


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path) -> None:
    packed = deflated(saved({"w": torch.zeros(30_000_000)}))
    assert len(packed) < 1_000_000
    (tmp_path / "bomb.pth").write_bytes(packed)
    with pytest.raises(ValueError, match=r"bomb\.pth .*it is compressed"):
        read_state_dict(tmp_path / "bomb.pth")


def test_pipes_devices_and_folders_are_no_checkpoints(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(ValueError, match=r"pipe\.pth is not a regular file"):
        read_state_dict(tmp_path / "pipe.pth")
    with pytest.raises(ValueError, match="/dev/zero is not a regular file"):
        safe_load("/dev/zero")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_state_dict(tmp_path)


def test_every_cut_and_every_changed_byte_of_a_checkpoint_is_noticed(tmp_path) -> None:
    whole = tmp_path / "whole.ckpt"
    safe_save({"ecanet": {}, "state_dict": {"network.w": torch.randn(500)}}, whole)
    content = whole.read_bytes()
    assert torch.load(whole, weights_only=True)["state_dict"]["network.w"].shape == (500,)
    path, chance = tmp_path / "damaged.ckpt", random.Random(0)
    cuts = sorted({0, 1, len(content) - 1, *(chance.randrange(len(content)) for _ in range(200))})
    for cut in cuts[:-1]:
        if cut >= len(content) - 79:  # the content is whole, and its checksum is not there
            continue
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"damaged\.ckpt"):
            read_checkpoint(path)
    for _ in range(200):
        at = chance.randrange(len(content) - 79)
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :])
        with pytest.raises(ValueError, match=r"damaged\.ckpt"):
            read_checkpoint(path)


# --- what a checkpoint of a run says --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> State:
    from ecanet.train import DataConfig, ModelConfig, OptimConfig, Recipe, TrainerConfig

    folder = tmp_path_factory.mktemp("run")
    recipe = Recipe(
        ModelConfig("small_eca_resnet", options={"widths": [8]}),
        DataConfig("image_folder", root=image_folder, image_size=12, resize=12, batch_size=8),
        OptimConfig(epochs=1),
        TrainerConfig(accelerator="cpu"),
    )
    fit(recipe, folder, progress=False)
    return read_checkpoint(folder / "last.ckpt")


def about(*path: str, to: Any) -> Callable[[State], None]:
    def change(checkpoint: State) -> None:
        place = checkpoint["ecanet"]
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = to

    return change


LIES: dict[str, tuple[Callable[[State], None], str]] = {
    "a number for all of it": (lambda c: c.update(ecanet=3), "must say what its network is"),
    "no recipe": (lambda c: c["ecanet"].pop("recipe"), "must hold its recipe"),
    "a recipe that is a list": (about("recipe", to=[]), "must hold its recipe"),
    "no classes": (about("classes", to=[]), "classes must be a list"),
    "classes that are a text": (about("classes", to="abc"), "classes must be a list"),
    "classes without end": (about("classes", to=["x"] * 100_001), "classes must be a list of 1 to"),
    "a class of a million letters": (about("classes", to=["x" * 10**6, "b", "c"]), "names of at most 200"),
    "another number of classes": (about("classes", to=["a", "b"]), "do not fit"),
    "means that are two": (about("mean", to=[0.5, 0.5]), "mean must be three numbers"),
    "means that are none": (about("mean", to=[float("nan")] * 3), "mean must be a finite number"),
    "no deviation": (about("std", to=[0, 0, 0]), "std must be"),
    "a history that is a number": (about("history", to=3), "history must be a list"),
    "a history of texts": (about("history", to=[{"epoch": "1"}]), "numbers by short names"),
    "a history of long names": (about("history", to=[{"epoch" * 99: 1}]), "numbers by short names"),
    "another network": (about("recipe", "model", "name", to="os.system"), "name must be one of"),
    "a file for a network": (about("recipe", "model", "name", to="/etc/passwd"), "name must be one of"),
    "a file of insert for a network": (about("recipe", "model", "name", to="gated.pt"), "name must be one of"),
    "a network that is a list": (about("recipe", "model", "name", to=["x"]), "name must be one of"),
    "a network of the Hub": (about("recipe", "model", "name", to="timm/hf-hub:a/b"), "timm has no"),
    "a network too large": (about("recipe", "model", to={"name": "torchvision/regnet_y_128gf"}), "the file .* values"),
    "another library's network": (about("recipe", "model", to={"name": "torchvision/resnet152"}), "do not fit"),
    "a function to call": (about("recipe", "model", to={"build": "os:system"}), "a checkpoint cannot call functions"),
    "code to call": (about("recipe", "model", to={"build": "os:system('x')"}), "build must be module:function"),
    "a call that is a number": (about("recipe", "model", to={"build": 3}), "build must be module:function"),
    "places without end": (about("recipe", "model", "where", to=["a"] * 2000), "where must be"),
    "a place that is a number": (about("recipe", "model", "where", to=3), "where must be"),
    "a text for true": (about("recipe", "model", "preserve", to="yes"), "preserve must be true or false"),
    "both names of preserve": (about("recipe", "model", "neutral", to=True), "both preserve and neutral"),
    "a network that does not fit": (about("recipe", "model", "name", to="eca_resnet152"), "network takes|do not fit"),
    "another gate": (about("recipe", "model", "gate", to="os.system"), "gate must be one of"),
    "a field that is none": (about("recipe", "model", "code", to="x"), "recipe.model has no code"),
    "widths of a billion": (about("recipe", "model", "options", "widths", to=[10**9]), "widths must be at most"),
    "widths that are not the file's": (about("recipe", "model", "options", "widths", to=[16_384]), "do not fit"),
    "an option that opens a path": (about("recipe", "model", "options", "weights", to="/etc/passwd"), "has weights"),
    "weights that are no text": (about("recipe", "model", "weights", to=3), "weights must be a text"),
    "pictures of a million pixels": (about("recipe", "data", "image_size", to=10**6), "image_size must be at most"),
    "a source that is none": (about("recipe", "data", "source", to=3), "source|damaged"),
    "no weights": (lambda c: c.update(state_dict={}), "holds no state dict|do not fit"),
    "weights that are a list": (lambda c: c.update(state_dict=[1]), "holds no state dict"),
    "one weight less": (lambda c: c["state_dict"].pop("network.fc.bias"), "1 missing: fc.bias"),
    "one weight more": (lambda c: c["state_dict"].update({"network.x": torch.ones(1)}), "1 unexpected: x"),
    "another shape": (lambda c: c["state_dict"].update({"network.fc.bias": torch.ones(4)}), "of another shape"),
    "NaN": (lambda c: c["state_dict"].update({"network.fc.bias": torch.full((3,), torch.nan)}), "NaN"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "says"), LIES.values(), ids=LIES)
def test_what_a_checkpoint_says_is_checked(change, says, run, tmp_path, image_folder, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "gated.pt")  # whoever reads it waits for ever
    checkpoint = copy.deepcopy(run)
    change(checkpoint)
    path = tmp_path / "hostile.ckpt"
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=says) as refused:
        load_trained(path)
    assert "hostile.ckpt" in str(refused.value)
    assert len(str(refused.value)) < 3000
    for command in (["validate", str(path)], ["predict", str(path), str(image_folder)]):
        with pytest.raises(SystemExit, match=r"hostile\.ckpt"):
            main(command)


STOPS: dict[str, tuple[Callable[[State], None], str]] = {
    "nothing about it": (lambda c: c.update(ecanet=[]), "must say what its network is"),
    "loops that are a text": (lambda c: c.update(loops={"fit_loop": "x"}), "its loops are not valid"),
    "a best accuracy of text": (lambda c: c.update(callbacks={"SaveCheckpoints": {"best": "x"}}), "accuracy is x"),
    "no steps": (lambda c: c.pop("global_step"), "does not say how far"),
    "weights that are a list": (lambda c: c.update(state_dict=[1]), "holds no weights"),
    "momenta of other weights": (
        lambda c: c["optimizer_states"][0]["state"][0].update(momentum_buffer=torch.ones(77)), "optimizer's state"
    ),
    "a recipe without its data": (lambda c: c["ecanet"]["recipe"].pop("optim"), "lacks a block"),
    "no epochs": (lambda c: c["ecanet"]["recipe"]["optim"].pop("epochs"), "its optim.epochs must be a number"),
    "epochs of text": (lambda c: c["ecanet"]["recipe"]["optim"].update(epochs="x"), "its optim.epochs must be a num"),
    "a recipe without end": (lambda c: c["ecanet"]["recipe"]["trainer"].update(seed="x" * 10**6), "seed: 'xxx"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "says"), STOPS.values(), ids=STOPS)
def test_a_run_does_not_go_on_from_a_hostile_checkpoint(change, says, run, tmp_path, image_folder) -> None:
    checkpoint = copy.deepcopy(run)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    (tmp_path / "recipe.json").write_text(json.dumps(run["ecanet"]["recipe"]))
    data = ["--data.source", "image_folder", "--data.root", str(image_folder)]
    with pytest.raises(SystemExit, match=says) as refused:
        main(["fit", "--out", str(tmp_path), "--resume", *data])
    assert str(tmp_path) in str(refused.value)
    assert len(str(refused.value)) < 3000


STEERING = {
    "download": {"source": "fashion_mnist", "download": True, "resize": None},
    "processes": {"workers": 1000},
    "a path": {"root": "/etc"},
    "another batch": {"batch_size": 2**30},
}


@pytest.mark.parametrize("steers", STEERING.values(), ids=STEERING)
def test_a_checkpoint_does_not_steer_the_machine(steers, run, tmp_path, image_folder, monkeypatch) -> None:
    def fetch(*_: Any, **__: Any) -> None:
        pytest.fail("a download was started")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST.download", fetch)
    checkpoint = copy.deepcopy(run)
    target = tmp_path / "data"
    checkpoint["ecanet"]["recipe"]["data"].update({"root": str(target), **steers})
    path = tmp_path / "hostile.ckpt"
    torch.save(checkpoint, path)
    trained = load_trained(path)
    how_labels_are_read = {"val_fraction", "split_seed", "image_column", "label_column", "label_separator"}
    assert set(trained.recipe["data"]) == {"source", "image_size", "resize", *how_labels_are_read}
    if steers.get("source") is None:
        with pytest.raises(SystemExit, match="--root FOLDER"):
            main(["validate", str(path), "--accelerator", "cpu"])
    main(["validate", str(path), "--root", str(image_folder), "--source", "image_folder", "--accelerator", "cpu"])
    main(["predict", str(path), str(image_folder / "val" / "bag"), "--accelerator", "cpu"])
    assert not target.exists()


def test_a_run_that_downloaded_its_pictures_is_used_without_a_download(run, tmp_path, image_folder, capsys) -> None:
    checkpoint = copy.deepcopy(run)
    checkpoint["ecanet"]["recipe"]["data"].update(source="fashion_mnist", download=True, resize=None, root="data")
    torch.save(checkpoint, tmp_path / "run.ckpt")
    main(["predict", str(tmp_path / "run.ckpt"), str(image_folder / "val" / "bag"), "--accelerator", "cpu"])
    assert "bag" in capsys.readouterr().out


# --- folders of the Hub, and insertions -----------------------------------------------------------------------------

CONFIGS: dict[str, tuple[Any, str]] = {
    "classes without end": ({"num_classes": 10**12}, "num_classes must be at most"),
    "classes below none": ({"num_classes": -1}, "num_classes must be 0 or more"),
    "more classes than the file has": ({"num_classes": 1_000_000}, "does not fit"),
    "widths without end": ({"widths": [16_384] * 16}, "does not fit"),
    "a kernel of a billion": ({"kernel_size": 10**9 + 1}, "kernel_size must be at most"),
    "a kernel of another size": ({"kernel_size": 255}, "does not fit"),
    "a path": ({"weights": "/etc/passwd"}, "has weights"),
    "loose keys": ({"strict": False}, "has strict"),
    "a device": ({"map_location": "cuda"}, "has map_location"),
    "a class": ({"norm_layer": "os.system"}, "has norm_layer"),
    "a gate by name of a function": ({"gate": "os.system"}, "gate must be one of"),
    "blocks without end": ({"blocks": 10**9}, "blocks must be at most"),
    "a factor of nothing": ({"factor": 0}, "factor must be"),
    "not a number": ({"factor": float("nan")}, "factor must be a finite number"),
    "a list": ([], "must hold names of arguments"),
    "a number": (3, "must hold names of arguments"),
    "nested": ("[" * 30_000, "is not a JSON file"),
    "cut": ('{"gate": ', "is not a JSON file"),
    "bytes": (b"\xff\xfe", "is not a JSON file"),
    "large": ('"' + "x" * 70_000 + '"', "70,002 bytes, more than"),
}


@pytest.mark.parametrize(("config", "says"), CONFIGS.values(), ids=CONFIGS)
def test_a_hostile_folder_of_the_hub(config, says, tmp_path) -> None:
    SmallECAResNet(num_classes=3).save_pretrained(tmp_path)
    raw = config if isinstance(config, (str, bytes)) else json.dumps(config)
    (tmp_path / "config.json").write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    with pytest.raises((TypeError, ValueError), match=says) as refused:
        SmallECAResNet.from_pretrained(tmp_path)
    assert "config.json" in str(refused.value)


def test_hostile_weights_in_a_folder_of_the_hub(tmp_path) -> None:
    SmallECAResNet(num_classes=3).save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for content in (b"", whole[:-100], whole[:50], (2**40).to_bytes(8, "little") + whole[8:], b"\xff" * 100):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            SmallECAResNet.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        SmallECAResNet.from_pretrained(tmp_path)


INSERTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a network of the Hub": ({"model": "timm/hf-hub:someone/something"}, "has no"),
    "a path": ({"model": "timm/local-dir:/etc"}, "has no"),
    "a file": ({"model": "/etc/passwd"}, "must be torchvision/NAME or timm/NAME"),
    "a number": ({"model": 3}, "model must be"),
    "a gate by name of a function": ({"gate": "os.system"}, "gate must be one of"),
    "classes without end": ({"num_classes": 10**12}, "num_classes must be at most"),
    "more classes than the file has": ({"num_classes": 500_000}, "do not fit"),
    "another field": ({"code": "x"}, "an insertion has no code"),
    "a kernel of a billion": ({"kernel_size": 10**9 + 1}, "kernel_size must be at most"),
    "places that are a number": ({"where": 3}, "where must be"),
    "a thousand places": ({"where": ["a"] * 2000}, "where must be"),
    "pictures of a million pixels": ({"input_size": 10**6}, "input_size must be at most"),
    "a large network that is not there": ({"model": "torchvision/regnet_y_128gf"}, "parameters, and the file"),
    "half a class": ({"num_classes": 2.5}, "num_classes must be a whole number"),
    "a text for true": ({"preserve": "yes"}, "preserve must be true or false"),
}


@pytest.fixture(scope="module")
def inserted(tmp_path_factory: pytest.TempPathFactory) -> State:
    """What the file of an insertion holds."""
    insertion = surgery.Insertion("torchvision/shufflenet_v2_x0_5", num_classes=3)
    model, _ = insertion.build()
    path = tmp_path_factory.mktemp("inserted") / "honest.pt"
    surgery.save(model, insertion, path)
    assert surgery.load(path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(("lies", "says"), INSERTIONS.values(), ids=INSERTIONS)
def test_a_hostile_insertion(lies, says, inserted, tmp_path) -> None:
    path = tmp_path / "hostile.pt"
    held = {**inserted, "ecanet_insertion": inserted["ecanet_insertion"] | lies}
    torch.save(held, path)
    with pytest.raises(ValueError, match=says) as refused:
        surgery.load(path)
    assert "hostile.pt" in str(refused.value)


def test_memory_and_time_are_bounded(hostile_files, tmp_path) -> None:
    """In a process of its own, with half a GiB beside what importing takes and 10 s a file."""
    names = [str(path) for name, path in hostile_files.items() if HOSTILE_STATES[name][1]]
    for i, content in enumerate([*DAMAGED_FILES.values(), deflated(saved({"w": torch.zeros(150_000_000)}))]):
        names.append(str(tmp_path / f"damaged{i}.pth"))
        Path(names[-1]).write_bytes(content)
    script = (
        "import resource, sys, time; from ecanet.models import load_official\n"
        "now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (now + 2**29, now + 2**29))\n"
        "for path in sys.argv[1:]:\n"
        "    start = time.monotonic()\n"
        "    try: load_official(path)\n"
        "    except ValueError as error:\n"
        "        assert path in str(error)\n"
        "        assert not any(word in str(error) for word in ('allocate', 'MemoryError')), error\n"
        "    else: raise SystemExit(path)\n"
        "    assert time.monotonic() - start < 10, path\n"
        "print('refused', len(sys.argv) - 1)\n"
    )
    done = fresh.run(script, *names, timeout=300)
    assert done.stdout.split() == ["refused", str(len(names))], done.stderr


# --- and honest files still load ------------------------------------------------------------------------------------


def test_honest_files_load(official, tmp_path) -> None:
    wrapped = {
        "epoch": 3,
        "arch": "x",
        "state_dict": {f"module.{k}": v for k, v in official.items()},
        "best": 1.0,
    }
    torch.save(wrapped, tmp_path / "new.pth.tar")
    torch.save(wrapped, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    safe_save(wrapped, tmp_path / "ours.ckpt")
    for name in ("new.pth.tar", "old.pth.tar", "ours.ckpt"):
        assert load_official(tmp_path / name).fc.out_features == 5
    half = {key: value.half() if value.is_floating_point() else value for key, value in official.items()}
    torch.save(half, tmp_path / "half.pth")
    assert read_state_dict(tmp_path / "half.pth")["fc.weight"].dtype == torch.float16
    ECAResNet(18, num_classes=4).save_pretrained(tmp_path / "folder")
    assert ECAResNet.from_pretrained(tmp_path / "folder").fc.out_features == 4


def test_a_view_of_a_larger_storage_is_honest(tmp_path) -> None:
    large = torch.randn(100, 10)
    torch.save({"w": large[:3], "b": large[5], "t": large.T}, tmp_path / "views.pth")
    assert read_state_dict(tmp_path / "views.pth")["w"].shape == (3, 10)
