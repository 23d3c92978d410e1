"""Whether the C++ kernels run in these tests: they are built, and ECANET_BACKEND does not keep them out."""

import pytest

from ecanet.ops import backend, cpu

_CHOICE = backend.current()
WHY_NOT = cpu.why_not() or (None if _CHOICE in ("auto", "cpu") else f"ECANET_BACKEND={_CHOICE}")
needs_kernels = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
