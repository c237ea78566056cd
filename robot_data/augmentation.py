"""The random changes of a training picture: crop, brightness, contrast, saturation and hue, as OpenVLA's training."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


MODES = ("published", "independent")

RandomState = np.random.Generator | int | Sequence[int]


@dataclass(frozen=True)
class AugmentationParameters:
    """
    What is done to one picture.

    Args:
        crop_y, crop_x (`float`): Where the crop lies, from 0 (top, left) to 1 (bottom, right).
        brightness (`float`): Added to every value; values lie in [0, 1].
        contrast (`float`): Factor of a channel's difference from its mean.
        saturation (`float`): Factor of the saturation of HSV.
        hue (`float`): Added to the hue of HSV, in turns of the colour circle.
    """

    crop_y: float
    crop_x: float
    brightness: float
    contrast: float
    saturation: float
    hue: float


@dataclass(frozen=True)
class Augmentation:
    """
    The random changes of OpenVLA's training, with its ranges and in its order; pictures keep their size.

    A crop is enlarged to the picture's size (bilinear, without antialiasing); then come brightness, contrast,
    saturation and hue, each clipped to [0, 1]. Equal to TensorFlow's `crop_and_resize`, `adjust_brightness`,
    `adjust_contrast`, `adjust_saturation` and `adjust_hue`, up to the rounding of float32.

    OpenVLA hands the same seed to all operations, so that one number drives them: its crops lie on the diagonal, and
    the brightest picture has the strongest colours too. `published` repeats that; `independent` draws each anew.

    Args:
        mode (`str`, defaults to `"published"`): `published` or `independent`.
        crop_area (`float`, defaults to 0.9): Part of the area that is kept, in (0, 1].
        brightness (`float`, defaults to 0.2): Most that is added or taken away.
        contrast, saturation (`float`, defaults to 0.2): Most that the factor differs from 1.
        hue (`float`, defaults to 0.05): Most that the hue moves, in turns of the colour circle.

    Raises:
        ValueError: If the mode is unknown or a value is out of range.
    """

    mode: str = "published"
    crop_area: float = 0.9
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.05

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"`mode` must be one of {list(MODES)}, got {self.mode!r}.")
        if not 0 < self.crop_area <= 1:
            raise ValueError(f"`crop_area` must lie in (0, 1], got {self.crop_area}.")
        for name, most in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"`{name}` must lie in [0, {most}], got {getattr(self, name)}.")

    def __call__(self, image: np.ndarray, random_state: RandomState) -> np.ndarray:
        """
        A picture, changed at random: [`draw`] and [`apply`] in one.

        Args:
            image (`np.ndarray`): See [`apply`].
            random_state (`np.random.Generator` or `int` or `Sequence[int]`): See [`draw`].

        Returns:
            `np.ndarray`: uint8 (H, W, 3).
        """
        return self.apply(image, self.draw(random_state))

    def draw(self, random_state: RandomState) -> AugmentationParameters:
        """
        Random parameters; pictures of one moment, from several cameras, share them in OpenVLA's training.

        Args:
            random_state (`np.random.Generator` or `int` or `Sequence[int]`): A generator, or the seed of a new one:
                `(seed, dataset, episode, frame)`, for instance, makes an example the same in every order.
        """
        generator = np.random.default_rng(random_state)
        return self.parameters(generator.random(1 if self.mode == "published" else 6))

    def parameters(self, uniform: np.ndarray | Sequence[float]) -> AugmentationParameters:
        """
        Parameters of numbers that are uniform in [0, 1).

        Args:
            uniform (`np.ndarray`): One for all operations, or six in the order of [`AugmentationParameters`].
        """
        crop_y, crop_x, brightness, contrast, saturation, hue = np.broadcast_to(uniform, 6).tolist()
        return AugmentationParameters(
            crop_y=crop_y,
            crop_x=crop_x,
            brightness=(2 * brightness - 1) * self.brightness,
            contrast=1 + (2 * contrast - 1) * self.contrast,
            saturation=1 + (2 * saturation - 1) * self.saturation,
            hue=(2 * hue - 1) * self.hue,
        )

    def apply(self, image: np.ndarray, parameters: AugmentationParameters) -> np.ndarray:
        """
        Args:
            image (`np.ndarray`): (H, W, 3), uint8 or floating point in [0, 1].
            parameters ([`AugmentationParameters`]): What to do.

        Returns:
            `np.ndarray`: uint8 (H, W, 3).
        """
        _check_image(image)
        planes = _crop(image, self.crop_area**0.5, parameters.crop_y, parameters.crop_x)
        _adjust_brightness_and_contrast(planes, parameters.brightness, parameters.contrast)
        return _adjust_saturation_and_hue(planes, parameters.saturation, parameters.hue)


def _check_image(image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f"A picture must be of shape (H, W, 3), got {image.shape}.")
    if np.issubdtype(image.dtype, np.floating):
        low, high = image.min(), image.max()
        if not (low >= 0 and high <= 1):  # so that NaN is refused too
            raise ValueError(f"A floating-point picture must lie in [0, 1], got [{low}, {high}]; or pass uint8.")
    elif image.dtype != np.uint8:
        raise ValueError(f"A picture must be uint8, or floating point in [0, 1], got {image.dtype}.")


def _crop(image: np.ndarray, length: float, y: float, x: float) -> np.ndarray:
    """
    `length` of both sides of (H, W, 3), enlarged to the whole: float32 (3, H, W) in [0, 1].

    Corners of the crop become corners of the result; between pixels, values are interpolated.
    """
    height, width, channels = image.shape
    top, bottom, row_weights = _sample_positions(height, length, y)
    left, right, column_weights = _sample_positions(width, length, x)
    planes = np.empty((channels, height, width), dtype=np.float32)
    for channel, plane in enumerate(planes):
        values = image[..., channel].astype(np.float32)
        rows = _interpolate(values.take(top, axis=0), values.take(bottom, axis=0), row_weights[:, None])
        plane[...] = _interpolate(rows.take(left, axis=1), rows.take(right, axis=1), column_weights)
    if image.dtype == np.uint8:
        planes *= np.float32(1 / 255)
    return planes


def _sample_positions(size: int, length: float, offset: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pixels before and after each sample of an axis, and the weight of the one after, in TensorFlow's float32."""
    start = np.float32(offset * (1 - length))
    end = np.float32(offset * (1 - length) + length)
    last = np.float32(size - 1)
    step = (end - start) * last / np.float32(max(size - 1, 1))
    positions = np.minimum(start * last + np.arange(size, dtype=np.float32) * step, last)
    before = positions.astype(np.intp)
    after = np.minimum(before + 1, size - 1)
    return before, after, positions - before.astype(np.float32)


def _interpolate(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """From `first` to `second`; overwrites `second`."""
    second -= first
    second *= weights
    second += first
    return second


def _adjust_brightness_and_contrast(planes: np.ndarray, brightness: float, contrast: float) -> None:
    """In place: (3, H, W)."""
    planes += np.float32(brightness)
    np.clip(planes, 0, 1, out=planes)
    means = planes.mean(axis=(1, 2), keepdims=True)
    planes -= means
    planes *= np.float32(contrast)
    planes += means
    np.clip(planes, 0, 1, out=planes)


def _adjust_saturation_and_hue(planes: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    """
    uint8 (H, W, 3) of (3, H, W) in [0, 1].

    In HSV, a pixel is its largest value V, the range C between its largest and smallest value, and the hue h, in
    sixths of the circle. Saturation is C / V, so that scaling it scales C, up to V. A channel whose colour lies at
    the hue k is (V - C) + C clip(2 - |h - k|, 0, 1), where |h - k| is taken the shorter way around.
    """
    red, green, blue = planes
    high = np.maximum(np.maximum(red, green), blue)  # (H, W)
    spread = high - np.minimum(np.minimum(red, green), blue)
    hues = _hues(planes, high, spread)
    hues += np.float32(6 * hue)
    hues -= 6 * np.floor(hues * np.float32(1 / 6))

    spread *= np.float32(saturation)
    np.minimum(spread, high, out=spread)
    # TensorFlow makes uint8 of values in [0, 1] by cutting off 255.5 times the value.
    high *= np.float32(255.5)
    spread *= np.float32(255.5)
    low = np.subtract(high, spread, out=high)

    result = np.empty((*high.shape, 3), dtype=np.uint8)
    for channel, center in enumerate((0, 2, 4)):
        part = np.abs(hues - np.float32(center))
        # 2 - min(d, 6 - d) = |d - 3| - 1: the distance d, the shorter way around.
        part -= 3
        np.abs(part, out=part)
        part -= 1
        np.clip(part, 0, 1, out=part)
        part *= spread
        part += low
        result[..., channel] = part
    return result


def _hues(planes: np.ndarray, high: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Hue in sixths of the circle, from -1 to 5, (H, W); any number for gray pixels."""
    red, green, blue = planes
    inverse = np.float32(1) / np.maximum(spread, np.float32(1e-12))
    hues = (red - green) * inverse + 4
    np.copyto(hues, (blue - red) * inverse + 2, where=green == high)
    np.copyto(hues, (green - blue) * inverse, where=red == high)
    return hues
