"""Mean average precision, the metric of data with several labels per image."""

import torch
from torch import Tensor
from torchmetrics.classification import MultilabelAveragePrecision
from torchmetrics.functional.classification import binary_average_precision
from torchmetrics.utilities import dim_zero_cat


class MeanAveragePrecision(MultilabelAveragePrecision):
    """The mean over classes of average precision, from 0 to 1. Classes without images do not count.

    torchmetrics' own mean warns about such classes and counts them.

    Args:
        num_labels: Number of classes.

    Example:
        >>> metric = MeanAveragePrecision(3)
        >>> metric.update(torch.tensor([[0.9, 0.2, 0.8], [0.1, 0.7, 0.3]]), torch.tensor([[1, 0, 0], [0, 1, 0]]))
        >>> float(metric.compute()), metric.of_each_class().tolist()
        (1.0, [1.0, 1.0, nan])
    """

    def __init__(self, num_labels: int) -> None:
        super().__init__(num_labels, average="none")

    def of_each_class(self) -> Tensor:
        """Average precision ``(num_labels,)``; NaN for a class without images."""
        scores, targets = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        values = torch.full((self.num_labels,), torch.nan, device=scores.device)
        for index in torch.nonzero(targets.any(dim=0)).flatten().tolist():
            values[index] = binary_average_precision(scores[:, index], targets[:, index])
        return values

    def compute(self) -> Tensor:  # type: ignore[override]
        """The mean over classes, for the images of all processes."""
        return self.of_each_class().nanmean()
