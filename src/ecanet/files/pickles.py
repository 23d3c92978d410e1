"""What a file of ``torch.save`` would make, told without making it."""

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

#: Bytes of one value, by the storage classes of torch.
_STORAGES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "ComplexDoubleStorage": 16,
    "ComplexFloatStorage": 8, "UntypedStorage": 1, "QInt8Storage": 1, "QUInt8Storage": 1, "QInt32Storage": 4,
}  # fmt: skip
#: What honest checkpoints name: how tensors are put together, and how they are ordered. All of it takes as much memory
#: as storages have; other things that torch would make as well, such as ``bytearray``, take what they are told to.
_KNOWN = {
    *(("torch", name) for name in _STORAGES),
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
#: Of these, what may not be called: it would make memory of a size it is told.
_NOT_CALLED = {name for module, name in _KNOWN if module in ("torch", "torch.storage") and name.endswith("Storage")}
_NOT_CALLED |= {"Tensor"}
#: Most parts of a file: a network's tensors, and as many again of an optimizer.
_ENTRIES = 50_000
#: The first pickle of a file from before torch 1.6.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class _Nothing:
    """Stands for whatever a pickle names, so that nothing of it is found, called or filled."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *_: Any) -> "_Nothing":
        if self.name in _NOT_CALLED:
            raise ValueError(f"it makes a {self.name} of a size of its own")
        return _Nothing("")

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """As of a list."""

    def extend(self, values: Any) -> None:
        """As of a list."""

    def add(self, value: Any) -> None:
        """As of a set."""


class _Look(pickle.Unpickler):
    """Reads a pickle for what it names and which storages it wants, and makes nothing but plain values."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise ValueError(f"it holds GLOBAL {module}.{name} , which no tensor or plain value needs")
        return _Nothing(name)

    def persistent_load(self, pid: Any) -> Any:
        kind, storage, key, _, count = pid[:5]
        if kind != "storage" or type(count) is not int or count < 0:
            raise ValueError("it holds a storage of no size")
        size = count * _STORAGES.get(getattr(storage, "name", ""), 1)
        self.storages[str(key)] = max(size, self.storages.get(str(key), 0))  # torch believes the first of several
        return _Nothing("")


def check_pickles(path: Path) -> None:
    """Raise unless what a file of ``torch.save`` makes of itself is no more than it holds.

    Args:
        path: A file of torch's format, of today or from before torch 1.6.

    Raises:
        ValueError: it is compressed, names something else than tensors and plain values are made of, or storages that
            are larger than the file.
        Exception: it is damaged; of whatever type reading found.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"
        file.seek(0)
        looks = list(_in_archive(path, size) if is_archive else _in_sequence(file))
    storages: dict[str, int] = {}
    for look in looks:
        storages |= look.storages
    if sum(storages.values()) > size:
        raise ValueError(f"its tensors claim {sum(storages.values()):,} bytes, and the file has {size:,}")


def _in_archive(path: Path, size: int) -> Iterator[_Look]:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len(entries) > _ENTRIES:
            raise ValueError(f"it has {len(entries):,} parts, more than {_ENTRIES:,}")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, which torch.save does not do, and could come to any size")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("its parts come to more than the file has")
        for entry in entries:
            if entry.filename.lower().endswith(".pkl"):  # torch finds its parts whatever the case
                with archive.open(entry) as file:
                    yield _read(file)[0]


def _in_sequence(file: IO[bytes]) -> Iterator[_Look]:
    """A magic number, a version, the machine, the object, and the keys of the storages that follow."""
    if _read(file)[1] != _LEGACY_MAGIC:
        return  # torch says what it thinks of it
    _read(file)
    _read(file)
    look, _ = _read(file)
    yield look
    keys = _read(file)[1]
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(look.storages):
        raise ValueError("the storages that follow are not those that its tensors want")


def _read(file: IO[bytes]) -> tuple[_Look, Any]:
    look = _Look(file)
    return look, look.load()
