"""What every test starts from: one thread, fixed seeds, and uninitialised memory that shows."""

import gc
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before anything imports triton: without a GPU its kernels run in its interpreter.
if not any(os.path.exists(device) for device in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
import torch
from PIL import Image

if TYPE_CHECKING:
    from ecanet.train import Recipe

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes that import torch and wait for code
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS is not deterministic
torch.set_num_threads(1)

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device of this machine in turn."""
    return torch.device(request.param)


@pytest.fixture(autouse=True, scope="module")
def _what_was_there_before_is_no_garbage() -> None:
    """The collector need not look through a million objects of torch again and again: a third of a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """Let ``torch.empty`` and its kin, C++ ones too, return NaN: an output that a kernel forgets to write then fails.

    Torch does so only where deterministic algorithms are asked for; operations without one keep theirs.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill


CLASSES = ("bag", "boot", "coat")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 training and 6 validation images of 12 x 12 pixels in each of three classes."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 20), ("val", 6)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(0, 60, (3, 12, 12), generator=generator)
                noise[label] += 120
                Image.fromarray(noise.to(torch.uint8).permute(1, 2, 0).numpy()).save(folder / f"{i:02}.png")
    return root


@pytest.fixture
def tiny(image_folder: Path) -> "Callable[..., Recipe]":
    """A recipe of 3 epochs of 8 steps that takes a second, with every source of chance on."""
    from ecanet.train import DataConfig, ModelConfig, OptimConfig, Recipe, TrainerConfig

    def make(
        *,
        seed: int = 0,
        epochs: int = 3,
        workers: int = 0,
        precision: str = "32-true",
        gate: str | None = "eca",
        checkpoint_steps: int | None = 3,
        mixing: float = 0.3,
        **optim: object,
    ) -> "Recipe":
        return Recipe(
            ModelConfig("small_eca_resnet", gate=gate, options={"widths": [8, 16]}),
            DataConfig("image_folder", root=image_folder, image_size=12, resize=12, batch_size=8, workers=workers),
            OptimConfig(epochs=epochs, mixup=mixing, cutmix=mixing, warmup_epochs=0.5, **optim),  # type: ignore[arg-type]
            TrainerConfig(seed=seed, accelerator="cpu", checkpoint_steps=checkpoint_steps, precision=precision),
        )

    return make
