"""Videos as sequences of frames."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import BinaryIO

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from .files import Files, Handles, reporting_damage


# A few hundred frames of a small video, LeRobot's usual episode, come with one request.
READ_AHEAD = 2**20


class Video:
    """An open video file."""

    def __init__(self, file: BinaryIO):
        self._file = file
        try:
            self._container = av.open(file)
            if not self._container.streams.video:
                raise ValueError("the file holds no video")
        except Exception:
            file.close()
            raise
        self._stream = self._container.streams.video[0]
        # Loading is parallel over episodes, in processes; a decoder's own threads would not survive a fork.
        self._stream.codec_context.thread_count = 1

    def frames_from(self, time: float) -> Iterator[av.VideoFrame]:
        """Frames in their order from the last key frame at or before a time in seconds."""
        self._container.seek(int(time / self._stream.time_base), stream=self._stream)
        yield from self._container.decode(self._stream)

    def close(self) -> None:
        self._container.close()
        self._file.close()


class VideoReader:
    """
    The videos of a dataset.

    Args:
        dataset (`str`): Name of the dataset.
        files (`Files`): Its folder.
    """

    def __init__(self, dataset: str, files: Files):
        self.dataset, self.files = dataset, files
        self.handles = Handles(self._open)

    def _open(self, name: str) -> Video:
        return Video(self.files.open(name, READ_AHEAD))


class VideoFrames(Sequence[np.ndarray]):
    """
    An episode's frames, uint8 (H, W, 3) each, decoded when they are asked for.

    Iterating decodes in order and keeps nothing; the first access by number decodes the whole episode and keeps it.

    Args:
        reader (`VideoReader`): Opens the file.
        file (`str`): Name of the video file, which may hold other episodes too.
        times (`np.ndarray`): float64 (T,), when the frames are shown, in seconds from the start of the file.
        fps (`float`): Frames per second.
        episode (`int`): Number of the episode, for messages.
    """

    def __init__(self, reader: VideoReader, file: str, times: np.ndarray, fps: float, episode: int):
        self._reader, self._file, self._times, self._fps, self._episode = reader, file, times, fps, episode
        self._frames: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._times)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self._decode() if self._frames is None else iter(self._frames)

    def __getitem__(self, index):
        if isinstance(index, slice):
            part = VideoFrames(self._reader, self._file, self._times[index], self._fps, self._episode)
            part._frames = None if self._frames is None else self._frames[index]
            return part
        if self._frames is None:
            self._frames = list(self._decode())
        return self._frames[index]

    def _decode(self) -> Iterator[np.ndarray]:
        """
        The frames, found by their place in the file's regular sequence.

        Raises:
            BadEpisodeError: If the file does not hold a frame for each step.
        """
        places = np.round(self._times * self._fps)
        where = self._reader.dataset, self._reader.files.url(self._file), self._episode
        reformatter = VideoReformatter()  # A frame's own one would be set up anew for each.
        with ExitStack() as stack:
            with _reporting_damage(*where):
                video = stack.enter_context(self._reader.handles.borrow(self._file))
                # A little later than the first frame, so that rounding does not fall back by one key frame.
                frames = video.frames_from((places[0] + 0.25) / self._fps)
            for place, time in zip(places.tolist(), self._times.tolist(), strict=True):
                with _reporting_damage(*where):
                    frame = _next_frame(frames, time, place, 0.5 / self._fps)
                    picture = reformatter.reformat(frame, format="rgb24").to_ndarray()  # (H, W, 3)
                yield picture


def _next_frame(frames: Iterator[av.VideoFrame], time: float, place: float, tolerance: float) -> av.VideoFrame:
    """The next frame that is shown at a time, in seconds."""
    for frame in frames:
        if frame.time <= time - tolerance:
            continue
        if frame.time < time + tolerance:
            return frame
        raise ValueError(f"there is no frame {place:.0f}, at {time:.3f} s; the next one is at {frame.time:.3f} s.")
    raise ValueError(f"the video ends before its frame {place:.0f}, at {time:.3f} s.")


@contextmanager
def _reporting_damage(dataset: str, file: str, episode: int) -> Iterator[None]:
    with reporting_damage(dataset, file, episode):
        try:
            yield
        except av.FFmpegError as error:
            raise ValueError(str(error)) from error
