"""
TFRecord files and the `tf.train.Example` records in them, read without TensorFlow and without a protobuf library.

A file is a row of records: length (uint64), masked CRC-32C of those 8 bytes (uint32), data, masked CRC-32C of the data
(uint32), all little-endian. An Example is a map from keys to lists of bytes, float32 or int64.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import google_crc32c
import numpy as np


HEADER_SIZE, CHECKSUM_SIZE = 12, 4
BYTES, FLOATS, INTEGERS = 1, 2, 3
_KIND_NAMES = {BYTES: "bytes", FLOATS: "floats", INTEGERS: "integers"}
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


# Framing


def masked_crc32c(data: bytes) -> int:
    """CRC-32C in the form that TFRecord stores it: rotated right by 15 bits, plus 0xa282ead8."""
    checksum = google_crc32c.value(data)
    return (((checksum >> 15) | (checksum << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def scan_records(file: BinaryIO, size: int) -> tuple[np.ndarray, str | None]:
    """
    Where the records of a file lie, from their headers alone.

    Args:
        file (`BinaryIO`): The file, open.
        size (`int`): Its size in bytes.

    Returns:
        `tuple[np.ndarray, str | None]`: int64 (N, 2), where the data of each record starts and stops; and what is
        wrong after the last of them, or None. Beyond damage to a header nothing can be found.
    """
    spans, position, fault = [], 0, None
    while position < size:
        file.seek(position)
        header = file.read(HEADER_SIZE)
        if len(header) < HEADER_SIZE:
            fault = f"the file ends within the header of a record at byte {position}"
            break
        length, checksum = struct.unpack("<QI", header)
        if masked_crc32c(header[:8]) != checksum:
            fault = f"the length of the record at byte {position} does not match its checksum"
            break
        start, stop = position + HEADER_SIZE, position + HEADER_SIZE + length
        if stop + CHECKSUM_SIZE > size:
            fault = f"the record at byte {position} is cut off: it takes {length} bytes, the file ends at {size}"
            break
        spans.append((start, stop))
        position = stop + CHECKSUM_SIZE
    return np.array(spans, dtype=np.int64).reshape(-1, 2), fault


def read_record(file: BinaryIO, start: int, stop: int) -> bytes:
    """
    The data of a record.

    Args:
        file (`BinaryIO`): The file, open.
        start (`int`), stop (`int`): Where the data lies, from [`scan_records`].

    Raises:
        ValueError: If it is cut off or does not match its checksum.
    """
    file.seek(start)
    stored = file.read(stop - start + CHECKSUM_SIZE)
    data, checksum = stored[:-CHECKSUM_SIZE], stored[-CHECKSUM_SIZE:]
    if len(stored) != stop - start + CHECKSUM_SIZE or masked_crc32c(data) != int.from_bytes(checksum, "little"):
        raise ValueError(f"the data of the record at byte {start - HEADER_SIZE} does not match its checksum")
    return data


# Examples


@dataclass(frozen=True)
class Feature:
    """
    One key's list inside a record, found but not yet read.

    Args:
        data (`bytes`): The whole record.
        kind (`int`, *optional*): `BYTES`, `FLOATS` or `INTEGERS`; None for a list that was never filled.
        start (`int`), stop (`int`): Where the list lies in `data`.
    """

    data: bytes
    kind: int | None
    start: int
    stop: int

    def _check(self, kind: int) -> bool:
        if self.kind not in (None, kind):
            raise ValueError(f"it holds {_KIND_NAMES[self.kind]}, expected {_KIND_NAMES[kind]}")
        return self.kind is not None

    def _parts(self) -> Iterator[tuple[int, int, int]]:
        """Wire type, start and stop of the list's parts."""
        return (part[1:] for part in _fields(self.data, self.start, self.stop) if part[0] == 1)

    def spans(self) -> list[tuple[int, int]]:
        """Where the byte strings start and stop in `data`."""
        return [(start, stop) for _, start, stop in self._parts()] if self._check(BYTES) else []

    def items(self) -> list[bytes]:
        """The byte strings."""
        return [self.data[start:stop] for start, stop in self.spans()]

    def floats(self) -> np.ndarray:
        """float32 (N,)"""
        parts = self._parts() if self._check(FLOATS) else ()
        # Packed or one by one, the numbers are the same four bytes each.
        values = [np.frombuffer(self.data, "<f4", (stop - start) // 4, start) for _, start, stop in parts]
        return values[0] if len(values) == 1 else np.concatenate([np.zeros(0, np.float32), *values])

    def integers(self) -> np.ndarray:
        """int64 (N,)"""
        parts = self._parts() if self._check(INTEGERS) else ()
        values = [_varints(self.data, start, stop) for _, start, stop in parts]
        return values[0] if len(values) == 1 else np.concatenate([np.zeros(0, np.int64), *values])


def parse_example(data: bytes) -> dict[str, Feature]:
    """
    The keys of a `tf.train.Example`; their values are stepped over and read when they are asked for.

    Args:
        data (`bytes`): The serialised record.

    Raises:
        ValueError: If it is none.
    """
    features = {}
    for number, _, start, stop in _fields(data, 0, len(data)):
        if number != 1:
            continue
        for _, _, entry_start, entry_stop in _fields(data, start, stop):
            entry = {field[0]: field[2:] for field in _fields(data, entry_start, entry_stop)}
            if 1 not in entry or 2 not in entry:
                raise ValueError("an entry of the record has no key or no value")
            lists = list(_fields(data, *entry[2]))
            kind, _, list_start, list_stop = lists[-1] if lists else (None, _LENGTH, 0, 0)
            features[data[slice(*entry[1])].decode()] = Feature(data, kind, list_start, list_stop)
    return features


def _fields(data: bytes, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type, start and stop of the fields of a protobuf message."""
    while position < end:
        tag, position = _varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        start = position
        if wire_type == _LENGTH:
            length, start = _varint(data, position)
            position = start + length
        elif wire_type == _VARINT:
            position = _varint(data, position)[1]
        elif wire_type in (_FIXED32, _FIXED64):
            position += 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError(f"byte {start} starts a field of unknown type {wire_type}")
        if position > end:
            raise ValueError(f"the field at byte {start} runs beyond the end of its message")
        yield number, wire_type, start, position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A protobuf variable-length integer, seven bits to a byte, the lowest first; and the position after it."""
    try:
        byte = data[position]
        if byte < 0x80:
            return byte, position + 1
        value, shift = byte & 0x7F, 7
        while byte >= 0x80:
            position += 1
            byte = data[position]
            value |= (byte & 0x7F) << shift
            shift += 7
    except IndexError as error:
        raise ValueError("the record ends within a number") from error
    return value, position + 1


def _varints(data: bytes, start: int, stop: int) -> np.ndarray:
    """All of a row of variable-length integers, int64 (N,)."""
    row = np.frombuffer(data, np.uint8, stop - start, start)
    if not len(row):
        return np.zeros(0, np.int64)
    last = row < 0x80
    if last.all():
        return row.astype(np.int64)
    if not last[-1]:
        raise ValueError("a list of integers ends within a number")
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    place = np.arange(len(row)) - np.repeat(starts, np.diff(starts, append=len(row)))
    bits = (row & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.add.reduceat(bits, starts).view(np.int64)
