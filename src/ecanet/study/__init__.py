"""Does attention help on this data? Paired seeds, intervals, costs and pictures."""

try:
    import lightning  # noqa: F401
    import tqdm  # noqa: F401
except ImportError as error:
    raise ImportError(f"ecanet.study needs {error.name}: pip install 'ecanet[train,plot]'") from error

from ecanet.inspect.paired import Difference, paired_difference
from ecanet.study.compare import Comparison, Run, compare
from ecanet.study.report import Cost, measure_costs, table, verdict

__all__ = [
    "Comparison",
    "Cost",
    "Difference",
    "Run",
    "compare",
    "measure_costs",
    "paired_difference",
    "table",
    "verdict",
]
