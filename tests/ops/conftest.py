"""What the tests of the operations start from."""

from collections.abc import Iterator
from typing import Any

import pytest

from ecanet.ops import gpu


@pytest.fixture(autouse=True, scope="session")
def _the_interpreter_patches_triton_once_a_launch() -> Iterator[None]:
    """Not at every call of a function within a kernel as well: looking through Triton's names takes it half its time.

    A launch patches them for the functions of our files; for a file of Triton's own the first call does, for good.
    """
    if not gpu.interpreting():
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction

    call_and_patch, patched = InterpretedFunction.__call__, set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(self.fn.__module__)
        return call_and_patch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "__call__", call)
        yield
