"""Files of a dataset wherever they lie: in a local folder, on the Hugging Face Hub, on any file system of fsspec."""

import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Generic, Protocol, TypeVar
from urllib.parse import quote, unquote

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from pyarrow import ArrowException

from .episode import BadEpisodeError


OPEN_FILES = 8
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>.+))?(?P<folder>)")
_HUB_URL = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?P<folder>/.*)?")
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")


class Files:
    """
    The files of one folder, by their names relative to it.

    Args:
        location (`str` or `os.PathLike`): A local folder; an id on the Hub, `owner/name` or `owner/name@revision`;
            or a URL that fsspec knows (`hf://datasets/owner/name`, `gs://...`, `s3://...`, `memory://...`).
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        token (`str`, *optional*): Given to the file system; without one it finds its own.

    Raises:
        FileNotFoundError: If `location` is neither a local folder nor of another form above.
        ValueError: If `revision` is given twice, or for a folder that is not on the Hub.
    """

    def __init__(self, location: str | os.PathLike, revision: str | None = None, token: str | None = None):
        self.location = _locate(os.fspath(location), revision).rstrip("/")
        self._options = {} if token is None else {"token": token}
        self._opened: tuple[int, AbstractFileSystem, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def _filesystem(self) -> tuple[AbstractFileSystem, str]:
        # A file system's connections do not survive a fork.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), *url_to_fs(self.location, **self._options))
        return self._opened[1:]

    @property
    def name(self) -> str:
        """Name of the folder; of the repository, without its revision."""
        return self.location.rpartition("/")[2].partition("@")[0]

    def url(self, name: str) -> str:
        """The file's full path or URL, for messages."""
        return f"{self.location}/{name}" if name else self.location

    def within(self, folder: str) -> "Files":
        """The files of a folder inside this one."""
        return Files(self.url(folder), **self._options)

    def names(self, folder: str = "") -> list[str]:
        """What lies in a folder, files and folders, sorted; nothing where there is no such folder."""
        filesystem, root = self._filesystem()
        try:
            found = filesystem.ls(f"{root}/{folder}".rstrip("/"), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

    def exists(self, name: str) -> bool:
        filesystem, root = self._filesystem()
        return filesystem.exists(f"{root}/{name}")

    def size(self, name: str) -> int:
        filesystem, root = self._filesystem()
        return filesystem.size(f"{root}/{name}")

    def open(self, name: str, read_ahead: int | None = None) -> BinaryIO:
        """
        Open a file to read from any place in it.

        Args:
            name (`str`): The file.
            read_ahead (`int`, *optional*): Bytes to fetch from a remote file beyond what is read, and to keep for
                the next read. By default exactly what is read is fetched.
        """
        filesystem, root = self._filesystem()
        cache_type = "none" if read_ahead is None else "readahead"
        return filesystem.open(f"{root}/{name}", "rb", cache_type=cache_type, block_size=read_ahead)

    def read(self, name: str) -> bytes:
        """
        A whole file.

        Raises:
            FileNotFoundError: If there is none.
        """
        filesystem, root = self._filesystem()
        try:
            return filesystem.cat_file(f"{root}/{name}")
        except (FileNotFoundError, IsADirectoryError) as error:
            raise FileNotFoundError(f"{self.url(name)} is missing.") from error

    def read_json(self, name: str) -> dict[str, Any]:
        """
        A file that holds one JSON object.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it holds anything else.
        """
        try:
            content = json.loads(self.read(name))
        except ValueError as error:
            raise ValueError(f"{self.url(name)} is not valid JSON: {error}.") from error
        if not isinstance(content, dict):
            raise ValueError(f"{self.url(name)} must hold a JSON object, got {type(content).__name__}.")
        return content


def _locate(location: str, revision: str | None) -> str:
    """The path or URL of a location in any of the forms that [`Files`] takes."""
    path = os.path.expanduser(location)
    is_elsewhere = "://" in location or os.path.exists(path)
    match = _HUB_URL.fullmatch(location) or (None if is_elsewhere else _HUB_ID.fullmatch(location))
    if match is None and not is_elsewhere:
        raise FileNotFoundError(f"There is no folder {location}, nor is it the id of a dataset on the Hub or a URL.")
    if match is None:
        if revision is not None:
            raise ValueError(f"`revision` ({revision!r}) is for a dataset on the Hub; {location} is none.")
        return location if "://" in location else os.path.abspath(path)
    if revision is not None and match["revision"] is not None:
        raise ValueError(f"A revision is given twice: {location!r} and {revision!r}.")
    revision = revision or match["revision"]
    at = "" if revision is None else f"@{quote(unquote(revision), safe='')}"
    return f"hf://datasets/{match['repo']}{at}{match['folder'] or ''}"


def recognize(files: Files) -> tuple[str, Files]:
    """
    Which format the dataset in a folder has.

    Args:
        files (`Files`): A LeRobot dataset; or an RLDS dataset, one version of it or the folder of its versions.

    Returns:
        `tuple[str, Files]`: `lerobot` or `rlds`, and the folder of the dataset itself: the newest version's.

    Raises:
        FileNotFoundError: If there is no dataset, with the folders inside that hold one.
        ValueError: If there are two.
    """
    names = files.names()
    found = [("lerobot", files)] if "meta" in names else []
    if {"features.json", "dataset_info.json"} & set(names):
        found.append(("rlds", files))
    elif versions := [name for name in names if _VERSION.fullmatch(name)]:
        newest = max(versions, key=lambda version: [int(part) for part in version.split(".")])
        found.append(("rlds", files.within(newest)))
    if len(found) > 1:
        raise ValueError(f"{files.location} holds two datasets, LeRobot's meta/ and RLDS at {found[1][1].location}.")
    if found:
        return found[0]
    inside = [name for name in names if _holds_dataset(files.names(name))]
    if len(inside) > 1:
        raise ValueError(f"{files.location} holds the datasets {inside}; open one of them.")
    hint = (
        f"the one in its folder {inside[0]} can be opened"
        if inside
        else f"it holds {names[:10] or 'nothing, or does not exist'}"
    )
    raise FileNotFoundError(
        f"{files.location} is no dataset: expected meta/info.json (LeRobot) or features.json and dataset_info.json "
        f"(RLDS); {hint}."
    )


def _holds_dataset(names: list[str]) -> bool:
    return bool({"meta", "features.json"} & set(names)) or any(_VERSION.fullmatch(name) for name in names)


class Closable(Protocol):
    def close(self) -> None: ...


Handle = TypeVar("Handle", bound=Closable)


class Handles(Generic[Handle]):
    """
    Open files, each lent to one reader at a time; the last few stay open.

    Copies of this object, in a worker process or a pickle, start with none: a file that two processes share has one
    position for both.

    Args:
        opener (`Callable[[str], Handle]`): Opens a file by its name.
    """

    def __init__(self, opener: Callable[[str], Handle]):
        self._opener = opener
        self._idle: OrderedDict[str, Handle] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"_opener": self._opener, "_idle": OrderedDict(), "_process": -1}

    @contextmanager
    def borrow(self, name: str) -> Iterator[Handle]:
        """The file, open and at any position; closed afterwards if reading it failed."""
        process, intact = os.getpid(), True
        if self._process != process:
            self._idle, self._process = OrderedDict(), process
        handle = self._idle.pop(name, None) or self._opener(name)
        try:
            yield handle
        except Exception:
            intact = False
            raise
        finally:
            if intact and process == os.getpid() and name not in self._idle:
                self._keep(name, handle)
            else:
                handle.close()

    def _keep(self, name: str, handle: Handle) -> None:
        self._idle[name] = handle
        if len(self._idle) > OPEN_FILES:
            self._idle.popitem(last=False)[1].close()


@contextmanager
def reporting_damage(dataset: str, file: str, episode: int | None = None) -> Iterator[None]:
    """Turn what a damaged or missing file raises into [`BadEpisodeError`]; let trouble on the way to it pass."""
    try:
        yield
    except BadEpisodeError:
        raise
    except FileNotFoundError as error:
        raise BadEpisodeError("the file is missing.", dataset, file, episode) from error
    except (ValueError, EOFError, ArrowException, OSError) as error:
        # Arrow says of damage `OSError` without a number; a connection or a disk that fails says more.
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise
        reason = str(error) if type(error) is ValueError else f"cannot be read: {error}"
        raise BadEpisodeError(reason, dataset, file, episode) from error
