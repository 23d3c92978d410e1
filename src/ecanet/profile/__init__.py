"""What networks cost on this machine, next to the numbers of the paper's Table 3. ``ecanet profile`` prints it.

Each name is imported where it is first used.
"""

from typing import TYPE_CHECKING

from ecanet.lazy import lazy_names

if TYPE_CHECKING:
    from ecanet.profile.counts import Counts
    from ecanet.profile.measure import Measured
    from ecanet.profile.paper import TABLE3, PaperRow
    from ecanet.profile.result import Profile, ProfileRow
    from ecanet.profile.run import profile_models, table3

__all__ = ["TABLE3", "Counts", "Measured", "PaperRow", "Profile", "ProfileRow", "profile_models", "table3"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "counts": ("Counts",),
        "measure": ("Measured",),
        "paper": ("TABLE3", "PaperRow"),
        "result": ("Profile", "ProfileRow"),
        "run": ("profile_models", "table3"),
    },
)
