"""Encoded pictures to pixels and back, with the pixels that TensorFlow's decoder gives."""

import io

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError


# Longest side of a picture, in pixels: a damaged header can claim gigabytes.
MAX_SIDE = 8192

JPEG_START = b"\xff\xd8\xff"


def decode(picture: bytes | np.ndarray, padding_size: tuple[int, int] | None = None) -> np.ndarray:
    """
    Pixels of a step's picture.

    JPEG goes through the fast integer inverse DCT, which is `tf.io.decode_image`'s default and gives its pixels to
    the bit; the accurate one differs on two values of three, by up to 11 levels. Grayscale is repeated, alpha
    dropped, a palette looked up, CMYK converted; of an animation, the first picture is taken. An orientation in EXIF
    is not followed, as TensorFlow does not either.

    Args:
        picture (`bytes` or `np.ndarray`): A file's content (JPEG, PNG, or anything that PIL reads), or uint8
            (H, W, 3), which is returned as it is.
        padding_size (`tuple[int, int]`, *optional*): Height and width of the black picture that stands for an empty
            one: RLDS datasets store no bytes where a camera has no picture. By default, an empty one is an error.

    Returns:
        `np.ndarray`: uint8 (H, W, 3).

    Raises:
        ValueError: If the picture is empty, damaged, too large or of more than 8 bits per value.
    """
    if isinstance(picture, np.ndarray):
        return _check_pixels(picture)
    if not isinstance(picture, bytes):
        raise ValueError(f"A picture must be bytes or a uint8 array, got {type(picture).__name__}.")
    if not picture and padding_size is not None:
        return np.zeros((*padding_size, 3), dtype=np.uint8)
    if not picture:
        raise ValueError("The picture is empty (0 bytes); pass `padding_size` to have it black.")
    try:
        return _decode_jpeg(picture) if picture.startswith(JPEG_START) else _decode_with_pil(picture)
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        kind = "JPEG" if picture.startswith(JPEG_START) else "picture"
        raise ValueError(
            f"A {kind} of {len(picture)} bytes, starting with {picture[:8].hex(' ')}, cannot be decoded: {error}"
        ) from error


def encode_jpeg(image: np.ndarray, quality: int = 95, subsampling: str = "420") -> bytes:
    """
    A JPEG file, by default as `tf.io.encode_jpeg` writes it: quality 95, colours at half the resolution.

    Args:
        image (`np.ndarray`): uint8 (H, W, 3).
        quality (`int`, defaults to 95): From 1 to 100.
        subsampling (`str`, defaults to `"420"`): `"420"`, or `"444"`: colours at full resolution, as decoded video
            frames should be kept.

    Raises:
        ValueError: If the image is no such array, or an option is out of range.
    """
    if not 1 <= quality <= 100:
        raise ValueError(f"`quality` must lie between 1 and 100, got {quality}.")
    if subsampling not in ("420", "444"):
        raise ValueError(f"`subsampling` must be '420' or '444', got {subsampling!r}.")
    pixels = np.ascontiguousarray(_check_pixels(image))
    return simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling=subsampling)


def jpeg_round_trip(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) as it comes back from a JPEG file, which is how policies saw their training pictures."""
    return decode(encode_jpeg(image))


def _check_pixels(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f"A picture must be uint8 (H, W, 3), got {image.dtype} {image.shape}.")
    return image


def _check_size(width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"it claims {width}x{height} pixels, more than {MAX_SIDE} along a side.")


def _decode_jpeg(data: bytes) -> np.ndarray:
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    _check_size(width, height)
    return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=True)


def _decode_with_pil(data: bytes) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise ValueError("it is of no known format.") from error
    _check_size(*image.size)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise ValueError(f"its mode {image.mode!r} holds depth or raw sensor values, not 8-bit colours.")
    return np.array(image.convert("RGB"))
