"""RLDS datasets as TensorFlow Datasets stores them, read without TensorFlow."""

import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from .episode import RawEpisode, check_unit, choose_keys
from .files import Files, Handles, reporting_damage
from .tfrecord import Feature, parse_example, read_record, scan_records


logger = logging.getLogger(__name__)

INSTRUCTION_KEY = "language_instruction"
DEFAULT_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_STRING_TYPES = ("string", "object", "str", "bytes")


# What features.json declares


@dataclass(frozen=True)
class Leaf:
    """
    One array of an episode.

    Args:
        key (`str`): Its key in the record. A name inside may hold a slash itself: a key cannot be split into names.
        kind (`str`): `number`, `text`, `bytes` or `image`; the class's name for what this module does not read.
        dtype (`str`): Of numbers, in numpy's words.
        shape (`tuple[int | None]`): Of one element; None where it varies.
        encoding (`str`): How numbers are stored: `none` (a list of numbers), `bytes` or `zlib` (one string each).
        lengths (`tuple[int | None]`): Of the sequences around it, the outermost first; None where it varies.
    """

    key: str
    kind: str
    dtype: str = ""
    shape: tuple[int | None, ...] = ()
    encoding: str = "none"
    lengths: tuple[int | None, ...] = ()

    @property
    def has_known_size(self) -> bool:
        """Whether the number of elements follows from what is stored."""
        return self.encoding != "none" or self.kind != "number" or (None not in self.shape and prod(self.shape) > 0)

    @property
    def fault(self) -> str | None:
        """Why this module cannot read it, or None."""
        if self.kind not in ("number", "text", "bytes", "image"):
            return f"features of class {self.kind} are not supported"
        if len(self.lengths) > (1 if self.kind == "image" else 2):
            return "sequences of pictures, and sequences nested more than twice, are not supported"
        if self.encoding not in ("none", "bytes", "zlib"):
            return f"the encoding {self.encoding!r} is not known"
        if self.encoding == "none" and self.shape.count(None) > 1:
            return "more than one unknown dimension is not supported"
        return None


def read_leaves(node: dict[str, Any], key: str = "", lengths: tuple[int | None, ...] = ()) -> Iterator[Leaf]:
    """
    The leaves below a node of features.json.

    Args:
        node (`dict[str, Any]`): The node.
        key (`str`): Its key.
        lengths (`tuple[int | None]`): Of the sequences around it.
    """
    if "featuresDict" in node:
        for name, inner in node["featuresDict"].get("features", {}).items():
            yield from read_leaves(inner, f"{key}/{name}" if key else name, lengths)
    elif "sequence" in node or "dataset" in node:
        sequence = node.get("sequence") or node.get("dataset")
        yield from read_leaves(sequence["feature"], key, (*lengths, _dimension(sequence.get("length", -1))))
    elif "tensor" in node:
        tensor = node["tensor"]
        shape = tuple(_dimension(size) for size in tensor.get("shape", {}).get("dimensions", ()))
        kind = "bytes" if tensor["dtype"] in _STRING_TYPES else "number"
        yield Leaf(key, kind, tensor["dtype"], shape, tensor.get("encoding", "none").lower(), lengths)
    elif "image" in node:
        yield Leaf(key, "image", lengths=lengths)
    elif "text" in node:
        yield Leaf(key, "text", lengths=lengths)
    elif "classLabel" in node:
        yield Leaf(key, "number", "int64", lengths=lengths)
    else:
        yield Leaf(key, node.get("pythonClassName", "of no known class"), lengths=lengths)


def _dimension(size: str | int) -> int | None:
    return None if int(size) < 0 else int(size)


# Values of one record


class Pictures(Sequence[bytes]):
    """Encoded pictures inside a record; each is copied out when it is asked for."""

    def __init__(self, data: bytes, spans: list[tuple[int, int]]):
        self._data, self._spans = data, spans

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Pictures(self._data, self._spans[index])
        start, stop = self._spans[index]
        return self._data[start:stop]


def read_values(leaf: Leaf, record: dict[str, Feature], count: int | None) -> np.ndarray | Pictures:
    """
    The values of a leaf.

    Args:
        leaf (`Leaf`): What is declared.
        record (`dict[str, Feature]`): The record, from [`parse_example`].
        count (`int`, *optional*): How many elements there must be; None where nothing says so.

    Returns:
        `np.ndarray` or `Pictures`: (N, ...), `object` for strings and for elements of different lengths.

    Raises:
        ValueError: If the record does not hold what is declared.
    """
    try:
        values = (
            _read_ragged(leaf, record) if len(leaf.lengths) > 1 else _read_flat(leaf, _take(record, leaf.key), count)
        )
    except (ValueError, zlib.error) as error:
        raise ValueError(f"{leaf.key!r}: {error}") from error
    if count is not None and len(values) != count:
        raise ValueError(f"{leaf.key!r} has {len(values)} elements, expected {count}")
    return values


def _take(record: dict[str, Feature], key: str) -> Feature:
    if key not in record:
        raise ValueError("the record does not have it, though features.json declares it")
    return record[key]


def _read_flat(leaf: Leaf, feature: Feature, count: int | None) -> np.ndarray | Pictures:
    """The elements of a leaf in a row, (N, *shape)."""
    if leaf.kind == "image":
        return Pictures(feature.data, feature.spans())
    if leaf.encoding != "none":
        return _decode_elements(leaf, feature.items())
    if leaf.kind in ("text", "bytes"):
        items = feature.items()
        texts = [item.decode() for item in items] if leaf.kind == "text" else items
        values = np.fromiter(texts, dtype=object, count=len(texts))
    else:
        values = _read_numbers(feature, np.dtype(leaf.dtype if leaf.dtype != "bfloat16" else "float32"))
    return _shape_elements(leaf, values, count)


def _read_numbers(feature: Feature, dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "f":
        return feature.floats().astype(dtype, copy=False)
    values = feature.integers()
    return values.view(np.uint64) if dtype == np.uint64 else values.astype(dtype, copy=False)


def _shape_elements(leaf: Leaf, values: np.ndarray, count: int | None) -> np.ndarray:
    shape = [-1 if size is None else size for size in leaf.shape]
    if leaf.has_known_size and None not in leaf.shape:
        size = prod(leaf.shape)
        if size == 0 or len(values) % size:
            raise ValueError(f"{len(values)} values do not make elements of shape {leaf.shape}")
        return values.reshape(len(values) // size, *shape)
    if count is None:
        raise ValueError(f"elements of shape {leaf.shape} cannot be told apart")
    return values.reshape(count, *shape)


def _decode_elements(leaf: Leaf, items: list[bytes]) -> np.ndarray:
    """Numbers of which each element is a string of bytes."""
    shape = [-1 if size is None else size for size in leaf.shape]
    raw = [zlib.decompress(item) for item in items] if leaf.encoding == "zlib" else items
    arrays = [np.frombuffer(item, np.dtype(leaf.dtype).newbyteorder("<")).reshape(shape) for item in raw]
    return _stack(arrays, None not in leaf.shape)


def _read_ragged(leaf: Leaf, record: dict[str, Feature]) -> np.ndarray:
    """Elements that are sequences themselves: all their values in a row, and their lengths."""
    lengths = _take(record, f"{leaf.key}/ragged_row_lengths_0").integers()
    flat = _read_flat(leaf, _take(record, f"{leaf.key}/ragged_flat_values"), int(lengths.sum()))
    if len(flat) != lengths.sum() or (lengths < 0).any():
        raise ValueError(f"it holds {len(flat)} values for lengths that add up to {lengths.sum()}")
    return _stack(np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else [], leaf.lengths[1] is not None)


def _stack(arrays: list[np.ndarray], is_regular: bool) -> np.ndarray:
    """(N, ...) of equal shapes, or an array of arrays (N,)."""
    if is_regular and arrays:
        return np.stack(arrays)
    return np.fromiter(arrays, dtype=object, count=len(arrays))


# The dataset


class RLDSSource:
    """
    One version of an RLDS dataset. A unit is one episode.

    Columns and pictures go by their keys within a step, `observation/image`; what is said of the whole episode is in
    its metadata, `episode_metadata/file_path`. `text` features are strings; string tensors, which may hold anything,
    are bytes. Pictures stay encoded; an empty one (`b""`) stands for none.

    Args:
        files (`Files`): The version's folder.
        name (`str`, *optional*): By default the dataset's own.
        split (`str`, *optional*): `train` by default; `all` for all of them, one after the other.
        instruction_key (`str`, *optional*): Key of the instruction, of the steps or of the episode, in UTF-8. By
            default `language_instruction` where the steps have it as a string; without one instructions are empty.

    Raises:
        FileNotFoundError: If dataset_info.json or features.json is missing.
        ValueError: If they do not describe an RLDS dataset, or not this split or instruction.
    """

    def __init__(
        self, files: Files, name: str | None = None, split: str | None = None, instruction_key: str | None = None
    ):
        self._files = files
        info = files.read_json("dataset_info.json")
        leaves = {leaf.key: leaf for leaf in read_leaves(files.read_json("features.json"))}
        prefix = "steps/"
        self._steps = {key.removeprefix(prefix): leaf for key, leaf in leaves.items() if key.startswith(prefix)}
        self._metadata = {key: leaf for key, leaf in leaves.items() if not key.startswith(prefix)}
        for key in [key for key, leaf in self._metadata.items() if leaf.fault]:
            logger.warning("%s: %r is left out: %s.", files.location, key, self._metadata.pop(key).fault)
        if not self._steps:
            raise ValueError(f"{files.url('features.json')} declares no `steps`; it has {sorted(leaves)}.")
        self.name = name or info["name"]
        self._shards = _list_shards(files, info, split or "train")
        self._ends = np.cumsum([length for _, length in self._shards])
        self._instruction = self._find_instruction(instruction_key)
        self._anchor = self._find_anchor()
        self._spans: dict[int, tuple[np.ndarray, str | None]] = {}
        self._handles = Handles(files.open)

    def _find_instruction(self, key: str | None) -> Leaf | None:
        leaf = self._steps.get(key or INSTRUCTION_KEY) or self._metadata.get(key)
        if leaf is not None and leaf.kind in ("text", "bytes") and len(leaf.lengths) < 2:
            return leaf
        if key is not None:
            texts = [name for name, leaf in (self._metadata | self._steps).items() if leaf.kind in ("text", "bytes")]
            raise ValueError(f"{self._files.location} has no text {key!r} for an instruction; it has {texts}.")
        return None

    def _find_anchor(self) -> Leaf:
        """A leaf that says how many steps there are."""
        leaves = [leaf for leaf in self._steps.values() if not leaf.fault and len(leaf.lengths) == 1]
        known = [leaf for leaf in leaves if leaf.has_known_size]
        if not known:
            raise ValueError(f"Nothing in {self._files.url('features.json')} tells the number of steps.")
        return min(known, key=lambda leaf: (leaf.kind != "number", prod(leaf.shape)))

    @property
    def num_units(self) -> int:
        return int(self._ends[-1])

    @property
    def num_episodes(self) -> int:
        return self.num_units

    @property
    def num_steps(self) -> None:
        """None: the files do not say."""

    @property
    def columns(self) -> list[str]:
        """Keys of the numbers and strings."""
        return [key for key, leaf in self._steps.items() if leaf.kind != "image"]

    @property
    def images(self) -> list[str]:
        """Keys of the cameras."""
        return [key for key, leaf in self._steps.items() if leaf.kind == "image"]

    def read(
        self, unit: int, columns: Sequence[str] | None = None, images: Sequence[str] | None = None
    ) -> Iterator[RawEpisode]:
        """See [`Source.read`]."""
        check_unit(self, unit)
        columns = choose_keys(self, "columns", columns, self.columns)
        images = choose_keys(self, "pictures", images, self.images)
        for key in (*columns, *images):
            if fault := self._steps[key].fault:
                raise ValueError(f"{self.name} has {key!r}, which cannot be read: {fault}. Ask for the other keys.")
        return self._read(unit, columns, images)

    def _read(self, unit: int, columns: list[str], images: list[str]) -> Iterator[RawEpisode]:
        shard = int(np.searchsorted(self._ends, unit, side="right"))
        file = self._shards[shard][0]
        with reporting_damage(self.name, self._files.url(file), unit):
            record = parse_example(self._read_record(shard, unit))
            count = len(read_values(self._anchor, record, None))
            if count == 0:
                raise ValueError("the episode has no steps")
            episode = RawEpisode(
                dataset=self.name,
                file=self._files.url(file),
                index=unit,
                columns={key: read_values(self._steps[key], record, count) for key in columns},
                instructions=self._read_instructions(record, count),
                images={key: read_values(self._steps[key], record, count) for key in images},
                metadata={key: _read_metadata(leaf, record) for key, leaf in self._metadata.items()},
            )
        yield episode

    def _read_record(self, shard: int, unit: int) -> bytes:
        file, length = self._shards[shard]
        if shard not in self._spans:
            with self._handles.borrow(file) as handle:
                self._spans[shard] = scan_records(handle, self._files.size(file))
            if len(self._spans[shard][0]) > length:
                found = len(self._spans[shard][0])
                logger.warning("%s holds %d records; only the %d declared are read.", file, found, length)
        spans, fault = self._spans[shard]
        number = unit - int(self._ends[shard]) + length
        if number >= len(spans):
            raise ValueError(fault or f"the file holds {len(spans)} records, dataset_info.json says {length}")
        with self._handles.borrow(file) as handle:
            return read_record(handle, *spans[number].tolist())

    def _read_instructions(self, record: dict[str, Feature], count: int) -> list[str]:
        leaf = self._instruction
        if leaf is None:
            return [""] * count
        texts = read_values(leaf, record, count if leaf.lengths else 1)
        texts = [text if isinstance(text, str) else text.decode() for text in texts]
        return texts if leaf.lengths else texts * count


def _read_metadata(leaf: Leaf, record: dict[str, Feature]) -> Any:
    """A value of the whole episode: a number or string of Python's where it is one, an array otherwise."""
    values = read_values(leaf, record, None if leaf.lengths else 1)
    value = values if leaf.lengths else values[0]
    return value.item() if isinstance(value, np.generic) else value


def _list_shards(files: Files, info: dict[str, Any], split: str) -> list[tuple[str, int]]:
    """Name of each file of a split, with the number of episodes in it."""
    file_format = info.get("fileFormat", "tfrecord")
    if file_format != "tfrecord":
        raise ValueError(f"{files.location} is stored as {file_format!r}; only tfrecord can be read.")
    splits = {entry["name"]: entry for entry in info.get("splits", [])}
    if split != "all" and split not in splits:
        raise ValueError(f"{files.location} has no split {split!r}; it has {[*splits, 'all']}.")
    shards = []
    for name, entry in splits.items():
        if split not in ("all", name):
            continue
        lengths = [int(length) for length in entry.get("shardLengths", ())]
        template = entry.get("filepathTemplate") or DEFAULT_TEMPLATE
        for index, length in enumerate(lengths):
            place = {
                "DATASET": info["name"],
                "SPLIT": name,
                "FILEFORMAT": file_format,
                "SHARD_INDEX": f"{index:05d}",
                "NUM_SHARDS": f"{len(lengths):05d}",
                "SHARD_X_OF_Y": f"{index:05d}-of-{len(lengths):05d}",
            }
            shards.append((template.format(**place), length))
    if not sum(length for _, length in shards):
        raise ValueError(f"{files.url('dataset_info.json')} gives the split {split!r} no episodes.")
    return shards
