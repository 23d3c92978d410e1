"""What the tests of whole networks share."""

import functools

import pytest
from torch import Tensor, nn

from ecanet.nn import CBAM


@pytest.fixture(autouse=True)
def _convolutions_are_drawn_once(monkeypatch):
    """Skip torch's own draw of 2-D convolutions' weights, a fifth of the time: every network here draws them again.

    One that forgets to has NaN for weights, as ``torch.empty`` is filled with it.
    """
    draw = nn.init.kaiming_uniform_

    def draw_others(tensor: Tensor, *args, **kwargs) -> Tensor:
        return tensor if tensor.dim() == 4 else draw(tensor, *args, **kwargs)

    build = CBAM.__init__

    @functools.wraps(build)
    def build_and_draw(self: CBAM, *args, **kwargs) -> None:
        """A gate has convolutions of its own, which no network draws."""
        with monkeypatch.context() as drawing:
            drawing.setattr(nn.init, "kaiming_uniform_", draw)
            build(self, *args, **kwargs)

    monkeypatch.setattr(nn.init, "kaiming_uniform_", draw_others)
    monkeypatch.setattr(CBAM, "__init__", build_and_draw)
