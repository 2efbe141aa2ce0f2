"""Read files of weights, of ``torch.save`` or safetensors, without running code from them.

``torch.load(weights_only=True)`` refuses a whole file for one harmless extra, such as an ``argparse.Namespace``. Here
only tensors and plain containers become real objects. Every other class or function that a file names becomes a
``Placeholder``, which keeps what it is given and does nothing. So the checkpoint of any trainer can be searched for its
tensors, without the packages that it was written with. Tensors are mapped from the file into memory where possible.
"""

from __future__ import annotations

import itertools
import math
import os
import pickle
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor

EXPECTED = "expected a file written by torch.save or safetensors"

# How files of other kinds start.
ARCHIVES = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"7z\xbc\xaf": "7z",
}
OTHER_KINDS = {
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"\x80": "a Python pickle that torch.save has not written",
}

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file from before PyTorch 1.6
LEGACY_PROTOCOL = 1001
LEGACY_HEAD = LEGACY_MAGIC.to_bytes(10, "little")  # these bytes occur in that pickle

# The element types of PyTorch's storage classes, by the name without "Storage".
DTYPES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Untyped": torch.uint8,
    "QInt8": torch.int8,
    "QUInt8": torch.uint8,
    "QInt32": torch.int32,
    "QUInt4x2": torch.uint8,
    "QUInt2x4": torch.uint8,
}

# Functions of torch._utils that make tensors which are not plain numbers in memory.
UNUSABLE = {
    "_rebuild_qtensor": "quantised",
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_sparse_csr_tensor": "sparse",
    "_rebuild_nested_tensor": "nested",
    "_rebuild_meta_tensor_no_storage": "meta",
    "_rebuild_wrapper_subclass": "of a tensor subclass",
    "_rebuild_device_tensor_from_numpy": "of another device",
    "_rebuild_device_tensor_from_cpu_tensor": "of another device",
}

# A pickle calls classes and functions. None is called here, but a file with a call that can do more than make data is
# refused. Classes (a capital letter, by convention), functions of DATA_MODULES and DATA_BUILTINS make data.
DATA_MODULES = {"torch", "numpy", "collections", "datetime", "copyreg", "_codecs", "functools", "array", "zoneinfo"}
DATA_BUILTINS = {"set", "frozenset", "complex", "bytearray", "slice", "range", "list", "dict", "tuple", "object"}
DATA_BUILTINS |= {"int", "float", "str", "bytes", "bool"}
CODE_MODULES = {"builtins", "os", "posix", "nt", "sys", "subprocess", "importlib", "multiprocessing", "threading"}


class WeightFileError(ValueError):
    """A file that cannot be read. The message says what is wrong with it; it continues after the file's name."""


@dataclass(frozen=True)
class UnusableTensor:
    """A tensor that cannot be read as plain numbers.

    Attributes:
        kind: what it is, such as "sparse".
    """

    kind: str


@dataclass(frozen=True)
class StorageRef:
    """The numbers of one or more tensors."""

    untyped: torch.UntypedStorage
    dtype: torch.dtype


class PlaceholderType(type):
    """The type of placeholder classes: they cannot be changed by a file, and only data can be made with them."""

    path: str

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.path == "builtins.getattr" and len(args) == 2 and isinstance(args[0], Placeholder | PlaceholderType):
            return placeholder_class(f"{args[0].path}.{args[1]}")  # a method or an enum member, by name
        if not makes_data(cls.path):
            raise WeightFileError(
                f"calls {cls.path}, which can run code (nothing was run); expected a file of tensors and plain data"
            )
        return cls.__new__(cls, *args, **kwargs)  # type: ignore[arg-type] # mypy does not see a class here

    def __setattr__(cls, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"{cls.path} cannot be changed")


class Placeholder(dict[Any, Any], metaclass=PlaceholderType):
    """An object of a class that is not loaded. It is a dict, because many such classes are.

    Attributes:
        path: module and name of the class or function.
        state: what the object's attributes would be set from.
    """

    path = ""
    state: object

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        made: Placeholder = dict.__new__(cls)
        made.state = None
        pairs = args[0] if args else ()  # an OrderedDict of Python 2 gets its items as pairs
        if isinstance(pairs, Mapping):
            made.update(pairs)
        elif isinstance(pairs, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            made.update({key: value for key, value in pairs})
        return made

    def __setstate__(self, state: object) -> None:
        self.state = state

    def append(self, item: object) -> None:
        """Ignore an item of a list or a set: it is not needed."""

    add = append

    def extend(self, items: object) -> None:
        """Ignore items of a list."""

    __hash__ = object.__hash__  # type: ignore[assignment] # it may be a key of a dict, or in a set
    __eq__ = object.__eq__


def makes_data(path: str) -> bool:
    """Return whether a call of the class or function ``path`` only makes data, as far as its name shows."""
    module, _, name = path.partition(".")
    last = path.rpartition(".")[2].lstrip("_")
    if module in CODE_MODULES:
        return module == "builtins" and name in DATA_BUILTINS
    return module in DATA_MODULES or path == "re._compile" or last[:1].isupper()


def placeholder_class(path: str) -> PlaceholderType:
    """A fresh placeholder for the class or function ``path``."""
    return PlaceholderType(path.rpartition(".")[2] or path, (Placeholder,), {"path": path})


class Maker:
    """A function of this module, as a file may call it. The file cannot change the function itself."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., object]):
        self.function = function

    def __call__(self, *args: object) -> object:
        return self.function(*args)


def make_tensor(storage: StorageRef, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> object:
    """A tensor in a storage: ``torch._utils._rebuild_tensor`` and ``_rebuild_tensor_v2``."""
    return tensor_of_type(storage, storage.dtype, offset, size, stride)


def make_tensor_v3(
    storage: StorageRef,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    hooks: object,
    dtype: torch.dtype,
    *_: object,
) -> object:
    """A tensor in a storage of bytes: ``torch._utils._rebuild_tensor_v3``."""
    return tensor_of_type(storage, dtype, offset, size, stride)


def tensor_of_type(
    storage: StorageRef, dtype: torch.dtype, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    """A tensor in a storage, as numbers of ``dtype``.

    Raises:
        UnpicklingError: the tensor is larger than the storage.
    """
    size, stride = tuple(size), tuple(stride)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if math.prod(size) else -1
    if min((0, offset, *size, *stride)) < 0 or (last + 1) * dtype.itemsize > storage.untyped.nbytes():
        raise pickle.UnpicklingError("a tensor is larger than its storage")
    return torch.empty(0, dtype=dtype).set_(storage.untyped, offset, size, stride)


def make_subclass(function: Callable[..., object], subclass: object, args: tuple[object, ...], *_: object) -> object:
    """A tensor with attributes or of a subclass, as a plain tensor: ``torch._tensor._rebuild_from_type_v2``."""
    return function(*args)


def first_argument(tensor: object, *_: object) -> object:
    """The tensor of a parameter: ``torch._utils._rebuild_parameter`` and ``_rebuild_parameter_with_state``."""
    return tensor


def encode(text: str, *_: object) -> bytes:
    """Bytes, which pickles of protocol 2 hold as text: ``_codecs.encode``."""
    return text.encode("latin1")


MAKERS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": make_tensor,
    "torch._utils._rebuild_tensor_v2": make_tensor,
    "torch._utils._rebuild_tensor_v3": make_tensor_v3,
    "torch._utils._rebuild_parameter": first_argument,
    "torch._utils._rebuild_parameter_with_state": first_argument,
    "torch._tensor._rebuild_from_type_v2": make_subclass,
    "_codecs.encode": encode,
}
MAKERS |= {f"torch._utils.{name}": lambda *_, kind=kind: UnusableTensor(kind) for name, kind in UNUSABLE.items()}


class SafeUnpickler(pickle.Unpickler):
    """An unpickler that loads no class and calls no function of the file.

    Args:
        file: is read from its present position to the end of one pickle.
        storage: returns the storage of a persistent id's fields.
    """

    def __init__(self, file: IO[bytes], storage: Callable[..., object] | None = None):
        super().__init__(file, encoding="latin1")  # for text of Python 2
        self.storage = storage

    def find_class(self, module: str, name: str) -> object:
        """A placeholder for a class or a function, or what makes a tensor."""
        module, name = NAME_MAPPING.get((module, name), (module, name))  # protocol 2 has the names of Python 2
        path = f"{IMPORT_MAPPING.get(module, module)}.{name}"
        if path in MAKERS:
            return Maker(MAKERS[path])
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return placeholder_class(path)

    def persistent_load(self, pid: object) -> object:
        """The storage that a persistent id names."""
        if isinstance(pid, tuple) and pid and self.storage:
            if pid[0] == "storage":
                return self.storage(*pid[1:])
            if pid[0] == "module":  # of a whole pickled module, with its source, which is ignored
                return pid[1]
        raise pickle.UnpicklingError("an unknown persistent id")


def storage_dtype(storage_class: PlaceholderType) -> torch.dtype:
    """Element type of a storage class such as ``torch.FloatStorage``."""
    return DTYPES[storage_class.path.rpartition(".")[2].removesuffix("Storage")]


# --- files -------------------------------------------------------------------------------------------------------


def read_weight_file(path: str) -> object:
    """Content of a file of ``torch.save`` or safetensors, on the CPU. The file's name does not matter.

    Raises:
        WeightFileError: it is another kind of file, is damaged, or would run code.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(512)
    reader = choose_reader(head)
    try:
        return reader(path)
    except (WeightFileError, OSError):
        raise
    except Exception as error:  # the reader of a damaged file can fail anywhere, with any type of error
        raise WeightFileError(f"damaged or cut short; copy or download it again, {EXPECTED}") from error


def choose_reader(head: bytes) -> Callable[[str], object]:
    """The function that reads a file whose first 512 bytes are ``head``.

    Raises:
        WeightFileError: it is another kind of file.
    """
    if head[8:9] == b"{":  # after 8 bytes of length, a safetensors file has a JSON header
        return safetensors.torch.load_file
    if head.startswith(b"PK"):
        return read_zip
    if LEGACY_HEAD in head[:32]:
        return read_legacy
    if not head:
        raise WeightFileError(f"empty; {EXPECTED}")
    if head.startswith(b"version https://git-lfs"):
        raise WeightFileError("only a git-lfs pointer to the weights; run `git lfs pull` in its repository to get them")
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise WeightFileError(f"a web page, not weights; download the file behind it, {EXPECTED}")
    archives = ARCHIVES | ({head[:1]: "tar"} if head[257:262] == b"ustar" else {})
    for start, kind in archives.items():
        if head.startswith(start):
            raise WeightFileError(f"a {kind} archive; unpack it first, {EXPECTED}")
    what = next((kind for start, kind in OTHER_KINDS.items() if head.startswith(start)), "not a file of weights")
    raise WeightFileError(f"{what}; {EXPECTED}")


def read_zip(path: str) -> object:
    """Content of a file of ``torch.save`` since PyTorch 1.6.

    Raises:
        WeightFileError: it is another kind of zip file, or would run code.
        Exception: of any type, if it is damaged.
    """
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        names = set(archive.namelist())
        pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise WeightFileError(f"a zip archive that torch.save has not written; {EXPECTED}")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}constants.pkl" in names:
            raise WeightFileError(
                "a TorchScript archive, which holds a program; expected weights alone (torch.save of a state_dict)"
            )
        if f"{folder}byteorder" in names:
            refuse_byte_order(archive.read(f"{folder}byteorder").decode())
        mapped = torch.UntypedStorage.from_file(path, False, os.path.getsize(path))
        storages: dict[str, StorageRef] = {}

        def storage(storage_class: PlaceholderType, key: str, location: object, numel: int) -> StorageRef:
            if key not in storages:
                record = archive.getinfo(f"{folder}data/{key}")
                file.seek(record.header_offset + 26)  # the lengths of name and extra field, 2 bytes each
                start = record.header_offset + 30 + sum(int.from_bytes(file.read(2), "little") for _ in range(2))
                if record.compress_type != zipfile.ZIP_STORED:  # packed again by another program
                    content = torch.frombuffer(bytearray(archive.read(record)), dtype=torch.uint8).untyped_storage()
                elif start + record.file_size > mapped.nbytes():
                    raise pickle.UnpicklingError("a storage lies behind the end of the file")
                else:
                    content = mapped[start : start + record.file_size]
                storages[key] = StorageRef(content, storage_dtype(storage_class))
            return storages[key]

        with archive.open(pickles[0]) as pickled:
            return SafeUnpickler(pickled, storage).load()


def read_legacy(path: str) -> object:
    """Content of a file of ``torch.save`` before PyTorch 1.6, or with ``_use_new_zipfile_serialization=False``.

    Raises:
        WeightFileError: it would run code.
        Exception: of any type, if it is damaged.
    """
    storages: dict[str, StorageRef] = {}

    def storage(
        storage_class: PlaceholderType, key: str, location: object, numel: int, view: tuple[str, int, int] | None = None
    ) -> StorageRef:
        dtype = storage_dtype(storage_class)
        if key not in storages:
            if numel * dtype.itemsize > os.path.getsize(path):
                raise pickle.UnpicklingError("a storage is larger than the file")
            storages[key] = StorageRef(torch.UntypedStorage(numel * dtype.itemsize), dtype)
        if view is None:
            return storages[key]
        start, stop = view[1] * dtype.itemsize, (view[1] + view[2]) * dtype.itemsize
        return StorageRef(storages[key].untyped[start:stop], dtype)

    with open(path, "rb") as file:
        magic, protocol, system = (SafeUnpickler(file).load() for _ in range(3))
        if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL:
            raise pickle.UnpicklingError("not the head of such a file")
        refuse_byte_order("little" if system["little_endian"] else "big")
        content = SafeUnpickler(file, storage).load()
        for key in SafeUnpickler(file).load():  # the numbers follow in this order, each after the count of elements
            untyped, count = storages[key].untyped, int.from_bytes(file.read(8), "little")
            if count * storages[key].dtype.itemsize != untyped.nbytes():
                raise pickle.UnpicklingError("a storage has the wrong size")
            numbers = torch.empty(0, dtype=torch.uint8).set_(untyped).numpy()
            if file.readinto(numbers.data) != len(numbers):
                raise pickle.UnpicklingError("the file ends before its last storage")
    return content


def refuse_byte_order(order: str) -> None:
    """Refuse numbers of another byte order than this machine's.

    Raises:
        WeightFileError: the orders differ.
    """
    if order != sys.byteorder:
        raise WeightFileError(f"written on a {order}-endian machine; expected a file of a {sys.byteorder}-endian one")


# --- search ------------------------------------------------------------------------------------------------------


def named_tensors(content: object, skip: Callable[[str], bool]) -> Iterator[tuple[str, Tensor | UnusableTensor]]:
    """Yield all tensors in nested containers, with the keys that lead to them joined by dots.

    A pickled module yields the names of its ``state_dict``. Each container is searched once, at its first place.

    Args:
        content: what ``read_weight_file`` returns, or any nested containers.
        skip: whether not to search below a key.
    """
    seen: set[int] = set()
    waiting: list[tuple[str, object]] = [("", content)]
    while waiting:
        name, item = waiting.pop()
        if isinstance(item, Tensor | UnusableTensor):
            yield name, item
            continue
        if id(item) in seen:
            continue
        seen.add(id(item))
        children = [(key, child) for key, child in children_of(item) if not skip(key)]
        waiting += [(f"{name}.{key}" if name else key, child) for key, child in reversed(children)]


def children_of(item: object) -> Iterator[tuple[str, object]]:
    """Yield the tensors and containers in a container, with their keys as text."""
    items: list[Iterable[tuple[object, object]]] = []
    if isinstance(item, Placeholder):
        state = item.state[0] if isinstance(item.state, tuple) and item.state else item.state
        if isinstance(state, Mapping):
            module = [state.get(part) for part in ("_parameters", "_buffers", "_modules")]
            parts = module if any(isinstance(part, Mapping) for part in module) else [state]
            items += [part.items() for part in parts if isinstance(part, Mapping)]
    if isinstance(item, Mapping):
        items.append(item.items())
    elif isinstance(item, list | tuple):
        items.append(enumerate(item))
    for key, child in itertools.chain.from_iterable(items):
        if isinstance(child, Tensor | UnusableTensor | Mapping | list | tuple):
            yield str(key), child
