// Where things are: cells, neighbours, borders, tiles. Nothing here needs a GPU; tests call it on the CPU.
#pragma once

#ifdef __CUDACC__
#define SVIT_BOTH __host__ __device__ __forceinline__
#else
#define SVIT_BOTH inline
#endif

namespace svit {

// Super tokens that a pixel sees: the 3 x 3 around its own cell, row-major from the top left.
constexpr int NEIGHBOURS = 9;

struct Place {
  int row, column;
};

struct Grid {
  int rows, columns;  // of cells; each has one super token

  SVIT_BOTH bool holds(Place cell) const {
    return cell.row >= 0 && cell.row < rows && cell.column >= 0 && cell.column < columns;
  }

  // Super tokens are numbered row by row. Of so few a product of floats finds the row; dividing integers takes longer.
  SVIT_BOTH int token(Place cell) const { return cell.row * columns + cell.column; }
  SVIT_BOTH Place cell(int token) const {
    const int row = static_cast<int>((static_cast<float>(token) + 0.5f) * (1.0f / static_cast<float>(columns)));
    return {row, token - row * columns};
  }
};

// The k-th neighbour of a cell; it may lie outside the grid.
SVIT_BOTH Place neighbour(Place cell, int k) { return {cell.row + k / 3 - 1, cell.column + k % 3 - 1}; }

// The cell whose k-th neighbour is `token`; it may lie outside the grid.
SVIT_BOTH Place source(Place token, int k) { return {token.row + 1 - k / 3, token.column + 1 - k % 3}; }

// Pixel p of a cell, row-major inside it, and back.
template <int HEIGHT, int WIDTH>
SVIT_BOTH Place pixel(Place cell, int p) {
  return {cell.row * HEIGHT + p / WIDTH, cell.column * WIDTH + p % WIDTH};
}

template <int HEIGHT, int WIDTH>
SVIT_BOTH int inside_cell(Place pixel) {
  return pixel.row % HEIGHT * WIDTH + pixel.column % WIDTH;
}

// A block owns `rows` rows of cells from `first` on, and keeps the super tokens of one more row and column on each side
// in slots, those outside the grid as zeros. Slot 0 is always outside.
struct Slots {
  int rows, columns;  // of cells that the block owns

  SVIT_BOTH int count() const { return (rows + 2) * (columns + 2); }
  // Slot of a super token at a row relative to the block's first one: -1 is above, `rows` below.
  SVIT_BOTH int at(Place token) const { return (token.row + 1) * (columns + 2) + token.column + 1; }
  // Slot of the k-th neighbour of a cell, slot 0 for the k of 9 to 15 that only fill up a tile.
  SVIT_BOTH int neighbour_at(Place cell, int k) const { return k < NEIGHBOURS ? at(neighbour(cell, k)) : 0; }
};

// The conv-FFN's tile: ROWS x COLUMNS pixels of the result, from as many and one more on each side. A row with its sides
// fills the 16 rows of a tensor-core tile.
template <int ROWS_>
struct Tile {
  static constexpr int ROWS = ROWS_, COLUMNS = 14, HALO_ROWS = ROWS + 2, HALO_COLUMNS = COLUMNS + 2;

  int image, top, left;  // the first pixel of the result

  static SVIT_BOTH int down(int H) { return (H + ROWS - 1) / ROWS; }
  static SVIT_BOTH int across(int W) { return (W + COLUMNS - 1) / COLUMNS; }
  static SVIT_BOTH Tile number(int n, int H, int W) {
    const int in_image = n % (down(H) * across(W));
    return {n / (down(H) * across(W)), in_image / across(W) * ROWS, in_image % across(W) * COLUMNS};
  }

  // Pixel of the map at a place of the tile with its sides; it may lie outside the map.
  SVIT_BOTH Place pixel(Place place) const { return {top + place.row - 1, left + place.column - 1}; }
  static SVIT_BOTH bool in_map(Place pixel, int H, int W) {
    return pixel.row >= 0 && pixel.row < H && pixel.column >= 0 && pixel.column < W;
  }
  // Where the n-th 8 of 32 hidden channels of a place lie in shared memory, in elements. Places lie PLACE apart, so that
  // a matrix load, of 8 in a row, meets each bank once. Beside a row lies the next; before the first and behind the last
  // there is room for one place more.
  static constexpr int PLACE = 40, ROW = HALO_COLUMNS * PLACE, HIDDEN = HALO_ROWS * ROW + 2 * PLACE;
  static SVIT_BOTH int hidden(Place place, int n) { return place.row * ROW + (place.column + 1) * PLACE + 8 * n; }
  // Whether a place belongs to the result: not to the sides, and not beyond the map.
  SVIT_BOTH bool in_result(Place place, int H, int W) const {
    return place.row >= 1 && place.row <= ROWS && place.column >= 1 && place.column <= COLUMNS &&
           in_map(pixel(place), H, W);
  }
};

}  // namespace svit
