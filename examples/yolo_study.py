"""Does attention help a YOLO on your data? A paired study with Ultralytics' own training.

pip install 'ecanet[study,ultralytics]'
python examples/yolo_study.py trees.yaml --model yolo11n.pt --gates none,eca,gct --seeds 7 --epochs 50

`trees.yaml` describes the data as Ultralytics reads them. The first of the gates is the baseline. Gates are put after
each convolution and start at 1, so that trained weights keep what they know. A run that is killed goes on from its
last.pt. Ultralytics is under the AGPL-3.0.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch

import ecanet
from ecanet.nn import build_gate
from ecanet.study import Study, run


def train(condition: dict[str, Any], seed: int, folder: Path) -> dict[str, float]:
    """Train one detector, or go on with it, and return what its best epoch reached on the validation pictures."""
    os.environ.setdefault("YOLO_VERBOSE", "false")  # the study's own display stays readable
    from ultralytics import YOLO

    last = folder / "run" / "weights" / "last.pt"
    if last.is_file() and (yolo := YOLO(last)).ckpt["epoch"] >= 0:  # it is -1 in the file of a training that ended
        metrics = yolo.train(resume=True)
    else:
        torch.manual_seed(seed)  # the weights of a network that is built from a .yaml
        yolo = YOLO(condition["model"])
        if condition["gate"] is not None:
            ecanet.insert_gates_(yolo.model, condition["gate"], where="conv")
        metrics = yolo.train(project=str(folder), name="run", exist_ok=True, seed=seed, **condition["train"])
    return {"mAP50-95": 100 * float(metrics.box.map), "mAP50": 100 * float(metrics.box.map50)}


def study(
    data: Path,
    model: str,
    gates: list[str],
    seeds: int,
    out: Path,
    settings: dict[str, Any],
    workers: int | None = None,
) -> Study:
    """Run the study, or go on with it.

    Args:
        data: Ultralytics' description of the data.
        model: A ``.pt`` or a ``.yaml`` of Ultralytics'.
        gates: Names that ``ecanet gates`` explains, or ``none``; the first is the baseline.
        seeds: Seeds of each.
        out: Folder of the study.
        settings: Passed to ``YOLO.train``: ``epochs``, ``imgsz``, ``batch`` and so on.
        workers: Trainings at a time.

    Raises:
        FileNotFoundError: there is no such description.
        ValueError: a gate is unknown.
    """
    for gate in set(gates) - {"none"}:
        build_gate(gate, 64)  # an unknown name is an error here, and not in every run
    shared = {"model": model, "train": {"data": str(data.resolve(strict=True)), **settings}}
    conditions = {gate: {"gate": None if gate == "none" else gate, **shared} for gate in gates}
    return run(train, conditions, range(seeds), out, metric="mAP50-95", workers=workers)


def main() -> None:
    """Read the command line and print the study's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="Ultralytics' description of the data, a .yaml.")
    parser.add_argument("--model", default="yolo11n.pt", help="A .pt or a .yaml of Ultralytics'.")
    parser.add_argument("--gates", default="none,eca", help="Gates with commas between, the baseline first.")
    parser.add_argument("--seeds", type=int, default=6, help="Seeds of each; fewer than 6 can show nothing.")
    parser.add_argument("--epochs", type=int, default=50, help="Epochs of each training.")
    parser.add_argument("--imgsz", type=int, default=640, help="Side of the pictures, in pixels.")
    parser.add_argument("--batch", type=int, default=16, help="Pictures in a step.")
    parser.add_argument("--workers", type=int, default=None, help="Trainings at a time.")
    parser.add_argument("--out", type=Path, default=Path("runs/yolo_study"), help="Folder of the study.")
    args = parser.parse_args()
    settings = {"epochs": args.epochs, "imgsz": args.imgsz, "batch": args.batch}
    print(study(args.data, args.model, args.gates.split(","), args.seeds, args.out, settings, args.workers))


if __name__ == "__main__":  # the processes that run `train` import this file
    main()
