"""Decodes every picture before training, and lists all that cannot be read."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from ecanet.train.data.pictures import what_is_wrong
from ecanet.train.data.splits import Splits


class Named(Protocol):
    """Pictures with names, for errors."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def name(self, index: int) -> str:
        """The name of a picture in errors: its file, or its place in a table."""


def verify_images(splits: Splits) -> None:
    """Decode every picture of a folder or table, with a progress bar if stderr is a terminal.

    Raises:
        ValueError: some pictures cannot be read; the message lists the first 20, and says how many there are.
        ModuleNotFoundError: tqdm is missing.

    Example:
        >>> verify_images(image_folder("photos"))  # doctest: +SKIP
    """
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("verify_images needs tqdm: pip install 'ecanet[train]'", name="tqdm") from error
    parts: list[Named] = [splits.train, splits.val]  # type: ignore[list-item]
    total, bad = sum(map(len, parts)), list[str]()
    chunk = 4096  # a pool queues all its tasks at once, and ImageNet has over a million files
    progress: Any = tqdm(total=total, desc="verifying images", unit="image", disable=None, leave=False)
    with ThreadPoolExecutor() as pool, progress as bar:
        for part in parts:
            for start in range(0, len(part), chunk):
                indices = range(start, min(start + chunk, len(part)))
                for problem in pool.map(_problem_with_image, [part] * len(indices), indices):
                    bar.update()
                    if problem is not None:
                        bad.append(problem)
    if bad:
        listed = list_first(bad, separator=";\n  ")
        raise ValueError(f"{len(bad)} of {total} images cannot be read, remove or replace them:\n  {listed}")


def _problem_with_image(images: Named, index: int) -> str | None:
    """What is wrong with an image, or None."""
    try:
        images[index]
    except (OSError, ValueError) as error:
        return f"{images.name(index)}: {what_is_wrong(error.__cause__ or error)}"
    return None


def list_first(items: Iterable[str], separator: str = ", ") -> str:
    """The first 20 items, and how many more there are."""
    all_items = list(items)
    more = [f"and {len(all_items) - 20} more"] if len(all_items) > 20 else []
    return separator.join(all_items[:20] + more)
