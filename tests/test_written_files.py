"""Files are written whole: nothing in the library or the benchmarks writes one otherwise, except what is named here."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "ecanet"
#: The only places that write otherwise, and why.
EXCEPTIONS = [
    "cli/command.py: os.open(os.devnull, os.O_WRONLY)",  # after a reader of stdout has left
    "cli/options.py: path.write_bytes(data)",  # into a pipe or a device
    "files/atomic.py: partial.open('wb')",  # this is how files are written whole
    "ops/build.py: linked.open('r+b')",  # the linker's output, renamed afterwards
]

#: Functions and methods that write the file they are given, whoever's they are.
_WRITERS = {
    *("write_text", "write_bytes", "save", "savefig", "imsave", "imwrite", "write_png", "write_jpeg", "savez"),
    *(
        "savez_compressed",
        "savetxt",
        "save_file",
        "save_model",
        "tofile",
        "to_csv",
        "to_json",
        "to_parquet",
        "to_excel",
    ),
    *("write_csv", "write_parquet", "write_table", "write_video", "mimsave", "print_png", "memmap", "touch"),
    *("FileHandler", "SummaryWriter", "NamedTemporaryFile", "mkstemp", "truncate", "link"),
    *("symlink", "symlink_to", "hardlink_to", "copy", "copy2", "copyfile", "copyfileobj", "copytree", "move"),
}
#: They open files; the mode is one of their arguments.
_OPENERS = {"open", "fdopen", "ZipFile", "TarFile", "GzipFile", "BZ2File", "LZMAFile", "FileIO", "File"}
#: Of these names, only the functions of shutil write files.
_OF_SHUTIL = {"copy", "copy2", "copyfile", "copyfileobj", "copytree", "move"}


def writes(source: str) -> Iterator[str]:
    """The calls in a source that write a file, as ``ast`` prints them; those into memory are left out."""
    tree = ast.parse(source)
    in_memory = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and re.match(r"io\.(BytesIO|StringIO)\(", ast.unparse(node.value))
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not (node.module or "ecanet").startswith(("ecanet", "benchmarks"))
        for alias in node.names
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        if any(isinstance(argument, ast.Name) and argument.id in in_memory for argument in given):
            continue
        function = ast.unparse(node.func)
        of, _, name = imported.get(function, function).rpartition(".")
        either = [way for each in given if isinstance(each, ast.IfExp) for way in (each.body, each.orelse)]
        modes = [argument.value for argument in [*given, *either] if isinstance(argument, ast.Constant)]
        opens = name in _OPENERS and any(
            isinstance(mode, str) and re.fullmatch(r"(?=.*[wax+])[rwaxbt+]+([:|]\w*)?", mode) for mode in modes
        )
        creates = of == "os" and name == "open" and re.search(r"O_(WRONLY|RDWR|CREAT|APPEND)", ast.unparse(node))
        writer = name in _WRITERS and (of == "shutil" if name in _OF_SHUTIL else of != "")
        if opens or creates or writer:
            yield ast.unparse(node)


def test_nothing_else_in_the_library_writes_files() -> None:
    found = [
        f"{path.relative_to(SOURCES)}: {call}"
        for path in sorted(SOURCES.rglob("*.py"))
        for call in writes(path.read_text())
    ]
    assert sorted(found) == sorted(EXCEPTIONS), "use ecanet.files.atomic.write_whole or safe_save: CONTRIBUTING.md"


def test_nothing_in_the_benchmarks_does() -> None:
    sources = {str(path): path.read_text() for path in (ROOT / "benchmarks").rglob("*.py")}
    found = [f"{name}: {call}" for name, source in sources.items() for call in writes(source)]
    assert found == [], "use ecanet.files.atomic.write_whole, for pictures benchmarks.report.save_picture"


@pytest.mark.parametrize(
    "call",
    [
        "open(path, 'w')",
        "open(path, mode='a')",
        "path.open('r+b')",
        "gzip.open(path, 'wb')",
        "os.open(path, os.O_WRONLY | os.O_CREAT)",
        "os.fdopen(handle, 'w')",
        "zipfile.ZipFile(path, 'w')",
        "path.write_text(text)",
        "Path('a').write_bytes(b'')",
        "figure.savefig(path)",
        "torch.save(state, path)",
        "image.save(path)",
        "shutil.copy(a, b)",
        "path.open('w' if new else 'a')",
        "tarfile.open(path, 'w:gz')",
        "gzip.GzipFile(path, 'wb')",
        "np.savez_compressed(path, a=a)",
        "os.truncate(path, 0)",
    ],
)
def test_every_way_to_write_a_file_is_noticed(call: str) -> None:
    assert list(writes(f"def f():\n    {call}")) == [call]


@pytest.mark.parametrize("imported", ["from torch import save", "from numpy import savez as save"])
def test_a_function_is_known_by_what_it_was_imported_from(imported: str) -> None:
    assert list(writes(f"{imported}\nsave(path, values)")) == ["save(path, values)"]


@pytest.mark.parametrize(
    "code",
    [
        "open(path)",
        "open(path, 'rb')",
        "path.open(encoding='utf-8')",
        "os.open(path, os.O_RDONLY)",
        "picture = io.BytesIO()\nfigure.savefig(picture)",
        "buffer = io.BytesIO()\ntorch.save(state, buffer)",
        "values.copy()",
        "save(model, insertion, path)",
        "write_whole(path, text)",
    ],
)
def test_reading_and_writing_into_memory_are_not_meant(code: str) -> None:
    assert list(writes(code)) == []
