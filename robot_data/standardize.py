"""
A dataset's own columns and cameras -> the project's [`Episode`], by a description that is data.

Descriptions of the datasets of Open X-Embodiment and LIBERO are in open_x.yaml; anyone's are written the same way:

    cameras: {primary: observation/image_0, wrist: observation/wrist_image}
    action: ["action[:6]", "action[-1] | clip | invert"]
    state: observation/state

A piece of an action or a state is a column, some of its numbers in brackets as Python counts them, and rules of
action_rules.py that are applied to them in turn; `zeros(3)` and `ones(1)` are constants. Pieces are put side by side.
"""

import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .action_rules import RULES, decode_code_points
from .episode import BadEpisodeError, Episode, RawEpisode
from .filters import Filters, Subset, strings


REGISTRY = Path(__file__).with_name("open_x.yaml")
LONG_NAME_ENDINGS = ("_dataset_converted_externally_to_rlds", "_converted_externally_to_rlds")
WRIST_CAMERA = re.compile(r"wrist|hand|gripper|eye_in", re.IGNORECASE)
MAIN_CAMERA = re.compile(r"primary|front|main|agentview|static|exterior|base|high|top", re.IGNORECASE)

_PIECE = re.compile(r"(?P<key>[^\[\]|()]+)(?:\[(?P<columns>-?\d+|(?:-?\d+)?:(?:-?\d+)?)\])?")
_CONSTANT = re.compile(r"(?P<value>zeros|ones)\((?P<width>\d+)\)")


# Pieces


@dataclass(frozen=True)
class Piece:
    """
    Part of an action or a state.

    Args:
        text (`str`): As in the description, such as `action[:6]`, `action[-1] | clip | invert` or `zeros(3)`.
        key (`str`, *optional*): Column that it is taken from; None for a constant.
        columns (`tuple[int | None, int | None]`, *optional*): First number and the one after the last; all by
            default.
        rules (`tuple[str]`): Names of the rules.
        constant (`tuple[float, int]`, *optional*): Value and width of a constant.
    """

    text: str
    key: str | None = None
    columns: tuple[int | None, int | None] | None = None
    rules: tuple[str, ...] = ()
    constant: tuple[float, int] | None = None

    @classmethod
    def parse(cls, text: str) -> "Piece":
        """
        Read a piece as it is written.

        Raises:
            ValueError: If it is not written so, or names an unknown rule.
        """
        head, *rules = [part.strip() for part in text.split("|")]
        if unknown := [rule for rule in rules if rule not in RULES]:
            raise ValueError(f"{text!r} names the unknown rules {unknown}; known: {sorted(RULES)}")
        if match := _CONSTANT.fullmatch(head):
            return cls(text, rules=tuple(rules), constant=(float(match["value"] == "ones"), int(match["width"])))
        match = _PIECE.fullmatch(head)
        if match is None:
            raise ValueError(
                f"cannot read {text!r}; a piece is written as `column`, `column[2]`, `column[:6]`, "
                "`column[-1] | clip | invert` or `zeros(3)`"
            )
        return cls(text, key=match["key"], columns=_bounds(match["columns"]), rules=tuple(rules))

    def read(self, raw: RawEpisode, first: int, stop: int) -> np.ndarray:
        """
        The numbers of this piece.

        Args:
            raw (`RawEpisode`): The episode.
            first (`int`): Step to begin with; what comes before is not seen.
            stop (`int`): Steps from here on are seen by rules that look ahead, and may be anything otherwise.

        Returns:
            `np.ndarray`: float32 (stop - first, W).

        Raises:
            ValueError: If the dataset has no such column, or not so wide a one.
            BadEpisodeError: If the episode's numbers are not finite or cannot be decoded.
        """
        if self.constant is not None:
            values = np.full((len(raw) - first, self.constant[1]), self.constant[0], np.float32)
        else:
            values = self._select(read_column(raw, self.key)[first:], raw)
            # Before the rules, which could turn a NaN into a number.
            _check_finite(values[: stop - first], raw, first, self.text)
        for rule in self.rules:
            try:
                values = RULES[rule](values)
            except zlib.error as error:
                raise BadEpisodeError(f"`{self.text}`: {error}", raw.dataset, raw.file, raw.index) from error
            except ValueError as error:
                raise ValueError(f"{raw.dataset}: `{self.text}`: {error}") from error
        if values.dtype == object:
            raise ValueError(f"{raw.dataset}: `{self.text}` gives text or bytes, numbers are expected")
        values = values[: stop - first].astype(np.float32, copy=False)
        _check_finite(values, raw, first, self.text)
        return values

    def _select(self, column: np.ndarray, raw: RawEpisode) -> np.ndarray:
        """(T, W) of a column (T,) or (T, N)."""
        if column.ndim > 2:
            raise ValueError(f"{raw.dataset}: column {self.key!r} is {column.ndim - 1}-D at each step, expected 1-D")
        values = column[:, None] if column.ndim == 1 else column
        if values.dtype != object:
            values = values.astype(np.float32, copy=False)
        if self.columns is None:
            return values
        width = values.shape[1]
        selected = values[:, slice(*self.columns)]
        if not selected.shape[1] or any(bound is not None and not -width <= bound <= width for bound in self.columns):
            raise ValueError(f"{raw.dataset}: `{self.text}` is not within column {self.key!r}, which is {width} wide")
        return selected


def _bounds(columns: str | None) -> tuple[int | None, int | None] | None:
    """`2` -> (2, 3), `-1` -> (-1, None), `:6` -> (None, 6)."""
    if columns is None:
        return None
    if ":" not in columns:
        return int(columns), (int(columns) + 1) or None
    start, stop = columns.split(":")
    return int(start) if start else None, int(stop) if stop else None


def read_column(raw: RawEpisode, key: str) -> np.ndarray:
    """
    A column of an episode.

    Raises:
        ValueError: If the dataset has none of this name.
        BadEpisodeError: If it has not one value per step.
    """
    if key not in raw.columns:
        raise ValueError(f"{raw.dataset} has no column {key!r}; it has {sorted(raw.columns)}")
    if len(raw.columns[key]) != len(raw):
        raise BadEpisodeError(
            f"column {key!r} has {len(raw.columns[key])} values for {len(raw)} steps", raw.dataset, raw.file, raw.index
        )
    return raw.columns[key]


def _check_finite(values: np.ndarray, raw: RawEpisode, first: int, what: str) -> None:
    if values.dtype == object or np.isfinite(values).all():
        return
    frame, dimension = np.argwhere(~np.isfinite(values))[0]
    raise BadEpisodeError(
        f"`{what}` is {values[frame, dimension]} at frame {first + frame}, dimension {dimension}",
        raw.dataset,
        raw.file,
        raw.index,
    )


# Descriptions


@dataclass(frozen=True)
class DatasetConfig:
    """
    How a dataset becomes episodes.

    Args:
        cameras (`dict[str, tuple[str]]`): Keys of the pictures by role, the main one first. Of several keys an
            episode takes one, always the same, chosen by its number.
        action (`tuple[Piece]`): Pieces of the action, side by side.
        state (`tuple[Piece]`): Pieces of the state; empty for none.
        action_dim (`int`, *optional*): Width that the action must have.
        instruction (`str`, *optional*): Column of the instruction: text, or rows of code points. By default what the
            source found.
        text (`str`, *optional*): One instruction for every step, in place of the dataset's.
        drop_first (`int`, defaults to 0), drop_last (`int`, defaults to 0): Steps without a usable action at either
            end of an episode.
        filters (`Filters`): What is left out besides.

    Raises:
        ValueError: If a value contradicts another.
    """

    cameras: Mapping[str, tuple[str, ...]]
    action: tuple[Piece, ...]
    state: tuple[Piece, ...] = ()
    action_dim: int | None = None
    instruction: str | None = None
    text: str | None = None
    drop_first: int = 0
    drop_last: int = 0
    filters: Filters = field(default_factory=Filters)

    def __post_init__(self):
        if not self.action:
            raise ValueError("`action` has no pieces")
        if self.instruction is not None and self.text is not None:
            raise ValueError("`instruction` names a column and `text` replaces it; give one of them")
        for name in ("instruction", "text"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"`{name}` is text, got {getattr(self, name)!r}")
        least = {"drop_first": 0, "drop_last": 0} | ({} if self.action_dim is None else {"action_dim": 1})
        for name, value in least.items():
            if type(getattr(self, name)) is not int or getattr(self, name) < value:
                raise ValueError(f"`{name}` is a whole number from {value} on, got {getattr(self, name)!r}")
        if not self.drop_last and any("displacement" in piece.rules for piece in (*self.action, *self.state)):
            raise ValueError("nothing follows the last step, so that `displacement` needs `drop_last: 1`")

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any], name: str) -> "DatasetConfig":
        """
        From YAML, where `action`, `state` and the keys of a camera may be one string or a list.

        Args:
            entry (`Mapping[str, Any]`): The fields above.
            name (`str`): Of the dataset, for messages.

        Raises:
            ValueError: On an unknown key, a missing one, or a value that cannot be read.
        """
        known = [part.name for part in fields(cls)]
        if unknown := sorted(set(entry) - set(known)):
            raise ValueError(f"{name}: unknown keys {unknown}; known: {known}")
        if missing := sorted({"cameras", "action"} - set(entry)):
            raise ValueError(f"{name}: {missing} missing")
        values = dict(entry)
        try:
            if not isinstance(values["cameras"], Mapping):
                raise ValueError(f"`cameras` gives a key for each role, got {values['cameras']!r}")
            values["cameras"] = {role: strings(keys, f"cameras.{role}") for role, keys in values["cameras"].items()}
            for part in ("action", "state"):
                values[part] = tuple(Piece.parse(text) for text in strings(values.get(part) or [], part))
            values["filters"] = Filters.from_dict(values.get("filters") or {})
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def required_columns(config: DatasetConfig) -> list[str]:
    """Columns that [`standardize`] and the filters read."""
    keys = [piece.key for piece in (*config.action, *config.state)]
    return list(dict.fromkeys(key for key in (*keys, config.instruction, config.filters.success_column) if key))


def required_images(config: DatasetConfig) -> list[str]:
    """Pictures that [`standardize`] reads."""
    return list(dict.fromkeys(key for keys in config.cameras.values() for key in keys))


# The registry


@cache
def _read_registry() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(REGISTRY.read_text(encoding="utf-8"))


def registry() -> dict[str, dict[str, Any]]:
    """The entries of open_x.yaml by dataset."""
    content = _read_registry()
    return {name: {**content["defaults"], **entry} for name, entry in content["datasets"].items()}


def registry_name(name: str) -> str | None:
    """
    The name under which open_x.yaml has a dataset, None if it has not.

    The long names that Open X-Embodiment gives to converted datasets and their short forms are the same dataset:
    `austin_buds`, `austin_buds_dataset_converted_externally_to_rlds`.
    """
    names = registry()
    return name if name in names else {_short(entry): entry for entry in names}.get(_short(name))


def _short(name: str) -> str:
    for ending in LONG_NAME_ENDINGS:
        name = name.removesuffix(ending)
    return name


def config_for(
    name: str, columns: Collection[str], images: Collection[str], entry: Mapping[str, Any] | None = None
) -> DatasetConfig:
    """
    The description of a dataset: from the registry, or from what the dataset calls its columns and cameras.

    Args:
        name (`str`): Of the dataset. One that the registry knows is described there.
        columns (`Collection[str]`): The dataset's columns.
        images (`Collection[str]`): Its cameras, in their order.
        entry (`Mapping[str, Any]`, *optional*): What is different, from YAML or a command line: any field of
            [`DatasetConfig`], which replaces the whole field (`filters`: only the filters named). `cameras` may also
            be a list of roles, of which the others are left out. `like` names the entry of the registry to start
            from; null: none.

    Raises:
        ValueError: If the entry cannot be read, or names something that the dataset does not have.
    """
    changes = dict(entry or {})
    like = changes.pop("like", registry_name(name))
    if like is None:
        base = _default_entry(columns, images, changes)
    elif known := registry_name(like):
        base = registry()[known]
    else:
        raise ValueError(f"{name}: `like: {like}` is not in the registry; it has {sorted(registry())}")
    if isinstance(changes.get("cameras"), list | tuple):
        changes["cameras"] = _select_roles(base["cameras"], changes["cameras"], name)
    if changes.get("text") is not None:
        base = {key: value for key, value in base.items() if key != "instruction"}
    if "filters" in changes:
        changes["filters"] = {**base.get("filters", {}), **(changes["filters"] or {})}
    config = DatasetConfig.from_dict({**base, **changes}, name)
    _check_keys(config, name, like, columns, images)
    return config


def _select_roles(cameras: Mapping[str, Any], roles: Collection[str], name: str) -> dict[str, Any]:
    if unknown := [role for role in roles if role not in cameras]:
        raise ValueError(f"{name} has no cameras {unknown}; it has {dict(cameras)}")
    return {role: cameras[role] for role in roles}


def _check_keys(
    config: DatasetConfig, name: str, like: str | None, columns: Collection[str], images: Collection[str]
) -> None:
    advice = f" (The description is that of {like!r}; `like: null` starts from the columns.)" if like else ""
    for what, keys, available in (
        ("columns", required_columns(config), columns),
        ("cameras", required_images(config), images),
    ):
        if missing := [key for key in keys if key not in available]:
            raise ValueError(f"{name} has no {what} {missing}; it has {sorted(available)}.{advice}")


def _default_entry(columns: Collection[str], images: Collection[str], changes: Mapping[str, Any]) -> dict[str, Any]:
    """LeRobot's names, or RLDS's where the action is one column."""
    entry: dict[str, Any] = {"cameras": default_cameras(images)}
    if "action" in columns:
        entry["action"] = "action"
    elif "action" not in changes:
        raise ValueError(f"there is no column 'action'; say which it is with `action`, out of {sorted(columns)}")
    for key in ("observation.state", "observation/state"):
        if key in columns:
            entry["state"] = key
    return entry


def default_cameras(images: Collection[str]) -> dict[str, str]:
    """
    Roles of cameras by their names: `primary`, `secondary`, `secondary_2`, ...; `wrist`, `wrist_2`, ...

    The main camera is the first that is called front, primary, top or the like, or else the first that is not at the
    wrist. Depth is left out.

    Args:
        images (`Collection[str]`): Keys of the pictures, in the dataset's order.

    Returns:
        `dict[str, str]`: Keys by role, the main camera first.
    """
    names = {key: re.split(r"[./]", key)[-1] for key in images if "depth" not in key.lower()}
    wrist = [key for key, name in names.items() if WRIST_CAMERA.search(name)]
    others = [key for key in names if key not in wrist]
    others.sort(key=lambda key: MAIN_CAMERA.search(names[key]) is None)
    ordered = others or wrist[:1]
    rest = [key for key in wrist if key not in ordered]
    roles = ["primary", "secondary", *(f"secondary_{number}" for number in range(2, len(ordered)))]
    wrist_roles = ["wrist", *(f"wrist_{number}" for number in range(2, len(rest) + 1))]
    return dict(zip(roles, ordered, strict=False)) | dict(zip(wrist_roles, rest, strict=False))


# Episodes


def standardize(raw: RawEpisode, config: DatasetConfig) -> Episode:
    """
    An episode in the project's form; its filters are not applied yet.

    Args:
        raw (`RawEpisode`): An episode with at least the [`required_columns`] and [`required_images`].
        config (`DatasetConfig`): Its dataset's description. With `cameras={}` no pictures are needed.

    Raises:
        ValueError: If the description does not fit the dataset: columns or cameras that it does not have, a width
            that is not the declared one.
        BadEpisodeError: If something is wrong with this episode: values that are not finite, columns or pictures
            that do not match in number, text that cannot be decoded, no step left.
    """
    first, stop = config.drop_first, len(raw) - config.drop_last
    if stop <= first:
        raise BadEpisodeError(
            f"it has {len(raw)} steps, of which the description drops {config.drop_first} at the start and "
            f"{config.drop_last} at the end",
            raw.dataset,
            raw.file,
            raw.index,
        )
    actions = _assemble(config.action, raw, first, stop)
    if config.action_dim not in (None, actions.shape[1]):
        raise ValueError(
            f"{raw.dataset}: the action is {actions.shape[1]} wide, the description says {config.action_dim} "
            "(`action_dim`)"
        )
    return Episode(
        dataset=raw.dataset,
        file=raw.file,
        index=raw.index,
        actions=actions,
        states=_assemble(config.state, raw, first, stop) if config.state else None,
        instructions=_instructions(raw, config)[first:stop],
        images={role: _pictures(raw, keys, first, stop) for role, keys in config.cameras.items()},
    )


def _assemble(pieces: tuple[Piece, ...], raw: RawEpisode, first: int, stop: int) -> np.ndarray:
    """float32 (stop - first, D)"""
    return np.concatenate([piece.read(raw, first, stop) for piece in pieces], axis=1)


def _instructions(raw: RawEpisode, config: DatasetConfig) -> list[str]:
    if config.text is not None:
        return [config.text] * len(raw)
    if config.instruction is None:
        return raw.instructions
    column = read_column(raw, config.instruction)
    try:
        if column.dtype.kind in "iu" and column.ndim == 2:
            return decode_code_points(column)
        return [_decode(value) for value in column.reshape(len(column), -1)[:, 0]]
    except UnicodeDecodeError as error:
        raise BadEpisodeError(
            f"the instruction {config.instruction!r} cannot be decoded: {error}", raw.dataset, raw.file, raw.index
        ) from error
    except TypeError as error:
        raise ValueError(f"{raw.dataset}: {config.instruction!r} is no instruction: {error}") from error


def _decode(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8")
    raise TypeError(f"expected text or code points, got {type(value).__name__}")


def _pictures(raw: RawEpisode, keys: tuple[str, ...], first: int, stop: int) -> Sequence[Any]:
    """The pictures of one camera, out of those that may play the role."""
    key = keys[zlib.crc32(f"{raw.dataset} {raw.index}".encode()) % len(keys)]
    if key not in raw.images:
        raise ValueError(f"{raw.dataset} has no camera {key!r}; it has {sorted(raw.images)}")
    pictures = raw.images[key]
    if len(pictures) != len(raw):
        raise BadEpisodeError(
            f"camera {key!r} has {len(pictures)} pictures for {len(raw)} steps", raw.dataset, raw.file, raw.index
        )
    return pictures if stop - first == len(raw) else Subset(pictures, range(first, stop))
