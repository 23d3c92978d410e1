"""Gates by name in Ultralytics' model files, and the model files that come with ecanet.

Ultralytics is under the AGPL-3.0. It is imported when a function is called, and none of its code is here.
"""

import re
from pathlib import Path

from torch.serialization import add_safe_globals

from ecanet.nn import GATES
from ecanet.nn.keep.ultralytics import keep_gates, read_rows

_EXAMPLES = Path(__file__).with_name("yolo")


def register() -> tuple[str, ...]:
    """Make the gates known to Ultralytics, so that its model files can name them.

    A row names the gate as it names any other layer, with the gate's arguments after the number of channels::

        - [-1, 1, ECA, []]    # k chosen from the channels of the layer before, at every scale
        - [-1, 1, ECA, [3]]   # k = 3
        - [-1, 1, SE, [8]]    # reduction 8

    A row never gives the number of channels: it is that of the layer before, at every scale. A second call does
    nothing. A process that imports Ultralytics and :mod:`ecanet.nn` need not call this function, but the call raises
    the reason if gates cannot be registered. It also lets ``ULTRALYTICS_SAFE_LOAD=1`` load the gates' classes, and
    makes Ultralytics keep gates (:mod:`ecanet.nn.keep`).

    Returns:
        The names: those of the classes and functions in :data:`ecanet.nn.GATES`.

    Raises:
        ImportError: Ultralytics is not installed, or its way of reading model files has changed.
        ValueError: Ultralytics already has another module of that name, such as one that was added to its source.

    Example:
        >>> register()
        ('ECA', 'ECANS', 'SE', 'SEVar1', 'SEVar2', 'SEVar3', 'SEGroup', 'se_gc2', 'se_gc3', 'ESE', 'SEShift', 'LCT', \
'GaussianGCT', 'SRM', 'GCT', 'GRN', 'CBAM', 'SimAM')
    """
    names = read_rows()
    # Any file that is loaded can then call these, so only classes that build a module are added.
    add_safe_globals([factory for factory in GATES.values() if isinstance(factory, type)])
    keep_gates()
    return names


def example(name: str = "yolo11-eca") -> str:
    """Path of a model file that comes with ecanet, for ``YOLO(...)``.

    ``yolo11-eca`` and ``yolo26-eca`` are YOLO11 and YOLO26 with ECA on the three maps that go to the detection head; a
    letter after the number is the scale, as in Ultralytics' own names: ``yolo11s-eca``. Without one it is n.

    Args:
        name: Name of the file, without ``.yaml``.

    Raises:
        ValueError: there is no such file.

    Example:
        >>> Path(example("yolo26m-eca")).name
        'yolo26m-eca.yaml'
    """
    match = re.fullmatch(r"(yolo\d+)([nsmlx]?)(-\w+)", str(name))
    if match is None or not (_EXAMPLES / f"{match[1]}{match[3]}.yaml").is_file():
        known = sorted(path.stem for path in _EXAMPLES.glob("*.yaml"))
        raise ValueError(f"name must be one of {known}, or one with a scale such as 'yolo11s-eca', got {name!r}")
    return str(_EXAMPLES / f"{match[1]}{match[2] or 'n'}{match[3]}.yaml")
