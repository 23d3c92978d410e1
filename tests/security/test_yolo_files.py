"""A saved YOLO with gates is data: reading it changes nothing of Ultralytics, and it still trains on elsewhere."""

import io
import json
import os
import pickle
import pickletools
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ecanet
import tests.integrations.conftest  # noqa: F401  where Ultralytics writes its settings
from ecanet.integrations import ultralytics as gates_in_yolo
from tests import fresh

tasks = pytest.importorskip("ultralytics.nn.tasks", reason="pip install ultralytics-opencv-headless")
from ultralytics import YOLO  # noqa: E402

# Everything of ecanet that changes another library, and what helps it to.
CHANGE_LIBRARIES = [
    f"ecanet.{module}.{name}"
    for module, names in {
        "integrations.ultralytics": ("register", "keep_gates", "example"),
        "nn.keep.ultralytics": (
            "patch_when_imported",
            "keep_gates",
            "patch_if_possible",
            "read_rows",
            "_parse_with_gates",
            "_train_with_gates",
        ),
        "nn.keep.transformers": ("keep_gates", "_initializing_gates"),
        "nn.attached": ("_patch_tools", "attach_"),
        "surgery": ("insert_gates_",),
    }.items()
    for name in names
]


@pytest.fixture(autouse=True)
def registered() -> None:
    gates_in_yolo.register()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved networks: gates that insert_gates_ attached, and gates named in rows of the model file."""
    folder = tmp_path_factory.mktemp("saved")
    gates_in_yolo.register()
    inserted, named = YOLO("yolo11n.yaml"), YOLO(gates_in_yolo.example())
    ecanet.insert_gates_(inserted.model)
    for name, yolo in {"inserted": inserted, "named": named}.items():
        yolo.save(folder / f"{name}.pt")
    return {path.stem: path for path in folder.glob("*.pt")}


def pickled_names(file: Path) -> set[str]:
    """Every class and function that a checkpoint names."""
    records = torch._C.PyTorchFileReader(str(file))
    strings: list[Any] = []
    found = set()
    for opcode, argument, _ in pickletools.genops(records.get_record("data.pkl")):
        if opcode.name == "GLOBAL":
            found.add(argument.replace(" ", "."))
        elif opcode.name == "STACK_GLOBAL":
            found.add(".".join(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)
    return found


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return self.function, ()


def look_up(path: str) -> Any:
    return pickle.loads(f"c{path.rpartition('.')[0]}\n{path.rpartition('.')[2]}\n.".encode())


@pytest.mark.parametrize("path", CHANGE_LIBRARIES)
def test_no_file_read_as_weights_calls_what_changes_a_library(path: str) -> None:
    function = look_up(path)
    file = io.BytesIO()
    torch.save({"model": Calls(function)}, file)
    with pytest.raises(pickle.UnpicklingError, match=rf"{path.rpartition('.')[2]}"):
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def test_only_gates_become_safe_to_load() -> None:
    ours = [g for g in torch.serialization.get_safe_globals() if getattr(g, "__module__", "").startswith("ecanet")]
    assert ours
    assert all(isinstance(g, type) and issubclass(g, ecanet.nn.Gate) for g in ours)
    # What torch calls when it builds one of these: nothing of ours but the constructor.
    hooks = ("__setstate__", "__reduce__", "__reduce_ex__", "__getstate__", "__new__")
    assert all(getattr(g, hook, None) == getattr(nn.Module, hook, None) for g in ours for hook in hooks)


@pytest.mark.parametrize("kind", ["inserted", "named"])
def test_a_saved_network_names_gates_and_hooks_alone(kind: str, files: dict[str, Path]) -> None:
    ours = {name for name in pickled_names(files[kind]) if name.startswith("ecanet")}
    hooks = {"ecanet.nn.attached.run_gate", "ecanet.nn.absent_gates._add_absent_gates", "ecanet.nn.gate.ResetWithGate"}
    assert ours == {"ecanet.nn.eca.ECA"} | (hooks if kind == "inserted" else set())


# Ways in which a process comes to a network with gates; each then builds it anew, as the trainer does.
FIRST = {
    "ultralytics alone": "from ultralytics import YOLO",
    "ecanet alone": "import ecanet\nfrom ultralytics import YOLO",
    "ecanet.nn first": "import ecanet.nn\nfrom ultralytics import YOLO",
    "ecanet.nn last": "from ultralytics import YOLO\nimport ecanet.nn",
    "asked for and not imported": "import ultralytics, ecanet.nn, importlib.util\n"
    "importlib.util.find_spec('ultralytics.engine.model')\nfrom ultralytics import YOLO",
}
READ = """
import json, sys, torch
before = torch.random.get_rng_state()
{first}
from ultralytics.engine.model import Model
from ultralytics.nn import tasks
drawn = not torch.equal(before, torch.random.get_rng_state())
now = lambda: [Model.train, tasks.BaseModel.load, tasks.parse_model, *torch.serialization.get_safe_globals()]
known = now()
saved = [YOLO(file).model for file in sys.argv[1:]]
changed = known != now()
counts = []
for source in saved:
    anew = tasks.DetectionModel(source.yaml, nc=2, verbose=False)
    anew.load(source)
    counts.append(sum(type(m).__name__ == "ECA" for m in anew.modules()))
print(json.dumps([counts, changed, drawn]))
"""


def in_a_fresh_process(code: str, *args: Any, **env: str) -> subprocess.CompletedProcess[str]:
    return fresh.run(code, *args, environment={**os.environ, **env}, warnings_are_errors=True)


@pytest.mark.parametrize("first", FIRST)
def test_a_saved_network_keeps_its_gates_whatever_is_imported_first(first: str, files: dict[str, Path]) -> None:
    done = in_a_fresh_process(READ.format(first=FIRST[first]), files["inserted"], files["named"])
    assert done.returncode == 0, done.stderr
    counts, changed, drawn = json.loads(done.stdout.splitlines()[-1])
    assert counts == [12, 3]
    assert changed == ("alone" in first)  # there, reading it imports ecanet.nn
    assert not drawn


@pytest.mark.parametrize(("kind", "loads"), [("named", True), ("inserted", False)])
def test_where_known_classes_alone_are_allowed(kind: str, loads: bool, files: dict[str, Path]) -> None:
    first = "from ultralytics import YOLO\nfrom ecanet.integrations.ultralytics import register\nregister()"
    done = in_a_fresh_process(READ.format(first=first), files[kind], ULTRALYTICS_SAFE_LOAD="1")
    assert (done.returncode == 0) == loads, done.stderr
    if not loads:
        assert "references types outside" in done.stderr


def test_importing_ecanet_makes_nothing_safe_to_load() -> None:
    code = "from ultralytics import YOLO\nimport ecanet.nn, torch\n"
    code += "print([g for g in torch.serialization.get_safe_globals() if 'ecanet' in getattr(g, '__module__', '')])"
    assert in_a_fresh_process(code).stdout.strip() == "[]"


def test_a_name_that_somebody_gives_another_meaning_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs(nn.Module):
        def __init__(self, *args: Any) -> None:
            super().__init__()
            self.args = args

    monkeypatch.setattr(tasks, "ECA", Theirs)
    d = {"nc": 1, "backbone": [[-1, 1, "Conv", [64, 3]]], "head": [[-1, 1, "ECA", [64, 3]]]}
    layers, _ = tasks.parse_model(d, ch=3, verbose=False)
    assert layers[1].args == (64, 3)


def test_an_ultralytics_that_ecanet_cannot_teach_is_imported_all_the_same(tmp_path: Path) -> None:
    for name in ("__init__", "engine/__init__", "engine/model", "nn/__init__", "nn/tasks"):
        path = tmp_path / "ultralytics" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("class Model: ...\n" if name == "engine/model" else "class BaseModel: ...\n")
    code = "import ecanet.nn\nimport ultralytics.engine.model as m\nprint(m.Model.__name__)"
    done = in_a_fresh_process(code, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert (done.stdout.strip(), done.returncode) == ("Model", 0), done.stderr
