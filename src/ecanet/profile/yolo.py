"""Ultralytics' networks from model files. These are checked first: building a network calls what its file names.

Ultralytics is under the AGPL-3.0. It is imported only when a function is called, and none of its code is here.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torchvision
from torch import nn

from ecanet.integrations.ultralytics import register
from ecanet.untrusted import check_file, check_number, shown

_CLASSES = {
    "detect": "DetectionModel",
    "segment": "SegmentationModel",
    "classify": "ClassificationModel",
    "pose": "PoseModel",
    "obb": "OBBModel",
}
#: The activation that a model file may name: a class of torch.nn with numbers and booleans, as in Ultralytics' files.
_ACTIVATION = re.compile(r"(torch\.)?nn\.([A-Za-z]\w*)\(((\w+=)?(True|False|[-+.\de]+)(, *(?=\w|[-+.]))?)*\)")
#: Modules in which layers may be defined. Those of ecanet are for gates, which have rows of their own.
_LAYERS = ("torch.nn.modules.", "torchvision.ops.", "ultralytics.nn.modules.", "ecanet.")
#: Limits: bytes of a file, rows of a block, repeats of a row, any number in it, depth and width.
_MAX_BYTES, _MAX_ROWS, _MAX_REPEATS, _MAX_NUMBER, _MAX_MULTIPLE = 2**17, 1000, 1000, 100_000, 16


def is_yolo(model: str) -> bool:
    """Whether ``model`` names a model file of Ultralytics."""
    return Path(model).suffix in (".yaml", ".yml")


def build_yolo(model: str) -> nn.Module:
    """Build the network of a model file, with random weights, on the CPU.

    Args:
        model: A file, or the name of one of Ultralytics' files, such as ``yolo11n.yaml``; the letter is the scale.

    Raises:
        ImportError: Ultralytics is not installed.
        FileNotFoundError: there is no such file, and none of Ultralytics' files has that name.
        ValueError: it is not a model file, or it names something that is not a layer.
    """
    try:
        from ultralytics.nn import tasks
    except ImportError as error:
        raise ImportError(f"{model} needs Ultralytics: pip install 'ecanet[ultralytics]'") from error
    register()  # so that rows may name gates
    if "://" in model:
        raise ValueError(f"models must be files on this machine, got the address {shown(model)}")
    if Path(model).exists():
        check_file(Path(model), _MAX_BYTES)
    try:
        description = tasks.yaml_model_load(model)
        _check(description, tasks)
        task = tasks.guess_model_task(description)
        if task not in _CLASSES:
            raise ValueError(f"its last layer must be one of {', '.join(_CLASSES)}, got {shown(task)}")
        return getattr(tasks, _CLASSES[task])(description, verbose=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no such file, and none of Ultralytics' has that name: {shown(model, 200)}") from error
    except Exception as error:  # a wrong row can make Ultralytics raise anything
        raise ValueError(f"{shown(model, 200)} is not a model file of Ultralytics: {shown(str(error), 300)}") from error


def _check(description: Any, tasks: Any) -> None:
    """Check that every row names a layer with plain arguments.

    Raises:
        TypeError, ValueError: a row does not; the message says which.
    """
    activation = description.get("activation")
    if activation is not None and not (isinstance(activation, str) and _ACTIVATION.fullmatch(activation)):
        raise ValueError(f"activation must be a layer such as nn.SiLU(), got {shown(activation)}")
    for name in ("depth_multiple", "width_multiple"):
        check_number(description.get(name, 1.0), name, 0, _MAX_MULTIPLE)
    for scale in (description.get("scales") or {}).values():
        check_number(scale[0], "a scale's depth", 0, _MAX_MULTIPLE)
        check_number(scale[1], "a scale's width", 0, _MAX_MULTIPLE)
    for name in ("nc", "ch", "reg_max"):
        check_number(description.get(name, 1), name, 1, _MAX_NUMBER)
    for block in ("backbone", "head"):
        rows = description.get(block)
        if not isinstance(rows, list) or not 1 <= len(rows) <= _MAX_ROWS:
            raise ValueError(f"{block} must be a list of 1 to {_MAX_ROWS} rows")
        for i, row in enumerate(rows):
            if not isinstance(row, list) or len(row) != 4 or not isinstance(row[3], list):
                raise ValueError(f"row {i} of {block} must be [from, repeats, layer, arguments]")
            check_number(row[1], f"the repeats of row {i} of {block}", 1, _MAX_REPEATS)
            if not _is_layer(row[2], tasks):
                raise ValueError(f"row {i} of {block} must name a layer, got {shown(row[2])}")
            for value in _numbers_in(row[3]):
                check_number(value, f"a number in row {i} of {block}", -_MAX_NUMBER, _MAX_NUMBER)


def _is_layer(name: object, tasks: Any) -> bool:
    """Whether Ultralytics finds a class of layers under a name, and neither a whole network nor a download."""
    if not isinstance(name, str):
        return False
    places = (("nn.", nn), ("torchvision.ops.", torchvision.ops), ("", tasks))
    prefix, place = next((prefix, place) for prefix, place in places if name.startswith(prefix))
    layer = getattr(place, name.removeprefix(prefix), None)
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)) or layer.__name__ == "TorchVision":
        return False
    return f"{layer.__module__}.".startswith(_LAYERS)


def _numbers_in(value: object) -> Iterator[int | float]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _numbers_in(item)
