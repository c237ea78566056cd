"""Augmentation: TensorFlow's pixels, and each operation by itself against its definition."""

import colorsys
import dataclasses
import json

import numpy as np
import pytest
from conftest import FIXTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from robot_data.augmentation import Augmentation, AugmentationParameters


GOLDEN = FIXTURES / "tf_preprocessing"
NUMBERS = json.loads((GOLDEN / "expected.json").read_text())["augmentation_u"]
NEUTRAL = AugmentationParameters(crop_y=0.5, crop_x=0.5, brightness=0, contrast=1, saturation=1, hue=0)
WHOLE = Augmentation(crop_area=1)


def read(name: str) -> np.ndarray:
    return np.asarray(Image.open(GOLDEN / f"{name}.png"))


@pytest.fixture(scope="module")
def picture():
    return read("256x256_lanczos3")


def level_differences(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    assert actual.dtype == expected.dtype == np.uint8
    return np.abs(actual.astype(int) - expected)


@pytest.mark.parametrize("index", range(len(NUMBERS)))
def test_as_tensorflow(picture, index):
    augmentation = Augmentation()
    differences = level_differences(
        augmentation.apply(picture, augmentation.parameters([NUMBERS[index]])), read(f"augmented_{index}")
    )
    assert differences.max() <= 1
    assert np.count_nonzero(differences) <= 20


def test_floating_point_picture(picture):
    parameters = Augmentation().parameters([0.3])
    expected = Augmentation().apply(picture, parameters)
    for dtype in (np.float32, np.float64):
        actual = Augmentation().apply(picture.astype(dtype) / 255, parameters)
        assert np.count_nonzero(level_differences(actual, expected)) <= 20


class TestOperations:
    """Each alone, the others neutral."""

    def test_neutral(self, picture):
        np.testing.assert_array_equal(WHOLE.apply(picture, NEUTRAL), picture)

    @pytest.mark.parametrize("crop_y, crop_x", [(0.0, 0.0), (1.0, 0.25), (0.3, 1.0)])
    def test_crop(self, crop_y, crop_x):
        """On a plane, interpolation is exact: each result shows where it was sampled."""
        height, width, side = 41, 61, 0.5
        rows, columns = np.mgrid[:height, :width]
        plane = 0.01 * rows + 0.005 * columns
        image = np.repeat(plane[..., None], 3, axis=2)
        parameters = dataclasses.replace(NEUTRAL, crop_y=crop_y, crop_x=crop_x)
        actual = Augmentation(crop_area=side**2).apply(image, parameters)
        y = (height - 1) * (crop_y * (1 - side) + side * np.linspace(0, 1, height))
        x = (width - 1) * (crop_x * (1 - side) + side * np.linspace(0, 1, width))
        expected = (0.01 * y[:, None] + 0.005 * x) * 255.5
        assert np.abs(actual - (expected[..., None] - 0.5)).max() <= 0.51  # cut off, not rounded

    @pytest.mark.parametrize("brightness", [-0.2, 0.15])
    def test_brightness(self, picture, brightness):
        actual = WHOLE.apply(picture, dataclasses.replace(NEUTRAL, brightness=brightness))
        expected = (np.clip(picture / 255 + brightness, 0, 1) * 255.5).astype(np.uint8)
        assert np.count_nonzero(level_differences(actual, expected)) <= 20

    @pytest.mark.parametrize("contrast", [0.8, 1.2])
    def test_contrast(self, picture, contrast):
        actual = WHOLE.apply(picture, dataclasses.replace(NEUTRAL, contrast=contrast))
        means = picture.mean(axis=(0, 1)) / 255
        expected = (np.clip((picture / 255 - means) * contrast + means, 0, 1) * 255.5).astype(np.uint8)
        assert np.count_nonzero(level_differences(actual, expected)) <= 20

    def test_contrast_follows_brightness(self):
        """Clipping in between is what makes the order matter."""
        image = np.zeros((8, 8, 3), np.uint8)
        image[:4] = 250
        actual = WHOLE.apply(image, dataclasses.replace(NEUTRAL, brightness=0.2, contrast=0.8))
        assert actual[0, 0, 0] == int((0.6 + (1 - 0.6) * 0.8) * 255.5)
        assert actual[7, 0, 0] == int((0.6 + (0.2 - 0.6) * 0.8) * 255.5)

    @settings(max_examples=200, deadline=None)
    @given(
        pixel=st.tuples(*[st.integers(0, 255)] * 3),
        saturation=st.floats(0, 2),
        hue=st.floats(-0.5, 0.5),
    )
    def test_saturation_and_hue(self, pixel, saturation, hue):
        """Of any colour, gray and ties included, as the standard library's HSV has it."""
        parameters = dataclasses.replace(NEUTRAL, saturation=saturation, hue=hue)
        actual = WHOLE.apply(np.array(pixel, np.uint8).reshape(1, 1, 3), parameters)[0, 0]
        h, s, v = colorsys.rgb_to_hsv(*(value / 255 for value in pixel))
        expected = colorsys.hsv_to_rgb((h + hue) % 1.0, min(s * saturation, 1.0), v)
        assert np.abs(actual + 0.5 - 255.5 * np.array(expected)).max() <= 0.502


@settings(max_examples=50, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    mode=st.sampled_from(["published", "independent"]),
    seed=st.integers(0, 2**32),
)
def test_every_size_keeps_shape_and_dtype(height, width, mode, seed):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    before = image.copy()
    result = Augmentation(mode)(image, seed)
    assert result.shape == image.shape
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(image, before)  # the argument stays as it is


class TestDraws:
    def test_published_is_one_number(self):
        u = np.random.default_rng(0).random()
        drawn = Augmentation().draw(0)
        assert drawn == Augmentation().parameters([u] * 6)
        assert drawn == AugmentationParameters(
            crop_y=u,
            crop_x=u,
            brightness=pytest.approx(-0.2 + 0.4 * u),
            contrast=pytest.approx(0.8 + 0.4 * u),
            saturation=pytest.approx(0.8 + 0.4 * u),
            hue=pytest.approx(-0.05 + 0.1 * u),
        )

    def test_independent(self):
        augmentation, generator = Augmentation("independent"), np.random.default_rng(7)
        draws = np.array([dataclasses.astuple(augmentation.draw(generator)) for _ in range(4000)])
        correlations = np.corrcoef(draws.T) - np.eye(6)
        assert np.abs(correlations).max() < 4 / np.sqrt(len(draws))
        lower, upper = np.array([0, 0, -0.2, 0.8, 0.8, -0.05]), np.array([1, 1, 0.2, 1.2, 1.2, 0.05])
        uniform = (draws - lower) / (upper - lower)
        for fraction in (0.01, 0.25, 0.5, 0.75, 0.99):
            np.testing.assert_allclose((uniform < fraction).mean(axis=0), fraction, atol=0.03)
        assert uniform.min() >= 0
        assert uniform.max() <= 1 + 1e-12

    @pytest.mark.parametrize("mode", ["published", "independent"])
    def test_seed_decides(self, picture, mode):
        augmentation = Augmentation(mode)
        seed = (3, 14, 15)
        expected = augmentation(picture, seed)
        np.testing.assert_array_equal(augmentation(picture, np.random.default_rng(seed)), expected)
        np.testing.assert_array_equal(augmentation(picture, seed), expected)
        assert (augmentation(picture, (3, 14, 16)) != expected).any()

    def test_generator_moves_on(self):
        generator = np.random.default_rng(0)
        assert Augmentation().draw(generator) != Augmentation().draw(generator)


class TestBadInput:
    @pytest.mark.parametrize(
        "image, message",
        [
            (np.zeros((8, 8), np.uint8), r"got \(8, 8\)"),
            (np.zeros((3, 8, 8), np.uint8), r"got \(3, 8, 8\)"),
            (np.zeros((0, 8, 3), np.uint8), r"got \(0, 8, 3\)"),
            (np.zeros((8, 8, 3), np.int64), "got int64"),
            (np.full((8, 8, 3), 255.0), r"must lie in \[0, 1\], got \[255.0, 255.0\]"),
            (np.full((8, 8, 3), np.nan), "nan"),
        ],
    )
    def test_picture(self, image, message):
        with pytest.raises(ValueError, match=message):
            Augmentation()(image, 0)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"mode": "random"}, "'random'"),
            ({"crop_area": 0}, "crop_area"),
            ({"crop_area": 1.1}, "crop_area"),
            ({"brightness": -0.1}, "brightness"),
            ({"contrast": 1.5}, "contrast"),
            ({"saturation": float("nan")}, "saturation"),
            ({"hue": 0.6}, r"`hue` must lie in \[0, 0.5\], got 0.6"),
        ],
    )
    def test_ranges(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            Augmentation(**arguments)
