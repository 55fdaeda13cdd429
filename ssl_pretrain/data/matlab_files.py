"""MATLAB files as far as data sets of images need them: arrays of numbers, cells of them, cells of cells, strings.

Version 5 is read here, and not by SciPy: a file of 40 KB with nested cells ends its process (scipy.io 1.17, a stack
overflow), and one of 200 bytes that claims a large cell takes gigabytes. (It is the oracle of the tests.) The layout:
"MAT-File Format", The MathWorks. Version 7.3 is HDF5 and read by h5py; what such a file may point to outside of itself
is refused. Structures, objects, functions and sparse arrays are refused too.

Shapes: an array of H rows and W columns, as MATLAB shows it; W 64-bit words.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ssl_pretrain.data.files import Rejected, escape, read_bytes
from ssl_pretrain.data.lookup import head
from ssl_pretrain.errors import DataError, UsageError

MAX_FILE_BYTES = 2 << 30
MAX_INFLATED_BYTES = 512 << 20
"""Of a compressed version 5 file. ISBI 2014's largest has about 150 MB."""
MAX_CELLS = 100_000
MAX_ELEMENTS = 100_000_000
"""Of one array, as of an image, and of all arrays in one cell of version 7.3."""
MAX_DEPTH = 3

Array = NDArray[np.generic]
Value = Array | list[Array]
"""What a cell holds: an array, or arrays."""

_CELL = 1
_CLASS_WORDS = {2: "structure", 3: "object", 4: "text", 5: "sparse array", 16: "function", 17: "object"}
_NUMERIC_CLASSES = range(6, 16)
_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_COMPRESSED, _MATRIX = 15, 14
_COMPLEX = 0x0800
_V73 = b"MATLAB 7.3 MAT-file"


class MatFile(Protocol):
    """An open file. All raise `DataError` for what is not as it is asked for."""

    def names(self) -> list[str]:
        """The variables, sorted."""
        ...

    def cells(self, name: str) -> Sequence[Value]:
        """The cells of a cell array, column by column."""
        ...

    def array(self, name: str) -> Array:
        """An array of numbers, (H, W)."""
        ...

    def strings(self, name: str) -> list[str]:
        """The texts of a string array."""
        ...


@contextlib.contextmanager
def open_mat(path: Path) -> Iterator[MatFile]:
    """The file, of version 5 or 7.3. Raises `DataError`, and `UsageError` where h5py is needed and not installed."""
    start = head(path, 128)
    if start.startswith(_V73):
        with _open_hdf5(path) as file:
            yield _Version73(path, file)
    elif len(start) == 128 and start[126:] in (b"IM", b"MI"):
        try:
            data = read_bytes(path, MAX_FILE_BYTES)
        except Rejected as why:
            raise DataError(f"{escape(path.name)} cannot be read: {why.reason}, {why.detail}") from why
        yield _Version5(path, data)
    else:
        raise DataError(f"{escape(path.name)} is not a MATLAB file of version 5 or 7.3")


def is_mat(path: Path) -> bool:
    """Whether a file starts as a MATLAB file of version 5 or 7.3 does."""
    start = head(path, 128)
    return len(start) == 128 and (start.startswith(_V73) or start[126:] in (b"IM", b"MI"))


def strings_of(words_W: NDArray[np.uint64]) -> list[str]:
    """MATLAB's string arrays: 1, how many sizes, the sizes, how long each string is, and UTF-16, four to a word.

    Raises `ValueError` when the words are not exactly that.

    >>> strings_of(np.array([1, 2, 1, 1, 2, 0x00620061], np.uint64))
    ['ab']
    """
    words = [int(word) for word in words_W[:2]]
    if len(words) < 2 or words[0] != 1 or not 2 <= words[1] <= 4 or len(words_W) < 2 + words[1]:
        raise ValueError("not an array of strings")
    count = math.prod(int(size) for size in words_W[2 : 2 + words[1]])
    lengths = [int(length) for length in words_W[2 + words[1] : 2 + words[1] + count]] if count <= MAX_CELLS else []
    text = words_W[2 + words[1] + count :].astype("<u8").tobytes() if len(lengths) == count else b""
    if len(lengths) != count or (sum(lengths) + 3) // 4 * 8 != len(text):
        raise ValueError("not an array of strings")
    ends = np.cumsum([0, *lengths]).tolist()
    return [text[2 * a : 2 * b].decode("utf-16-le") for a, b in itertools.pairwise(ends)]


# --- version 5 --------------------------------------------------------------------------------------------------------


class _Version5:
    def __init__(self, path: Path, data: bytes) -> None:
        self._where = escape(path.name)
        self._order = "<" if data[126:128] == b"IM" else ">"
        self._variables: dict[str, memoryview] = {}
        try:
            for content in self._top_level(data):
                self._variables.setdefault(self._header(content)[2], content)
        except (ValueError, struct.error, zlib.error) as error:
            raise DataError(f"{self._where} is damaged ({escape(str(error))})") from error

    def names(self) -> list[str]:
        return sorted(self._variables)

    def cells(self, name: str) -> Sequence[Value]:
        value = self._value(name)
        if not isinstance(value, list):
            raise DataError(f"{self._where}: {escape(name)} is not a cell array")
        return value

    def array(self, name: str) -> Array:
        value: Value = self._value(name)
        if isinstance(value, list):
            raise DataError(f"{self._where}: {escape(name)} is not an array of numbers")
        return value

    def strings(self, name: str) -> list[str]:
        raise DataError(f"{self._where}: {escape(name)} is not an array of strings, which need version 7.3")

    def _value(self, name: str) -> Any:
        if name not in self._variables:
            raise DataError(f"{self._where} has no {escape(name)}; it has {', '.join(map(escape, self.names()))}")
        try:
            return self._matrix(self._variables[name], 1)
        except (ValueError, struct.error) as error:
            raise DataError(f"{self._where}: {escape(name)} cannot be read ({escape(str(error))})") from error

    def _top_level(self, data: bytes) -> Iterator[memoryview]:
        """The content of each variable's element."""
        view, at, inflated = memoryview(data), 128, 0
        while at + 8 <= len(view):
            kind, size = struct.unpack_from(f"{self._order}II", view, at)
            body = view[at + 8 : at + 8 + size]
            if len(body) < size:
                raise ValueError("cut off")
            at += 8 + size
            if kind == _COMPRESSED:
                inflater = zlib.decompressobj()
                body = memoryview(inflater.decompress(body, MAX_INFLATED_BYTES - inflated + 1))
                inflated += len(body)
                if inflated > MAX_INFLATED_BYTES:
                    raise ValueError(f"more than {MAX_INFLATED_BYTES} bytes when it is inflated")
                if len(body) < 8:
                    raise ValueError("cut off")
                kind, size = struct.unpack_from(f"{self._order}II", body, 0)
                body = body[8 : 8 + size]
                if len(body) < size:
                    raise ValueError("cut off")
            if kind == _MATRIX and size:
                yield body

    def _element(self, view: memoryview, at: int) -> tuple[int, memoryview, int]:
        """Its kind, its bytes, and where the next one is; up to four bytes stand in the tag itself."""
        kind, size = struct.unpack_from(f"{self._order}II", view, at)
        if kind >> 16:
            kind, size = kind & 0xFFFF, kind >> 16
            if size > 4:
                raise ValueError("a small element of more than 4 bytes")
            return kind, view[at + 4 : at + 4 + size], at + 8
        body = view[at + 8 : at + 8 + size]
        if len(body) < size:
            raise ValueError("cut off")
        return kind, body, at + 8 + (size + 7) // 8 * 8

    def _header(self, view: memoryview) -> tuple[int, tuple[int, ...], str, int]:
        """Flags, sizes, name, and where the values start."""
        kind, flags, at = self._element(view, 0)
        if kind != 6 or len(flags) != 8:
            raise ValueError("no array flags")
        kind, sizes, at = self._element(view, at)
        if kind != 5 or len(sizes) % 4 or len(sizes) < 8:
            raise ValueError("no sizes")
        _, name, at = self._element(view, at)
        shape = struct.unpack(f"{self._order}{len(sizes) // 4}i", sizes)
        if min(shape) < 0:
            raise ValueError("a size below 0")
        return struct.unpack_from(f"{self._order}I", flags)[0], shape, bytes(name).decode("latin-1"), at

    def _matrix(self, view: memoryview, depth: int) -> Any:
        """An array, or a list for a cell array."""
        flags, shape, _, at = self._header(view)
        kind, count = flags & 0xFF, math.prod(shape)
        if kind == _CELL:
            # each cell takes at least its tag, so a claim of more is refused before anything is made
            if depth >= MAX_DEPTH or count > min(MAX_CELLS, (len(view) - at) // 8):
                raise ValueError("cells too deep, or more than there is room for")
            values = []
            for _ in range(count):
                inner, body, at = self._element(view, at)
                if inner != _MATRIX:
                    raise ValueError("a cell that is no array")
                values.append(self._matrix(body, depth + 1) if len(body) else np.zeros((0, 0)))
            return values
        if kind not in _NUMERIC_CLASSES or flags & _COMPLEX:
            raise ValueError(f"a {_CLASS_WORDS.get(kind, 'complex array')} is not read")
        stored, body, _ = self._element(view, at)
        if stored not in _STORED or len(shape) > 3 or count > MAX_ELEMENTS:
            raise ValueError("numbers of an unknown kind, or too many")
        dtype = np.dtype(self._order + _STORED[stored])
        if len(body) != count * dtype.itemsize:
            raise ValueError("another count of numbers than its sizes say")
        return np.frombuffer(body, dtype).reshape(shape, order="F")


# --- version 7.3 ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open_hdf5(path: Path) -> Iterator[Any]:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise UsageError(f"{escape(path.name)} needs h5py: pip install 'ssl-pretrain[data]'") from error
    try:
        file = h5py.File(path, "r", locking=False)
    except Exception as error:  # on broken files h5py raises whatever HDF5 happens to hit
        raise DataError(f"{escape(path.name)} is damaged ({escape(str(error))[:200]})") from error
    with file:
        yield file


class _Cells73(Sequence[Value]):
    """Cells that are read when they are asked for: a test set has 900 images and thousands of masks."""

    def __init__(self, file: _Version73, name: str, references: list[Any]) -> None:
        self._file, self._name, self._references = file, name, references

    def __len__(self) -> int:
        return len(self._references)

    def __getitem__(self, i: int) -> Value:  # type: ignore[override]  # no slices
        return self._file.value(self._name, self._references[i])


class _Version73:
    def __init__(self, path: Path, file: Any) -> None:
        self._where, self._file = escape(path.name), file

    def names(self) -> list[str]:
        with self._refused("its list of variables"):
            return sorted(name for name in self._file if not name.startswith("#"))

    def cells(self, name: str) -> Sequence[Value]:
        with self._refused(name):
            return _Cells73(self, name, self._references(self._variable(name)))

    def array(self, name: str) -> Array:
        with self._refused(name):
            return self._numbers(self._variable(name))

    def strings(self, name: str) -> list[str]:
        """Of the one array in `#refs#` that has their form: the variable itself has but a number."""
        with self._refused(name):
            self._variable(name)
            found = []
            for inner in list(self._file["#refs#"])[:MAX_CELLS]:
                dataset = self._file["#refs#"][inner]
                if self._is_dataset(dataset) and dataset.dtype == np.uint64 and dataset.size <= MAX_ELEMENTS // 64:
                    with contextlib.suppress(ValueError):
                        found.append(strings_of(self._numbers(dataset).ravel().astype(np.uint64)))
            if len(found) != 1:
                raise ValueError(f"{len(found)} arrays of strings, where one is expected")
            return found[0]

    def value(self, name: str, reference: Any) -> Value:
        """What a reference leads to: an array, or the arrays of a cell array."""
        with self._refused(name):
            dataset = self._file[reference]
            if not self._is_dataset(dataset):
                raise ValueError("a cell that is no array")
            if dataset.dtype.kind != "O":
                return self._numbers(dataset)
            values, total = [], 0
            for inner in self._references(dataset):
                values.append(self._numbers(self._file[inner]))
                total += values[-1].size
                if total > MAX_ELEMENTS:  # many references may lead to one large array
                    raise ValueError(f"more than {MAX_ELEMENTS} numbers in one cell")
            return values

    @contextlib.contextmanager
    def _refused(self, name: str) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        except Exception as error:  # as above
            why = escape(str(error))[:200] or type(error).__name__
            raise DataError(f"{self._where}: {escape(name)} cannot be read ({why})") from error

    def _variable(self, name: str) -> Any:
        import h5py

        link = self._file.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):  # a soft or external one leads to wherever it likes
            raise DataError(f"{self._where} has no {escape(name)}; it has {', '.join(map(escape, self.names()))}")
        dataset = self._file[name]
        if not self._is_dataset(dataset):
            raise ValueError("a structure is not read")
        return dataset

    def _is_dataset(self, thing: Any) -> bool:
        import h5py

        return isinstance(thing, h5py.Dataset)

    def _references(self, dataset: Any) -> list[Any]:
        import h5py

        if h5py.check_ref_dtype(dataset.dtype) is not h5py.Reference:
            raise ValueError("not a cell array")
        if dataset.size > MAX_CELLS:
            raise ValueError(f"more than {MAX_CELLS} cells")
        return list(dataset[()].ravel()) if dataset.size else []

    def _numbers(self, dataset: Any) -> Array:
        """HDF5 has rows first and MATLAB columns, so it is turned."""
        if not self._is_dataset(dataset) or dataset.dtype.kind not in "uif" or dataset.ndim not in (2, 3):
            raise ValueError("not an array of numbers")
        if dataset.size > MAX_ELEMENTS:
            raise ValueError(f"more than {MAX_ELEMENTS} numbers")
        if dataset.external is not None or dataset.is_virtual:
            raise ValueError("its values are in another file")
        if "MATLAB_empty" in dataset.attrs:
            return np.zeros((0, 0))
        array: Array = np.asarray(dataset[()]).T
        return array
