"""The result file: all measurements, and the machine and settings they were made with; written after every case."""

import json
from pathlib import Path
from typing import Any

from ecanet.files.atomic import write_whole

#: A run can only be resumed if these are the same.
_SAME = ("settings", "machine", "versions", "kernels", "commit")

Document = dict[str, Any]


def write(path: Path, document: Document) -> None:
    """Replace the file in one step: a killed run leaves the last complete one."""
    write_whole(path, _dumps(document) + "\n")


def read(path: Path) -> Document:
    """Read a result file.

    Raises:
        ValueError: it is not a result file.
    """
    try:
        document = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a result file: {error}") from error
    if not isinstance(document, dict) or "cases" not in document:
        raise ValueError(f"{path} is not a result file: it has no cases")
    return document


def resume(path: Path, header: Document) -> Document:
    """The document of an earlier run, to be continued; without cases if there is no file.

    Args:
        path: The result file.
        header: Settings and machine of the present run.

    Raises:
        ValueError: the file was measured with other settings, on another machine or from another commit.
    """
    if not path.exists():
        return {"cases": {}}
    before = read(path)
    for name in _SAME:
        if _without_ceilings(before.get(name)) != _without_ceilings(header[name]):
            raise ValueError(
                f"{path} cannot be resumed, its {name} differ: {before.get(name)} there, {header[name]} now; "
                "measure again without --resume, or write to another file"
            )
    return before


def _without_ceilings(value: Any) -> Any:
    """A header's value without what every run measures again: the ceilings of the GPU."""
    if not isinstance(value, dict) or "gpu" not in value:
        return value
    return {**value, "gpu": {k: v for k, v in (value["gpu"] or {}).items() if "_per_second" not in k}}


def _dumps(document: Document) -> str:
    """Indented JSON with one line per case: the file stays short and its differences readable."""
    rest = {name: value for name, value in document.items() if name != "cases"}
    cases = ",\n".join(f"    {json.dumps(key)}: {json.dumps(case)}" for key, case in document["cases"].items())
    head = json.dumps(rest, indent=2, ensure_ascii=False).removesuffix("\n}")
    return f'{head},\n  "cases": {{\n{cases}\n  }}\n}}'
