import re

import numpy as np
import pytest
import superpixels
from PIL import Image

LEFT_RIGHT = np.repeat([[0, 0, 0, 1, 1, 1]], 6, 0)  # two segments of 18 pixels
OFF = np.repeat([[0, 0, 1, 1, 1, 1]], 6, 0)  # the border one column too far to the left


def test_overlaps():
    assert superpixels.overlaps(OFF, LEFT_RIGHT).tolist() == [[12, 0], [6, 18]]


def test_equal_partitions_are_perfect():
    found = superpixels.measure(LEFT_RIGHT + 5, [LEFT_RIGHT])
    assert (found["regions"], found["ASA"], found["recall"], found["UE"]) == (2, 1, 1, 0)


def test_a_border_that_is_off():
    assert superpixels.achievable_accuracy(OFF, LEFT_RIGHT) == pytest.approx(30 / 36)
    # Region 1 has 6 pixels in segment 0 and 18 in segment 1: 6 cross, seen from either.
    assert superpixels.undersegmentation(OFF, LEFT_RIGHT) == pytest.approx(12 / 36)
    assert superpixels.boundary_recall(OFF, LEFT_RIGHT, tolerance=1) == 1
    assert superpixels.boundary_recall(OFF, LEFT_RIGHT, tolerance=0) == 0
    assert superpixels.boundary_recall(OFF, np.zeros_like(OFF)) == 1


def test_no_boundary_at_all():
    one = np.zeros((6, 6), int)
    assert superpixels.boundary_recall(one, LEFT_RIGHT) == 0
    assert superpixels.achievable_accuracy(one, LEFT_RIGHT) == 0.5


def test_a_disc_is_more_compact_than_a_square_and_a_square_than_a_stripe():
    y, x = np.mgrid[:101, :101] - 50
    disc = superpixels.compactness((x**2 + y**2 > 40**2).astype(int))
    stripes = superpixels.compactness((np.mgrid[:100, :100][0] // 5).astype(int))
    squares = superpixels.compactness(np.add(*np.mgrid[:100, :100] // 20 * [[[5]], [[1]]]))
    assert stripes < 0.25 < squares < 0.95
    assert disc > 0.5  # with a square around it that has a hole


def test_measures_are_means_over_the_segmentations():
    found = superpixels.measure(LEFT_RIGHT, [LEFT_RIGHT, OFF])
    assert found["ASA"] == pytest.approx((1 + 30 / 36) / 2)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "segmentations").mkdir()
    rng = np.random.default_rng(0)
    for number in range(2):
        segments = np.zeros((40, 64), np.uint16)
        segments[:, 24:] = 7
        photo = rng.integers(0, 60, (40, 64, 3)) + 180 * (segments > 0)[..., None]
        Image.fromarray(photo.astype(np.uint8)).save(tmp_path / "images" / f"{number}.jpg", quality=95)
        np.savez(tmp_path / "segmentations" / f"{number}.npz", seg0=segments, seg1=segments)
    return tmp_path


def test_command(folder, capsys):
    out, picture = folder / "table.md", folder / "plot.svg"
    command = [str(folder), "--cells", "4", "2", "--report", str(out), "--plot", str(picture)]
    assert superpixels.main(command) == 0
    lines = [line.split("|")[1:-1] for line in out.read_text().splitlines()]
    names = [cell.strip() for cell in lines[0]]
    rows = [dict(zip(names, (cell.strip() for cell in line), strict=True)) for line in lines[2:]]
    assert [row["method"] for row in rows[::2]] == ["super tokens", "super tokens, random weights", "SLIC", "grid"]
    grid = [row for row in rows if row["method"] == "grid"]
    assert [int(row["regions"]) for row in grid] == [3 * 4, 5 * 8]  # of a map of 10 x 16
    for row in rows:
        assert 0.5 < float(row["ASA"]) <= 1
    assert float(grid[1]["recall"]) == 1  # 24 is a border of 8 columns of cells
    assert "boundary recall" in picture.read_text() or picture.stat().st_size > 5000
    assert capsys.readouterr().out.startswith("| method")


@pytest.mark.parametrize("what", ["no images", "no segmentation", "another size"])
def test_a_folder_that_cannot_be_used(folder, what, capsys):
    if what == "no images":
        for image in (folder / "images").iterdir():
            image.unlink()
        message = "expected images/.*jpg, got none"
    elif what == "no segmentation":
        (folder / "segmentations" / "0.npz").unlink()
        message = "0.jpg: expected its segmentations in"
    else:
        np.savez(folder / "segmentations" / "0.npz", seg0=np.zeros((40, 63), np.uint16))
        message = r"expected \(40, 64\), the image's size, got \(40, 63\)"
    assert superpixels.main([str(folder), "--cells", "8"]) == 1
    assert re.search(f"^error: .*{message}", capsys.readouterr().err)


@pytest.mark.parametrize("option", ["--report", "--plot"])
def test_a_report_that_has_no_place(folder, option, capsys):
    with pytest.raises(SystemExit, match="2"):
        superpixels.main([str(folder), option, str(folder / "none" / "a.svg")])
    assert f"there is no folder {folder}/none" in capsys.readouterr().err
