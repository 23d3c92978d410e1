"""Networks to do surgery on, and what tests ask of them."""

import timm
import torch
import torchvision
from torch import Tensor, nn

from ecanet.nn import GATES, build_gate

#: Gates that can start neutral. One without weights, as SE-Var1, has nothing that could be set to 0.
GATES_WITH_WEIGHTS = [name for name in GATES if any(True for _ in build_gate(name, 64).parameters())]


def build(name: str) -> nn.Module:
    """``torchvision/NAME`` or ``timm/NAME``, with norms, biases and scales as training leaves them, in eval mode."""
    source, _, model_name = name.partition("/")
    model = torchvision.models.get_model(model_name) if source == "torchvision" else timm.create_model(model_name)
    return randomise_(model).eval()


@torch.no_grad()
def randomise_(model: nn.Module) -> nn.Module:
    """Give vectors (norms, biases, layer scales) and running statistics values of their own."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.0)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.2)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model


def images(size: int = 64, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random pictures."""
    return torch.randn(batch, 3, size, size, dtype=dtype)


def relative_difference(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return ((got - want).norm() / want.norm()).item()


def assert_same_state(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """The same keys in the same order, and the same bits."""
    assert list(got) == list(want)
    for key, value in want.items():
        assert torch.equal(got[key], value), key
