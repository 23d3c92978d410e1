"""What networks cost on this machine, beside the numbers of the paper's Table 3. ``ecanet profile`` prints it.

Each name is imported where it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ecanet.profile.counts import Counts
    from ecanet.profile.measure import Measured
    from ecanet.profile.paper import TABLE3, PaperRow
    from ecanet.profile.result import Profile, Row
    from ecanet.profile.run import profile_models, table3

__all__ = ["TABLE3", "Counts", "Measured", "PaperRow", "Profile", "Row", "profile_models", "table3"]

_FOUND_IN = {
    **{"Counts": "counts", "Measured": "measure", "PaperRow": "paper", "Profile": "result", "Row": "result"},
    **dict.fromkeys(("profile_models", "table3"), "run"),
}


def __getattr__(name: str) -> Any:
    """Import what a public name needs, the first time that it is used (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'ecanet.profile' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ecanet.profile.{_FOUND_IN.get(name, 'paper')}"), name)
    globals()[name] = value
    return value
