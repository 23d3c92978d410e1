"""Marks that tests of the operations share."""

import op_cases as op
import pytest
import torch

every_layout = pytest.mark.parametrize(("rank", "make"), op.LAYOUTS.values(), ids=op.LAYOUTS)


def of_type(*dtypes: torch.dtype) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dtype", dtypes, ids=[str(dtype).removeprefix("torch.") for dtype in dtypes])
