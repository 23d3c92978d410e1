"""The result file: everything that was measured and what it was measured on, written after every case."""

import json
from pathlib import Path
from typing import Any

from ecanet.files.atomic import write_whole

#: A run that differs in one of these is another run.
_SAME = ("settings", "machine", "versions", "kernels", "commit")

Document = dict[str, Any]


def write(path: Path, document: Document) -> None:
    """Replace the file in one step: a killed run leaves the last complete one."""
    write_whole(path, _dumps(document) + "\n")


def read(path: Path) -> Document:
    """Read a result file.

    Raises:
        ValueError: it is none.
    """
    try:
        document = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a result file: {error}") from error
    if not isinstance(document, dict) or "cases" not in document:
        raise ValueError(f"{path} is not a result file: it has no cases")
    return document


def resume(path: Path, header: Document) -> Document:
    """What an earlier run has found, to go on with; no cases where there is no file.

    Args:
        path: The result file.
        header: What is measured now, and on what.

    Raises:
        ValueError: the file was measured in another way, on another machine or from another commit.
    """
    if not path.exists():
        return {"cases": {}}
    before = read(path)
    for name in _SAME:
        if _given(before.get(name)) != _given(header[name]):
            raise ValueError(
                f"{path} cannot be resumed, its {name} differ: {before.get(name)} there, {header[name]} now; "
                "measure again without --resume, or write to another file"
            )
    return before


def _given(value: Any) -> Any:
    """Without what is measured anew in every run: the ceilings of the GPU."""
    if not isinstance(value, dict) or "gpu" not in value:
        return value
    return {**value, "gpu": {k: v for k, v in (value["gpu"] or {}).items() if "_per_second" not in k}}


def _dumps(document: Document) -> str:
    """Indented, but a case a line: the file stays short and its differences readable."""
    rest = {name: value for name, value in document.items() if name != "cases"}
    cases = ",\n".join(f"    {json.dumps(key)}: {json.dumps(case)}" for key, case in document["cases"].items())
    head = json.dumps(rest, indent=2, ensure_ascii=False).removesuffix("\n}")
    return f'{head},\n  "cases": {{\n{cases}\n  }}\n}}'
