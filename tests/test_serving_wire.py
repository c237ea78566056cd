"""Arrays on the wire: the published forms to the byte, limits, and frames that are not what they say."""

import base64
import io
import json
import struct

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from serving.observations import MAX_PIXELS, ObservationError, read_observation, read_picture
from serving.wire import DTYPES, MAX_DEPTH, MAX_ITEMS, WireError, dump_json, load_json, pack, unpack


ARRAYS = [
    np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
    np.linspace(-1, 1, 7),
    np.float32([[0.5]]),
    np.array([True, False]),
    np.zeros((0, 3), np.int64),
    np.array(3.5),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
def test_arrays_come_back(array):
    for back in (load_json(dump_json({"a": array}))["a"], unpack(pack({"a": array}))["a"]):
        assert (back.dtype, back.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(back, array)


def test_the_bytes_are_the_published_ones():
    """What json_numpy 2.1 and openpi-client 0.1 write."""
    array = np.array([1.0, -2.0])
    content = base64.b64encode(struct.pack("<dd", 1.0, -2.0)).decode()
    assert dump_json(array) == f'{{"__numpy__": "{content}", "dtype": "<f8", "shape": [2]}}'
    assert dump_json([array], (",", ":")) == f'[{{"__numpy__":"{content}","dtype":"<f8","shape":[2]}}]'
    expected = {b"__ndarray__": True, b"data": struct.pack("<dd", 1.0, -2.0), b"dtype": "<f8", b"shape": (2,)}
    assert pack({"actions": array}) == msgpack.packb({"actions": expected})
    assert pack(np.float32(0.5)) == msgpack.packb({b"__npgeneric__": True, b"data": 0.5, b"dtype": "<f4"})
    assert unpack(pack({"n": np.int64(3)}))["n"] == 3


def test_dtypes_are_a_list():
    assert all(np.dtype(name).kind in "biuf" for name in DTYPES)
    for dtype in ("|O", "<U4", "|V8", "<c16", "|S3", "M8[s]", "f8,i4", "", None, 3, ["<f8"], "x" * 10_000):
        as_json = json.dumps({"__numpy__": "", "dtype": dtype, "shape": [0]})
        as_frame = msgpack.packb({b"__ndarray__": True, b"data": b"", b"dtype": dtype, b"shape": [0]})
        for read, message in ((load_json, as_json), (unpack, as_frame)):
            with pytest.raises(WireError, match="dtype") as error:
                read(message)
            assert len(str(error.value)) < 300
    for dtype in (object, "<U4", complex):
        for write in (pack, dump_json):
            with pytest.raises(ValueError, match="not sent"):
                write(np.zeros(1, dtype))


@pytest.mark.parametrize("shape", [[3], [2, 2], [-1], [1 << 62, 4], [True, 2], [1.0], "2", None, {}, [1] * 5, [[2]]])
def test_arrays_fill_their_shape(shape):
    """Two numbers are there."""
    for read, message in (
        (load_json, json.dumps({"__numpy__": base64.b64encode(bytes(16)).decode(), "dtype": "<f8", "shape": shape})),
        (unpack, msgpack.packb({b"__ndarray__": True, b"data": bytes(16), b"dtype": "<f8", b"shape": shape})),
    ):
        with pytest.raises(WireError):
            read(message)


@pytest.mark.parametrize(
    "text",
    [
        *(
            b"",
            b"{",
            b"\xff\xfe",
            b'{"a": NaN}',
            b"[" * 10_000,
            b'{"a":' * 5000,
            b"1" * 5000,
            b"[" + b"1," * MAX_ITEMS,
        ),
        *(b'{"__numpy__": 3, "dtype": "<f8", "shape": []}', b'{"__numpy__": "a?", "dtype": "<f8", "shape": []}'),
        b'{"__numpy__": "\xc3\xa9", "dtype": "<f8", "shape": []}',
    ],
    ids=range(11),
)
def test_bad_json(text):
    with pytest.raises(WireError):
        load_json(text)


def test_frames_that_promise_much():
    """Each would take gigabytes if it were believed."""
    large_array, large_map, large_bytes = b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"
    for frame in (
        large_array,
        large_array * 1000,
        large_map,
        large_map + b"\xa1a",
        large_bytes,
        b"\xdc\xff\xff" * 900,
    ):
        with pytest.raises(WireError):
            unpack(frame)
    for frame in (b"\x90" * 0 + b"\xdd\x00\x01\x00\x00" + b"\x90" * 65536, b"\x91" * (MAX_DEPTH + 5) + b"\x90"):
        with pytest.raises(WireError, match="more than"):
            unpack(frame)


@pytest.mark.parametrize(
    "frame",
    [
        *(
            b"",
            b"\xc1",
            b"\x81",
            b"\x81\xa1",
            b"\x81\xa1a",
            b"\x80\x80",
            b"\xa1\xff",
            b"\x81\x01\x02",
            b"\x81\x90\x01",
        ),
        *(b"\x81\x80\x01", b"\xd4\x01\x00", b"\xd6\xff\x00\x00\x00\x00", b"\xc7\x01\x05\x00"),
    ],
    ids=range(13),
)
def test_bad_frames(frame):
    with pytest.raises(WireError):
        unpack(frame)


FRAME = pack(
    {
        "observation/image": np.zeros((8, 8, 3), np.uint8),
        "observation/state": np.zeros(8),
        "prompt": "pick up the red cube",
        "scale": np.float32(1.5),
    }
)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_mutated_frames(data):
    """A frame is an observation, or one of two errors."""
    frame = bytearray(FRAME)
    for _ in range(data.draw(st.integers(0, 6))):
        place = data.draw(st.integers(0, len(frame) - 1))
        match data.draw(st.sampled_from(("set", "cut", "insert", "repeat"))):
            case "set":
                frame[place] = data.draw(st.integers(0, 255))
            case "cut":
                del frame[place : place + data.draw(st.integers(1, 16))]
            case "insert":
                frame[place:place] = data.draw(st.binary(max_size=8))
            case _:
                frame[place:place] = frame[place : place + 32]
        frame = frame or bytearray(b"\x80")
    try:
        read_observation(unpack(bytes(frame)), num_images=1, use_proprio=True)
    except (WireError, ObservationError) as error:
        assert len(str(error)) < 1000


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(data):
    for read in (unpack, load_json):
        try:
            read(data)
        except WireError as error:
            assert str(error)


def test_names_of_known_clients():
    front, wrist = np.zeros((8, 8, 3), np.uint8), np.ones((8, 8, 3), np.uint8)
    planar = wrist.transpose(2, 0, 1)
    oft = {"full_image": front, "left_wrist": wrist, "right_wrist_image": front, "instruction": "go", "state": [1, 2]}
    libero = {"observation/image": front, "observation/wrist_image": wrist, "observation/state": np.ones(8)}
    droid = {
        "observation/exterior_image_1_left": front,
        "observation/wrist_image_left": wrist,
        "observation/joint_position": np.arange(7.0),
        "observation/gripper_position": np.array([0.5]),
    }
    cameras = {"cam_right_wrist": front, "cam_low": front, "cam_left_wrist": planar, "cam_high": front}
    aloha = {"images": cameras, "state": np.arange(14.0)}
    for fields, count, size in ((oft, 3, 2), (libero, 2, 8), (droid, 2, 8), (aloha, 3, 14)):
        seen = read_observation({"prompt": "go", **fields}, count, use_proprio=True)
        assert (len(seen.images), seen.state.shape, seen.state.dtype) == (count, (size,), np.float64)
        assert not np.asarray(seen.images[0]).any()
        assert np.asarray(seen.images[1]).all()
        assert len(read_observation({"prompt": "go", **fields}, 1, use_proprio=False).images) == 1
    np.testing.assert_array_equal(read_observation({"prompt": "go", **droid}, 2, True).state, [*range(7), 0.5])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "map"),
        ({"image": 3}, "instruction"),
        ({"image": 3, "instruction": " "}, "text of 1 to"),
        ({"image": 3, "instruction": "x" * 2000}, "text of 1 to"),
        ({"image": 3, "instruction": "\ud800"}, "surrogate"),
        ({"image": 3, "instruction": b"go"}, "text of 1 to"),
        ({"instruction": "go"}, "looks at 1 picture"),
        ({"wrist_image": 3, "instruction": "go"}, "looks at 1 picture"),
        ({"image": 3, "full_image": 3, "instruction": "go"}, "several front cameras"),
        ({"image": 3, "instruction": "go"}, "must be an array, or a JPEG or PNG"),
        ({"image": "/etc/passwd", "instruction": "go"}, "base64"),
        ({"image": "file:///etc/passwd", "instruction": "go"}, "base64"),
        ({"image": "AAAA", "instruction": "go"}, "neither a JPEG nor a PNG"),
        ({"image": np.zeros((4, 4, 4, 3), np.uint8), "instruction": "go"}, "shape"),
        ({"image": ARRAYS[0], "instruction": "go", "state": 1, "unnorm_key": ["a"]}, "unnorm_key"),
        ({"image": ARRAYS[0], "instruction": "go", "state": 1, "session_id": 3}, "session_id"),
        ({"image": ARRAYS[0], "instruction": "go", "state": 1, "uncertainty": 1}, "uncertainty"),
        ({"image": ARRAYS[0], "instruction": "go"}, "takes a state"),
        *(
            ({"image": ARRAYS[0], "instruction": "go", "state": state}, "`state` must be")
            for state in ("a", [[1, 2]], [1, None], [10**400], [float("nan")], {}, [1, [2]], b"12", [1j])
        ),
    ],
)
def test_what_is_wrong_is_said(fields, message):
    with pytest.raises(ObservationError, match=message):
        read_observation(fields, num_images=1, use_proprio=True)


def test_pictures_are_limited(camera_image):
    def encoded(image, kind, **options):
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        return stream.getvalue()

    png = encoded(camera_image, "PNG")
    np.testing.assert_array_equal(np.asarray(read_picture("image", png)), np.asarray(camera_image))
    text = base64.b64encode(png).decode()
    for value in (text, f"data:image/png;base64,{text}"):
        np.testing.assert_array_equal(np.asarray(read_picture("image", value)), np.asarray(camera_image))
    side = int(MAX_PIXELS**0.5) + 1
    with pytest.raises(ObservationError, match="pixels; at most"):
        read_picture("image", encoded(Image.new("1", (side, side)), "PNG"))
    for damaged in (png[: len(png) // 2], encoded(camera_image, "JPEG")[:2000], encoded(camera_image, "JPEG")[:200]):
        with pytest.raises(ObservationError, match=r"damaged|neither"):
            read_picture("image", damaged)
    for kind in ("GIF", "BMP", "TIFF", "PPM"):  # formats with other decoders are not tried
        with pytest.raises(ObservationError, match="neither"):
            read_picture("image", encoded(camera_image, kind))
