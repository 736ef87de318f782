"""The reader of images, on whatever Pillow can write: orientation, depth, modes, and files that are damaged."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from svit.images import EXTENSIONS, MODES, UnreadableImageError, channel_values, mode_of, read_image

ORIENTATION = 0x112

# What a viewer does with the stored pixels (H, W, C), by EXIF's number.
SHOWN = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}

sizes = st.tuples(st.integers(1, 12), st.integers(1, 12))
seeds = st.integers(0, 2**32 - 1)
# pytest-timeout ends what hangs; a slow machine is no failure.
quick = settings(max_examples=60, deadline=None)


def pixels(seed: int, size: tuple[int, int], channels: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, channels), np.uint8)


def encoded(image: Image.Image, form: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, form, **options)
    file.seek(0)
    return file


def exif(orientation: int) -> bytes:
    data = Image.Exif()
    data[ORIENTATION] = orientation
    return data.tobytes()


def array(file, mode: str = "L") -> np.ndarray:
    return np.asarray(read_image(file, mode)).astype(int)


@quick
@given(st.sampled_from(sorted(SHOWN)), st.sampled_from(["PNG", "WEBP", "TIFF"]), st.sampled_from([3, 4]), sizes, seeds)
def test_an_image_is_turned_as_its_exif_orientation_says(orientation, form, channels, size, seed):
    stored = pixels(seed, size, channels)
    stored[..., 3:] = 255
    lossless = {"lossless": True, "exact": True} if form == "WEBP" else {}
    file = encoded(Image.fromarray(stored), form, exif=exif(orientation), **lossless)
    mode = MODES[channels]
    expected = SHOWN[orientation](stored)
    assert np.array_equal(array(file, mode), expected)
    file.seek(0)
    with Image.open(file) as image:  # as data sets hand it on; read twice, since it stays as it is
        assert np.array_equal(array(image, mode), expected)
        assert np.array_equal(array(image, mode), expected)


@pytest.mark.parametrize("orientation", SHOWN)
def test_a_jpeg_is_turned_as_the_same_jpeg_without_metadata(orientation, tmp_path):
    image = Image.fromarray(pixels(0, (24, 40), 3))
    image.save(tmp_path / "stored.jpg")
    image.save(tmp_path / "turned.jpg", exif=exif(orientation))
    expected = SHOWN[orientation](array(tmp_path / "stored.jpg", "RGB"))
    assert np.array_equal(array(tmp_path / "turned.jpg", "RGB"), expected)


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "I", "F"])
def test_grey_images_of_any_depth_are_turned_too(mode):
    values = np.zeros((2, 3), np.uint8)
    values[0, 2] = 255
    image = Image.fromarray(values)
    deep = {"I;16": values.astype(np.uint16) * 257, "I": values.astype(np.int32) * 257, "F": values / np.float32(255)}
    image = Image.fromarray(deep[mode]) if mode in deep else image.convert(mode)
    file = encoded(image, "TIFF", exif=exif(6))
    assert array(file).tolist() == [[0, 0], [0, 0], [0, 255]]


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_none(orientation):
    stored = pixels(1, (2, 5), 3)
    assert np.array_equal(array(encoded(Image.fromarray(stored), "PNG", exif=exif(orientation)), "RGB"), stored)


@pytest.mark.filterwarnings("ignore:.*(EXIF|Truncated)")
def test_damaged_exif_data_leave_what_can_be_known_of_the_orientation():
    stored = pixels(2, (2, 5), 3)
    turn = struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0)
    start = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + turn
    for data, expected in (
        (start + struct.pack("<HHII", 0x11A, 5, 1, 1 << 30) + bytes(4), SHOWN[6](stored)),  # a tag points outside
        (start + struct.pack("<HHII", 0x11A, 7, 8, 0) + bytes(4), SHOWN[6](stored)),  # one of the wrong type
        (b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1), stored),
        (b"Exif\0\0" + b"\xff" * 30, stored),
        (b"Exif\0\0", stored),
    ):
        assert np.array_equal(array(encoded(Image.fromarray(stored), "PNG", exif=data), "RGB"), expected)


@pytest.mark.filterwarnings("ignore:.*EXIF")
@settings(quick, max_examples=150)
@given(st.binary(max_size=80), seeds)
@example(b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", 0)
def test_any_exif_data_at_all_leave_an_image(data, seed):
    stored = pixels(seed, (3, 4), 3)
    for head in (b"", b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"):
        found = array(encoded(Image.fromarray(stored), "PNG", exif=head + data), "RGB")
        assert any(np.array_equal(found, shown(stored)) for shown in SHOWN.values())


@quick
@given(sizes, seeds, st.sampled_from(["PNG", "TIFF", "PPM", None]))
def test_16_bits_look_like_8(size, seed, form):
    values = np.random.default_rng(seed).integers(0, 65536, size, np.uint16)
    values.flat[0] = 65535
    image = Image.fromarray(values)
    assert abs(array(encoded(image, form) if form else image) - (values >> 8)).max() <= 1


@quick
@given(sizes, seeds, st.sampled_from([65535, 2**31 - 1]), st.sampled_from(["TIFF", None]))
def test_32_bits_look_like_8_by_65535_where_that_is_enough(size, seed, largest, form):
    values = np.random.default_rng(seed).integers(0, largest, size, np.int32, endpoint=True)
    values.flat[0] = largest
    image = Image.fromarray(values)
    twin = values / largest * 255
    assert abs(array(encoded(image, form) if form else image) - twin).max() <= 1


@quick
@given(sizes, seeds, st.sampled_from([(0, 1), (0, 0.25), (0, 255), (-1, 1), (-1000, 3000), (-3e38, 3e38)]))
def test_floats_from_0_to_1_are_taken_as_they_are_and_others_from_their_own_range(size, seed, limits):
    low, high = limits
    values = (low + np.random.default_rng(seed).random(size) * (high - low)).astype(np.float32)
    values.flat[0], values.flat[-1] = low, high
    black, white = (0, 1) if values.min() >= 0 and values.max() <= 1 else (values.min(), values.max())
    twin = (values.astype(float) - float(black)) / (float(white) - float(black) or 1) * 255
    for file in (Image.fromarray(values), encoded(Image.fromarray(values), "TIFF")):
        assert abs(array(file) - twin).max() <= 1


def test_values_that_are_no_numbers_do_not_move_the_others():
    nan, inf = np.nan, np.inf
    for values, expected in (
        ([0.0, 0.5, 1.0, nan, inf, -inf], [0, 128, 255, 0, 255, 0]),
        ([-1.0, 0.0, 1.0, nan, inf, -inf], [0, 128, 255, 0, 255, 0]),
        ([nan, nan], [0, 0]),
        ([7.0, 7.0], [0, 0]),
        ([1.0, 1.0], [255, 255]),
    ):
        assert array(Image.fromarray(np.array([values], np.float32))).tolist() == [expected]


def tiff(data: bytes, size: tuple[int, int], order: str = "<", **tags: int) -> io.BytesIO:
    """A TIFF of types that Pillow does not write, `size` being height and width."""
    numbers = {256: size[1], 257: size[0], 259: 1, 262: 1, 273: 8, 277: 1, 278: size[0], 279: len(data), 339: 1}
    names = {"bits": 258, "compression": 259, "photometric": 262, "channels": 277, "planes": 284, "sample_format": 339}
    numbers |= {names[name]: value for name, value in tags.items()}
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in sorted(numbers.items()))
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8 + len(data))
    return io.BytesIO(head + data + struct.pack(order + "H", len(numbers)) + entries + bytes(4))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("kind", "sample_format", "photometric"),
    [
        *(("<u1", 1, 1), ("<u1", 1, 0), ("<u2", 1, 1), ("<u2", 1, 0), ("<u4", 1, 1), (">u2", 1, 1)),
        *(("<i1", 2, 1), ("<i2", 2, 1), ("<i4", 2, 1), (">i1", 2, 1), (">i2", 2, 1), (">i4", 2, 1)),
        *(("<f4", 3, 1), ("<f4", 3, 0), (">f4", 3, 1), (">f4", 3, 0)),
    ],
)
def test_the_whole_range_of_a_type_is_from_black_to_white(kind, sample_format, photometric, compressed):
    largest = 1 if "f" in kind else np.iinfo(kind).max
    smallest = np.iinfo(kind).min if "i" in kind else 0
    for low in {0, smallest}:  # all values of the type, or of a signed one those that are not negative
        values = np.linspace(low, largest, 24).astype(kind).reshape(4, 6)
        data = zlib.compress(values.tobytes()) if compressed else values.tobytes()
        bits = 8 * values.itemsize
        tags = dict(sample_format=sample_format, photometric=photometric, compression=8 if compressed else 1)
        expected = (values.astype(float) - low) / (float(largest) - low) * 255
        expected = expected if photometric else 255 - expected  # 0 is white
        file = tiff(data, (4, 6), kind[0].replace("|", "<"), bits=bits, **tags)
        assert abs(array(file) - expected).max() <= 1
        with Image.open(file) as image:
            assert abs(array(image) - expected).max() <= 1


def test_12_bits_in_a_file_of_12_look_like_8():
    values = np.linspace(0, 4095, 24).astype(int)
    packed = bytes(b for x, y in values.reshape(-1, 2) for b in (x >> 4, (x & 15) << 4 | y >> 8, y & 255))
    assert abs(array(tiff(packed, (4, 6), bits=12)).ravel() - values / 4095 * 255).max() <= 1


def test_colours_that_pillow_decodes_wrongly_are_refused():
    plane = np.arange(24, dtype=np.uint16).tobytes()
    colours = Image.open(tiff(plane, (4, 6), bits=16))
    colours.tag_v2[258], colours.tag_v2[284] = (16, 16, 16), 2
    with pytest.raises(UnreadableImageError, match="16-bit colours in separate planes"):
        read_image(colours)
    assert ".fits" not in EXTENSIONS  # in the other byte order


@pytest.mark.parametrize("mode", MODES.values())
@pytest.mark.parametrize("stored", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_as_pillow_converts_them(stored, mode):
    image = Image.fromarray(pixels(3, (5, 4), 3)).convert(stored)
    found = read_image(image, mode)
    assert found.mode == mode
    assert found.tobytes() == image.convert(mode).tobytes()


@pytest.mark.parametrize("mode", MODES.values())
def test_lab_colours_are_seen_as_those_of_the_screen(mode, tmp_path):
    lab = np.full((2, 2, 3), (200, 30, 10), np.uint8)
    Image.frombytes("LAB", (2, 2), lab.tobytes()).save(tmp_path / "lab.tif")
    found = read_image(tmp_path / "lab.tif", mode)
    assert found.tobytes() == read_image(tmp_path / "lab.tif").convert(mode).tobytes()
    red, green, blue = array(tmp_path / "lab.tif", "RGB")[0, 0]
    assert red > green + 50


def test_transparency_becomes_the_alpha_channel():
    image = Image.fromarray(pixels(4, (5, 4), 3)).quantize(8)
    file = encoded(image, "PNG", transparency=bytes([0, 50, 255]))
    alpha = np.array([0, 50] + [255] * 6)[np.asarray(image)]
    assert array(file, "RGBA")[..., 3].tolist() == alpha.tolist()
    file.seek(0)
    assert array(file, "LA")[..., 1].tolist() == alpha.tolist()
    assert set(array(Image.new("L", (2, 2)), "RGBA")[..., 3].flat) == {255}  # where there is none


@pytest.fixture
def photo(tmp_path) -> Path:
    Image.fromarray(pixels(5, (40, 30), 3)).save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


def test_what_cannot_be_read_is_one_error_that_names_the_file(photo, tmp_path, monkeypatch):
    whole = photo.read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "._photo.jpg").write_bytes(b"\0\x05\x16\x07\0\x02\0\0Mac OS X        " + bytes(60))
    (tmp_path / "folder.png").mkdir()
    for name, reason in {
        "cut.jpg": "truncated",
        "empty.png": "not an image",
        "text.png": "not an image",
        "._photo.jpg": "not an image",
        "folder.png": "Is a directory",
        "nowhere.jpg": "no such file",
    }.items():
        for file in (tmp_path / name, str(tmp_path / name)):
            with pytest.raises(UnreadableImageError) as caught:
                read_image(file)
            assert str(caught.value).startswith(f"{tmp_path / name}: cannot be read (")
            assert reason in str(caught.value)
    with pytest.raises(UnreadableImageError, match="^not an image"):  # a file without a name
        read_image(io.BytesIO(b"no image"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(UnreadableImageError, match="decompression bomb"):
        read_image(photo)


@settings(quick, max_examples=200)
@given(
    st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "TGA", "ICO", "JPEG2000", "PCX", "QOI"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
    st.floats(0, 1),
)
def test_of_a_damaged_file_comes_an_image_or_that_error(form, changes, rest):
    data = bytearray(encoded(Image.fromarray(pixels(6, (16, 16), 3)), form).read())
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    try:
        found = read_image(io.BytesIO(data[: max(1, int(len(data) * (1 - rest / 4)))]))
    except UnreadableImageError:
        return
    assert found.mode == "RGB"
    assert len(found.tobytes()) == 3 * found.width * found.height


def test_extensions_are_those_of_images_that_can_be_decoded():
    assert {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".pgm", ".jp2"} <= EXTENSIONS
    assert not EXTENSIONS & {".pdf", ".eps", ".h5", ".mpg", ".wmf", ".txt", ".json", ".csv", ""}
    assert all(end == end.lower() and end.startswith(".") for end in EXTENSIONS)


def test_values_of_channels():
    mean = (0.2, 0.4, 0.9)
    assert channel_values(mean, 3) == mean
    assert channel_values(mean, 1) == pytest.approx((0.5,))
    assert channel_values(mean, 2) == pytest.approx((0.5, 0.5))
    assert channel_values(mean, 4) == (*mean, 0.5)
    assert channel_values([0.3, 0.7], 2) == (0.3, 0.7)
    assert channel_values((0.3,), 3) == (0.3, 0.3, 0.3)
    assert channel_values((0.3, 0.7), 4) == (0.3, 0.3, 0.3, 0.5)
    assert channel_values((*mean, 0.8), 3) == mean
    assert channel_values(mean, 5) == mean
    assert [mode_of(channels) for channels in (1, 2, 3, 4)] == ["L", "LA", "RGB", "RGBA"]
    with pytest.raises(ValueError, match=r"in_chans: expected .* 1 \(L\), 2 \(LA\), 3 \(RGB\), 4 \(RGBA\), got 5"):
        mode_of(5)


@pytest.mark.parametrize(("longest", "too_long"), [((1, 2000), (1, 2001)), ((4000, 2), (4001, 2))])
def test_images_far_longer_than_wide_are_unreadable(longest, too_long, tmp_path):
    """Resized with its shorter side to a model's size, 1 x 60,000 pixels would need gigabytes."""
    file = tmp_path / "thin.png"
    Image.new("L", longest).save(file)
    assert read_image(file).size == longest
    Image.new("L", too_long).save(file)
    with pytest.raises(UnreadableImageError, match=f"at most 2000 to 1, got {too_long[0]} x {too_long[1]} pixels"):
        read_image(file)
