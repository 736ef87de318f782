// svit/ops/csrc/geometry.h as functions that ctypes can call.
#include <geometry.h>

using namespace svit;

extern "C" {
int holds(int rows, int columns, int row, int column) { return Grid{rows, columns}.holds({row, column}); }
int token(int rows, int columns, int row, int column) { return Grid{rows, columns}.token({row, column}); }

void cell_of_token(int rows, int columns, int number, int* place) {
  const Place at = Grid{rows, columns}.cell(number);
  place[0] = at.row, place[1] = at.column;
}

void neighbour_of(int row, int column, int k, int* place) {
  const Place at = neighbour({row, column}, k);
  place[0] = at.row, place[1] = at.column;
}

void source_of(int row, int column, int k, int* place) {
  const Place at = source({row, column}, k);
  place[0] = at.row, place[1] = at.column;
}

void pixel_8x8(int row, int column, int p, int* place) {
  const Place at = pixel<8, 8>({row, column}, p);
  place[0] = at.row, place[1] = at.column;
}
int inside_8x8(int row, int column) { return inside_cell<8, 8>({row, column}); }

void pixel_4x4(int row, int column, int p, int* place) {
  const Place at = pixel<4, 4>({row, column}, p);
  place[0] = at.row, place[1] = at.column;
}
int inside_4x4(int row, int column) { return inside_cell<4, 4>({row, column}); }

int slot_count(int rows, int columns) { return Slots{rows, columns}.count(); }
int slot_of_neighbour(int rows, int columns, int row, int column, int k) {
  return Slots{rows, columns}.neighbour_at({row, column}, k);
}

int tiles(int H, int W) { return Tile<7>::down(H) * Tile<7>::across(W); }
int place_in_tile(int number, int H, int W, int row, int column, int* pixel) {
  const Tile<7> tile = Tile<7>::number(number, H, W);
  const Place at = tile.pixel({row, column});
  pixel[0] = tile.image, pixel[1] = at.row, pixel[2] = at.column;
  return tile.in_result({row, column}, H, W) + 2 * Tile<7>::in_map(at, H, W);
}
int hidden_at(int row, int column, int n) { return Tile<7>::hidden({row, column}, n); }
int hidden_size() { return Tile<7>::HIDDEN; }
}
