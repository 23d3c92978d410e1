"""Does attention help on this data? Paired seeds, intervals, tests, costs and pictures.

Needs ``pip install 'ecanet[study]'``; what trains by recipes, times networks or draws needs ``ecanet[train,plot]`` too.
Each name is imported where it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ecanet.study.comparison import Comparison, Run, compare
    from ecanet.study.conclusions import summary_table, verdict
    from ecanet.study.costs import Cost, measure_costs
    from ecanet.study.html_report import write_report
    from ecanet.study.paired_study import run
    from ecanet.study.report import table
    from ecanet.study.results import FailedRun, FinishedRun, Study
    from ecanet.study.statistics import (
        ConditionSummary,
        Difference,
        Summary,
        detectable,
        paired_difference,
        plan,
        power,
        seeds_needed,
        summarise,
    )

__all__ = [
    "Comparison",
    "ConditionSummary",
    "Cost",
    "Difference",
    "FailedRun",
    "FinishedRun",
    "Run",
    "Study",
    "Summary",
    "compare",
    "detectable",
    "measure_costs",
    "paired_difference",
    "plan",
    "power",
    "run",
    "seeds_needed",
    "summarise",
    "summary_table",
    "table",
    "verdict",
    "write_report",
]

_FOUND_IN = {
    **dict.fromkeys(("Comparison", "Run", "compare"), "comparison"),
    **dict.fromkeys(("Cost", "measure_costs"), "costs"),
    **dict.fromkeys(("FailedRun", "FinishedRun", "Study"), "results"),
    **dict.fromkeys(("summary_table", "verdict"), "conclusions"),
    "run": "paired_study",
    "table": "report",
    "write_report": "html_report",
}


def __getattr__(name: str) -> Any:
    """Import what a public name needs, the first time that it is used (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'ecanet.study' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ecanet.study.{_FOUND_IN.get(name, 'statistics')}"), name)
    globals()[name] = value
    return value
