"""Pixels: equal to the reference's, and refused where they are no camera frame."""

import hashlib
import io
import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from load_policy import repository_class
from PIL import Image
from safetensors.torch import load_file


RECORDS = json.loads((GOLDEN / "imgproc.json").read_text())
STORED_IMAGES = sorted(path.stem for path in (GOLDEN / "images").glob("*.png"))


def read_image(name: str) -> Image.Image:
    return Image.open(GOLDEN / "images" / f"{name}.png")


def sha256(pixel_values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixel_values).tobytes()).hexdigest()


def make_processor(record: dict, side: int = 224):
    """An image processor from the arguments the reference was given, without the derived ones."""
    means = [tower["mean"] for tower in record["normalize"]]
    return repository_class("OpenVLAImageProcessor")(
        use_fused_vision_backbone=len(means) == 2,
        image_resize_strategy=record["strategy"],
        input_sizes=[(3, side, side)] * len(means),
        means=means,
        stds=[tower["std"] for tower in record["normalize"]],
    )


@pytest.fixture(scope="module")
def resized():
    return load_file(GOLDEN / "resized_u8.safetensors")


@pytest.mark.parametrize("name", RECORDS["sets"])
def test_pixel_values_as_the_reference(name, resized):
    """To the bit, and so within the promised 1e-6; the hash of the whole output says which."""
    record = RECORDS["sets"][name]
    processor = make_processor(record)
    assert processor.tvf_letterbox_fill == record["letterbox_fill"]
    assert sorted(record["images"]) == STORED_IMAGES
    for image_name, golden in record["images"].items():
        values = processor(read_image(image_name), return_tensors="np")["pixel_values"][0]
        if golden["u8_key"] in resized:  # the one letterbox colour that is not stored is left to the hash
            levels = resized[golden["u8_key"]].permute(2, 0, 1).numpy().astype(np.float32) / np.float32(255)
            mean, std = (
                np.array([tower[key] for tower in record["normalize"]], dtype=np.float32)[..., None, None]
                for key in ("mean", "std")
            )
            np.testing.assert_allclose(values, ((levels - mean) / std).reshape(values.shape), atol=1e-6)
        for channel, row, column, value in golden["samples"]:
            assert values[channel, row, column] == pytest.approx(value, abs=1e-6)
        assert sha256(values) == golden["sha256_f32"], image_name


def test_published_file_is_read_as_it_is(golden_image_processor):
    """The constants rounded to bfloat16 win over the exact ones in the same file."""
    assert golden_image_processor.means[0] == [0.485, 0.456, 0.406]
    assert golden_image_processor.tvf_normalize_params[0]["mean"] == [0.484375, 0.455078125, 0.40625]
    golden = RECORDS["sets"]["openvla7b_from_pretrained"]["images"]
    for name, record in golden.items():
        values = golden_image_processor(read_image(name), return_tensors="np")["pixel_values"][0]
        assert sha256(values) == record["sha256_f32"]


def test_384_pixels():
    processor = make_processor(RECORDS["sets"]["fused_resize-naive"], side=384)
    for name in STORED_IMAGES:
        values = processor(read_image(name), return_tensors="np")["pixel_values"][0]
        assert values.shape == (6, 384, 384)
        assert sha256(values) == RECORDS["fused_384_sha256"][name]


def test_save_and_load(golden_image_processor, camera_image, tmp_path):
    golden_image_processor.save_pretrained(tmp_path)
    restored = type(golden_image_processor).from_pretrained(tmp_path)
    expected, actual = golden_image_processor(camera_image), restored(camera_image)
    assert torch.equal(actual["pixel_values"], expected["pixel_values"])
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    published = json.loads((GOLDEN / "ckpt" / "preprocessor_config.json").read_text())
    assert {name: saved.get(name) for name in published} == published | {
        "image_processor_type": "OpenVLAImageProcessor"
    }


class TestForms:
    """One picture in every form it can come in."""

    @pytest.fixture
    def expected(self, golden_image_processor, camera_image):
        return golden_image_processor(camera_image)["pixel_values"]

    @pytest.mark.parametrize(
        "convert",
        [
            np.asarray,
            lambda image: torch.from_numpy(np.array(image)),
            lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1),
            lambda image: np.asarray(image).transpose(2, 0, 1),
            lambda image: np.asarray(image, dtype=np.float32) / 255,
            lambda image: torch.from_numpy(np.asarray(image, dtype=np.float64) / 255),
            lambda image: [image],
            lambda image: np.asarray(image)[None],
            lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1)[None],
            lambda image: np.dstack([np.asarray(image), np.full((240, 320), 77, np.uint8)]),
            lambda image: Image.fromarray(np.dstack([np.asarray(image), np.zeros((240, 320), np.uint8)])),
        ],
    )
    def test_same_pixels(self, golden_image_processor, camera_image, expected, convert):
        assert torch.equal(golden_image_processor(convert(camera_image))["pixel_values"], expected)

    @pytest.mark.parametrize("convert", [lambda image: image, np.asarray, lambda image: np.asarray(image)[..., None]])
    def test_grayscale(self, golden_image_processor, camera_image, convert):
        gray = camera_image.convert("L")
        expected = golden_image_processor(gray.convert("RGB"))["pixel_values"]
        assert torch.equal(golden_image_processor(convert(gray))["pixel_values"], expected)

    def test_palette(self, golden_image_processor, camera_image):
        palette = camera_image.quantize(64)
        expected = golden_image_processor(palette.convert("RGB"))["pixel_values"]
        assert torch.equal(golden_image_processor(palette)["pixel_values"], expected)

    def test_batch_of_sizes(self, golden_image_processor, camera_image, expected):
        other = Image.fromarray(np.zeros((50, 70, 3), np.uint8))
        batch = golden_image_processor([camera_image, other, camera_image])["pixel_values"]
        assert batch.shape == (3, 6, 224, 224)
        assert torch.equal(batch[::2], expected.expand(2, -1, -1, -1))
        assert torch.equal(batch[1:2], golden_image_processor(other)["pixel_values"])


@settings(max_examples=25, deadline=None)
@given(
    width=st.integers(8, 400),
    height=st.integers(8, 400),
    strategy=st.sampled_from(["resize-naive", "resize-crop", "letterbox"]),
)
def test_every_size_gives_the_shape(width, height, strategy):
    record = {**RECORDS["sets"]["fused_resize-naive"], "strategy": strategy}
    values = make_processor(record)(np.full((height, width, 3), 128, np.uint8))["pixel_values"]
    assert values.shape == (1, 6, 224, 224)
    assert torch.isfinite(values).all()


class TestBadInput:
    @pytest.mark.parametrize(
        "image, message",
        [
            (np.zeros((1, 1, 3), np.uint8), "1x1 pixels was given"),
            (np.zeros((10_000, 10_000), np.uint8), "10000x10000 pixels was given"),
            (np.full((20, 20, 3), np.nan, np.float32), "NaN"),
            (np.full((20, 20, 3), 255.0, np.float32), r"must lie in \[0, 1\], got \[0.0, 255.0\]"),
            (np.full((20, 20, 3), -0.5), r"must lie in \[0, 1\], got \[-0.5"),
            (np.zeros((20, 20, 3), np.int32), "got int32"),
            (np.zeros((20, 20, 2), np.uint8), r"got \(20, 20, 2\)"),
            (np.zeros(20, np.uint8), r"got \(20,\)"),
            ("picture.png", "got str"),
            ([], "empty"),
            (np.zeros((0, 20, 20, 3), np.uint8), "empty"),
            ([None], "got NoneType"),
            (Image.new("I", (20, 20)), "mode 'I'"),
            (Image.new("F", (20, 20)), "mode 'F'"),
            (Image.new("I;16", (20, 20)), "mode 'I;16'"),
        ],
    )
    def test_refused(self, golden_image_processor, image, message):
        with pytest.raises(ValueError, match=message):
            golden_image_processor(image)

    @pytest.mark.parametrize("image_format", ["png", "jpeg"])
    def test_truncated_file(self, golden_image_processor, camera_image, image_format, tmp_path):
        encoded = io.BytesIO()
        camera_image.save(encoded, image_format)
        path = tmp_path / f"frame.{image_format}"
        path.write_bytes(encoded.getvalue()[: len(encoded.getvalue()) // 2])
        with pytest.raises(ValueError, match=rf"frame.{image_format} \(320x240 pixels\) cannot be decoded"):
            golden_image_processor(Image.open(path))

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"image_resize_strategy": "stretch"}, "'stretch'"),
            ({"use_fused_vision_backbone": True}, r"means for 1 tower\(s\)"),
            ({"interpolations": ["bilinear"]}, "bilinear"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            repository_class("OpenVLAImageProcessor")(**settings)
