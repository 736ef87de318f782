"""Which values masks may hold, compared with what MMSegmentation makes of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers import needs_mm

needs_mm()

from mmseg.datasets import BaseSegDataset  # noqa: E402
from mmseg.datasets.transforms import LoadAnnotations  # noqa: E402

from svit.adapters.images import CheckMask, ImageError  # noqa: E402
from svit.adapters.masks import NUMBERS, WIDE_NUMBERS, MaskValues, in_words, values_of  # noqa: E402


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (MaskValues(11), "0..10 or 255 = ignore"),
        (MaskValues(1), "0 or 255 = ignore"),
        (MaskValues(256), "0..254 or 255 = ignore"),
        (MaskValues(11, ignore_index=100), "0..10 or 100, 255 = ignore"),
        (MaskValues(11, ignore_index=0), "1..10 or 0, 255 = ignore"),
        (MaskValues(150, reduce_zero_label=True), "1..150 or 0, 255 = ignore"),
        (MaskValues(2, label_map={0: 255, 1: 0, 2: 1, 3: 255}), "1..2 or 0, 3, 255 = ignore"),
        (MaskValues(2, True, {0: 255, 1: 0, 2: 1, 3: 255}), "2..3 or 0..1, 4, 255 = ignore"),
    ],
)
def test_expected(values, expected):
    assert str(values) == expected


@pytest.mark.parametrize(
    ("found", "flaw"),
    [
        ([0, 10], None),
        ([0, 1, 255], None),
        ([3], None),
        ([255], None),
        ([0, 11], "values 0 and 11; expected 0..10 or 255 = ignore"),
        ([11], "value 11; expected 0..10 or 255 = ignore"),
        ([0, 1, 200, 255], "values 0, 1, 200 and 255; expected 0..10 or 255 = ignore"),
        ([0, 256], "values 0 and 256; expected 0..10 or 255 = ignore"),
        ([-1, 0], "values -1 and 0; expected 0..10 or 255 = ignore"),
    ],
)
def test_flaw(found, flaw):
    assert MaskValues(11).flaw(np.array(found)) == flaw


@pytest.mark.parametrize(
    ("values", "found", "flaw"),
    [
        (MaskValues(11), [0, 255], "nothing but values 0 and 255; expected 0..10 or 255 = ignore"),
        (MaskValues(11), [255], "nothing but value 255; expected 0..10 or 255 = ignore"),
        (MaskValues(150, True), [0, 1], "nothing but values 0 and 1; expected 1..150 or 0, 255 = ignore"),
        (MaskValues(150, True), [0], "nothing but value 0; expected 1..150 or 0, 255 = ignore"),
        (MaskValues(11), [0, 1], None),
        (MaskValues(11), [0, 1, 255], None),
        (MaskValues(11), [4, 255], None),  # one class, the rest not labelled
        (MaskValues(11), [4], None),  # every pixel of one class: dull, but no sign of a mistake
        (MaskValues(1), [0, 255], None),  # one class, and where it is not
    ],
)
def test_flaw_of_all(values, found, flaw):
    assert values.flaw_of_all(np.array(found)) == flaw


def test_in_words():
    assert in_words(range(8)) == "values 0, 1, 2, 3, 4, 5, 6 and 7"
    assert in_words(range(9)) == "values 0, 1, 2, 3, 4, 5, 6 and 2 more"
    assert in_words([7]) == "value 7"


@pytest.mark.parametrize("mode", sorted(NUMBERS | WIDE_NUMBERS))
def test_values_of(tmp_path, mode):
    values = {"1": [0, 1]}.get(mode, [0, 3, 255] if mode in NUMBERS else [0, 3, 256])
    pixels = np.array([values] * 2)
    mask = Image.fromarray(pixels.astype(bool if mode == "1" else np.uint8 if mode in NUMBERS else np.int32))
    if mode == "P":
        mask.putpalette([0, 0, 0, 9, 9, 9])  # colours play no part
    elif mode.startswith("I;"):
        mask = Image.frombuffer(mode, (3, 2), pixels.astype(">u2" if mode.endswith("B") else "<u2").tobytes())
    assert mask.mode == mode
    found = values_of(mask)
    assert found.tolist() == (values if mode != "1" else [0, 1])


def load(mask: Image.Image, file, num_classes: int, reduce_zero_label: bool, label_map: dict | None) -> dict:
    mask.save(file)
    info = dict(seg_map_path=str(file), reduce_zero_label=reduce_zero_label, label_map=label_map, seg_fields=[])
    return LoadAnnotations()(info)


@settings(max_examples=200, deadline=None)
@given(
    num_classes=st.integers(1, 20),
    reduce_zero_label=st.booleans(),
    own_classes=st.one_of(st.none(), st.sets(st.integers(0, 24), min_size=1)),
    ignore_index=st.sampled_from([255, 255, 0, 3, 30, 254]),
    values=st.lists(
        st.one_of(st.integers(0, 24), st.integers(0, 255), st.sampled_from([0, 255])), min_size=2, max_size=6
    ),
    mode=st.sampled_from(["L", "P", "1", "I;16", "I"]),
    more=st.sampled_from([0, 0, 256, 512]),
)
def test_as_mmsegmentation_reads_them(
    tmp_path_factory, num_classes, reduce_zero_label, own_classes, ignore_index, values, mode, more
):
    """A mask has a flaw if and only if the loss would get a number of no class, or one that more than 8 bits held."""
    label_map = None
    if own_classes:
        names = [str(i) for i in range(25)]
        kind = type("Names", (BaseSegDataset,), {"METAINFO": dict(classes=tuple(names))})
        label_map = kind.get_label_map([str(i) for i in sorted(own_classes)])
        num_classes = len(own_classes)
    pixels = np.array([values] * 2)
    if mode == "1":
        mask = Image.fromarray(pixels > 0)
        pixels = (pixels > 0).astype(int)
    elif mode in ("L", "P"):
        mask = Image.fromarray(pixels.astype(np.uint8))
        if mode == "P":
            mask.putpalette(list(range(256)) * 3)
    else:
        pixels = pixels + more
        mask = Image.fromarray(pixels.astype(np.uint16 if mode == "I;16" else np.int32))
    assert mask.mode == mode
    file = tmp_path_factory.getbasetemp() / "mask.png"
    results = load(mask, file, num_classes, reduce_zero_label, label_map)
    labels = results["gt_seg_map"].astype(int)
    fits = ((labels < num_classes) | (labels == 255) | (labels == ignore_index)).all()
    expected = fits and pixels.max() < 256
    with Image.open(file) as stored:
        flaw = MaskValues(num_classes, reduce_zero_label, label_map, ignore_index).flaw(values_of(stored))
    assert (flaw is None) == expected
    check = CheckMask(num_classes, ignore_index)
    if fits:
        assert check(results) is results
    else:
        with pytest.raises(ImageError, match="mask .*mask.png: value"):
            check(results)


@pytest.mark.parametrize(
    ("reduce_zero_label", "message"),
    [
        (False, r"mask .*x.png: values 0, 12 and 255; expected 0..10 or 255 = ignore$"),
        (True, r"mask .*x.png: values 0 and 12; expected 1..11 or 0, 255 = ignore$"),
    ],
)
def test_check_mask_names_the_values_of_the_file(tmp_path, reduce_zero_label, message):
    mask = Image.fromarray(np.array([[0, 12, 0 if reduce_zero_label else 255]], np.uint8))
    with pytest.raises(ImageError, match=message):
        CheckMask(11)(load(mask, tmp_path / "x.png", 11, reduce_zero_label, None))


def test_error_from_a_worker():
    """A DataLoader raises the error anew with the worker's traceback as its message."""
    text = "Caught ImageError in DataLoader worker process 0.\nTraceback ...\nsvit.ImageError: mask a.png: value 9\n"
    assert str(ImageError(text)) == "mask a.png: value 9"
    assert str(ImageError("mask a.png: value 9")) == "mask a.png: value 9"
