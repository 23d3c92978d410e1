"""Does attention help on this data? Paired seeds, intervals, tests, costs and pictures.

It needs ``pip install 'ecanet[study]'``; to train by recipes, time networks or draw, ``ecanet[train,plot]`` as well.
Each name is imported where it is first used.
"""

from typing import TYPE_CHECKING

from ecanet.lazy import lazy_names

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

_STATISTICS = (
    *("ConditionSummary", "Difference", "Summary"),
    *("detectable", "paired_difference", "plan", "power", "seeds_needed", "summarise"),
)

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "comparison": ("Comparison", "Run", "compare"),
        "conclusions": ("summary_table", "verdict"),
        "costs": ("Cost", "measure_costs"),
        "html_report": ("write_report",),
        "paired_study": ("run",),
        "report": ("table",),
        "results": ("FailedRun", "FinishedRun", "Study"),
        "statistics": _STATISTICS,
    },
)
