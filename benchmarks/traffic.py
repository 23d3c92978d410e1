"""Count what compiled networks move through a GPU's memory, without a GPU: ``python -m benchmarks.traffic --help``."""

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.layers import EcaModule
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torchvision.ops import SqueezeExcitation

import ecanet
from benchmarks import results, run, simulated_gpu
from benchmarks.cases import MEMORY_FORMATS, STAGES, FusedTail, Tail
from benchmarks.machine import describe
from benchmarks.networks import NETWORKS
from ecanet.nn import ECA

_NETWORKS = ("resnet50", "mobilenet_v2")
_COMPETITORS = ("no gate", "ecanet", "timm", "SE")
_BATCH = 128


class Traffic(NamedTuple):
    """What one training step or one call moves.

    Attributes:
        forward: Bytes that kernels read and write.
        backward: Likewise; 0 at inference.
        kernels: Number of kernels that are launched.
    """

    forward: int
    backward: int
    kernels: int


class CompiledCase(NamedTuple):
    """One row of the table.

    Attributes:
        name: Name of what is compiled.
        shape: Shape of its input.
        memory_format: ``contiguous`` or ``channels_last``.
        training: Whether there is a backward pass.
        builders: Competitors by name.
    """

    name: str
    shape: tuple[int, ...]
    memory_format: str
    training: bool
    builders: dict[str, Callable[[], nn.Module]]

    @property
    def key(self) -> str:
        """Its name in a result file."""
        what = "training" if self.training else "inference"
        return "/".join((self.name, what, "x".join(map(str, self.shape)), self.memory_format))


def cases(quick: bool) -> Iterator[CompiledCase]:
    """Tails of the four stages of a ResNet-50, and networks.

    Args:
        quick: One small tail.
    """
    for channels, height, width in [(64, 28, 28)] if quick else STAGES:
        for memory_format in ("channels_last",) if quick else MEMORY_FORMATS:
            builders: dict[str, Callable[[], nn.Module]] = {
                "no gate": lambda c=channels: Tail(nn.BatchNorm2d(c), None),
                "ecanet": lambda c=channels: FusedTail(nn.BatchNorm2d(c), ECA(c)),
                "timm": lambda c=channels: Tail(nn.BatchNorm2d(c), EcaModule(c)),
                "SE": lambda c=channels: Tail(nn.BatchNorm2d(c), SqueezeExcitation(c, c // 16)),
            }
            yield CompiledCase(
                "tail", (32 if quick else _BATCH, channels, height, width), memory_format, True, builders
            )
    if quick:
        return
    for network in _NETWORKS:
        for training in (True, False):
            builders = {name: NETWORKS[network][name] for name in _COMPETITORS}
            yield CompiledCase(network, (_BATCH, 3, 224, 224), "channels_last", training, builders)


def count(case: CompiledCase, build: Callable[[], nn.Module]) -> Traffic:
    """Compile one competitor for a simulated GPU, and count what it moves."""
    generated: dict[bool, simulated_gpu.GeneratedCode] = {}
    with FakeTensorMode():
        model = _in_bfloat16(build()).train(case.training)
        maps = [_map(case) for _ in range(2 if case.name == "tail" else 1)]
        with ecanet.backend("reference"), torch.set_grad_enabled(case.training):  # as on a GPU: no kernels of a CPU
            graphs: dict[bool, tuple[torch.fx.GraphModule, list[Any]]] = {}
            out = simulated_gpu.capture(
                lambda inputs: model(*inputs), maps, lambda back, *graph: graphs.update({back: graph})
            )
            if case.training:
                wanted = [*(maps if case.name == "tail" else ()), *model.parameters()]
                torch.autograd.grad(out, wanted, torch.empty_like(out))
    for is_backward, (graph, inputs) in graphs.items():
        generated[is_backward] = simulated_gpu.generate(*_on_gpu(graph, inputs), is_backward)
    backward = generated[True].bytes if case.training else 0
    return Traffic(generated[False].bytes, backward, sum(code.kernels for code in generated.values()))


def _map(case: CompiledCase) -> Tensor:
    x = torch.empty(case.shape, dtype=torch.bfloat16).to(memory_format=MEMORY_FORMATS[case.memory_format])
    return x.requires_grad_(case.training and case.name == "tail")


def _in_bfloat16(model: nn.Module) -> nn.Module:
    """The model with weights as autocast gives them to convolutions, norms in float32, and no dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            for name, weight in list(module.named_parameters(recurse=False)):
                half = torch.empty(weight.shape, dtype=torch.bfloat16)
                half = half.to(memory_format=torch.channels_last) if weight.dim() == 4 else half
                setattr(module, name, nn.Parameter(half))
    return model


def _on_gpu(graph: torch.fx.GraphModule, inputs: list[Any]) -> tuple[torch.fx.GraphModule, list[Any]]:
    """The graph for tensors on a GPU. It was captured on the CPU, because autograd asks a GPU's driver."""
    graph = copy.deepcopy(graph)
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    graph.recompile()
    with FakeTensorMode() as mode:
        moved = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") if isinstance(t, Tensor) else t
            for t in inputs
        ]
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*moved)
    return graph, moved


def report(document: results.Document) -> str:
    """A table: GB that no gate moves, what the others move in relation to it, and numbers of kernels."""
    lines = [
        "What kernels of torch.compile read and write on a GPU, relative to no gate (counted by Inductor; kernels)",
        f"{'':44}{'GB':>8}" + "".join(f"{name:>16}" for name in _COMPETITORS),
    ]
    for key, case in document["cases"].items():
        total = {name: case[name]["forward"] + case[name]["backward"] for name in _COMPETITORS}
        row = [f"{total[name] / total['no gate']:.3f} ({case[name]['kernels']})" for name in _COMPETITORS]
        lines.append(f"{key:44}{total['no gate'] / 1e9:8.3f}" + "".join(f"{cell:>16}" for cell in row))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Count, print the table, write JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.traffic",
        description="Count the bytes that compiled networks with a gate and without move through a GPU's memory in a "
        "step of training and at inference. No GPU is needed: Inductor generates code for an H100 and counts. "
        "This does not measure time; kernels bound by memory take time in proportion.",
        epilog="Example: python -m benchmarks.traffic --quick",
    )
    parser.add_argument("--quick", action="store_true", help="one small tail, to see whether it runs")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: benchmarks/results/traffic.json")
    args = parser.parse_args(argv)
    path = args.out or Path(f"benchmarks/results/{'quick-' * args.quick}traffic.json")
    document: results.Document = {
        "command": f"{parser.prog}{' --quick' * args.quick}",
        "settings": {"gpu": "H100, simulated", "batch": _BATCH, "dtype": "bfloat16", "quick": args.quick},
        **describe(torch.get_num_threads()),
        "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "cases": {},
    }
    simulated_gpu.start()
    warnings.filterwarnings("ignore", "Your compiler for AOTAutograd")
    for case in cases(args.quick):
        run.say(case.key)
        document["cases"][case.key] = {name: count(case, case.builders[name])._asdict() for name in _COMPETITORS}
        results.write(path, document)
    print(report(document))


if __name__ == "__main__":
    main()
