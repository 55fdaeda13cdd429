"""What is done to good files: the same harm for the same (format, number), on every machine.

`mutated(files, targets, draw)` takes a data set as a dict of relative path to bytes and gives what to change: new
bytes, None for a file that is gone, or a `Special` that is no regular file.
"""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeVar

import numpy as np

from ssl_pretrain import rng

T = TypeVar("T")
Files = dict[str, bytes]


@dataclass(frozen=True)
class Special:
    """Something in a file's place that is no regular file: fifo, socket, zero, loop, dangling, folder, outside."""

    kind: str


MAX_BYTES = 2 << 20
"""Of a harmed file."""
Change = bytes | None | Special

NUMBERS = (
    "NaN", "nan", "-NaN", "Infinity", "-Infinity", "inf", "-1", "-0", "0", "0.0", "1e308", "-1e308", "1e309", "1e-320",
    "4.9e-324", "0.5", "1", "2", "7", "65000", "100000000", "1000000000", "1e9", "1e12", "4294967295", "2147483648",
    "9223372036854775807", "9223372036854775808", "-9223372036854775809", "18446744073709551616", "9" * 5000,
    "0." + "3" * 5000, "1_000", "0x10", "1e", "--1", "+5", "1,5", "1.5.2", "\u0663", "\u00b2", "null", "true", "",
    '"5"', "[]", "{}", "1 2", "01", ".5", "5.",
)  # fmt: skip
WORDS = (
    "../../x", "../" * 40 + "etc/passwd", "/etc/passwd", "/dev/zero", "C:\\x", "\\\\host\\x", "..\\..\\x", ".", "..",
    "/", "", " ", "a\0b", "a\nb", "a\rb", "\x1b[31mred\x1b[0m", "\u202egnp.a", "\ufeff", "\u2028", "\U0001f52c", "\x85",
    "x" * 10_000, "9" * 5000, "\u0663", "\u00b2", "nan", "null", "file:///etc/passwd", "http://localhost:9/x", "~/x",
    "$HOME/x", "%s%n", "{0.__class__}", "-1", "&amp;", "&", "<", "]]>", '"', "'", "\\", "\t", "a/b/c", "train/a.png",
    "!!python/object:os.system", "*", "A" * 300, "con", "\ud800",
)  # fmt: skip
ENCODINGS = ("utf-16", "utf-7", "rot13", "hex", "idna", "punycode", "gbk", "cp037", "latin-1", "nothing", "\u0663", "")
DEPTHS = (50, 1100, 100_000)


class Draw:
    """Numbers of one case, out of its key."""

    def __init__(self, format: str, number: int) -> None:
        self._key = rng.fold_in(rng.key(0, f"fuzz {format}"), number)
        self._block = 0
        self._left: list[float] = []

    def unit(self) -> float:
        """In [0, 1)."""
        if not self._left:
            self._left = rng.uniform(rng.fold_in(self._key, self._block), 64).tolist()
            self._block += 1
        return self._left.pop()

    def below(self, n: int) -> int:
        """From 0 to n - 1; 0 for nothing to choose from."""
        return min(int(self.unit() * n), max(n - 1, 0))

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]


def mutated(files: Files, targets: Sequence[str], draw: Draw) -> dict[str, Change]:
    """Mostly one file harmed in one to four ways; one time in eight the tree itself."""
    if draw.unit() < 1 / 8:
        return draw.pick(TREE)(files, targets, draw)
    changes: dict[str, Change] = {}
    for _ in range(1 + (draw.unit() < 0.2)):
        name = draw.pick(targets)
        data = files[name]
        for _ in range(draw.pick((1, 1, 1, 2, 4))):
            kinds = OF_SUFFIX.get(PurePosixPath(name).suffix.lower(), BYTES)
            data = draw.pick(draw.pick(kinds))(data, draw)[:MAX_BYTES]
        changes[name] = data
    return changes


# --- bytes ------------------------------------------------------------------------------------------------------------


def flip_bits(data: bytes, draw: Draw) -> bytes:
    out = bytearray(data)
    for _ in range(draw.pick((1, 1, 2, 8, 64)) if out else 0):
        out[draw.below(len(out))] ^= 1 << draw.below(8)
    return bytes(out)


def truncate(data: bytes, draw: Draw) -> bytes:
    return data[: draw.below(len(data) + 1)]


def splice(data: bytes, draw: Draw) -> bytes:
    """A piece of the file over another one."""
    start, length, to = draw.below(len(data)), 1 + draw.below(64), draw.below(len(data))
    return data[:to] + data[start : start + length] + data[to + draw.pick((0, length)) :]


def cut_out(data: bytes, draw: Draw) -> bytes:
    start = draw.below(len(data))
    return data[:start] + data[start + 1 + draw.below(32) :]


def repeat(data: bytes, draw: Draw) -> bytes:
    start = draw.below(len(data))
    piece = data[start : start + 1 + draw.below(48)]
    return data[:start] + piece * draw.pick((2, 10, 1000)) + data[start:]


def extremes(data: bytes, draw: Draw) -> bytes:
    """A whole number somewhere becomes as large or as small as it can be."""
    width, order = draw.pick((1, 2, 4, 8)), draw.pick("<>")
    value = draw.pick((0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1) - 1, 2 ** (8 * width - 1), 65000, 16))
    word = (value % 2 ** (8 * width)).to_bytes(width, "little" if order == "<" else "big")
    at = draw.below(len(data)) if draw.unit() < 0.5 else draw.below(min(len(data), 64))
    return data[:at] + word + data[at + width :]


def noise(data: bytes, draw: Draw) -> bytes:
    return bytes(draw.below(256) for _ in range(draw.pick((1, 16, 200)))) + data[draw.pick((0, 0, len(data))) :]


def foreign(data: bytes, draw: Draw) -> bytes:
    """Another kind of file under this name."""
    return draw.pick(FOREIGN)


FOREIGN = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b" " * 1000, b"{}", b"[]", b"null", b"0", b'""', b"<a/>", b"---\n",
    b"\x80\x04N.", b"cos\nsystem\n(S'false'\ntR.", b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False}",
    b"PK\x05\x06" + bytes(18), b"\x1f\x8b\x08" + bytes(20), b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89HDF\r\n\x1a\n",
    b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff",
    b"II*\x00\x08\x00\x00\x00",
    b"\xa7" * 100_000, b"1 " * 50_000, b"," * 100_000, b'"' * 100_000, b"\r" * 100_000, b"\\" * 10_000,
)  # fmt: skip


# --- text -------------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_WORD = re.compile(rb"[A-Za-z_][\w./-]*")
_PUNCTUATION = re.compile(rb"[][{}()<>,:;\"'/=\t \n]")


def _replaced(pattern: re.Pattern[bytes], data: bytes, word: bytes, draw: Draw) -> bytes:
    found = list(pattern.finditer(data))
    if not found:
        return data + word
    at = draw.pick(found)
    if draw.unit() < 0.1:  # all that say the same
        return data.replace(at[0], word, 1 + MAX_BYTES // (len(word) + 1))
    return data[: at.start()] + word + data[at.end() :]


def number(data: bytes, draw: Draw) -> bytes:
    return _replaced(_NUMBER, data, draw.pick(NUMBERS).encode(), draw)


def word(data: bytes, draw: Draw) -> bytes:
    chosen = draw.pick(WORDS).encode("utf-8", "surrogatepass")
    return _replaced(_WORD, data, draw.pick((chosen, chosen, b"\xff\xfe\x80")), draw)


def punctuation(data: bytes, draw: Draw) -> bytes:
    return _replaced(
        _PUNCTUATION, data, draw.pick((b"", b",", b'"', b"\n", b"<", b"{", b"[", b";", b"\0", b"  ")), draw
    )


def swap_words(data: bytes, draw: Draw) -> bytes:
    found = _WORD.findall(data) + _NUMBER.findall(data)
    return _replaced(draw.pick((_WORD, _NUMBER)), data, draw.pick(found), draw) if found else data


def lines(data: bytes, draw: Draw) -> bytes:
    """A line gone, doubled, moved, a thousand times there; other line ends."""
    all_lines = data.split(b"\n")
    at, kind = draw.below(len(all_lines)), draw.below(6)
    if kind == 0:
        del all_lines[at]
    elif kind in (1, 2):
        all_lines[at:at] = [all_lines[at]] * draw.pick((1, 1000))
    elif kind == 3:
        all_lines.insert(draw.below(len(all_lines)), all_lines.pop(at))
    elif kind == 4:
        all_lines[at] = b""
    return draw.pick((b"\n", b"\n", b"\r\n", b"\r", b"\n\n", b"\x0b")).join(all_lines)


def encoding(data: bytes, draw: Draw) -> bytes:
    plain = data.decode("utf-8", "replace")
    kind = draw.pick(("utf-16", "utf-32", "utf-8-sig", "utf-16-le", "cp1252", "utf-8 twice"))
    if kind == "utf-8 twice":
        return b"\xef\xbb\xbf\xef\xbb\xbf" + data
    return plain.encode(kind, "replace")


# --- JSON -------------------------------------------------------------------------------------------------------------

_RAW = "raw text "
"""Marks a string that stands for JSON which `json.dumps` would not write."""
JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 0.5, 3, 2**31, 2**63, 2**64, 1e308, -1e308, float("nan"), float("inf"), "", [], {},
    [[]], [{}],
    {"": None}, [None], ["a"], [0] * 5, [[0, 0, 1, 0, 1, 1]], "1", "a", [1e9, 1e9], [10**9, 10**9], [10**12], [-5, 5],
    [10**6] * 1000, [0] * 20_000, "0" * 20_000, "~" * 5000, {"size": [10**9, 10**9], "counts": [10**18]},
    {"size": [24, 32], "counts": "~~~~~~~"}, {"size": [-1, -1], "counts": []},
    _RAW + "9" * 5000, _RAW + "-" + "9" * 400,
    _RAW + "[" * 900 + "]" * 900, _RAW + "[" * 100_000 + "]" * 100_000, _RAW + '{"a":' * 50_000 + "1" + "}" * 50_000,
    _RAW + "1e400", _RAW + '{"id":1,"id":2}', _RAW + '"\\ud800"', _RAW + "-0", _RAW + "1" * 309, *WORDS,
)  # fmt: skip


def json_tree(data: bytes, draw: Draw) -> bytes:
    """A value of another type, a key gone or renamed, two values swapped, an entry twice."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return data
    places = list(_places(tree, []))
    if not places:
        return _dumped(draw.pick(JUNK))
    parent, key = draw.pick(places)
    kind = draw.below(8)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[draw.pick(WORDS)] = parent.pop(key)
    elif kind == 2 and isinstance(parent, list):
        parent.extend([parent[key]] * draw.pick((1, 300)))
    elif kind == 3:
        other, place = draw.pick(places)
        try:
            parent[key], other[place] = other[place], parent[key]
            return _dumped(tree)
        except ValueError:  # one is now inside the other
            return data
    else:
        parent[key] = draw.pick(JUNK)
    return _dumped(tree)


def _places(node: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    stack = [node]
    while stack and len(found) < 4000:
        node = stack.pop()
        if isinstance(node, dict | list):
            for key in node if isinstance(node, dict) else range(len(node)):
                found.append((node, key))
                stack.append(node[key])
    return found


def _dumped(tree: Any) -> bytes:
    """JSON, with the marked strings as they are."""
    written = json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return re.sub(
        rb'"raw text ((?:[^"\\]|\\.)*)"', lambda m: m[1].replace(b'\\"', b'"').replace(b"\\\\", b"\\"), written
    )


def duplicate_key(data: bytes, draw: Draw) -> bytes:
    found = list(re.finditer(rb'"\w+"\s*:', data))
    if not found:
        return data
    at = draw.pick(found)
    return data[: at.start()] + at[0] + _dumped(draw.pick(JUNK)) + b"," + data[at.start() :]


def deep(data: bytes, draw: Draw) -> bytes:
    depth = draw.pick(DEPTHS)
    return draw.pick((b"[" * depth, b"[" * depth + b"]" * depth, b'{"a":' * depth + data + b"}" * depth))


# --- XML --------------------------------------------------------------------------------------------------------------

_LOL = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 12))
DTDS = (
    f'<!DOCTYPE a [<!ENTITY l0 "lol">{_LOL}]>',
    '<!DOCTYPE a [<!ENTITY q "' + "q" * 50_000 + '">]>',
    '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
    '<!DOCTYPE a [<!ENTITY % p SYSTEM "http://localhost:9/x"> %p;]>',
    '<!DOCTYPE a SYSTEM "/etc/passwd">',
    "<!DOCTYPE a>",
)


def dtd(data: bytes, draw: Draw) -> bytes:
    """Bombs, and files from elsewhere."""
    entity = draw.pick((b"&l11;", b"&q;" * 2000, b"&x;", b"", b"&amp;", b"&nothing;"))
    body = re.sub(rb">[^<>]+<", b">" + entity + b"<", data, count=draw.pick((1, 5)))
    return draw.pick(DTDS).encode() + re.sub(rb"^\s*<\?xml.*?\?>", b"", body)


def declaration(data: bytes, draw: Draw) -> bytes:
    body = re.sub(rb"^\s*<\?xml.*?\?>", b"", data)
    return f'<?xml version="1.0" encoding="{draw.pick(ENCODINGS)}"?>'.encode() + body


def tags(data: bytes, draw: Draw) -> bytes:
    """A tag gone, renamed, doubled; an element emptied or nested deep."""
    found = list(re.finditer(rb"<[^<>]*>", data))
    if not found:
        return data
    at, kind = draw.pick(found), draw.below(6)
    before, tag, after = data[: at.start()], at[0], data[at.end() :]
    if kind == 0:
        return before + after
    if kind == 1:
        return before + tag * draw.pick((2, 1100)) + after
    if kind == 2:
        name = re.match(rb"</?([\w-]*)", tag)
        return data.replace(b"<" + name[1], b"<z").replace(b"</" + name[1], b"</z") if name and name[1] else data
    if kind == 3:
        depth = draw.pick(DEPTHS)
        return before + b"<d>" * depth + b"</d>" * depth + after
    if kind == 4:
        return re.sub(rb">[^<>]+<", b"><", data, count=1 + draw.below(4))
    return before + draw.pick((b"<![CDATA[<b>]]>", b"<!-- -- -->", b"<?php x?>", b"<x:y/>", b'<a b="1" b="2"/>')) + data


# --- YAML -------------------------------------------------------------------------------------------------------------

_ALIASES = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
_YAML = (
    "!!python/object/apply:os.system ['false']", "!!int '" + "9" * 5000 + "'", "9" * 5000, "2001-99-99",
    "!!binary '\u00e9'",
    "&a [*a]", "{[1]: 2}", "{{a: 1}: 2}", "? [a]\n: b", "0o777", "1:99:99", "!!float '.'", "!!timestamp x",
    "!!set {a, b}",
    "[" * 900, "[" * 5000, "[" * 5000 + "]" * 5000, "{a: " * 3000, "<<: 1", "<<: *a", "!!omap [a]", "12e03", "~",
    ".nan", "-.inf",
    "yes", "1_000", "\t", "%YAML 9.9\n---", "--- a\n--- b", "|\n x", "> x", "&a", "*nothing", "'", "!", "!!map []",
    "1: 2", "null: 1",
)  # fmt: skip


def yaml_value(data: bytes, draw: Draw) -> bytes:
    """The value of a line becomes one of YAML's oddities, or a line of its own."""
    odd = draw.pick(_YAML).encode()
    found = list(re.finditer(rb"(?m)(?<=: )[^\n]+$", data))
    if not found or draw.unit() < 0.3:
        return draw.pick((odd + b"\n" + data, data + odd + b"\n"))
    at = draw.pick(found)
    return data[: at.start()] + odd + data[at.end() :]


def alias_bomb(data: bytes, draw: Draw) -> bytes:
    """Nine to the ninth strings in 400 bytes, where a value is wanted, or before everything."""
    found = list(re.finditer(rb"(?m)(?<=: )[^\n]+$", data))
    if not found or draw.unit() < 0.5:
        return _ALIASES.encode() + data
    flow = "[" + ",".join(["&b0 [x,x,x]"] + [f"&b{i} [{','.join([f'*b{i - 1}'] * 9)}]" for i in range(1, 9)]) + "]"
    at = draw.pick(found)
    return data[: at.start()] + flow.encode() + data[at.end() :]


# --- what binary headers declare --------------------------------------------------------------------------------------

SIZES = (
    (65_000, 65_000), (0, 0), (1, 1), (0, 24), (2**31 - 1, 2), (32_768, 3_000), (10_000, 9_999), (16, 16), (33, 24),
    (32_767, 1), (65_535, 1_500),
)  # fmt: skip


def declared_size(data: bytes, draw: Draw) -> bytes:
    """The header claims another width and height, the rest as it was."""
    width, height = draw.pick(SIZES)
    w2, h2 = min(width, 65_535), min(height, 65_535)
    if data[:4] == b"\x89PNG" and len(data) > 33:
        head = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
        return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]
    if data[:2] == b"BM":
        return data[:18] + struct.pack("<ii", width, draw.pick((height, -height))) + data[26:]
    if data[:3] == b"GIF":
        out = data[:6] + struct.pack("<HH", w2, h2) + data[10:]
        at = out.find(b",")
        return out[: at + 5] + struct.pack("<HH", w2, h2) + out[at + 9 :] if at > 0 and draw.unit() < 0.7 else out
    if data[:2] == b"\xff\xd8":
        found = re.search(rb"\xff[\xc0\xc2]\x00.\x08", data)
        return data[: found.end()] + struct.pack(">HH", h2, w2) + data[found.end() + 4 :] if found else data
    if data[:4] in (b"II*\0", b"MM\0*"):
        return _tiff_size(data, width, height)
    return extremes(data, draw)


def _tiff_size(data: bytes, width: int, height: int) -> bytes:
    order = "<" if data[:2] == b"II" else ">"
    out = bytearray(data)
    try:
        at = struct.unpack_from(order + "I", data, 4)[0]
        for i in range(min(struct.unpack_from(order + "H", data, at)[0], 64)):
            entry = at + 2 + 12 * i
            tag = struct.unpack_from(order + "H", data, entry)[0]
            if tag in (256, 257):
                struct.pack_into(order + "HHII", out, entry, tag, 4, 1, width if tag == 256 else height)
    except struct.error:
        return data
    return bytes(out)


def npz_arrays(data: bytes, draw: Draw) -> bytes:
    """An array of another type or shape, a value out of range, an array gone or pickled."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as opened:
            arrays = {name: opened[name] for name in opened.files}
    except Exception:  # harmed already
        return data
    if not arrays:
        return data
    name = draw.pick(sorted(arrays))
    array, kind = arrays[name], draw.below(9)
    if kind == 0:
        del arrays[name]
    elif kind == 1:
        arrays[name] = array.astype(draw.pick((np.float64, np.int8, np.bool_, np.complex128, "U5", "S3", "M8[s]")))
    elif kind == 2:
        arrays[name] = draw.pick((array[:0], array[:-1], np.concatenate([array, array]), array[None], array.ravel()))
    elif kind == 3:
        arrays[name] = np.array([{"a": 1}, None], object)
    elif kind == 4:
        arrays[name] = np.array(draw.pick((0, np.nan, "x")))
    elif array.size and array.dtype.kind in "iu":
        changed = array.copy()
        limits = np.iinfo(array.dtype)
        value = draw.pick((0, 1, 10, 255, -1, limits.max, limits.min, 2**31, 2**40))
        changed.flat[draw.below(array.size)] = min(max(value, int(limits.min)), int(limits.max))
        arrays[name] = changed
    into = io.BytesIO()
    np.savez(into, **arrays)
    return into.getvalue()


def safetensors_header(data: bytes, draw: Draw) -> bytes:
    """The JSON before the tensors harmed, its length stated rightly or not."""
    if len(data) < 8:
        return data
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    header = draw.pick((json_tree, number, word, punctuation, duplicate_key, deep))(header, draw)
    stated = len(header) if draw.unit() < 0.8 else draw.pick((0, 1, 2**63 - 1, 2**64 - 1, len(data), 100_000_001))
    return stated.to_bytes(8, "little") + header + rest


# --- the tree ---------------------------------------------------------------------------------------------------------


def gone(files: Files, targets: Sequence[str], draw: Draw) -> dict[str, Change]:
    return {draw.pick(sorted(files)): None}


def emptied(files: Files, targets: Sequence[str], draw: Draw) -> dict[str, Change]:
    return {draw.pick(sorted(files)): b""}


def special(files: Files, targets: Sequence[str], draw: Draw) -> dict[str, Change]:
    return {draw.pick(sorted(files)): Special(draw.pick(("fifo", "socket", "loop", "dangling", "folder")))}


def renamed(files: Files, targets: Sequence[str], draw: Draw) -> dict[str, Change]:
    """A file under a name that a file system allows and nobody expects; sometimes its folder too."""
    name = PurePosixPath(draw.pick(sorted(files)))
    stem = draw.pick(
        (
            "a\nb",
            "\x1b[31m",
            "a\\b",
            "\udcff\udcfe",
            "\u202ex",
            " ",
            "x" * 200,
            ".hidden",
            "-rf",
            "%s",
            "9" * 200,
            "a;b",
            "a,b",
            "'",
        )
    )
    parent = PurePosixPath(stem) if draw.unit() < 0.3 else name.parent
    return {str(name): None, str(parent / (stem + name.suffix)): files[str(name)]}


def doubled(files: Files, targets: Sequence[str], draw: Draw) -> dict[str, Change]:
    """The same file again, where only the suffix, the case or the folder tells them apart."""
    name = PurePosixPath(draw.pick(sorted(files)))
    other = draw.pick((name.with_suffix(draw.pick((".JPG", ".txt", ".json", ".xml", ".csv", ".PNG"))),
                       PurePosixPath(str(name).upper()),
                       name.parent / "copy" / name.name, PurePosixPath(name.name)))  # fmt: skip
    return {str(other): files[str(name)]} if str(other) not in files else {}


def swapped(files: Files, targets: Sequence[str], draw: Draw) -> dict[str, Change]:
    first, second = draw.pick(sorted(files)), draw.pick(sorted(files))
    return {first: files[second], second: files[first]}


def junk(files: Files, targets: Sequence[str], draw: Draw) -> dict[str, Change]:
    """What operating systems leave lying about."""
    folder = PurePosixPath(draw.pick(sorted(files))).parent
    names = (".DS_Store", "._" + PurePosixPath(draw.pick(sorted(files))).name, "Thumbs.db", "a.png:Zone.Identifier",
             ".ipynb_checkpoints/a.txt", "__MACOSX/._a.json", "desktop.ini")  # fmt: skip
    return {str(folder / draw.pick(names)): draw.pick(FOREIGN)}


Mutator = Callable[[bytes, Draw], bytes]
BINARY: tuple[Mutator, ...] = (flip_bits, truncate, splice, cut_out, repeat, extremes, noise, foreign)
TEXT: tuple[Mutator, ...] = (number, number, word, word, punctuation, swap_words, lines, encoding)
BYTES = (BINARY,)
OF_SUFFIX: dict[str, tuple[tuple[Mutator, ...], ...]] = {
    ".txt": (BINARY, TEXT, TEXT), ".csv": (BINARY, TEXT, TEXT, TEXT), ".dat": (BINARY, TEXT, TEXT),
    ".json": (BINARY, TEXT, (json_tree, json_tree, json_tree, duplicate_key, deep), (json_tree,)),
    ".xml": (BINARY, TEXT, TEXT, (tags, tags, dtd, declaration)),
    ".yaml": (BINARY, TEXT, (yaml_value, yaml_value, alias_bomb)),
    ".yml": (BINARY, TEXT, (yaml_value, yaml_value, alias_bomb)),
    ".npz": (BINARY, (npz_arrays,), (npz_arrays,)),
    ".safetensors": (BINARY, (safetensors_header,)),
    **dict.fromkeys((".png", ".jpg", ".tif", ".tiff", ".bmp", ".gif", ".webp"), (BINARY, BINARY, (declared_size,))),
}  # fmt: skip
TREE = (gone, emptied, special, special, renamed, doubled, swapped, junk)
