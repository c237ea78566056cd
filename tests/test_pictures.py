"""Encoded pictures: TensorFlow's pixels, every kind of file, and messages for damaged ones."""

import hashlib
import io
import json
import struct
import zlib

import numpy as np
import pytest
from conftest import FIXTURES
from PIL import Image

from robot_data.pictures import decode, encode_jpeg, jpeg_round_trip


GOLDEN = FIXTURES / "tf_preprocessing"
DECODED_SHA256 = json.loads((GOLDEN / "expected.json").read_text())["decoded_sha256"]


@pytest.fixture(scope="module")
def jpeg() -> bytes:
    return (GOLDEN / "256x256.jpg").read_bytes()


@pytest.fixture(scope="module")
def pixels(jpeg) -> np.ndarray:
    return decode(jpeg)


def encode(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def segments(jpeg: bytes) -> dict[int, list[bytes]]:
    """The tables in front of a JPEG's picture, by their marker."""
    result, position = {}, 2
    while jpeg[position + 1] != 0xDA:
        length = int.from_bytes(jpeg[position + 2 : position + 4], "big")
        result.setdefault(jpeg[position + 1], []).append(jpeg[position + 4 : position + 2 + length])
        position += 2 + length
    return result


class TestDecode:
    @pytest.mark.parametrize("name", DECODED_SHA256)
    def test_jpeg_as_tensorflow(self, name):
        """To the bit."""
        picture = decode((GOLDEN / f"{name}.jpg").read_bytes())
        width, height = map(int, name.split("x"))
        assert picture.shape == (height, width, 3)
        assert hashlib.sha256(picture.tobytes()).hexdigest() == DECODED_SHA256[name]

    @pytest.mark.parametrize(
        "file_format, mode",
        [
            *(("PNG", mode) for mode in ("RGB", "L", "LA", "RGBA", "P", "1")),
            *(("BMP", mode) for mode in ("RGB", "L", "P")),
            *(("GIF", mode) for mode in ("L", "P")),
        ],
    )
    def test_lossless(self, pixels, file_format, mode):
        image = Image.fromarray(pixels).convert(mode)
        expected = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(decode(encode(image, file_format)), expected)

    def test_alpha_is_dropped(self, pixels):
        transparent = np.dstack([pixels, np.zeros(pixels.shape[:2], np.uint8)])
        np.testing.assert_array_equal(decode(encode(Image.fromarray(transparent), "PNG")), pixels)

    @pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
    def test_jpeg_modes(self, pixels, mode):
        image = Image.fromarray(pixels).convert(mode)
        picture = decode(encode(image, "JPEG", quality=100, subsampling=0))
        assert picture.shape == pixels.shape
        assert np.abs(picture.astype(int) - np.asarray(image.convert("RGB"))).mean() < 1.5

    def test_array_passes(self, pixels):
        assert decode(pixels) is pixels

    def test_result_can_be_written_to(self, jpeg, pixels):
        for encoded in (jpeg, encode(Image.fromarray(pixels), "PNG")):
            assert decode(encoded).flags.writeable

    def test_empty(self):
        padding = decode(b"", padding_size=(3, 5))
        np.testing.assert_array_equal(padding, np.zeros((3, 5, 3), np.uint8))
        with pytest.raises(ValueError, match=r"empty \(0 bytes\); pass `padding_size`"):
            decode(b"")

    @pytest.mark.parametrize("kept", [1, 10, 700, 5_000, 23_000])
    @pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
    def test_truncated(self, jpeg, pixels, file_format, kept):
        encoded = jpeg if file_format == "JPEG" else encode(Image.fromarray(pixels), "PNG")
        start = encoded[: min(kept, 8)].hex(" ")
        with pytest.raises(ValueError, match=rf"A (JPEG|picture) of {kept} bytes, starting with {start}, cannot"):
            decode(encoded[:kept])

    @pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
    def test_overwritten(self, jpeg, pixels, file_format):
        encoded = jpeg if file_format == "JPEG" else encode(Image.fromarray(pixels), "PNG")
        with pytest.raises(ValueError, match="cannot be decoded"):
            decode(encoded[:6000] + bytes(50) + encoded[6050:])

    def test_claimed_size(self, jpeg, pixels):
        frame = jpeg.index(b"\xff\xc0") + 5
        with pytest.raises(ValueError, match="it claims 65500x65500 pixels"):
            decode(jpeg[:frame] + struct.pack(">HH", 65500, 65500) + jpeg[frame + 4 :])
        png = encode(Image.fromarray(pixels), "PNG")
        for side in (9_000, 60_000):
            header = png[12:16] + struct.pack(">II", side, side) + png[24:29]
            forged = png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
            with pytest.raises(ValueError, match=f"claims {side}x{side}|{side * side} pixels"):
                decode(forged)

    @pytest.mark.parametrize(
        "picture, message",
        [
            (b"no picture at all", "A picture of 17 bytes, starting with 6e 6f 20 .*: it is of no known format"),
            (encode(Image.new("I;16", (20, 20)), "PNG"), "mode 'I;16' holds depth"),
            ("frame.png", "got str"),
            (np.zeros((8, 8), np.uint8), r"got uint8 \(8, 8\)"),
            (np.zeros((8, 8, 3), np.float32), r"got float32 \(8, 8, 3\)"),
        ],
    )
    def test_refused(self, picture, message):
        with pytest.raises(ValueError, match=message):
            decode(picture)


class TestEncode:
    def test_as_tensorflow(self, jpeg, pixels):
        """Quantisation, sampling and Huffman tables are those of a file that TensorFlow wrote."""
        ours, theirs = segments(encode_jpeg(pixels)), segments(jpeg)
        for marker in (0xDB, 0xC0, 0xC4):
            assert ours[marker] == theirs[marker]

    def test_subsampling(self, pixels):
        """A red and a blue pixel side by side survive only with colours at full resolution."""
        checkered = np.zeros((64, 64, 3), np.uint8)
        checkered[:, ::2, 0] = checkered[:, 1::2, 2] = 255
        errors = {
            subsampling: np.abs(decode(encode_jpeg(checkered, subsampling=subsampling)).astype(int) - checkered).mean()
            for subsampling in ("420", "444")
        }
        assert errors["444"] < 5
        assert errors["420"] > 50

    def test_round_trip(self, pixels):
        returned = jpeg_round_trip(pixels)
        np.testing.assert_array_equal(returned, decode(encode_jpeg(pixels, quality=95, subsampling="420")))
        assert 0.5 < np.abs(returned.astype(int) - pixels).mean() < 2

    def test_view(self, pixels):
        """LIBERO's pictures come turned by 180 degrees, as a view with negative strides."""
        turned = pixels[::-1, ::-1]
        assert encode_jpeg(turned) == encode_jpeg(np.ascontiguousarray(turned))

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"quality": 0}, "between 1 and 100, got 0"),
            ({"quality": 101}, "got 101"),
            ({"subsampling": "422"}, "'422'"),
            ({"image": np.zeros((8, 8, 3))}, "float64"),
        ],
    )
    def test_refused(self, pixels, arguments, message):
        with pytest.raises(ValueError, match=message):
            encode_jpeg(**{"image": pixels, **arguments})
