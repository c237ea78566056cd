"""Pixels: equal to the reference's, and refused where they are no camera frame."""

import hashlib
import io
import json
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import FIXTURES, GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from load_policy import repository_class
from PIL import Image
from safetensors.torch import load_file

from robot_data.pictures import decode


RECORDS = json.loads((GOLDEN / "imgproc.json").read_text())
TENSORFLOW = FIXTURES / "tf_preprocessing"
STORED_IMAGES = sorted(path.stem for path in (GOLDEN / "images").glob("*.png"))


def read_image(name: str) -> Image.Image:
    return Image.open(GOLDEN / "images" / f"{name}.png")


def sha256(pixel_values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixel_values).tobytes()).hexdigest()


def make_processor(record: dict, side: int = 224, **settings):
    """An image processor from the arguments the reference was given, without the derived ones."""
    means = [tower["mean"] for tower in record["normalize"]]
    return repository_class("OpenVLAImageProcessor")(
        use_fused_vision_backbone=len(means) == 2,
        image_resize_strategy=record["strategy"],
        input_sizes=[(3, side, side)] * len(means),
        means=means,
        stds=[tower["std"] for tower in record["normalize"]],
        **settings,
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


class TestTensorFlowPixels:
    """The two settings beyond the published ones, against TensorFlow's own output."""

    @pytest.fixture
    def image_processor(self):
        return make_processor(RECORDS["sets"]["fused_resize-naive"], resample="tf_lanczos3")

    @staticmethod
    def read(name: str) -> np.ndarray:
        return np.asarray(Image.open(TENSORFLOW / f"{name}.png"))

    @staticmethod
    def count_differences(actual: np.ndarray, expected: np.ndarray) -> int:
        """How many levels differ, all of them by one."""
        assert actual.dtype == expected.dtype == np.uint8
        assert np.abs(actual.astype(int) - expected).max() <= 1
        return np.count_nonzero(actual != expected)

    @pytest.mark.parametrize("name", ["256x256", "640x480", "320x180"])
    def test_lanczos3(self, image_processor, name):
        """Smaller, much smaller, and with one side enlarged."""
        pixels = decode((TENSORFLOW / f"{name}.jpg").read_bytes())
        assert self.count_differences(image_processor.resize(pixels), self.read(f"{name}_lanczos3")) <= 5

    @pytest.mark.parametrize("strategy", ["resize-crop", "letterbox"])
    def test_lanczos3_of_other_strategies(self, strategy):
        """They differ in what is resized, not in how."""
        settings = {**RECORDS["sets"]["fused_resize-naive"], "strategy": strategy}
        pixels = decode((TENSORFLOW / "320x180.jpg").read_bytes())
        actual = make_processor(settings, resample="tf_lanczos3").resize(pixels)
        bicubic = make_processor(settings).resize(pixels)
        assert actual.shape == bicubic.shape
        assert 0.1 < np.abs(actual.astype(int) - bicubic).mean() < 3

    def test_center_crop(self, image_processor):
        picture, expected = self.read("256x256_lanczos3"), self.read("center_crop")
        image_processor.center_crop_area = 0.9
        mean, std = (
            np.array([tower[name] for tower in image_processor.tvf_normalize_params], np.float32).reshape(6, 1, 1)
            for name in ("mean", "std")
        )
        values = image_processor(picture, return_tensors="np")["pixel_values"][0]
        levels = np.rint((values * std + mean) * 255).astype(np.uint8).transpose(1, 2, 0)  # (S, S, 6)
        assert self.count_differences(levels[..., :3], expected) <= 5
        np.testing.assert_array_equal(levels[..., :3], levels[..., 3:])

    def test_center_crop_of_the_whole_area(self, image_processor, camera_image):
        expected = image_processor(camera_image)["pixel_values"]
        image_processor.center_crop_area = 1
        assert torch.equal(image_processor(camera_image)["pixel_values"], expected)

    def test_training_turns_the_center_crop_off(self, image_processor, camera_image):
        expected = image_processor(camera_image)["pixel_values"]
        image_processor.center_crop_area = 0.9
        assert not torch.equal(image_processor(camera_image)["pixel_values"], expected)
        assert torch.equal(image_processor(camera_image, do_center_crop=False)["pixel_values"], expected)

    @pytest.mark.parametrize("resample", ["pil_bicubic", "tf_lanczos3"])
    @pytest.mark.parametrize("strategy", ["resize-naive", "resize-crop", "letterbox"])
    @pytest.mark.parametrize("center_crop_area", [None, 0.9])
    def test_resized_picture_passes(self, camera_image, resample, strategy, center_crop_area):
        """Training resizes, augments, and then calls the processor: which must not resize again."""
        settings = {**RECORDS["sets"]["fused_resize-naive"], "strategy": strategy}
        processor = make_processor(settings, resample=resample, center_crop_area=center_crop_area)
        picture = processor.resize(camera_image)
        assert (picture.shape, picture.dtype) == ((224, 224, 3), np.uint8)
        np.testing.assert_array_equal(processor.resize(picture), picture)
        assert torch.equal(processor(picture)["pixel_values"], processor(camera_image)["pixel_values"])

    @settings(max_examples=40, deadline=None)
    @given(height=st.integers(8, 700), width=st.integers(8, 700), level=st.integers(0, 255))
    def test_flat_picture_stays_flat(self, height, width, level):
        """The weights of every output pixel add up to one, at the borders too."""
        processor = make_processor(
            RECORDS["sets"]["fused_resize-naive"], side=56, resample="tf_lanczos3", center_crop_area=0.9
        )
        picture = np.full((height, width, 3), level, np.uint8)
        np.testing.assert_array_equal(processor.resize(picture), np.full((56, 56, 3), level))
        values = processor(picture)["pixel_values"]
        assert torch.equal(values, values[..., :1, :1].expand_as(values))

    def test_saved_and_loaded(self, golden_image_processor, camera_image, tmp_path):
        """The published file has neither; a saved one has both, and an override changes nothing else."""
        assert (golden_image_processor.resample, golden_image_processor.center_crop_area) == (
            "pil_bicubic",
            None,
        )
        ours = {"resample": "tf_lanczos3", "center_crop_area": 0.9}
        image_processor_class = type(golden_image_processor)
        changed = image_processor_class.from_pretrained(GOLDEN / "ckpt", **ours)
        assert changed.to_dict() == golden_image_processor.to_dict() | ours
        changed.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert {name: saved[name] for name in ours} == ours
        restored = image_processor_class.from_pretrained(tmp_path)
        assert torch.equal(restored(camera_image)["pixel_values"], changed(camera_image)["pixel_values"])

    def test_override_keeps_what_does_not_follow_from_it(self, tmp_path):
        settings = {**RECORDS["sets"]["fused_resize-naive"], "strategy": "letterbox"}
        make_processor(settings, tvf_letterbox_fill=[1, 2, 3]).save_pretrained(tmp_path)
        restored = repository_class("OpenVLAImageProcessor").from_pretrained(tmp_path, resample="tf_lanczos3")
        assert restored.tvf_letterbox_fill == [1, 2, 3]

    def test_processor_passes_the_switch_on(self, processor, camera_image):
        processor.image_processor.center_crop_area = 0.9
        arguments = {"instruction": "push the cube", "images": camera_image}
        cropped = processor(**arguments)["pixel_values"]
        whole = processor(**arguments, do_center_crop=False)["pixel_values"]
        processor.image_processor.center_crop_area = None
        assert torch.equal(processor(**arguments)["pixel_values"], whole)
        assert not torch.equal(cropped, whole)


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


class TestThreads:
    """Large pictures are resized side by side, on as many threads as torch may use."""

    @pytest.fixture(autouse=True)
    def two_threads(self):
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        yield
        torch.set_num_threads(before)

    @pytest.fixture
    def frames(self):
        return list(np.random.default_rng(0).integers(0, 256, (4, 480, 640, 3), dtype=np.uint8))

    @pytest.mark.parametrize("resample", ["pil_bicubic", "tf_lanczos3"])
    def test_same_pixels_in_order(self, frames, resample):
        processor = make_processor(RECORDS["sets"]["fused_resize-naive"], resample=resample)
        alone = torch.cat([processor(frame)["pixel_values"] for frame in frames])
        forms = [frames[0], Image.fromarray(frames[1]), torch.from_numpy(frames[2]).permute(2, 0, 1), frames[3]]
        assert torch.equal(processor(forms)["pixel_values"], alone)

    @pytest.mark.parametrize("kind", ["png", "jpeg"])
    def test_one_file_given_twice(self, golden_image_processor, frames, tmp_path, kind):
        Image.fromarray(frames[0]).save(tmp_path / f"frame.{kind}")
        expected = golden_image_processor(Image.open(tmp_path / f"frame.{kind}"))["pixel_values"]
        for _ in range(5):
            image = Image.open(tmp_path / f"frame.{kind}")
            values = golden_image_processor([image] * 4)["pixel_values"]
            assert torch.equal(values, expected.expand(4, -1, -1, -1))

    def test_two_at_once(self, golden_image_processor, frames, monkeypatch):
        meeting, resize = threading.Barrier(2, timeout=20), type(golden_image_processor).resize

        def meet(processor, image):
            meeting.wait()
            return resize(processor, image)

        monkeypatch.setattr(type(golden_image_processor), "resize", meet)
        assert golden_image_processor(frames)["pixel_values"].shape == (4, 6, 224, 224)

    @pytest.mark.parametrize("num_threads, side", [(1, 640), (2, 64)])
    def test_one_after_the_other(self, golden_image_processor, monkeypatch, num_threads, side):
        """Where torch has one thread, as in a worker of a data loader, and where the pictures are small."""
        torch.set_num_threads(num_threads)
        monkeypatch.setattr(sys.modules[type(golden_image_processor).__module__], "ThreadPoolExecutor", None)
        assert golden_image_processor(np.zeros((4, side, side, 3), np.uint8))["pixel_values"].shape[0] == 4

    def test_a_bad_one_among_them(self, golden_image_processor, frames):
        with pytest.raises(ValueError, match="must lie in"):
            golden_image_processor([*frames, np.full((480, 640, 3), 2.0, np.float32)])


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


class TestOnDevice:
    """What a GPU would run, run on the CPU: nothing here has one."""

    @settings(max_examples=60, deadline=None)
    @given(
        sizes=st.tuples(*[st.integers(8, 700)] * 2, *[st.integers(16, 400)] * 2),
        seed=st.integers(0, 2**32 - 1),
        levels=st.sampled_from([(0, 256), (0, 2), (200, 256)]),
    )
    def test_resize_is_pillows_to_the_bit(self, sizes, seed, levels):
        height, width, new_height, new_width = sizes
        low, high = levels
        pixels = np.random.default_rng(seed).integers(low, high, (height, width, 3), dtype=np.uint8)
        pixels = pixels * (255 if high == 2 else 1)  # black and white overshoot most
        expected = np.asarray(Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BICUBIC))
        planes = torch.from_numpy(pixels).permute(2, 0, 1)
        module = sys.modules[repository_class("OpenVLAImageProcessor").__module__]
        resized = module.resize_pil_bicubic(planes, new_width, new_height)
        np.testing.assert_array_equal(resized.permute(1, 2, 0), expected)

    @pytest.mark.parametrize("side", [224, 384])
    @pytest.mark.parametrize("name", ["fused_resize-naive", "siglip_resize-naive", "openvla7b_from_pretrained"])
    @pytest.mark.parametrize("default", [torch.float32, torch.float64])
    def test_same_pixel_values(self, name, side, default):
        processor = make_processor(RECORDS["sets"][name], side)
        pixels = [np.array(read_image(image).convert("RGB")) for image in STORED_IMAGES]
        tensors = [torch.from_numpy(each) for each in pixels]
        expected = processor(pixels)["pixel_values"]
        torch.set_default_dtype(default)
        try:
            with torch.autocast("cpu", torch.bfloat16):
                values = processor._preprocess_on_device(tensors)
                of_planes = processor._preprocess_on_device([each.permute(2, 0, 1) for each in tensors])
        finally:
            torch.set_default_dtype(torch.float32)
        assert values.dtype == torch.float32
        assert torch.equal(values, expected)
        assert torch.equal(of_planes, expected)

    @pytest.mark.parametrize("return_tensors", [None, "np", "pt"])
    def test_processor_takes_them_from_there(self, processor, monkeypatch, return_tensors):
        """`pt` alone: nothing else can be on a GPU."""
        image_processor = processor.image_processor
        pictures = [
            torch.from_numpy(np.array(read_image(STORED_IMAGES[0]))),
            torch.zeros(3, 50, 90, dtype=torch.uint8),
        ]
        inputs = {"instruction": ["push", "lift"], "images": pictures, "return_tensors": return_tensors}
        expected, calls = processor(**inputs)["pixel_values"], []
        monkeypatch.setattr(type(image_processor), "_can_stay_on_device", lambda *_: calls.append(1) or True)
        values = processor(**inputs)["pixel_values"]
        assert len(calls) == (return_tensors == "pt")
        assert isinstance(values, torch.Tensor if return_tensors == "pt" else np.ndarray)
        np.testing.assert_array_equal(values, expected)

    def test_sizes_are_checked(self, golden_image_processor):
        with pytest.raises(ValueError, match="both sides must be between"):
            golden_image_processor._preprocess_on_device([torch.zeros(3, 4, 100, dtype=torch.uint8)])

    def test_what_stays(self, golden_image_processor):
        """Told by stand-ins for tensors on a GPU."""

        def on(number):
            class OnGPU(torch.Tensor):
                device = torch.device("cuda", number)

            return torch.zeros(60, 80, 3, dtype=torch.uint8).as_subclass(OnGPU)

        picture, there = torch.zeros(60, 80, 3, dtype=torch.uint8), on(0)
        assert golden_image_processor._can_stay_on_device([there], True)
        squashing = make_processor(RECORDS["sets"]["fused_resize-naive"])
        assert squashing._can_stay_on_device([there, there.permute(2, 0, 1)], True)
        huge = there.repeat(300, 1, 1)
        for others in (
            [picture],
            [there, picture],
            [there, on(1)],
            [there.float()],
            [there[..., :1]],
            [there[0]],
            [np.asarray(picture)],
            [huge],
        ):
            assert not squashing._can_stay_on_device(others, True)
        for record in ("fused_resize-crop", "fused_letterbox"):
            assert not make_processor(RECORDS["sets"][record])._can_stay_on_device([there], True)
        squashing.center_crop_area = 0.9
        assert not squashing._can_stay_on_device([there], True)
        assert squashing._can_stay_on_device([there], False)


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
            ({"resample": "lanczos"}, r"one of \['pil_bicubic', 'tf_lanczos3'\], got 'lanczos'"),
            ({"center_crop_area": 0}, r"must lie in \(0, 1\], or be None, got 0"),
            ({"center_crop_area": 1.5}, "got 1.5"),
            ({"center_crop_area": float("nan")}, "got nan"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            repository_class("OpenVLAImageProcessor")(**settings)
