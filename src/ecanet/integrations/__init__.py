"""Gates in other libraries, one a module, which imports its library when a function is called."""

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_ULTRALYTICS = "ultralytics.engine.model"  # by then ultralytics.nn.tasks is there, too


def follow_ultralytics() -> None:
    """Let Ultralytics know of gates in every process that imports both libraries, whichever comes first.

    A saved network is data, and reading it must not change a library. But a process that has read one with gates has
    imported ecanet, and so can train it on.
    """
    if _ULTRALYTICS in sys.modules:
        _teach()
    elif not any(isinstance(finder, _Follower) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Follower())


def _teach() -> None:
    from ecanet.integrations import ultralytics

    ultralytics.teach()


class _Follower(importlib.abc.MetaPathFinder):
    """Finds one module, where Python would have found it, and has something done when it is imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _ULTRALYTICS else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_teach(module: ModuleType) -> None:
            execute(module)
            _teach()

        spec.loader.exec_module = execute_and_teach  # type: ignore[method-assign]
        return spec
