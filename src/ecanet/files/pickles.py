"""Inspects a file of ``torch.save`` without creating anything that it describes."""

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

#: Bytes of one value in each of torch's storage classes.
_BYTES_PER_VALUE = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "ComplexDoubleStorage": 16,
    "ComplexFloatStorage": 8, "UntypedStorage": 1, "QInt8Storage": 1, "QUInt8Storage": 1, "QInt32Storage": 4,
}  # fmt: skip
#: What honest checkpoints refer to: tensors, their parts, and ordered dictionaries. None of these take more memory
#: than the storages hold. Torch would accept other names, such as ``bytearray``, which allocate any size that a file
#: asks for.
_ALLOWED = {
    *(("torch", name) for name in _BYTES_PER_VALUE),
    *(("torch.storage", name) for name in ("UntypedStorage", "TypedStorage", "_LegacyStorage")),
    *(("torch", name) for name in ("Size", "device", "Tensor", "strided")),
    *(("torch", str(dtype).removeprefix("torch.")) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_parameter_with_state"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"),
    ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
}
#: Allowed names that must not be called: they would allocate any size that a file asks for.
_NEVER_CALLED = {name for module, name in _ALLOWED if module in ("torch", "torch.storage") and name.endswith("Storage")}
_NEVER_CALLED |= {"Tensor"}
#: Most parts a file may have: enough for a network's tensors and an optimizer's.
_MAX_PARTS = 50_000
#: The first pickle of a file from before torch 1.6.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class _Placeholder:
    """Stands in for everything that a pickle refers to, so that nothing is imported, called or filled."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *_: Any) -> "_Placeholder":
        if self.name in _NEVER_CALLED:
            raise ValueError(f"it creates a {self.name} of any size that it names")
        return _Placeholder("")

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Ignore, as a list."""

    def extend(self, values: Any) -> None:
        """Ignore, as a list."""

    def add(self, value: Any) -> None:
        """Ignore, as a set."""


class _Inspector(pickle.Unpickler):
    """Reads which names and storages a pickle refers to, and creates only plain values."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ValueError(f"it holds GLOBAL {module}.{name} , which no tensor or plain value needs")
        return _Placeholder(name)

    def persistent_load(self, pid: Any) -> Any:
        kind, storage, key, _, count = pid[:5]
        if kind != "storage" or type(count) is not int or count < 0:
            raise ValueError("it holds a storage without a valid size")
        size = count * _BYTES_PER_VALUE.get(getattr(storage, "name", ""), 1)
        self.storages[str(key)] = max(size, self.storages.get(str(key), 0))  # torch trusts the first of several
        return _Placeholder("")


def check_pickles(path: Path) -> None:
    """Raise unless loading a file of ``torch.save`` creates only tensors and plain values, no larger than the file.

    Args:
        path: A file in torch's format, the current one or that from before torch 1.6.

    Raises:
        ValueError: it is compressed, refers to something that tensors and plain values do not need, or claims storages
            that are larger than the file.
        Exception: it is damaged; the type is whatever the reader raised.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"
        file.seek(0)
        inspectors = list(_inspect_archive(path, size) if is_archive else _inspect_legacy_file(file))
    storages: dict[str, int] = {}
    for inspector in inspectors:
        storages |= inspector.storages
    if sum(storages.values()) > size:
        raise ValueError(f"its tensors claim {sum(storages.values()):,} bytes, and the file has {size:,}")


def _inspect_archive(path: Path, size: int) -> Iterator[_Inspector]:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len(entries) > _MAX_PARTS:
            raise ValueError(f"it has {len(entries):,} parts, more than {_MAX_PARTS:,}")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, which torch.save does not do, and could unpack to any size")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("its parts add up to more than the file's size")
        for entry in entries:
            if entry.filename.lower().endswith(".pkl"):  # torch ignores case here
                with archive.open(entry) as file:
                    yield _read(file)[0]


def _inspect_legacy_file(file: IO[bytes]) -> Iterator[_Inspector]:
    """The file holds a magic number, a version, the machine, the object, and the keys of the storages that follow."""
    if _read(file)[1] != _LEGACY_MAGIC:
        return  # torch raises its own error
    _read(file)
    _read(file)
    inspector, _ = _read(file)
    yield inspector
    keys = _read(file)[1]
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(inspector.storages):
        raise ValueError("the storages that follow are not those that its tensors refer to")


def _read(file: IO[bytes]) -> tuple[_Inspector, Any]:
    inspector = _Inspector(file)
    return inspector, inspector.load()
