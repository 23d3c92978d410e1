"""Every kernel against the formulas in float64: the checks that the tests run, as many as a minute allows."""

import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_TESTS = Path(__file__).parents[2] / "tests" / "ops"
_SECONDS = 40


def _checks() -> Any:
    sys.path.insert(0, str(_TESTS))
    import kernel_checks

    return kernel_checks


def names() -> list[str]:
    """The names that :func:`check` knows: operations, and what is built from them."""
    return list(_checks().CHECKS)


def check(of: Sequence[str], quick: bool) -> dict[str, Any]:
    """Run checks, with all memory that torch allocates set to NaN.

    Args:
        of: Some of :func:`names`.
        quick: Only a few of each.

    Returns:
        ``checks``: how many were run; ``failures``: their messages; ``not_reached``: how many there was no time for.
    """
    checks = _checks()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    done, failures, not_reached = 0, [], 0
    deadline = time.monotonic() + _SECONDS
    for name in of:
        for i, (case, run) in enumerate(checks.CHECKS[name]()):
            if time.monotonic() > deadline or (quick and i >= 6):
                not_reached += 1
                continue
            torch.manual_seed(0)
            done += 1
            try:
                run()
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                text = " ".join(str(error).split())[:400]
                failures.append(
                    f"{name} {case}: {type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"
                )
    return {"checks": done, "failures": failures, "not_reached": not_reached}
