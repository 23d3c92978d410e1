"""Gates in YOLO: by name in model files, and put into a network by insert_gates_; trained, saved, loaded, exported."""

import copy
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecanet
from ecanet.integrations.ultralytics import example, keep_gates, register
from ecanet.nn import GATES
from tests import fresh
from tests.integrations.deepforest_tiles import needs_deepforest, write_yolo

tasks = pytest.importorskip("ultralytics.nn.tasks", reason="pip install ultralytics-opencv-headless")
from ultralytics import YOLO  # noqa: E402

NAMES = tuple(factory.__name__ for factory in GATES.values())
SCALES = {"n": [0.5, 0.25, 1024], "s": [0.5, 0.5, 1024], "m": [0.5, 1, 512], "l": [1, 1, 512], "x": [1, 1.5, 512]}
FILES = ("yolo11n.yaml", "yolo26n.yaml", "yolov8n.yaml")


def build(row: list[Any], scale: str = "n") -> nn.Module:
    """The layer that a row becomes after one of 256 channels, at a scale."""
    register()
    d = {"nc": 1, "scales": SCALES, "scale": scale, "backbone": [[-1, 1, "Conv", [256, 3, 2]]], "head": [row]}
    layers, _ = tasks.parse_model(d, ch=3, verbose=False)
    return layers[1]


def gates(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, ecanet.nn.Gate)]


@torch.no_grad()
def lively(file: str) -> nn.Module:
    """A network whose norms have the statistics of what they see, so that every layer matters for the output."""
    torch.manual_seed(0)
    model = YOLO(file).model
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    model.train()(torch.rand(4, 3, 64, 64))
    return model.eval()


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out[0] if isinstance(out, tuple) else out


def in_a_fresh_process(code: str, *args: Any, **env: str) -> Any:
    """Run code that ends by printing a line of JSON, and knows nothing of register() that it does not call."""
    # As in pyproject.toml: where Ray is installed, Ultralytics asks it after each epoch whether it is tuning.
    code = f"import warnings; warnings.filterwarnings('ignore', '.get_trial_id. is meant to only')\n{code}"
    done = fresh.run(code, *args, environment={**os.environ, **env}, warnings_are_errors=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# Importing and registering.


def test_nothing_of_ultralytics_is_imported_before_register():
    code = """
import json, sys
import ecanet, ecanet.cli, ecanet.integrations.ultralytics
print(json.dumps([name for name in sys.modules if name.partition(".")[0] == "ultralytics"]))
"""
    assert in_a_fresh_process(code) == []


@pytest.mark.parametrize("function", [register, keep_gates])
def test_without_ultralytics_the_error_says_what_to_install(function, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "ultralytics"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'ecanet\[ultralytics\]'"):
        function()


def test_register_twice_does_it_once():
    assert register() == NAMES
    parse, load, train = tasks.parse_model, tasks.BaseModel.load, YOLO.train
    assert register() == NAMES
    assert (tasks.parse_model, tasks.BaseModel.load, YOLO.train) == (parse, load, train)
    assert not hasattr(parse.__wrapped__, "__wrapped__")


@pytest.fixture
def not_registered(monkeypatch):
    """Ultralytics as it was before register(), and afterwards as it is now."""
    register()
    monkeypatch.setattr(tasks, "parse_model", tasks.parse_model.__wrapped__)
    for name in NAMES:
        monkeypatch.delattr(tasks, name)


@pytest.mark.usefixtures("not_registered")
def test_a_module_pasted_into_ultralytics_is_not_replaced(monkeypatch):
    parse, pasted = tasks.parse_model, type("ECA", (nn.Module,), {"__module__": "ultralytics.nn.modules.conv"})
    monkeypatch.setattr(tasks, "ECA", pasted, raising=False)
    with pytest.raises(ValueError, match=r"ultralytics.nn.tasks already has a module ECA.*modules\.conv\.ECA"):
        register()
    assert (tasks.ECA, tasks.parse_model, hasattr(tasks, "SE")) == (pasted, parse, False)


@pytest.mark.usefixtures("not_registered")
@pytest.mark.parametrize(
    "parse",
    [
        lambda d, ch, verbose: (nn.Sequential(nn.Identity()), []),
        lambda d, ch, verbose: (nn.Sequential(*(tasks.ECA(*row[3]) for row in d["head"])), []),
    ],
    ids=["builds something else", "does not look up names"],
)
def test_an_ultralytics_that_reads_files_in_another_way_is_an_error(parse, monkeypatch):
    monkeypatch.setattr(tasks, "parse_model", parse)
    with pytest.raises(ImportError, match=r"Ultralytics [\d.]+ reads model files in a way that ecanet does not know"):
        register()
    assert tasks.parse_model is parse
    assert not any(hasattr(tasks, name) for name in NAMES)


# Rows of model files.


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("factory", GATES.values(), ids=GATES)
def test_a_row_takes_the_channels_of_the_layer_before_at_every_scale(factory, scale):
    gate = build([-1, 1, factory.__name__, []], scale)
    channels = int(256 * SCALES[scale][1])
    want = factory(channels)
    assert type(gate) is type(want)
    assert (gate.channels, gate.extra_repr()) == (channels, want.extra_repr())


@pytest.mark.parametrize(
    ("row", "attribute", "value"),
    [
        ([-1, 1, "ECA", [3]], "kernel_size", 3),
        ([-1, 1, "ECA", ["adaptive"]], "kernel_size", 3),
        ([0, 1, "ECANS", [7]], "kernel_size", 7),
        ([-1, 1, "SE", [8]], "reduction", 8),
        ([-1, 1, "SEGroup", [4]], "groups", 4),
    ],
    ids=str,
)
def test_arguments_of_a_row(row, attribute, value):
    assert getattr(build(row), attribute) == value


def test_a_row_that_is_repeated_has_as_many_gates():
    assert [type(gate) for gate in build([-1, 2, "ECA", [3]], "l")] == [ecanet.ECA, ecanet.ECA]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([-1, 1, "ECA", [256, 3]], r"row 1 of the model file, ECA with the arguments \[256, 3\]: at most one argument"),
        (
            [-1, 1, "ECA", [256]],
            r"below the 64 channels. Channels are not written down.*\[\] means the defaults, \[3\]",
        ),
        ([-1, 1, "SE", [256]], r"below the 64 channels.*\[8\] a reduction of 8"),
        ([-1, 1, "ECA", [4]], r"kernel_size must be odd.*got 4"),
        ([-1, 1, "ECA", ["k"]], r"kernel_size must be 'adaptive' or a positive odd integer, got 'k'"),
        ([-1, 1, "SEVar2", [3]], r"SEVar2 with the arguments \[3\]"),
        ([-1, 1, "SEGroup", [5]], r"groups must divide channels=64, got 5"),
        (
            [[-1, 0], 1, "ECA", []],
            r"row 1 of the model file, ECA: 'from' must be the number of one layer, got \[-1, 0\]",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, list) else "",
)
def test_a_row_that_is_wrong_says_what_is_right(row, message):
    with pytest.raises(ValueError, match=message):
        build(row)


def test_files_without_gates_are_read_as_before(capsys):
    register()
    d = copy.deepcopy(YOLO("yolo11n.yaml").model.yaml)
    plain, save = tasks.parse_model.__wrapped__(copy.deepcopy(d), ch=3, verbose=False)
    ours, our_save = tasks.parse_model(copy.deepcopy(d), ch=3, verbose=False)
    assert (str(ours), our_save) == (str(plain), save)


def test_the_table_of_a_network_shows_channels_and_arguments(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(tasks.LOGGER, "info", lines.append)
    register()
    d = {"nc": 1, "backbone": [[-1, 1, "Conv", [64, 3]]], "head": [[-1, 1, "ECA", [5]]]}
    tasks.parse_model(d, ch=3, verbose=True)
    assert lines[-1].split() == ["1", "-1", "1", "5", "ecanet.integrations.ultralytics.ECA", "[64,", "5]"]


# Model files that come with the package.


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("yolo11-eca", [64, 128, 256]),
        ("yolo11m-eca", [256, 512, 512]),
        ("yolo26-eca", [64, 128, 256]),
        ("yolo26s-eca", [128, 256, 512]),
    ],
)
def test_examples_have_a_gate_on_each_map_for_the_head(name, channels):
    register()
    model = YOLO(example(name)).model
    assert [gate.channels for gate in gates(model)] == channels
    assert [type(gate) for gate in gates(model)] == [ecanet.ECA] * 3
    plain = YOLO(f"{name.partition('-')[0]}.yaml".replace("yolo11.", "yolo11n.").replace("yolo26.", "yolo26n.")).model
    kernels = sum(gate.kernel_size for gate in gates(model))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters()) + kernels


@pytest.mark.parametrize("version", ["yolo11", "yolo26"])
def test_weights_of_the_plain_network_fit_the_example_up_to_the_head(version):
    register()
    source = lively(f"{version}n.yaml")
    plain = source.state_dict()
    model = YOLO(example(f"{version}-eca")).model
    model.load(source)
    loaded = model.state_dict()
    body = {key for key in plain if int(key.split(".")[1]) < 23}
    assert len(body) > 300
    assert all(torch.equal(loaded[key], plain[key]) for key in body)


@pytest.mark.parametrize("name", ["yolo11", "yolov8-eca", "yolo11q-eca", "yolo11-eca.yaml", "../yolo11-eca"])
def test_an_unknown_example(name):
    with pytest.raises(ValueError, match=r"name must be one of \['yolo11-eca', 'yolo26-eca'\]"):
        example(name)


# insert_gates_ on YOLO's networks.


@pytest.mark.parametrize("where", ["conv", "block"])
@pytest.mark.parametrize("file", FILES)
def test_inserted_gates_keep_the_function_also_after_fuse(file, where):
    model = lively(file)
    plain = copy.deepcopy(model.state_dict())
    x = torch.rand(1, 3, 64, 64)
    want = run(model, x)
    report = ecanet.insert_gates_(model, where=where, input_shape=(1, 3, 64, 64))
    assert len(report.rows) == len(gates(model)) >= 4
    assert report.multiply_adds > 0
    assert set(plain) <= set(model.state_dict())
    assert relative_difference(run(model, x), want) < 1e-5
    fused = copy.deepcopy(model).fuse(verbose=False)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.model[0].modules())
    assert relative_difference(run(fused, x), want) < 1e-4
    for gate in gates(fused):  # they are still called, and do something
        gate.scale *= 1.5
    assert relative_difference(run(fused, x), want) > 1e-3
    model.load_state_dict(plain)
    assert relative_difference(run(model, x), want) < 1e-5


def relative_difference(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def test_conv_gates_follow_conv_and_block_gates_the_branch_of_bottlenecks():
    conv, block = YOLO("yolo11n.yaml").model, YOLO("yolo11n.yaml").model
    rows = ecanet.insert_gates_(conv, where="conv").rows
    assert {type(conv.get_submodule(row.where)).__name__ for row in rows} == {"Conv", "DWConv"}
    assert (len(rows), len(ecanet.insert_gates_(YOLO("yolo11n.yaml").model).rows)) == (77, 12)  # docs/yolo.md
    rows = ecanet.insert_gates_(block, filter_fn=lambda module, name: type(module).__name__ == "Bottleneck").rows
    bottlenecks = [f"{name}.cv2" for name, m in block.named_modules() if type(m).__name__ == "Bottleneck" and m.add]
    assert [row.where for row in rows] == bottlenecks


def test_the_holder_of_the_network_is_not_the_network():
    with pytest.raises(TypeError, match=r"model is Ultralytics' YOLO, which holds the network: pass its \.model"):
        ecanet.insert_gates_(YOLO("yolo11n.yaml"))


@pytest.mark.parametrize("pretrained", [False, "other.pt"])
def test_training_that_would_lose_inserted_gates_is_an_error(pretrained):
    yolo = YOLO("yolo11n.yaml")
    ecanet.insert_gates_(yolo.model)
    with pytest.raises(ValueError, match=r"pretrained=.* would lose the gates"):
        yolo.train(data="trees.yaml", epochs=1, pretrained=pretrained)


def test_gates_that_fit_no_layer_of_the_new_network_are_named():
    source, target = YOLO("yolo11n.yaml").model, YOLO("yolo11n.yaml").model
    ecanet.insert_gates_(source, where=["model.0", "model.1"])
    target.model[1] = type(target.model[1])(16, 48, 3, 2)
    with pytest.warns(
        UserWarning, match=r"1 gates are left out, because layers of the new network have other.*: model\.1$"
    ):
        target.load(source)
    assert [name for name, module in target.named_modules() if isinstance(module, ecanet.ECA)] == ["model.0.gate"]


def test_weights_of_a_network_that_is_not_ultralytics_load_as_before():
    keep_gates()
    model = YOLO("yolo11n.yaml").model
    before = copy.deepcopy(model.state_dict())
    model.load(nn.Sequential(nn.Linear(2, 2)))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_gate_that_replaced_that_of_a_row_runs_and_is_kept_in_training():
    register()
    model = YOLO(example()).model.eval()
    assert len(ecanet.replace_gates_(model, "se").rows) == 3
    x = torch.rand(1, 3, 64, 64)
    want = run(model, x)
    anew = tasks.DetectionModel(model.yaml, verbose=False).eval()
    anew.load(model)
    assert [type(gate) for gate in gates(anew)] == [ecanet.SE] * 3
    torch.testing.assert_close(run(anew, x), want)


def test_removing_inserted_gates_gives_the_network_back():
    model = lively("yolo11n.yaml")
    x, keys = torch.rand(1, 3, 64, 64), list(model.state_dict())
    want = run(model, x)
    ecanet.insert_gates_(model, where="conv")
    ecanet.remove_gates_(model)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(run(model, x), want, rtol=1e-5, atol=1e-5)


def test_weights_for_another_scale_bring_no_gates():
    small, large = YOLO("yolo11n.yaml"), YOLO("yolo11s.yaml")
    ecanet.insert_gates_(small.model)
    large.model.load(small.model)
    assert gates(large.model) == []


# Training, for real.


@pytest.fixture(autouse=True)
def no_network(monkeypatch) -> Iterator[None]:
    attempts: list[Any] = []

    connect = socket.socket.connect

    def refuse(*args: Any, **kwargs: Any) -> Any:
        attempts.append(args)
        raise OSError("no network in tests")

    def connect_here(self: socket.socket, address: Any) -> None:
        """To a process of this machine alone, such as the server of tests/fresh.py."""
        return connect(self, address) if self.family == socket.AF_UNIX else refuse(self, address)

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", connect_here)
    yield
    assert attempts == []


@pytest.fixture
def train(tmp_path, monkeypatch) -> Callable[..., Any]:
    """Train on tiles of three photographs, validate on those of the fourth."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "PYTHONHASHSEED"):  # the trainer sets and removes them
        monkeypatch.setenv(name, os.environ.get(name, ""))
    data = write_yolo(tmp_path / "trees", size=128, held_out="OSBS_029", limit=8)

    def start(yolo: Any, **kwargs: Any) -> Any:
        return yolo.train(**settings(data, tmp_path), **kwargs)

    return start


def settings(data: Path, project: Path) -> dict[str, Any]:
    quick = {"imgsz": 64, "batch": 8, "workers": 0, "device": "cpu", "amp": False, "plots": False, "verbose": False}
    quick |= {"nbs": 8, "warmup_epochs": 0}  # every batch is a step, with the full learning rate
    return {"data": str(data), "project": str(project), "name": "run", **quick}


def tile(tmp_path: Path) -> Path:
    return tmp_path / "trees" / "images" / "val" / "OSBS_029_000.png"


LOAD = """
import json, sys
from ultralytics import YOLO
yolo = YOLO(sys.argv[1])
[result] = yolo.predict(sys.argv[2], imgsz=64, conf=1e-4, verbose=False)
print(json.dumps([[type(m).__name__ for m in yolo.model.model[23:26]], result.boxes.data.tolist()]))
"""

RESUME = """
import json, sys
from ultralytics import YOLO
yolo = YOLO(sys.argv[1])
yolo.train(resume=True)
print()
print(json.dumps(sum(type(m).__name__ == "ECA" for m in yolo.model.modules())))
"""

BUILD_ANEW = """
import json, sys
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel
counts = []
for file in sys.argv[1:]:
    saved = YOLO(file).model
    model = DetectionModel(saved.yaml, nc=2, verbose=False)  # as the trainer does
    model.load(saved)
    counts.append(sum(type(m).__name__ == "ECA" for m in model.modules()))
print(json.dumps(counts))
"""


@needs_deepforest
@pytest.mark.parametrize(("name", "optimizer"), [("yolo11-eca", "auto"), ("yolo26-eca", "MuSGD")])
@pytest.mark.filterwarnings(
    "ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning",
    "ignore:The feature will be removed:DeprecationWarning",
    "ignore:Converting a tensor to a Python:torch.jit.TracerWarning",
    "ignore:Constant folding - Only steps=1 can be constant folded:UserWarning",
)
def test_a_file_with_gates_is_trained_saved_loaded_and_exported(name, optimizer, train, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    register()
    yolo = YOLO(example(name))
    kernels: dict[str, list[Tensor]] = {}
    for moment in ("on_train_start", "on_train_end"):
        yolo.add_callback(moment, lambda trainer, moment=moment: kernels.update({moment: weights(trainer.model)}))
    train(yolo, epochs=1, optimizer=optimizer)
    for before, after in zip(kernels["on_train_start"], kernels["on_train_end"], strict=True):
        assert torch.isfinite(after).all()
        assert not torch.equal(before, after)
    assert yolo.metrics.box.nc == 1

    best = tmp_path / "run" / "weights" / "best.pt"
    [result] = yolo.predict(tile(tmp_path), imgsz=64, conf=1e-4, verbose=False)
    assert len(result.boxes) > 0
    layers, boxes = in_a_fresh_process(LOAD, best, tile(tmp_path))
    assert layers == ["ECA", "ECA", "ECA"]
    torch.testing.assert_close(torch.tensor(boxes), result.boxes.data, rtol=1e-5, atol=1e-4)

    x = torch.rand(1, 3, 64, 64)
    want = run(YOLO(best).model.eval(), x)
    file = YOLO(best).export(format="onnx", imgsz=64, simplify=False)
    [got] = onnxruntime.InferenceSession(file).run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-3, atol=1e-3)  # boxes in pixels, 0 to 64


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for gate in gates(model) for p in gate.parameters()]


class Interrupted(Exception):  # noqa: N818
    pass


@needs_deepforest
@pytest.mark.parametrize("from_file", [False, True], ids=["from a saved network", "from a model file"])
def test_training_keeps_inserted_gates_also_when_resumed_elsewhere(from_file, train, tmp_path):
    def interrupt(trainer: Any) -> None:
        if trainer.epoch == 1:
            raise Interrupted

    yolo = YOLO("yolo11n.yaml")
    if not from_file:
        yolo.save(tmp_path / "plain.pt")
        yolo = YOLO(tmp_path / "plain.pt")
    count = len(ecanet.insert_gates_(yolo.model, where="conv").rows)
    kernels: list[list[Tensor]] = []
    yolo.add_callback("on_train_start", lambda trainer: kernels.append(weights(trainer.model)))
    yolo.add_callback("on_train_epoch_start", interrupt)
    with pytest.raises(Interrupted):
        train(yolo, epochs=2)
    assert len(kernels[0]) == count  # although the head was built anew for one class instead of 80
    assert not any(kernel.any() for kernel in kernels[0])  # neutral, so training starts from the plain network
    last = tmp_path / "run" / "weights" / "last.pt"
    assert any(kernel.any() for kernel in weights(YOLO(last).model))
    if from_file:
        assert in_a_fresh_process(RESUME, last) == count


def test_gates_of_a_saved_network_are_kept_where_it_is_built_anew(tmp_path):
    yolo = YOLO("yolo11n.yaml")
    count = len(ecanet.insert_gates_(yolo.model).rows)
    yolo.save(tmp_path / "inserted.pt")
    register()
    YOLO(example()).save(tmp_path / "by_name.pt")
    counts = in_a_fresh_process(BUILD_ANEW, tmp_path / "inserted.pt", tmp_path / "by_name.pt")
    assert counts == [count, 3]


def test_a_network_from_a_file_with_gates_loads_where_known_classes_alone_are_allowed(tmp_path):
    register()
    YOLO(example()).save(tmp_path / "by_name.pt")
    restricted = "from ecanet.integrations.ultralytics import register\nregister()\n" + BUILD_ANEW
    assert in_a_fresh_process(restricted, tmp_path / "by_name.pt", ULTRALYTICS_SAFE_LOAD="1") == [3]
