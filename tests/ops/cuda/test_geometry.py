"""The arithmetic of cells, borders and tiles (csrc/geometry.h), against the reference and for all places there are."""

import ctypes
import itertools

import pytest
import torch

from svit.ops import reference

GRIDS = [(1, 1), (1, 5), (4, 1), (2, 2), (3, 4), (8, 8)]


@pytest.fixture(scope="module")
def geometry(compile_for_cpu):
    return compile_for_cpu("geometry.cpp")


def place(function, *args, size: int = 2) -> tuple[int, ...]:
    out = (ctypes.c_int * size)()
    function(*args, out)
    return tuple(out)


def cells(rows: int, columns: int):
    return itertools.product(range(rows), range(columns))


@pytest.mark.parametrize("grid", GRIDS)
def test_neighbours_are_the_references(geometry, grid):
    rows, columns = grid
    numbers = torch.arange(1, rows * columns + 1.0).reshape(1, rows, columns, 1)  # 0 is outside
    expected = reference.neighbours(numbers)[0, ..., 0]
    for cell in cells(rows, columns):
        for k in range(9):
            at = place(geometry.neighbour_of, *cell, k)
            inside = bool(geometry.holds(rows, columns, *at))
            assert (geometry.token(rows, columns, *at) + 1 if inside else 0) == expected[(*cell, k)]


@pytest.mark.parametrize("grid", GRIDS)
def test_sources_are_the_references(geometry, grid):
    """Each share k of each cell, as a number of its own, goes where the reference adds it."""
    rows, columns = grid
    of_cell = 512.0 ** torch.arange(rows * columns, dtype=torch.float64).remainder(5)
    shares = of_cell.reshape(1, rows, columns, 1) * 2.0 ** torch.arange(9, dtype=torch.float64)
    expected = reference.sum_neighbours(shares.unsqueeze(-1))[0, ..., 0]
    for token in cells(rows, columns):
        sources = [(place(geometry.source_of, *token, k), k) for k in range(9)]
        total = sum(shares[(0, *at, k)] for at, k in sources if geometry.holds(rows, columns, *at))
        assert total == expected[token]


@pytest.mark.parametrize("grid", GRIDS)
def test_tokens_are_numbered_row_by_row(geometry, grid):
    for number, cell in enumerate(cells(*grid)):
        assert geometry.token(*grid, *cell) == number
        assert place(geometry.cell_of_token, *grid, number) == cell


@pytest.mark.parametrize("size", [8, 4])
def test_pixels_of_cells_are_the_references(geometry, size):
    H, W = 3 * size, 2 * size
    numbers = torch.arange(float(H * W)).reshape(1, H, W, 1)
    expected = reference.to_cells(numbers, (size, size))[0, ..., 0]
    for cell in cells(3, 2):
        for p in range(size * size):
            row, column = place(getattr(geometry, f"pixel_{size}x{size}"), *cell, p)
            assert row * W + column == expected[(*cell, p)]
            assert getattr(geometry, f"inside_{size}x{size}")(row, column) == p


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (3, 2), (8, 8)])
def test_slots(geometry, rows, columns):
    """Where the neighbours of a block's cells lie, those beyond the grid too, which stay zero."""
    count = geometry.slot_count(rows, columns)
    used = {}
    for row, column in cells(rows, columns):
        for k in range(9):
            y, x = row + k // 3 - 1, column + k % 3 - 1
            slot = geometry.slot_of_neighbour(rows, columns, row, column, k)
            assert 0 <= slot < count
            assert used.setdefault(slot, (y, x)) == (y, x)  # a slot has one super token
        for k in range(9, 16):
            assert geometry.slot_of_neighbour(rows, columns, row, column, k) == 0
    assert used[0] == (-1, -1)
    assert len(set(used.values())) == len(used) == count


@pytest.mark.parametrize(("H", "W"), [(1, 1), (7, 14), (8, 14), (7, 15), (28, 28), (5, 31)])
def test_tiles_cover_each_pixel_once(geometry, H, W):
    seen = []
    for number in range(2 * geometry.tiles(H, W)):  # of two images
        for row, column in itertools.product(range(9), range(16)):
            pixel = (ctypes.c_int * 3)()
            answer = geometry.place_in_tile(number, H, W, row, column, pixel)
            inside = 0 <= pixel[1] < H and 0 <= pixel[2] < W
            assert bool(answer & 2) == inside
            if answer & 1:
                assert inside
                assert 1 <= row <= 7
                assert 1 <= column <= 14
                seen.append(tuple(pixel))
    assert sorted(seen) == list(itertools.product(range(2), range(H), range(W)))


def test_hidden_channels_lie_apart(geometry):
    """With room for one place before the first, and behind the last."""
    places = itertools.product(range(9), range(-1, 17), range(4))
    starts = {geometry.hidden_at(*place) for place in places}
    assert all(start % 8 == 0 for start in starts)  # 16 bytes
    assert len(starts) == (9 * 16 + 2) * 4
    assert min(starts) == 0
    assert max(starts) + 8 <= geometry.hidden_size()


def test_hidden_channels_meet_each_bank_once(geometry):
    """Shared memory has 32 banks of 4 bytes: two 16-bit channels. A matrix load reads 16 bytes of 8 places in a row."""
    for column, n in itertools.product(range(-1, 10), range(4)):
        starts = [geometry.hidden_at(3, column + place, n) for place in range(8)]
        banks = [(start // 2 + word) % 32 for start in starts for word in range(4)]
        assert sorted(banks) == list(range(32))
