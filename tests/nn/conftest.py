"""What the tests of gates and of the tail share."""

import pytest
import torch


@pytest.fixture
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()
