"""Marks that tests of the operations share."""

import pytest
import torch
from op_cases import LAYOUTS

every_layout = pytest.mark.parametrize(("rank", "make"), LAYOUTS.values(), ids=LAYOUTS)


def of_type(*dtypes: torch.dtype) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dtype", dtypes, ids=[str(dtype).removeprefix("torch.") for dtype in dtypes])
