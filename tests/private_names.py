"""Takes private names of torch away, one at a time, and runs what must survive; prints a line of JSON for each.

Started by ``test_private_torch.py``: ``python tests/private_names.py``. Each name has a process of its own, forked
after torch is imported. A name is gone for ``private_torch`` alone: torch goes on using its own.
"""

import contextlib
import importlib.util
import json
import os
import re
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.utils.flop_counter
import torchvision  # noqa: F401
from torch import Tensor, nn

with contextlib.suppress(ImportError):  # all that ecanet imports is imported once for all processes
    import timm  # noqa: F401

SOURCE = Path(__file__).parents[1] / "src/ecanet/private_torch.py"


def names() -> list[str]:
    """What the file looks up: dotted paths, and attributes that it asks for."""
    text = SOURCE.read_text()
    paths = re.findall(r'f?"(torch\.[\w.]+\.[\w{}]+)"', text)
    return list(dict.fromkeys([*paths, *re.findall(r'getattr\(\w+, "(\w+)"', text)]))


def take_away(name: str) -> None:
    """Import ``ecanet.private_torch`` as if torch had no such name."""
    text = SOURCE.read_text()
    spec = importlib.util.spec_from_file_location("ecanet.private_torch", SOURCE)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    exec(compile(text.replace(f'{name}"', f'{name}_gone"'), str(SOURCE), "exec"), vars(module))
    sys.modules["ecanet.private_torch"] = module


def plain_tail(x: Tensor, norm: nn.BatchNorm2d, gate: Any, residual: Tensor, kept: tuple[Tensor, Tensor]) -> Tensor:
    """The tail in plain PyTorch, with the statistics of the batch or those that were kept."""
    mean, var = (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)) if norm.training else kept
    y = (x - mean[:, None, None]) / (var[:, None, None] + norm.eps).sqrt()
    y = y * norm.weight[:, None, None] + norm.bias[:, None, None]
    return torch.relu(y * torch.sigmoid(gate.logits(y.mean((2, 3))))[..., None, None] + residual)


def use() -> dict[str, Any]:
    """What a user does first: values and gradients, torch.func, tracers, a copy, surgery, doctor."""
    import ecanet
    from ecanet import private_torch
    from ecanet.doctor import doctor
    from ecanet.nn import ECA, SE, explain, norm_gate_add_act

    torch.manual_seed(0)
    worst = 0.0
    residual = torch.randn(3, 8, 4, 5)
    for gate in (ECA(8), SE(8, reduction=2)):
        for training in (True, False):
            norm = nn.BatchNorm2d(8).train(training)
            kept = norm.running_mean.clone(), norm.running_var.clone()
            x = torch.randn(3, 8, 4, 5, requires_grad=True)
            got, want = norm_gate_add_act(x, norm, gate, residual, "relu"), plain_tail(x, norm, gate, residual, kept)
            wanted = [x, *gate.parameters(), *norm.parameters()]
            found, truth = (torch.autograd.grad(out.square().sum(), wanted) for out in (got, want))
            pairs = zip([got, *found], [want, *truth], strict=True)
            worst = max(worst, *((a - b).abs().max().item() for a, b in pairs))
    gate.factor = 2.0
    torch.func.vmap(gate)(torch.randn(2, 3, 8, 4, 4))
    torch.jit.trace(gate, torch.randn(1, 8, 4, 4))
    stages = [(nn.Conv2d(i, 8, 3), nn.BatchNorm2d(8), nn.ReLU()) for i in (3, 8)]
    plain = nn.Sequential(*stages[0], *stages[1])
    report = ecanet.insert_gates_(plain, where="conv", input_shape=(1, 3, 16, 16))
    network = ecanet.optimize_for_inference(ecanet.models.small_eca_resnet().eval())
    with torch.no_grad():
        network(torch.randn(1, 3, 32, 32))
        torch.ops.ecanet.apply_(torch.ones(1, 2, 3), torch.ones(1, 2), None, None, 0)
    return {
        "missing": list(private_torch.missing),
        "worst": worst,
        "gates": len(report.rows),
        "explains": explain(residual, nn.BatchNorm2d(8), ECA(8), residual, "relu"),
        "doctor": "\n".join(doctor().lines),
    }


def in_a_process(name: str) -> dict[str, Any]:
    """What comes out without a name."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            warnings.simplefilter("ignore")  # of torch.jit, which is deprecated
            take_away(name)
            found = use()
        except BaseException:  # told by the parent
            found = {"error": traceback.format_exc()}
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        found = json.loads(answer.read())
    os.waitpid(child, 0)
    return found


if __name__ == "__main__":
    for each in names():
        print(json.dumps({"name": each, **in_a_process(each)}), flush=True)
