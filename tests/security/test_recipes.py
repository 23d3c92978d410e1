"""Recipes from anywhere: nothing in one is executed, built, followed or believed."""

import re
import time
from pathlib import Path

import pytest

from ecanet.cli import main
from ecanet.train.recipes import read_recipe
from tests import fresh

CALL = "{class_path: subprocess.Popen, init_args: {args: [touch, executed]}}"


def nested(depth: int) -> str:
    return "model: " + "[" * depth + "]" * depth


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


HOSTILE = {
    "a class among the options": (f"model: {{options: {{widths: {CALL}}}}}", "model.options.widths holds class_path"),
    "options that are a class": (f"model: {{options: {CALL}}}", "model.options holds class_path"),
    "a class as the name": (f"model: {{name: {CALL}}}", "model.name holds class_path"),
    "a class as the gate": (f"model: {{gate: {CALL}}}", "model.gate holds class_path"),
    "a class as a number": (f"optim: {{lr: {CALL}}}", "optim.lr holds class_path"),
    "a class as a block": (f"model: {CALL}", "model holds class_path"),
    "a class as the recipe": (CALL, "holds class_path"),
    "a class in a list": (f"model: {{options: {{widths: [{CALL}]}}}}", "options.widths holds class_path"),
    "a function of Python": ("model: !!python/object/apply:os.system ['touch executed']", "has a tag"),
    "a name of Python": ("model: {gate: !!python/name:os.system }", "has a tag"),
    "a module of Python": ("optim: {lr: !!python/module:os }", "has a tag"),
    "a tag of one's own": ("model: !recipe {name: x}", "has a tag"),
    "a binary": ("model: {name: !!binary aGVsbG8=}", "has a tag"),
    "an alias of itself": ("model: &m {options: *m}", "anchor or alias"),
    "a list that holds itself": ("data: &d [*d]", "anchor or alias"),
    "an alias bomb": (bomb(9), "anchor or alias"),
    "a merge": ("model: &m {name: x}\ndata: {<<: *m}", "anchor or alias"),
    "lists in lists": (nested(1000), "nested deeper than 8 levels"),
    "twenty thousand lists": (nested(20_000), "nested deeper"),
    "mappings in mappings": ("model: " + "{a: " * 500 + "1" + "}" * 500, "nested deeper"),
    "two documents": ("model: {}\n---\nmodel: {}", "more than one document"),
    "nothing": ("", "must hold the blocks"),
    "a list": ("[model, data]", "must hold the blocks"),
    "a text": ("model", "must hold the blocks"),
    "bytes": (b"\xff\xfe\x00model", "is not a recipe"),
    "control characters": ("model: {name: '\x1b[2J'}", "is not a recipe"),
    "an open bracket": ("model: {name: x", "is not a recipe"),
    "another block": ("out: /etc", "a recipe has only the blocks"),
    "a block that is a list": ("model: [1]", "model must hold names and values"),
    "a key that is not known": ("optim: {learning_rate: 1}", "optim has no learning_rate"),
    "a key that is a number": ("optim: {1: 1}", "optim has no 1"),
    "a key of a million characters": ("optim: {" + "k" * 60_000 + ": 1}", "is not a recipe"),
    "not a number": ("optim: {lr: .nan}", "optim.lr must be a finite number"),
    "infinite": ("optim: {lr: .inf}", "optim.lr must be a finite number"),
    "a million digits": ("optim: {epochs: " + "9" * 60_000 + "}", "is not a recipe"),
    "negative": ("optim: {lr: -1}", "optim.lr must be 0 or more"),
    "no epochs": ("optim: {epochs: 0}", "optim.epochs must be 1 or more"),
    "too many epochs": ("optim: {epochs: 10000000000}", "optim.epochs must be at most"),
    "a batch of a billion": ("data: {batch_size: 1000000000}", "data.batch_size must be at most"),
    "a million processes": ("data: {workers: 1000000}", "data.workers must be at most"),
    "pictures of a million pixels a side": ("data: {image_size: 1000000}", "data.image_size must be at most"),
    "a million devices": ("trainer: {devices: 1000000}", "trainer.devices must be at most"),
    "an accelerator that is none": ("trainer: {accelerator: '../../evil'}", "trainer.accelerator must be one of"),
    "a seed beyond what there is": ("trainer: {seed: 99999999999}", "trainer.seed must be at most"),
    "a network that is none": ("model: {name: os.system}", "model.name must be one of"),
    "a gate that is none": ("model: {gate: os.system}", "gate must be one of"),
    "a kernel of a billion": ("model: {kernel_size: 1000000001}", "kernel_size must be at most"),
    "a kernel beyond the channels": ("model: {kernel_size: 4097}", "kernel_size must be at most"),
    "widths of a billion": ("model: {options: {widths: [1000000000]}}", "widths must be at most"),
    "widths without end": ("model: {options: {widths: [" + "8, " * 999 + "8]}}", "widths must be a list of 1 to 16"),
    "a million blocks": ("model: {options: {blocks: 1000000}}", "blocks must be at most"),
    "an option of another network": ("model: {options: {width_mult: 1}}", "has width_mult, and the network takes"),
    "an option that is a path": ("model: {options: {weights: /etc/passwd}}", "options.weights must be a number"),
    "an option that is a class": ("model: {options: {norm_layer: torch.nn.Module}}", "norm_layer must be a number"),
    "a function to call": ("model: {build: 'os:system'}", "model.build is never taken from a file"),
    "a class to call": (f"model: {{build: {CALL}}}", "model.build is never taken from a file"),
    "a network of the Hub": ("model: {name: 'timm/hf-hub:someone/something'}", "timm has no"),
    "a folder for a network": ("model: {name: 'timm/local-dir:/etc'}", "timm has no"),
    "a path behind a library": ("model: {name: torchvision/../../etc/passwd}", "torchvision has no"),
    "a device for a network": ("model: {name: /dev/zero}", "model.name must be one of"),
    "a network of a million letters": ("model: {name: '" + "x/" * 30_000 + "'}", "must be a text of at most 1000"),
    "another's options": ("model: {name: torchvision/resnet18, options: {widths: [8]}}", "network takes fold, fuse"),
    "a class as a place": (f"model: {{where: {CALL}}}", "model.where holds class_path"),
    "YAML in a place": ("model: {where: '[&a [1], *a]'}", "model.where cannot be this text"),
    "a thousand places": (
        "model: {name: torchvision/resnet18, where: [" + "a, " * 1001 + "a]}", "must be a list of at most 1000"
    ),
    "a place of a thousand letters": ("model: {name: torchvision/resnet18, where: " + "a" * 999 + "}", "at most 300"),
    "a kernel of a billion in a library's": (
        "model: {name: torchvision/resnet18, kernel_size: 1000000001}", "kernel_size must be at most"
    ),
    "both names of preserve": ("model: {neutral: true, preserve: true}", "both preserve and neutral"),
    "YAML in a text": ("model: {options: '{a: &a [1], b: *a}'}", "model.options must hold names and values"),
    "YAML in a kernel size": ("model: {kernel_size: '[&a [1], *a]'}", "model.kernel_size cannot be this text"),
    "YAML in a path": ("data: {source: image_folder, root: '{a: &a [1], b: *a}'}", "no folder '{a: &a [1], b"),
    "YAML in a path of weights": ("model: {weights: '{a: &a [1], b: *a}'}", "{a: &a [1], b: *a}"),
    "YAML in a number": ("optim: {step_epochs: '[1, 2]'}", "optim.step_epochs cannot be this text"),
    "a class in a text": ("model: {options: '{widths: {class_path: os.system}}'}", "model.options must hold names"),
    "a number of minutes": ("optim: {lr: " + "1:" * 300 + "1.5}", "optim.lr cannot be this text"),
    "a date for a name": ("model: {options: {2001-01-01: 1}}", "has 2001-01-01"),
    "a number for a name": ("model: {options: {1: 1}}", "must have names for its values"),
    "an optimizer that is a class": (f"optim: {{name: {CALL}}}", "optim.name holds class_path"),
    "kinds that are none": ("optim: {no_decay: [norms, os.system]}", "optim.no_decay must be some of norms, biases"),
    "a class among the kinds": (f"optim: {{no_decay: [{CALL}]}}", "optim.no_decay holds class_path"),
    "a class as a pattern": (f"optim: {{freeze: {CALL}}}", "optim.freeze holds class_path"),
    "patterns without end": ("optim: {freeze: [" + "a, " * 1001 + "a]}", "optim.freeze must be a list of at most 1000"),
    "a pattern without end": ("optim: {freeze: " + "'*a" + "*a" * 600 + "'}", "optim.freeze must be a text of at"),
    "an empty pattern": ("optim: {freeze: ['conv1', '']}", "optim.freeze must be names or patterns"),
    "YAML in a pattern": ("optim: {freeze: '{a: &a [1], b: *a}'}", "optim.freeze"),
    "a billion batches in a step": ("optim: {accumulate: 1000000000}", "optim.accumulate must be at most"),
    "no batches in a step": ("optim: {accumulate: 0}", "optim.accumulate must be 1 or more"),
    "gates that unlearn": ("optim: {gate_lr_scale: -1}", "optim.gate_lr_scale must be 0 or more"),
    "gates at an infinite rate": ("optim: {gate_lr_scale: .inf}", "optim.gate_lr_scale must be a finite number"),
    "an end before the start": ("optim: {early_stopping: 0}", "optim.early_stopping must be 1 or more"),
    "a beta of 1": ("optim: {name: adamw, momentum: 1}", "optim.momentum must be below 1 for optim.name=adamw"),
    "Nesterov's AdamW": ("optim: {name: adamw, nesterov: true}", "optim.nesterov is for optim.name=sgd"),
    "a logger that is none": ("trainer: {loggers: [csv, os.system]}", "trainer.loggers must be some of csv"),
    "a logger that is a class": (f"trainer: {{loggers: [{CALL}]}}", "trainer.loggers holds class_path"),
    "a magnitude beyond the last": ("data: {randaugment: 31}", "data.randaugment must be at most 30"),
    "a jitter beyond the last": ("data: {color_jitter: 2}", "data.color_jitter must be at most 1"),
    "an option of another type": ("model: {options: {blocks: two}}", "blocks must be a number, true"),
    "true for a number": ("model: {options: {blocks: true}}", "blocks must be a number"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "says"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_recipe_is_refused_by_name_before_anything_is_built(text, says, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(text if isinstance(text, bytes) else text.encode())
    started = time.process_time()
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(recipe), "--out", str(tmp_path / "out")])
    assert time.process_time() - started < 10
    message = str(stopped.value)
    assert says in message
    assert len(message) < 1000
    assert "\x1b" not in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"], "nothing ran, nothing was written"


def test_what_a_recipe_may_be_of_is_a_file(tmp_path) -> None:
    (tmp_path / "large.yaml").write_text("#" * 70_000)
    with pytest.raises(ValueError, match="70,000 bytes, more than"):
        read_recipe(tmp_path / "large.yaml")
    with pytest.raises(ValueError, match="is a folder"):
        read_recipe(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="not a regular file"):
        read_recipe("/dev/zero")


@pytest.mark.parametrize(
    "argument",
    [
        "--model=recipe.yaml",
        "--optim",
        "--model.options={'class_path': 'os.system'}",
        "--model.class_path=os.system",
        "--optim.class_path=os.system",
        '--model={"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "executed"]}}',
    ],
)
def test_the_command_line_builds_no_class(argument, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"no class is built from the command line|is not an option: --config FILE"):
        main(["fit", argument])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["model: {name: resnet999}", "data: {source: image_folder}", "data: {source: fashion_mnist, root: nowhere}"]
)
@pytest.mark.parametrize("option", [["--config", "{}"], ["--config={}"]])
def test_what_is_found_wrong_later_names_the_recipe_as_well(text, option, tmp_path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(SystemExit, match=f"the recipe: {re.escape(str(recipe))}\n"):
        main(["fit", *(word.format(recipe) for word in option), "--out", str(tmp_path / "run")])


def test_every_recipe_of_the_repository_is_read() -> None:
    recipes = sorted(Path("recipes").rglob("*.yaml"))
    assert len(recipes) >= 8
    for path in recipes:
        assert set(read_recipe(path)) <= {"model", "data", "optim", "trainer"}


def test_numbers_are_read_as_yaml_1_2_has_them(tmp_path) -> None:
    (tmp_path / "r.yaml").write_text("optim: {lr: 1e-4, weight_decay: 5.0e-4, momentum: .9, epochs: 3}")
    read = read_recipe(tmp_path / "r.yaml")
    assert read == {"optim": {"lr": 1e-4, "weight_decay": 5e-4, "momentum": 0.9, "epochs": 3}}


def test_memory_is_bounded(tmp_path) -> None:
    """In a process of its own with 1 GB beside what importing takes."""
    (tmp_path / "bomb.yaml").write_text(bomb(9))
    (tmp_path / "deep.yaml").write_text(nested(20_000))
    script = (
        "import resource, sys; from ecanet.train.recipes import read_recipe\n"
        "now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, now + 2**30))\n"
        "for path in sys.argv[1:]:\n"
        "    try: read_recipe(path)\n"
        "    except ValueError: print('refused')\n"
    )
    files = [str(tmp_path / name) for name in ("bomb.yaml", "deep.yaml")]
    done = fresh.run(script, *files)
    assert done.stdout.split() == ["refused", "refused"], done.stderr
