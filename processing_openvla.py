# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""Image processor and processor: camera images and instructions in, model inputs out, and actions back."""

import contextlib
import copy
import functools
import inspect
import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file, logging

from .action_codec_openvla import (
    ActionCodec,
    action_dim,
    embodiment_rows,
    normalize,
    resolve_row_keys,
    select_row_statistics,
    unnormalize,
)
from .configuration_openvla import (
    HUB_LOAD_ARGUMENTS,
    HUB_PUSH_ARGUMENTS,
    STATISTICS_BOUNDS,
    OpenVLAConfig,
    check_statistics,
    copy_remote_code,
    load_statistics,
    state_dims,
)
from .fast_tokenizer_openvla import FastTokenizer, ids_to_tokens, tokens_to_ids


logger = logging.get_logger(__name__)

ImageInput = Image.Image | np.ndarray | torch.Tensor

PROCESSOR_AUTO_MAP = {
    "AutoImageProcessor": "processing_openvla.OpenVLAImageProcessor",
    "AutoProcessor": "processing_openvla.OpenVLAProcessor",
}

# Sides of an image, in pixels, that can be a camera frame: below, there is nothing to see; above, one frame alone
# takes hundreds of megabytes.
MIN_IMAGE_SIDE, MAX_IMAGE_SIDE = 8, 8192

RESAMPLINGS = ("pil_bicubic", "tf_lanczos3")

# Levels of pictures, those of one with 512x512 pixels: on two cores, a second thread did not pay for less.
MIN_VALUES_PER_THREAD = 3 * 2**18

_INSTRUCTION = "What action should the robot take to {instruction}?"
PROMPT_TEMPLATES = {
    "pure": f"In: {_INSTRUCTION}\nOut:",
    "vicuna": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        f"detailed, and polite answers to the user's questions. USER: {_INSTRUCTION} ASSISTANT:"
    ),
}


def to_pil_rgb(image: ImageInput) -> Image.Image:
    """
    One image as an RGB picture; grayscale is repeated, alpha dropped, a palette looked up.

    Args:
        image: A PIL image; an array, (H, W) or (H, W, C) with C in {1, 3, 4}; or a tensor of these shapes or
            (C, H, W). uint8 in [0, 255] or floating point in [0, 1].

    Raises:
        ValueError: On another type, shape, dtype or range, NaN, or a file that cannot be decoded.
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(_to_uint8_array(image))
    width, height = image.size
    _check_sides(width, height)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise ValueError(f"An image of mode {image.mode!r} holds depth or raw sensor values, not 8-bit colours.")
    try:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, SyntaxError) as error:
        name = getattr(image, "filename", "") or "the image"
        raise ValueError(f"{name} ({width}x{height} pixels) cannot be decoded: {error}.") from error


def to_rgb_pixels(image: ImageInput) -> np.ndarray:
    """uint8 (H, W, 3) of one image: see [`to_pil_rgb`]. An array that is this already is returned as it is."""
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3:
        _check_sides(image.shape[1], image.shape[0])
        return image
    return np.asarray(to_pil_rgb(image))


def _check_sides(width: int, height: int) -> None:
    if not MIN_IMAGE_SIDE <= min(width, height) <= max(width, height) <= MAX_IMAGE_SIDE:
        raise ValueError(
            f"An image of {width}x{height} pixels was given; both sides must be between {MIN_IMAGE_SIDE} and "
            f"{MAX_IMAGE_SIDE}."
        )


def _to_uint8_array(image: np.ndarray | torch.Tensor) -> np.ndarray:
    """uint8 (H, W) or (H, W, C) of an array or a tensor."""
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
        if image.ndim == 3 and image.shape[0] in (1, 3, 4):
            image = image.transpose(1, 2, 0)  # (C, H, W) -> (H, W, C)
    elif not isinstance(image, np.ndarray):
        raise ValueError(f"An image must be a PIL image, an array or a tensor, got {type(image).__name__}.")
    if image.ndim == 3 and image.shape[-1] not in (1, 3, 4) and image.shape[0] in (1, 3, 4):
        image = image.transpose(1, 2, 0)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[-1] not in (1, 3, 4)):
        raise ValueError(f"An image must be of shape (H, W) or (H, W, 1, 3 or 4), got {image.shape}.")
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    if np.issubdtype(image.dtype, np.floating):
        if not np.isfinite(image).all():
            raise ValueError("The image holds NaN or infinite pixels.")
        low, high = image.min(initial=0.0), image.max(initial=0.0)
        # Resizing in floating point may leave the range by a rounding error.
        if low < -1e-3 or high > 1.0 + 1e-3:
            raise ValueError(f"A floating-point image must lie in [0, 1], got [{low}, {high}]; or pass uint8.")
        image = np.rint(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8)
    if image.dtype != np.uint8:
        raise ValueError(f"An image must be uint8, or floating point in [0, 1], got {image.dtype}.")
    return np.ascontiguousarray(image)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def pad_to_square(image: Image.Image, fill: Sequence[int]) -> Image.Image:
    """Borders of the same width on opposite sides; an odd difference leaves one pixel."""
    side = max(image.size)
    horizontal, vertical = (side - image.width) // 2, (side - image.height) // 2
    return ImageOps.expand(image, (horizontal, vertical, horizontal, vertical), fill=tuple(fill))


# Weights of one axis, cut into runs of output pixels: which pixels go in, which come out, and how much each counts,
# float32 (in, out).
Bands = tuple[tuple[slice, slice, np.ndarray], ...]


def cut_into_bands(weights: np.ndarray) -> Bands:
    """
    The non-zero part of a resampling matrix, (out, in), whose rows have their weights around a diagonal.

    Eight output pixels at a time: in runs this short few zeros are multiplied, and a matrix product pays off.
    """
    bands = []
    for start in range(0, len(weights), 8):
        target = slice(start, min(start + 8, len(weights)))
        used = np.flatnonzero(weights[target].any(axis=0))
        source = slice(int(used[0]), int(used[-1]) + 1)
        block = np.ascontiguousarray(weights[target, source].T, dtype=np.float32)  # (in, out)
        block.setflags(write=False)
        bands.append((source, target, block))
    return tuple(bands)


@functools.lru_cache(maxsize=64)
def lanczos3_bands(size_in: int, size_out: int) -> Bands:
    """
    Weights of TensorFlow's `ScaleAndTranslate` with the kernel `lanczos3` and antialiasing, in its float32.

    The kernel is sinc(x) sinc(x / 3) for |x| < 3, stretched by the scale where the picture shrinks, centred on the
    output pixel, cut off at the borders and normalised.
    """
    step = np.float32(1) / (np.float32(size_out) / np.float32(size_in))
    stretch = max(step, np.float32(1))
    centers = (np.arange(size_out, dtype=np.float32) + np.float32(0.5)) * step
    pixels = np.arange(size_in, dtype=np.float32) + np.float32(0.5)
    distances = np.abs(pixels - centers[:, None]) * (np.float32(1) / stretch)  # (out, in)
    distances = np.maximum(distances, np.float32(1e-6))  # nothing is divided by zero
    angles = np.float32(np.pi) * distances
    # In double precision, since numpy's float32 sine is off in the last bit where the C library's is right.
    sines, slow_sines = (
        np.sin(each.astype(np.float64)).astype(np.float32) for each in (angles, angles / np.float32(3))
    )
    square = np.float32(np.pi) * np.float32(np.pi) * distances * distances
    kernel = np.float32(3) * sines * slow_sines / square
    weights = np.where(distances <= 1e-3, np.float32(1), np.where(distances < 3, kernel, np.float32(0)))
    total = np.cumsum(weights, axis=1)[:, -1:]  # one by one, unlike `sum`
    return cut_into_bands(weights * (np.float32(1) / total))


@functools.lru_cache(maxsize=64)
def center_crop_bands(size: int, area: float) -> Bands:
    """Weights of TensorFlow's `crop_and_resize`, bilinear, for the middle sqrt(`area`) of a side, back to the side."""
    length = area**0.5
    positions = np.linspace((1 - length) / 2, (1 + length) / 2, size, dtype=np.float64) * (size - 1)
    weights = np.maximum(1 - np.abs(np.arange(size) - positions[:, None]), 0)  # (out, in)
    return cut_into_bands(weights)


def apply_bands(pixels: np.ndarray, row_bands: Bands, column_bands: Bands) -> np.ndarray:
    """float32 (H', W', 3) of uint8 (H, W, 3)."""
    height, width, channels = pixels.shape
    columns = _apply_to_first_axis(pixels.reshape(height, -1), row_bands)  # (W * C, H')
    planes = _apply_to_first_axis(columns.reshape(width, -1), column_bands)  # (C * H', W')
    return planes.reshape(channels, -1, planes.shape[1]).transpose(1, 2, 0)  # (C, H', W') -> (H', W', C)


def _apply_to_first_axis(values: np.ndarray, bands: Bands) -> np.ndarray:
    """(M, out) of (in, M): with the axis moved to the end, the next call finds the other axis first."""
    result = np.empty((values.shape[1], bands[-1][1].stop), dtype=np.float32)
    for source, target, weights in bands:
        np.matmul(values[source].astype(np.float32, copy=False).T, weights, out=result[:, target])
    return result


def resize_lanczos3(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """uint8 (height, width, 3), as `tf.image.resize(method="lanczos3", antialias=True)`, rounded and clipped."""
    if pixels.shape[:2] == (height, width):
        return pixels
    resized = apply_bands(pixels, lanczos3_bands(pixels.shape[0], height), lanczos3_bands(pixels.shape[1], width))
    return np.clip(np.rint(resized), 0, 255).astype(np.uint8, order="C")


def crop_center(pixels: np.ndarray, area: float) -> np.ndarray:
    """uint8 (H, W, 3): the middle `area` of it, enlarged to its size, as in OpenVLA's evaluation."""
    height, width = pixels.shape[:2]
    cropped = apply_bands(pixels, center_crop_bands(height, area), center_crop_bands(width, area))
    # TensorFlow makes uint8 of values in [0, 1] by cutting off 255.5 times the value.
    return (cropped * np.float32(255.5 / 255)).astype(np.uint8, order="C")


# What is exact in `resize_pil_bicubic`: 258 pixels for each of the output.
MAX_DEVICE_SHRINKAGE = 64


@functools.lru_cache(maxsize=8)
def pil_bicubic_weights(size_in: int, size_out: int, device: torch.device) -> torch.Tensor:
    """
    Weights of Pillow's bicubic resize of 8-bit pictures along one axis, whole numbers of which 2**22 stands for 1.

    The kernel is Keys' with a = -0.5, stretched by the scale where the picture shrinks, centred on the output pixel,
    cut off at the borders, normalised, and rounded to the nearest number.

    Returns:
        `torch.Tensor`: float32 (3 * out, in): the high bytes, with the sign, the middle bytes, and the low bytes.
    """
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    centers = (np.arange(size_out)[:, None] + 0.5) * scale  # (out, 1)
    pixels = np.arange(size_in)
    first = np.maximum(np.trunc(centers - 2 * stretch + 0.5), 0)  # (out, 1)
    end = np.minimum(np.trunc(centers + 2 * stretch + 0.5), size_in)  # (out, 1)
    x = np.abs((pixels - centers + 0.5) * (1 / stretch))  # (out, in)
    inner, outer = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    kernel = np.where(x < 1, inner, np.where(x < 2, outer, 0.0))
    kernel[(pixels < first) | (pixels >= end)] = 0.0
    kernel /= np.cumsum(kernel, axis=1)[:, -1:]  # one by one, unlike `sum`
    weights = np.trunc(kernel * 2**22 + np.copysign(0.5, kernel)).astype(np.int64)
    parts = np.concatenate([weights >> 16, weights >> 8 & 255, weights & 255])
    return torch.tensor(parts, dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=256)
def pil_axes(height: int, width: int, new_height: int, new_width: int) -> tuple[int, int]:
    """
    The axes of (C, H, W) in the order in which the installed Pillow resizes them. It rounds between them.

    Pillow 10.4 to 12.2 were seen to begin with the width; 13.0 decides by the sizes, which is seen on noise.

    Raises:
        RuntimeError: If it does something else.
    """
    if int(PIL.__version__.split(".")[0]) < 13:
        return 2, 1
    noise = np.random.default_rng(0).integers(0, 2, (height, width, 3), dtype=np.uint8) * np.uint8(255)
    image, size = Image.fromarray(noise), (new_width, new_height)
    expected = image.resize(size, Image.Resampling.BICUBIC).tobytes()
    for axes, between in (((2, 1), (new_width, height)), ((1, 2), (width, new_height))):
        halfway = image.resize(between, Image.Resampling.BICUBIC)
        if halfway.resize(size, Image.Resampling.BICUBIC).tobytes() == expected:
            return axes
    raise RuntimeError(f"Pillow {PIL.__version__} resizes in a way that is not known: move the pictures to the host.")


def resize_pil_bicubic(pixels: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """
    uint8 (3, height, width) of uint8 (3, H, W), wherever that lies: Pillow's bicubic resize to the bit.

    Bytes of the weights times pixels are whole numbers of 16 bits; float32 holds sums of 258 of them exactly, and
    TF32 and bfloat16 the bytes themselves.
    """
    for axis in pil_axes(*pixels.shape[1:], height, width):
        size = (height, width)[axis - 1]
        if pixels.shape[axis] != size:
            weights = pil_bicubic_weights(pixels.shape[axis], size, pixels.device)
            with torch.autocast(pixels.device.type, enabled=False):
                sums = pixels.float() @ weights.T if axis == 2 else weights @ pixels.float()
            high, middle, low = sums.int().chunk(3, dim=axis)  # (3, H', W') each
            pixels = ((high << 16) + (middle << 8) + low + 2**21 >> 22).clamp(0, 255).to(torch.uint8)
    return pixels


class OpenVLAImageProcessor(BaseImageProcessor):
    """
    Camera images to `pixel_values`: resize, crop, scale to [0, 1], normalise once per tower.

    Reads the published `preprocessor_config.json` and writes the same fields. The `tvf_*` fields, where they are
    given, decide: the published ones hold constants rounded to bfloat16, and training used those.

    Args:
        use_fused_vision_backbone (`bool`): Whether there are two towers.
        image_resize_strategy (`str`): `resize-naive` (squash), `resize-crop` (short side, then centre crop) or
            `letterbox` (pad to a square, then resize).
        input_sizes (`list`): (channels, height, width) per tower.
        interpolations (`list[str]`): `bicubic` per tower.
        means, stds (`list`): Per tower and channel.
        tvf_do_letterbox, tvf_letterbox_fill, tvf_resize_params, tvf_crop_params, tvf_normalize_params: The same
            settings as torchvision arguments.
        resample (`str`, defaults to `"pil_bicubic"`): How pictures are resized: `pil_bicubic`, as the published
            processor does, or `tf_lanczos3`, as the pictures of its training and its evaluation were.
        center_crop_area (`float`, *optional*): Part of the resized picture's area to keep, in its middle, enlarged to
            the whole. 0.9 for policies that were trained with random crops of this area.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        use_fused_vision_backbone: bool = False,
        image_resize_strategy: str = "letterbox",
        input_sizes: Sequence[Sequence[int]] | None = None,
        interpolations: Sequence[str] | None = None,
        means: Sequence[Sequence[float]] | None = None,
        stds: Sequence[Sequence[float]] | None = None,
        tvf_do_letterbox: bool | None = None,
        tvf_letterbox_fill: Sequence[int] | None = None,
        tvf_resize_params: list[dict] | None = None,
        tvf_crop_params: list[dict] | None = None,
        tvf_normalize_params: list[dict] | None = None,
        resample: str = "pil_bicubic",
        center_crop_area: float | None = None,
        **kwargs,
    ):
        for name in ("auto_map", "image_processor_type"):
            kwargs.pop(name, None)
        super().__init__(**kwargs)
        self.auto_map = dict(PROCESSOR_AUTO_MAP)
        self.use_fused_vision_backbone = use_fused_vision_backbone
        self.image_resize_strategy = image_resize_strategy
        self.means = [list(mean) for mean in means or [(0.5, 0.5, 0.5)]]
        self.stds = [list(std) for std in stds or [(0.5, 0.5, 0.5)]]
        num_towers = len(self.means)
        self.input_sizes = [list(size) for size in input_sizes or [(3, 224, 224)] * num_towers]
        self.interpolations = list(interpolations or ["bicubic"] * num_towers)
        self.resample = resample
        self.center_crop_area = center_crop_area
        self._check_settings()

        side, letterbox = self.input_sizes[0][-1], image_resize_strategy == "letterbox"
        size = [side, side] if image_resize_strategy == "resize-naive" else side
        resize = {"antialias": True, "interpolation": 3, "max_size": None, "size": size}
        self.tvf_do_letterbox = letterbox if tvf_do_letterbox is None else tvf_do_letterbox
        # The last tower's mean, as published.
        fill = [int(255 * value) for value in self.means[-1]] if letterbox else None
        self.tvf_letterbox_fill = tvf_letterbox_fill or fill
        self.tvf_resize_params = tvf_resize_params or [dict(resize) for _ in range(num_towers)]
        self.tvf_crop_params = tvf_crop_params or [{"output_size": [side, side]} for _ in range(num_towers)]
        self.tvf_normalize_params = tvf_normalize_params or [
            {"inplace": False, "mean": mean, "std": std} for mean, std in zip(self.means, self.stds, strict=True)
        ]

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs):
        """As [`BaseImageProcessor.from_dict`]; what follows from an overridden setting is derived again."""
        settings = inspect.signature(cls.__init__).parameters.keys() - {"self", "kwargs"}
        overrides = {name: kwargs.pop(name) for name in settings & kwargs.keys()}
        derived = {"tvf_do_letterbox", "tvf_letterbox_fill", "tvf_resize_params", "tvf_crop_params"}
        if {"means", "stds"} & overrides.keys():
            derived.add("tvf_normalize_params")
        decisive = overrides.keys() - {"resample", "center_crop_area"}
        kept = {name: value for name, value in image_processor_dict.items() if not (decisive and name in derived)}
        return super().from_dict(kept | overrides, **kwargs)

    def preprocess(
        self,
        images: ImageInput | Sequence[ImageInput],
        return_tensors: str | None = "pt",
        do_center_crop: bool = True,
    ) -> BatchFeature:
        """
        Args:
            images: One image or a batch: see [`to_pil_rgb`]; arrays and tensors may carry a leading batch axis.
            return_tensors (`str`, *optional*, defaults to `"pt"`): `pt` or `np`.
            do_center_crop (`bool`, defaults to `True`): Follow `center_crop_area`. `False` in training, whose random
                crop takes its place.

        Returns:
            `BatchFeature`: `pixel_values`, float32 (B, 3 * towers, S, S). With `pt`, those of uint8 RGB tensors on one
            CUDA device are made and stay there, where pictures are squashed bicubically and not cropped, as for
            openvla-7b; all others are made on the host.
        """
        images = as_image_list(images)
        if return_tensors == "pt" and self._can_stay_on_device(images, do_center_crop):
            return BatchFeature({"pixel_values": self._preprocess_on_device(images)})
        pictures = self._resize_all(images)
        if do_center_crop and self.center_crop_area is not None:
            pictures = [crop_center(picture, self.center_crop_area) for picture in pictures]
        pixels = np.stack(pictures)  # (B, S, S, 3)
        planes = pixels.transpose(0, 3, 1, 2)[:, None].astype(np.float32, order="C")  # (B, 1, 3, S, S)
        planes /= np.float32(255.0)
        mean, std = (
            np.array([tower[name] for tower in self.tvf_normalize_params], dtype=np.float32)[..., None, None]
            for name in ("mean", "std")
        )  # (towers, 3, 1, 1)
        values = planes - mean  # (B, towers, 3, S, S)
        values /= std
        return BatchFeature({"pixel_values": values.reshape(len(values), -1, *values.shape[3:])}, return_tensors)

    def _can_stay_on_device(self, images: list[ImageInput], do_center_crop: bool) -> bool:
        """Whether nothing but a bicubic squash is asked for, of uint8 RGB tensors on one CUDA device."""
        is_squashed = self.tvf_resize_params[0]["size"] == self.tvf_crop_params[0]["output_size"]
        is_cropped = do_center_crop and self.center_crop_area is not None
        if self.tvf_do_letterbox or self.resample != "pil_bicubic" or not is_squashed or is_cropped:
            return False
        if not all(isinstance(image, torch.Tensor) and image.ndim == 3 for image in images):
            return False
        kinds = {(image.device, image.dtype) for image in images}
        device, dtype = next(iter(kinds))
        are_rgb = all(3 in (image.shape[0], image.shape[-1]) for image in images)
        most = MAX_DEVICE_SHRINKAGE * self.tvf_crop_params[0]["output_size"][0]
        are_small = all(max(image.shape) <= most for image in images)
        return len(kinds) == 1 and device.type == "cuda" and dtype == torch.uint8 and are_rgb and are_small

    def _preprocess_on_device(self, images: list[torch.Tensor]) -> torch.Tensor:
        """float32 (B, 3 * towers, S, S) of uint8 (3, H, W) or (H, W, 3), where they lie."""
        constants = [[tower["mean"], tower["std"], [255.0] * 3] for tower in self.tvf_normalize_params]
        constants = torch.tensor(constants, dtype=torch.float32, device=images[0].device)[..., None, None]
        mean, std, white = constants.unbind(dim=1)  # (towers, 3, 1, 1)
        pictures = []
        for image in images:
            planes = image if image.shape[0] == 3 else image.permute(2, 0, 1)  # (3, H, W)
            _check_sides(planes.shape[2], planes.shape[1])
            pictures.append(resize_pil_bicubic(planes, *self._resized(planes.shape[2], planes.shape[1])))
        # By a number of the host, a GPU would not divide but multiply by its inverse, and round otherwise.
        values = torch.stack(pictures)[:, None] / white  # (B, towers, 3, S, S)
        return ((values - mean) / std).flatten(1, 2)

    def resize(self, image: ImageInput) -> np.ndarray:
        """
        One image at the size of the towers, by the resize strategy and `resample`, before any centre crop.

        Training resizes first and augments then. What this returns passes through `preprocess` without another
        resize.

        Args:
            image: See [`to_pil_rgb`].

        Returns:
            `np.ndarray`: uint8 (S, S, 3); the given array itself where nothing has to be done.
        """
        if self.tvf_do_letterbox:
            image = pad_to_square(to_pil_rgb(image), self.tvf_letterbox_fill)
        if self.resample == "tf_lanczos3":
            pixels = to_rgb_pixels(image)
            pixels = resize_lanczos3(pixels, *self._resized(pixels.shape[1], pixels.shape[0]))
        else:
            image = to_pil_rgb(image)
            pixels = np.asarray(image.resize(self._resized(*image.size), Image.Resampling.BICUBIC))
        side = self.tvf_crop_params[0]["output_size"][0]
        return pixels if pixels.shape[:2] == (side, side) else np.asarray(center_crop(Image.fromarray(pixels), side))

    def _resize_all(self, images: list[ImageInput]) -> list[np.ndarray]:
        """[`resize`] of each; large ones on as many threads as torch may use: neither Pillow nor numpy stops them."""
        num_values = sum(_num_values(image) for image in images)
        num_threads = min(len(images), torch.get_num_threads(), num_values // MIN_VALUES_PER_THREAD)
        if num_threads < 2:
            return [self.resize(image) for image in images]
        # A file is read here: two threads must not decode one that was given twice.
        images = [to_pil_rgb(image) if isinstance(image, Image.Image) else image for image in images]
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(self.resize, images))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after the resize, with the shorter side at a size that is one number."""
        size = self.tvf_resize_params[0]["size"]
        if not isinstance(size, int):
            return size[1], size[0]
        if width <= height:
            return size, int(size * height / width)
        return int(size * width / height), size

    def _check_settings(self) -> None:
        num_towers = len(self.means)
        if num_towers != 1 + self.use_fused_vision_backbone:
            raise ValueError(
                f"`use_fused_vision_backbone={self.use_fused_vision_backbone}` with means for {num_towers} tower(s)."
            )
        if self.image_resize_strategy not in ("resize-naive", "resize-crop", "letterbox"):
            raise ValueError(
                "`image_resize_strategy` must be 'resize-naive', 'resize-crop' or 'letterbox', got "
                f"{self.image_resize_strategy!r}."
            )
        if set(self.interpolations) != {"bicubic"}:
            raise ValueError(f"`interpolations` must be 'bicubic', got {self.interpolations}.")
        if self.resample not in RESAMPLINGS:
            raise ValueError(f"`resample` must be one of {list(RESAMPLINGS)}, got {self.resample!r}.")
        if self.center_crop_area is not None and not 0 < self.center_crop_area <= 1:
            raise ValueError(f"`center_crop_area` must lie in (0, 1], or be None, got {self.center_crop_area}.")
        if len({tuple(size) for size in self.input_sizes}) > 1:
            raise ValueError(f"The towers share one picture and need one size, got {self.input_sizes}.")


def _num_values(image: Any) -> int:
    """Levels that an image of any form holds; 0 of what is no image."""
    return math.prod((*image.size, 3) if isinstance(image, Image.Image) else getattr(image, "shape", (0,)))


def as_image_list(images: ImageInput | Sequence[ImageInput]) -> list[ImageInput]:
    """A list of single images."""
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        images = list(images)
    elif isinstance(images, (Image.Image, np.ndarray, torch.Tensor)):
        images = [images]
    if not isinstance(images, (list, tuple)):
        raise ValueError(f"`images` must be an image or a list of images, got {type(images).__name__}.")
    if len(images) == 0:
        raise ValueError("The batch of images is empty.")
    return list(images)


def as_image_rows(
    images: ImageInput | Sequence[ImageInput | Sequence[ImageInput]], num_texts: int, num_images: int
) -> list[list[ImageInput]]:
    """
    Images by text: of one text alone they may come as a flat list, and of several texts with one image each.

    Raises:
        ValueError: If the numbers of texts and images do not fit.
    """
    images = as_image_list(images)
    if any(isinstance(row, (list, tuple)) or getattr(row, "ndim", 0) == 4 for row in images):
        rows = [as_image_list(row) for row in images]
    elif num_images > 1 and num_texts == 1:
        rows = [images]
    else:
        rows = [[image] for image in images]
    if len(rows) != num_texts:
        raise ValueError(f"Each text needs one image: {num_texts} texts and {len(rows)} images were given.")
    if wrong := [len(row) for row in rows if len(row) != num_images]:
        raise ValueError(f"This policy looks at {num_images} image(s) per text (`num_images`), got {wrong[0]}.")
    return rows


class OpenVLAProcessor(ProcessorMixin):
    """
    Image processor, tokenizer and the statistics of the datasets, behind one call.

    Args:
        image_processor ([`OpenVLAImageProcessor`]), tokenizer (`PreTrainedTokenizerBase`).
        prompt_style (`str`, defaults to `"pure"`): Frame of the prompt, one of `PROMPT_TEMPLATES`.
        norm_type (`str`, defaults to `"bounds_q99"`): How actions are normalised, as in [`OpenVLAConfig`].
        n_action_bins (`int`, defaults to 256): Number of action tokens.
        action_token_end (`int`, *optional*): One past the last action token. Default: the tokenizer's vocabulary
            without added tokens.
        closing_token_id (`int`, `None` or `"auto"`): Token that ends the prompt; `"auto"`: the tokenizer's lone
            "▁", or none where it has no such piece.
        head_type, chunk_size, num_images, use_proprio, append_stop_token, embodiments: As in [`OpenVLAConfig`].
        action_dim, proprio_dim (`int`, *optional*): As in [`OpenVLAConfig`]: what is narrower is padded with zeros.
        fast_scale, fast_min_token: As in [`OpenVLAConfig`]; they follow the `fast_tokenizer` that is assigned.
    """

    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: OpenVLAImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prompt_style: str = "pure",
        norm_type: str = "bounds_q99",
        n_action_bins: int = 256,
        action_token_end: int | None = None,
        closing_token_id: int | str | None = "auto",
        head_type: str = "tokens",
        chunk_size: int = 1,
        num_images: int = 1,
        use_proprio: bool = False,
        append_stop_token: bool = True,
        embodiments: list[str] | None = None,
        action_dim: int | None = None,
        proprio_dim: int | None = None,
        fast_scale: float | None = None,
        fast_min_token: int | None = None,
    ):
        if prompt_style not in PROMPT_TEMPLATES:
            raise ValueError(f"`prompt_style` must be one of {sorted(PROMPT_TEMPLATES)}, got {prompt_style!r}.")
        super().__init__(image_processor, tokenizer)
        self.prompt_style = prompt_style
        self.norm_type = norm_type
        self.n_action_bins = n_action_bins
        self.action_token_end = tokenizer.vocab_size if action_token_end is None else action_token_end
        self.closing_token_id = _lone_space_id(tokenizer) if closing_token_id == "auto" else closing_token_id
        self.head_type = head_type
        self.chunk_size = chunk_size
        self.num_images = num_images
        self.use_proprio = use_proprio
        self.append_stop_token = append_stop_token
        self.embodiments = embodiments
        self.action_dim = action_dim
        self.proprio_dim = proprio_dim
        self.fast_scale = fast_scale
        self.fast_min_token = fast_min_token
        self._fast_tokenizer: FastTokenizer | None = None
        self._norm_stats: dict[str, dict] = {}
        # A tokenizer keeps the way it treats special tokens as a state: switching it between prompts and
        # instructions, threads that share a processor would let control tokens through.
        self._instruction_tokenizer = copy.deepcopy(tokenizer)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "OpenVLAProcessor":
        """
        Load from one of our repositories or a published one, whose own code is never used.

        Settings that `processor_config.json` does not hold come from the model's `config.json`, statistics from
        `dataset_statistics.json` or, where there is none, from `config.json`; with `head_type="fast"` the FAST
        tokenizer from `fast_tokenizer.json`, if there is one.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): Directory or Hub id.
            kwargs: Hub arguments (`revision`, `token`, `cache_dir`, ...), settings of this class and of the image
                processor, and arguments of the tokenizer (`padding_side`, ...).

        Raises:
            ValueError: On an argument that is none of these.
        """
        source = str(pretrained_model_name_or_path)
        hub_kwargs = {name: kwargs.pop(name) for name in HUB_LOAD_ARGUMENTS if name in kwargs}
        hub_kwargs = {name: value for name, value in hub_kwargs.items() if value is not None}
        settings = _settings_of_model(source, hub_kwargs)
        norm_stats = settings.pop("norm_stats")
        settings |= _read_json(source, "processor_config.json", hub_kwargs)
        settings |= {name: kwargs.pop(name) for name in _SETTINGS if name in kwargs}
        tokenizer_kwargs = {name: kwargs.pop(name) for name in _TOKENIZER_ARGUMENTS if name in kwargs}
        image_settings = inspect.signature(OpenVLAImageProcessor.__init__).parameters.keys() - {"self", "kwargs"}
        image_kwargs = {name: kwargs.pop(name) for name in image_settings & kwargs.keys()}
        if unknown := sorted(name for name in kwargs.keys() - _LOADER_ARGUMENTS if not name.startswith("_")):
            raise ValueError(f"Arguments {unknown} are none of the processor, its image processor or its tokenizer.")
        processor = cls(
            OpenVLAImageProcessor.from_pretrained(source, **hub_kwargs, **image_kwargs),
            cls.load_tokenizer(source, hub_kwargs, **tokenizer_kwargs),
            **{name: settings[name] for name in _SETTINGS if name in settings},
        )
        processor.norm_stats = norm_stats
        if processor.head_type == "fast" and processor.fast_scale is not None:
            with contextlib.suppress(FileNotFoundError):  # the tokenizer may still have to be made
                processor.fast_tokenizer = FastTokenizer.load(
                    source, processor.fast_scale, processor.fast_min_token, **hub_kwargs
                )
        return processor

    @staticmethod
    def load_tokenizer(
        source: str | Path, hub_kwargs: dict[str, Any] | None = None, **kwargs
    ) -> PreTrainedTokenizerBase:
        """
        The tokenizer exactly as its `tokenizer.json` has it.

        The class that a published tokenizer_config.json names is not followed: transformers 5 rebuilds a Llama
        tokenizer from its vocabulary, with other rules for spaces.

        Args:
            source (`str` or `Path`): Directory or Hub id.
            hub_kwargs (`dict`, *optional*): `revision`, `token`, `cache_dir`, ...
            kwargs: Arguments of the tokenizer, such as `padding_side`.
        """
        source, hub_kwargs = str(source), hub_kwargs or {}
        path = cached_file(source, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **hub_kwargs)
        if path is None:
            return AutoTokenizer.from_pretrained(source, **hub_kwargs, **kwargs)
        saved = _read_json(source, "tokenizer_config.json", hub_kwargs)
        arguments = {name: saved[name] for name in _TOKENIZER_ARGUMENTS if saved.get(name) is not None} | kwargs
        for name, value in arguments.items():
            if isinstance(value, dict):  # a serialised AddedToken
                arguments[name] = value["content"]
        return PreTrainedTokenizerFast(
            tokenizer_file=path, model_input_names=["input_ids", "attention_mask"], **arguments
        )

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> list[str]:
        """
        Write image processor, tokenizers, settings and code in the layout that transformers 4.57 and 5 both read.

        Statistics are the model's to save: `dataset_statistics.json` has one writer.
        """
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.image_processor.save_pretrained(directory)
        save_tokenizer(self.tokenizer, directory)
        _write_json(directory / "processor_config.json", self.to_dict())
        if self.fast_tokenizer is not None:
            self.fast_tokenizer.save(directory)
        copy_remote_code(__file__, directory)
        if push_to_hub:
            hub_kwargs = {name: kwargs[name] for name in HUB_PUSH_ARGUMENTS if name in kwargs}
            self.push_to_hub(**{"repo_id": directory.name, **hub_kwargs})
        return [str(path) for path in sorted(directory.iterdir())]

    def to_dict(self, *args, **kwargs) -> dict[str, Any]:
        """The settings, as `processor_config.json` holds them."""
        settings = {name: getattr(self, name) for name in _SETTINGS}
        return {"auto_map": dict(PROCESSOR_AUTO_MAP), "processor_class": type(self).__name__, **settings}

    @property
    def norm_stats(self) -> dict[str, dict]:
        """Statistics by dataset name; they can be assigned."""
        return self._norm_stats

    @norm_stats.setter
    def norm_stats(self, norm_stats: dict[str, dict]) -> None:
        self._norm_stats = check_statistics(norm_stats)

    @property
    def fast_tokenizer(self) -> FastTokenizer | None:
        """With `head_type="fast"`, what makes tokens of chunks; can be assigned, and is saved with the processor."""
        return self._fast_tokenizer

    @fast_tokenizer.setter
    def fast_tokenizer(self, tokenizer: FastTokenizer) -> None:
        if self.head_type != "fast":
            raise ValueError(f"A FAST tokenizer was given to a processor with `head_type={self.head_type!r}`.")
        if tokenizer.vocab_size > self.action_token_end:
            raise ValueError(
                f"{tokenizer.vocab_size} FAST tokens do not fit in front of id {self.action_token_end} "
                "(`action_token_end`)."
            )
        self.fast_scale, self.fast_min_token = tokenizer.scale, tokenizer.min_token
        self._fast_tokenizer = tokenizer

    def fit_fast_tokenizer(
        self,
        actions: np.ndarray | Sequence,
        unnorm_key: str | Sequence[str] | None = None,
        scale: float = 10.0,
        vocab_size: int = 1024,
    ) -> FastTokenizer:
        """
        Learn a FAST tokenizer of chunks of a dataset, and use it from now on.

        Args:
            actions: (N, K, D), in the units of the dataset.
            unnorm_key (`str` or `list[str]`, *optional*): Dataset, or one per chunk.
            scale (`float`), vocab_size (`int`): See [`FastTokenizer.fit`].

        Returns:
            [`FastTokenizer`]: For `model.fast_tokenizer`, and its `config_fields` for the model's configuration.
        """
        normalized = self.normalize_actions(actions, unnorm_key)  # (N, K, D)
        self._check_chunk_size(normalized)
        self.fast_tokenizer = FastTokenizer.fit(normalized, scale, vocab_size)
        return self.fast_tokenizer

    @property
    def codec(self) -> ActionCodec:
        return ActionCodec(self.n_action_bins, self.action_token_end)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", *(["proprio"] if self.use_proprio else [])]

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: ImageInput | Sequence[ImageInput | Sequence[ImageInput]] | None = None,
        *,
        instruction: str | Sequence[str] | None = None,
        state: np.ndarray | Sequence | None = None,
        actions: np.ndarray | Sequence[np.ndarray] | None = None,
        unnorm_key: str | Sequence[str] | None = None,
        padding: bool | str | None = None,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = "pt",
        do_center_crop: bool = True,
    ) -> BatchFeature:
        """
        Model inputs of one observation or a batch.

        Args:
            text (`str` or `list[str]`): Whole prompts, tokenised as published: no closing token, and the strings of
                special tokens become special tokens.
            images: One image per text: see [`to_pil_rgb`], and [`OpenVLAImageProcessor.preprocess`] for those on a
                GPU, whose `pixel_values` may stay there: move the inputs to the policy's device. With `num_images`
                above 1 a list of so many per text, the third-person view first and the wrists after it.
            instruction (`str` or `list[str]`): Instead of `text`, what the robot should do. The prompt is rendered
                around it, with the closing token; strings of special tokens in it stay text.
            state (`np.ndarray`): The robot's state, (P,) or (B, P), in the units of the dataset; with `use_proprio`.
            actions (`np.ndarray`): With `instruction`, the actions to learn, (D,) or (B, D) in the units of the
                dataset, with `chunk_size` above 1 (K, D) or (B, K, D). Their tokens and the stop token follow the
                prompt, and `labels` are returned. States and actions of robots that differ in P or D are lists of B
                arrays.
            unnorm_key (`str` or `list[str]`): Dataset whose statistics normalise `state` and `actions`.
            padding, truncation, max_length, return_tensors: As in the tokenizer. A batch of instructions is padded
                by default, and never truncated.
            do_center_crop (`bool`, defaults to `True`): `False` in training: see
                [`OpenVLAImageProcessor.preprocess`].

        Returns:
            `BatchFeature`: `input_ids` and `attention_mask` (B, L), `pixel_values` (B, images * towers * 3, S, S) with
            `images`, `proprio` (B, P) with `state`, and `labels` (B, L) with `actions`. For a head on the hidden
            states also the normalised `actions`, float32 (B, K, D), and, where robots in the statistics differ in D,
            `action_dims` (B,): D is then that of the widest, and 0 stands behind the numbers of the others, as in
            `proprio`. For a policy that tells robots apart also `embodiment` (B,).

        Raises:
            ValueError: On an empty instruction, numbers of texts, images, states and actions that differ, or a state
                that is not finite or has no statistics.
        """
        if (text is None) == (instruction is None):
            raise ValueError("Pass exactly one of `text` (a whole prompt) and `instruction`.")
        prompts = _as_text_list(text if instruction is None else instruction)
        rows = None if images is None else as_image_rows(images, len(prompts), self.num_images)
        if instruction is not None:
            if truncation:
                raise ValueError("Instructions are never truncated: the prompt would lose its end.")
            inputs = self._encode_instructions(prompts, actions, unnorm_key, padding, max_length)
        else:
            if actions is not None:
                raise ValueError("`actions` go with `instruction`, not with a whole prompt.")
            self._check_frame(prompts)
            inputs = dict(
                self.tokenizer(prompts, padding=padding or False, truncation=truncation, max_length=max_length)
            )
        if rows is not None:
            flat = [image for row in rows for image in row]
            kind = "pt" if return_tensors == "pt" else "np"
            seen = self.image_processor(flat, return_tensors=kind, do_center_crop=do_center_crop)
            pixels = seen["pixel_values"]
            # (B * images, towers * 3, S, S) -> (B, images * towers * 3, S, S)
            inputs["pixel_values"] = pixels.reshape(len(rows), -1, *pixels.shape[2:])
        if state is not None:
            inputs["proprio"] = self.normalize_state(state, unnorm_key, len(prompts))
        return BatchFeature(inputs, tensor_type=return_tensors)

    def render_prompt(self, instruction: str) -> str:
        """The prompt around a lower-cased instruction, without the closing token."""
        return PROMPT_TEMPLATES[self.prompt_style].format(instruction=instruction.lower())

    def normalize_state(
        self,
        state: np.ndarray | Sequence,
        unnorm_key: str | Sequence[str] | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """
        The robot's state as the model takes it: like actions, by the `proprio` statistics. Numbers whose bounds
        coincide become 0, as where they never change in training.

        Args:
            state: (P,) or (B, P), in the units of the dataset; a list of (P,) for robots that differ in P.
            unnorm_key (`str` or `list[str]`, *optional*): Dataset, or one per row.
            batch_size (`int`, *optional*): Rows that are expected.

        Returns:
            `np.ndarray`: float32 (B, P), P the policy's `proprio_dim`, 0 behind the numbers of narrower robots.

        Raises:
            ValueError: If the policy takes no state, the state is not finite or of another shape, or the statistics
                have no `proprio`, or one that never changes in any number.
        """
        if not self.use_proprio:
            raise ValueError("`state` was given to the processor of a policy that takes none (`use_proprio=False`).")
        rows = _ragged_rows(state) or list(np.atleast_2d(np.asarray(state, dtype=np.float64)))
        if any(row.ndim != 1 for row in rows) or len(rows) != (batch_size or len(rows)):
            shapes = [row.shape for row in _ragged_rows(state)] or np.shape(state)
            raise ValueError(f"`state` must be of shape (P,) or ({batch_size or 'B'}, P), got {shapes}.")
        if not all(np.isfinite(row).all() for row in rows):
            raise ValueError(f"`state` must be finite, got {[row.tolist() for row in rows]}.")
        statistics = [self.norm_stats[key] for key in resolve_row_keys(self.norm_stats, unnorm_key, len(rows))]
        self._check_widths(rows)
        rows = [_normalized_state(row, each, self.norm_type) for row, each in zip(rows, statistics, strict=True)]
        return _pad_numbers(rows, self.proprio_dim).astype(np.float32)

    def _check_widths(self, rows: Sequence[np.ndarray]) -> None:
        """Refuse states that no robot of the statistics makes as wide as the policy's."""
        narrow = {len(row) for row in rows if len(row) < (self.proprio_dim or 0)}
        if narrow and self.proprio_dim not in state_dims(self.norm_stats):
            raise ValueError(
                f"The policy's states have {self.proprio_dim} numbers (`proprio_dim`), and {sorted(narrow)} were "
                f"given. Those of a robot with fewer are padded where the statistics hold a robot with "
                f"{self.proprio_dim}, too."
            )

    def decode_actions(
        self,
        token_ids: torch.Tensor | np.ndarray | Sequence,
        unnorm_key: str | Sequence[str] | None = None,
        fallback: np.ndarray | Sequence | None = None,
    ) -> np.ndarray:
        """
        Actions of action tokens.

        Args:
            token_ids: Ids of one action (D,) or a batch (B, D); with chunks (K * D,) or (B, K * D). FAST tokens: a row
                of any length, or a batch of rows, each up to its first stop token.
            unnorm_key (`str` or `list[str]`, *optional*): Dataset, or one per row; see `predict_action`.
            fallback (*optional*): (K, D), in the units of the dataset, in the place of FAST tokens that spell no
                chunk, such as zeros where actions are displacements. `predict_action` never needs it.

        Returns:
            `np.ndarray`: float64 of the same shape, in the units of the dataset; with chunks (K, D) or (B, K, D).

        Raises:
            ValueError: If an id is no action token. Of FAST tokens, without a `fallback`, a [`MalformedActionError`],
                also where they spell no chunk.
        """
        if self.head_type == "fast":
            return self._decode_fast_actions(token_ids, unnorm_key, fallback)
        if fallback is not None:
            raise ValueError("`fallback` is for FAST tokens; every sequence of bins is an action.")
        token_ids = token_ids.cpu().numpy() if isinstance(token_ids, torch.Tensor) else np.asarray(token_ids)
        normalized = self.codec.decode(np.atleast_2d(token_ids))  # (B, D)
        if self.chunk_size > 1:
            normalized = normalized.reshape(len(normalized), self.chunk_size, -1)  # (B, K, D)
        actions = self.unnormalize_actions(normalized, unnorm_key)
        return actions[0] if token_ids.ndim == 1 else actions

    def unnormalize_actions(self, normalized: np.ndarray, unnorm_key: str | Sequence[str] | None = None) -> np.ndarray:
        """
        Actions of normalised ones, such as a head on the hidden states gives them.

        Args:
            normalized (`np.ndarray`): (B, ..., D).
            unnorm_key (`str` or `list[str]`, *optional*): Dataset, or one per row; see `predict_action`.

        Returns:
            `np.ndarray`: float64 of the same shape, in the units of the dataset.
        """
        statistics = select_row_statistics(self.norm_stats, unnorm_key, len(normalized))
        rows = [
            unnormalize(row, each["action"], self.norm_type) for row, each in zip(normalized, statistics, strict=True)
        ]
        return np.stack(rows)

    def encode_actions(
        self, actions: np.ndarray | Sequence, unnorm_key: str | Sequence[str] | None = None
    ) -> np.ndarray | list[int] | list[list[int]]:
        """
        Action tokens of actions: the inverse of `decode_actions`, up to half a bin (FAST: half a step of the
        coefficients) and the clipping to the bounds.

        Args:
            actions: (D,) or (B, D), with chunks (K, D) or (B, K, D), in the units of the dataset.
            unnorm_key (`str` or `list[str]`, *optional*): Dataset, or one per row.

        Returns:
            `np.ndarray`: int64 of the same shape. FAST tokens: a list of ids for each chunk.
        """
        normalized = self.normalize_actions(actions, unnorm_key)
        if self.head_type != "fast":
            return self.codec.encode(normalized).reshape(np.shape(actions))
        self._check_chunk_size(normalized)
        rows = self._encode_normalized(normalized)
        return rows[0] if np.ndim(actions) == 2 else rows

    def _encode_normalized(self, chunks: Sequence[np.ndarray]) -> list[list[int]]:
        """Ids of the action tokens of each chunk (K, D)."""
        if self.head_type != "fast":
            return [self.codec.encode(chunk).flatten().tolist() for chunk in chunks]
        tokenizer = self._require_fast_tokenizer()
        rows = [tokenizer.encode(chunk[None])[0] for chunk in chunks]
        return [tokens_to_ids(row, self.action_token_end) for row in rows]

    def _decode_fast_actions(
        self,
        token_ids: torch.Tensor | np.ndarray | Sequence,
        unnorm_key: str | Sequence[str] | None,
        fallback: np.ndarray | Sequence | None,
    ) -> np.ndarray:
        """(K, D) or (B, K, D); see `decode_actions`."""
        rows = token_ids.tolist() if isinstance(token_ids, (torch.Tensor, np.ndarray)) else list(token_ids)
        is_batch = not rows or np.ndim(rows[0]) == 1
        rows = rows if is_batch else [rows]
        statistics = select_row_statistics(self.norm_stats, unnorm_key, len(rows))
        chunks = [self._decode_fast_row(row, each, fallback) for row, each in zip(rows, statistics, strict=True)]
        return np.stack(chunks) if is_batch else chunks[0]

    def _decode_fast_row(
        self, token_ids: Sequence[int], statistics: dict, fallback: np.ndarray | Sequence | None
    ) -> np.ndarray:
        """float64 (K, D), in the units of the dataset."""
        shape = (self.chunk_size, action_dim(statistics))
        if fallback is not None and np.shape(fallback) != shape:
            raise ValueError(f"`fallback` must be of shape {shape}, got {np.shape(fallback)}.")
        tokens = ids_to_tokens(token_ids, self.action_token_end, self.tokenizer.eos_token_id)
        tokenizer = self._require_fast_tokenizer()
        try:
            normalized = tokenizer.decode([tokens], *shape)[0]
        except ValueError as error:  # a MalformedActionError, perhaps of another copy of this code
            if fallback is None:
                raise
            logger.warning(f"The fallback takes the place of a chunk: {error}")
            return np.asarray(fallback, dtype=np.float64)
        return unnormalize(normalized, statistics["action"], self.norm_type)

    def _require_fast_tokenizer(self) -> FastTokenizer:
        if self.fast_tokenizer is None:
            raise ValueError(
                "The processor has no FAST tokenizer: call `fit_fast_tokenizer`, or assign `fast_tokenizer`."
            )
        return self.fast_tokenizer

    def normalize_actions(
        self, actions: np.ndarray | Sequence, unnorm_key: str | Sequence[str] | None = None
    ) -> np.ndarray:
        """
        Actions as the model learns them.

        Args:
            actions: (D,) or (B, D), with chunks (K, D) or (B, K, D), in the units of the dataset.
            unnorm_key (`str` or `list[str]`, *optional*): Dataset, or one per row.

        Returns:
            `np.ndarray`: float64 (B, K, D).

        Raises:
            ValueError: If the actions are of another shape, or there are no statistics of the dataset.
        """
        rows = self._normalized_chunks(actions, unnorm_key)
        select_row_statistics(self.norm_stats, unnorm_key, len(rows))  # of one dimension
        return np.stack(rows)

    def _normalized_chunks(
        self, actions: np.ndarray | Sequence, unnorm_key: str | Sequence[str] | None
    ) -> list[np.ndarray]:
        """float64 (K, D) of each row; see `normalize_actions`. Rows may differ in D."""
        chunks = self._chunks_of(actions)
        statistics = [self.norm_stats[key] for key in resolve_row_keys(self.norm_stats, unnorm_key, len(chunks))]
        return [normalize(row, each["action"], self.norm_type) for row, each in zip(chunks, statistics, strict=True)]

    def _chunks_of(self, actions: np.ndarray | Sequence) -> list[np.ndarray]:
        """float64 (K, D) of each row."""
        rows = _ragged_rows(actions)
        if not rows:
            array = np.asarray(actions, dtype=np.float64)
            is_batch = array.ndim == (2 if self.chunk_size == 1 else 3)
            rows = list(array) if is_batch else [array]
        if any(row.ndim != (1 if self.chunk_size == 1 else 2) for row in rows):
            expected = "(D,) or (B, D)" if self.chunk_size == 1 else "(K, D) or (B, K, D)"
            shapes = [row.shape for row in _ragged_rows(actions)] or np.shape(actions)
            raise ValueError(f"Actions must be of shape {expected}, got {shapes}.")
        return [np.atleast_2d(row) for row in rows]

    def _check_chunk_size(self, chunks: Sequence[np.ndarray]) -> None:
        if wrong := [len(chunk) for chunk in chunks if len(chunk) != self.chunk_size]:
            raise ValueError(f"Chunks of {self.chunk_size} actions are learned, got {wrong[0]}.")

    def _encode_instructions(
        self,
        instructions: list[str],
        actions: np.ndarray | Sequence | None,
        unnorm_key: str | Sequence[str] | None,
        padding: bool | str | None,
        max_length: int | None,
    ) -> dict[str, list[list[int]] | np.ndarray]:
        """
        Ids, mask and labels of the rendered prompts, with the closing token and the actions' tokens; for a head on the
        hidden states the actions, too.
        """
        if any(not instruction.strip() for instruction in instructions):
            raise ValueError(f"Every instruction needs words, got {instructions}.")
        prompts = [self.render_prompt(instruction) for instruction in instructions]
        rows = self._instruction_tokenizer(prompts, split_special_tokens=True)["input_ids"]
        closing = [] if self.closing_token_id is None else [self.closing_token_id]
        rows = [row + closing for row in rows]
        targets = [[] for _ in rows]
        numbers = {}
        if actions is not None:
            chunks = self._normalized_chunks(actions, unnorm_key)  # B of (K, D)
            if len(chunks) != len(rows):
                raise ValueError(f"{len(rows)} instructions and {len(chunks)} actions were given.")
            self._check_chunk_size(chunks)
            chunks, numbers = self._head_targets(chunks)
            if self.embodiments is not None:
                keys = resolve_row_keys(self.norm_stats, unnorm_key, len(rows))
                numbers["embodiment"] = np.array(embodiment_rows(self.embodiments, keys))
            stop = [self.tokenizer.eos_token_id] if self.append_stop_token else []
            targets = [[*ids, *stop] for ids in self._encode_normalized(chunks)]

        labels = [[-100] * len(row) + target for row, target in zip(rows, targets, strict=True)]
        rows = [row + target for row, target in zip(rows, targets, strict=True)]
        columns = {
            "input_ids": (rows, self.tokenizer.pad_token_id),
            "attention_mask": ([[1] * len(r) for r in rows], 0),
        }
        if actions is not None:
            columns["labels"] = (labels, -100)
        width = _padded_width(rows, len(rows) > 1 if padding is None else padding, max_length)
        return {
            name: [_pad_row(row, fill, width, self.tokenizer.padding_side) for row in column]
            for name, (column, fill) in columns.items()
        } | numbers

    def _head_targets(self, chunks: list[np.ndarray]) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        """Normalised chunks as wide as a head on the hidden states, and what it learns of them; tokens are as wide."""
        if self.head_type in ("tokens", "fast"):
            return chunks, {}
        padded = _pad_numbers(chunks, self.action_dim)  # (B, K, D)
        numbers = {"actions": padded.astype(np.float32)}
        if len({action_dim(statistics) for statistics in self.norm_stats.values()}) > 1:
            numbers["action_dims"] = np.array([chunk.shape[-1] for chunk in chunks])
        return list(padded), numbers

    def _check_frame(self, prompts: list[str]) -> None:
        start, _, end = PROMPT_TEMPLATES[self.prompt_style].partition("{instruction}")
        for prompt in prompts:
            if not (prompt.startswith(start) and prompt.rstrip().endswith(end.rstrip())):
                logger.warning_once(
                    f"The prompt {prompt!r} does not have the form {start + '<instruction>' + end!r} that the policy "
                    "was trained with; pass the bare instruction as `instruction=` to have it rendered."
                )


def _normalized_state(state: np.ndarray, statistics: dict, norm_type: str) -> np.ndarray:
    """float64 (P,) of a state (P,)."""
    if "proprio" not in statistics:
        raise ValueError(
            f"The dataset's statistics hold no `proprio`, only {sorted(statistics)}: the state has no scale."
        )
    normalized = normalize(state, statistics["proprio"], norm_type)
    low, high = STATISTICS_BOUNDS[norm_type]
    low, high = np.asarray(statistics["proprio"][low]), np.asarray(statistics["proprio"][high])
    is_constant = high == 0 if norm_type == "normal" else low == high
    if is_constant.all():
        raise ValueError(
            "The `proprio` statistics never change in any number: the dataset recorded no state. Compute them from "
            "data that did."
        )
    return np.where(is_constant, 0.0, normalized)


def _ragged_rows(values: Any) -> list[np.ndarray]:
    """float64 arrays of a list of arrays that differ in shape, as of several robots; nothing for anything else."""
    if not isinstance(values, (list, tuple)) or len({np.shape(row) for row in values}) < 2:
        return []
    return [np.asarray(row, dtype=np.float64) for row in values]


def _pad_numbers(rows: Sequence[np.ndarray], width: int | None) -> np.ndarray:
    """Rows (..., D) stacked, with zeros behind the numbers of those that have fewer than `width`, or than others."""
    width = max(width or 0, *(row.shape[-1] for row in rows))
    return np.stack([np.pad(row, [(0, 0)] * (row.ndim - 1) + [(0, width - row.shape[-1])]) for row in rows])


_SETTINGS = (
    "prompt_style",
    "norm_type",
    "n_action_bins",
    "action_token_end",
    "closing_token_id",
    "head_type",
    "chunk_size",
    "num_images",
    "use_proprio",
    "append_stop_token",
    "embodiments",
    "action_dim",
    "proprio_dim",
    "fast_scale",
    "fast_min_token",
)
# What the Auto classes pass on, and means nothing here.
_LOADER_ARGUMENTS = {"trust_remote_code", "code_revision", "use_fast", "proxies", "resume_download", "dtype"}
_TOKENIZER_ARGUMENTS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "model_max_length",
    "padding_side",
    "truncation_side",
    "clean_up_tokenization_spaces",
)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write the tokenizer under names and with fields that transformers 4.57 and 5 both read."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for name in ("extra_special_tokens", "is_local", "local_files_only", "backend", "auto_map", "processor_class"):
        settings.pop(name, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    _write_json(path, settings)


def _settings_of_model(source: str, hub_kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the model's configuration beside the processor says of prompt, actions and statistics."""
    config_file = cached_file(source, "config.json", _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    if config_file is None:
        return {"norm_stats": load_statistics(source, **hub_kwargs) or {}}
    config = OpenVLAConfig.from_pretrained(source, **hub_kwargs)
    settings = {name: getattr(config, name) for name in _SETTINGS if hasattr(config, name)}
    if (config.llm_backbone_id or "").startswith("vicuna"):
        settings["prompt_style"] = "vicuna"
    return settings | {"norm_stats": config.norm_stats}


def _read_json(source: str, name: str, hub_kwargs: dict[str, Any]) -> dict[str, Any]:
    path = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    return {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _as_text_list(texts: str | Sequence[str]) -> list[str]:
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"Expected a text or a list of at least one text, got {texts!r}.")
    return texts


def _lone_space_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    token_id = tokenizer.convert_tokens_to_ids("▁")
    return None if token_id == tokenizer.unk_token_id else token_id


def _padded_width(rows: list[list[int]], padding: bool | str, max_length: int | None) -> int:
    if padding == "max_length":
        if max_length is None or max_length < max(map(len, rows)):
            raise ValueError(f"`max_length` {max_length} must be at least the longest row, {max(map(len, rows))}.")
        return max_length
    return max(map(len, rows)) if padding in (True, "longest") else 0


def _pad_row(row: list[int], fill: int | None, width: int, side: str) -> list[int]:
    missing = max(width - len(row), 0)
    if missing and fill is None:
        raise ValueError("Prompts of different lengths need a padding token; set `processor.tokenizer.pad_token`.")
    return row + [fill] * missing if side == "right" else [fill] * missing + row


__all__ = ["OpenVLAImageProcessor", "OpenVLAProcessor"]
