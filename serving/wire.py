"""
Arrays on the wire: json_numpy's JSON (https://github.com/Crimson-Crow/json-numpy) and openpi's msgpack
(https://github.com/Physical-Intelligence/openpi), written as they write them, and read within limits.

Nothing here is ever unpickled: arrays are raw bytes of a dtype of `DTYPES` in a shape that they fill exactly.
"""

import base64
import binascii
import json
import math
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np


DTYPES = frozenset(
    ("|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8")  # no objects, no text
)
MAX_DIMENSIONS = 4
MAX_ITEMS = 20_000  # values of a message beside the contents of its arrays: an observation has a few dozen
MAX_DEPTH = 16

# First bytes of msgpack values: https://github.com/msgpack/msgpack/blob/master/spec.md
_MAPS = frozenset((*range(0x80, 0x90), 0xDE, 0xDF))
_ARRAYS = frozenset((*range(0x90, 0xA0), 0xDC, 0xDD))
_EXTENSIONS = frozenset((*range(0xC7, 0xCA), *range(0xD4, 0xD9)))
_NESTED = _MAPS | _ARRAYS | _EXTENSIONS


class WireError(ValueError):
    """A message that is not what its protocol says, or beyond its limits."""


def dump_json(value: Any, separators: tuple[str, str] | None = None) -> str:
    """JSON with arrays as json_numpy writes them. Values that are not finite raise, as in Starlette's answers."""
    return json.dumps(value, default=_json_array, separators=separators, ensure_ascii=False, allow_nan=False)


def load_json(text: str | bytes) -> Any:
    """
    The value of a JSON text with json_numpy's arrays.

    Raises:
        WireError: If it is none, has more than `MAX_ITEMS` values, or an array that is not allowed.
    """
    marks = (b",", b"[", b"{") if isinstance(text, bytes) else (",", "[", "{")
    if sum(text.count(mark) for mark in marks) > MAX_ITEMS:
        raise WireError(f"The JSON has more than {MAX_ITEMS} values; pictures go as json_numpy arrays or as base64.")
    try:
        return json.loads(text, object_hook=_array_of_json, parse_constant=_refuse_constant)
    except WireError:
        raise
    except RecursionError as error:
        raise WireError("The JSON is nested too deeply.") from error
    except ValueError as error:  # of the decoder, or bytes that are no text
        raise WireError(f"The body is not JSON: {error}.") from error


def pack(value: Any) -> bytes:
    """msgpack with arrays as openpi writes them."""
    return msgpack.packb(value, default=_msgpack_array)


def unpack(data: bytes) -> Any:
    """
    The value of a msgpack frame with openpi's arrays. The frame is walked value by value, so that a small one that
    promises large containers costs nothing.

    Raises:
        WireError: If it is none, has more than `MAX_ITEMS` values, is nested deeper than `MAX_DEPTH`, or has an array
            that is not allowed.
    """
    reader = _FrameReader(data)
    try:
        value = reader.read(MAX_DEPTH)
    except WireError:
        raise
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise WireError(f"The frame is not msgpack: {type(error).__name__} {error}".rstrip() + ".") from error
    if reader.position != len(data):
        raise WireError(f"The frame has {len(data) - reader.position} bytes behind its value.")
    return value


class _FrameReader:
    """Reads one msgpack value, counting as it goes."""

    def __init__(self, data: bytes):
        self._data, self._items = data, 0
        self._unpacker = msgpack.Unpacker(raw=False, max_buffer_size=max(len(data), 1))
        self._unpacker.feed(data)

    @property
    def position(self) -> int:
        return self._unpacker.tell()

    def read(self, depth: int) -> Any:
        """The next value, of at most so many levels of containers."""
        self._items += 1
        if self._items > MAX_ITEMS or depth < 0:
            raise WireError(f"The frame has more than {MAX_ITEMS} values, or more than {MAX_DEPTH} levels.")
        kind = self._kind()
        if kind in _MAPS:
            size = self._unpacker.read_map_header()
            return _array_of_msgpack({self._key(): self.read(depth - 1) for _ in range(size)})
        if kind in _ARRAYS:
            return [self.read(depth - 1) for _ in range(self._unpacker.read_array_header())]
        if kind in _EXTENSIONS:
            raise WireError("The frame has a value of an extension type.")
        return self._unpacker.unpack()

    def _kind(self) -> int | None:
        return self._data[self.position] if self.position < len(self._data) else None

    def _key(self) -> str | bytes:
        key = None if self._kind() in _NESTED else self._unpacker.unpack()
        if not isinstance(key, str | bytes):
            raise WireError("The keys of a map must be strings.")
        return key


def _json_array(value: Any) -> dict[str, Any]:
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"{type(value).__name__} has no form in JSON.")
    _check_sendable(value)
    content = base64.b64encode(value.tobytes()).decode()  # in C order
    return {"__numpy__": content, "dtype": value.dtype.str, "shape": list(value.shape)}


def _check_sendable(value: Any) -> None:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.str not in DTYPES:
        raise ValueError(f"Arrays of dtype {value.dtype} are not sent; convert them to one of {sorted(DTYPES)}.")


def _array_of_json(value: dict[str, Any]) -> Any:
    if "__numpy__" not in value:
        return value
    content = value["__numpy__"]
    try:
        data = base64.b64decode(content, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise WireError(f"`__numpy__` of an array is not base64: {error}.") from error
    return _array(data, value.get("dtype"), value.get("shape"))


def _msgpack_array(value: Any) -> Any:
    _check_sendable(value)
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"{type(value).__name__} has no form in msgpack.")


def _array_of_msgpack(value: dict[Any, Any]) -> Any:
    if b"__ndarray__" in value:
        return _array(value.get(b"data"), value.get(b"dtype"), value.get(b"shape"))
    if b"__npgeneric__" in value:
        return _scalar(value.get(b"data"), value.get(b"dtype"))
    return value


def _array(data: Any, dtype: Any, shape: Any) -> np.ndarray:
    """The array, read-only, of raw bytes in C order."""
    checked = _dtype(dtype)
    if not isinstance(shape, Sequence) or isinstance(shape, str | bytes) or len(shape) > MAX_DIMENSIONS:
        raise WireError(f"An array must have a shape of at most {MAX_DIMENSIONS} numbers.")
    if any(type(side) is not int or side < 0 for side in shape):
        raise WireError("The shape of an array must be of whole numbers, none below 0.")
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * checked.itemsize:
        raise WireError(f"An array of shape {list(shape)} and dtype {dtype} must have as many bytes as it takes.")
    return np.frombuffer(data, checked).reshape(shape)


def _scalar(data: Any, dtype: Any) -> np.generic:
    checked = _dtype(dtype)
    try:
        return checked.type(data)
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"A number does not fit dtype {dtype}.") from error


def _dtype(name: Any) -> np.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        raise WireError(f"The dtype of an array must be one of {sorted(DTYPES)}, got {str(name)[:40]!r}.")
    return np.dtype(name)


def _refuse_constant(name: str) -> None:
    raise WireError(f"{name} is not JSON.")
