// The kernels of svit/ops/csrc for a CPU, and its geometry, as functions that ctypes can call.
#include <conv_ffn.cuh>
#include <super_token_attention.cuh>

#include <cstdio>

using namespace svit;

namespace {

const char* message(const std::exception& error) {
  static char text[256];
  std::snprintf(text, sizeof text, "%s", error.what());
  return text;
}

template <typename T, int C, int HEIGHT, int WIDTH, bool MANY>
void attention(const AttentionArguments<T>& arguments, int images, int order) {
  const Grid grid = arguments.grid;
  const int blocks = MANY ? grid.rows : 1;
  const typename SuperTokenAttention<T, C, HEIGHT, WIDTH, MANY>::Layout layout(grid.rows / blocks, grid.columns);
  emulator::run([&] { super_token_attention<T, C, HEIGHT, WIDTH, MANY>(arguments); }, images * blocks,
                32 * grid.columns, layout.bytes, blocks, order);
}

template <typename T, bool MANY>
void attention_of(int C, const AttentionArguments<T>& arguments, int images, int order) {
  switch (C) {
    case 64: return attention<T, 64, 8, 8, MANY>(arguments, images, order);
    case 96: return attention<T, 96, 8, 8, MANY>(arguments, images, order);
    case 128: return attention<T, 128, 4, 4, MANY>(arguments, images, order);
    case 192: return attention<T, 192, 4, 4, MANY>(arguments, images, order);
    default: throw std::runtime_error("no such size");
  }
}

template <typename T>
void attention_typed(int C, bool clusters, bool wide, int images, int rows, int columns, float eps, void** p, int order) {
  const auto parameters = [&](int i) { return Parameters<T>{p[i], wide}; };
  const auto map = [&](int i) { return static_cast<T*>(p[i]); };
  const AttentionArguments<T> arguments = {
      map(0), parameters(1), parameters(2), parameters(3), parameters(4), map(5), map(6), static_cast<float*>(p[7]),
      map(8), map(9), map(10), static_cast<float*>(p[11]), eps, {rows, columns}};
  if (clusters) {
    attention_of<T, true>(C, arguments, images, order);
  } else {
    attention_of<T, false>(C, arguments, images, order);
  }
}

template <typename T, int C, int ROWS>
void ffn(const ConvFFNArguments<T>& arguments, int images, int order) {
  using Kernel = ConvFFN<T, C, ROWS>;
  const int tiles = Kernel::Tile::down(arguments.H) * Kernel::Tile::across(arguments.W);
  emulator::run([&] { conv_ffn<T, C, ROWS>(arguments); }, images * tiles, Kernel::THREADS, Kernel::BYTES, 1, order);
}

template <typename T>
void ffn_typed(int C, bool wide, int images, int H, int W, void** p, int order) {
  const auto parameters = [&](int i) { return Parameters<T>{p[i], wide}; };
  const auto map = [&](int i) { return static_cast<T*>(p[i]); };
  const ConvFFNArguments<T> arguments = {map(0),        map(1),        map(2), map(3), parameters(4), parameters(5),
                                         parameters(6), parameters(7), map(8), H,      W};
  switch (C) {
    case 64: return ffn<T, 64, rows_of_tile(64)>(arguments, images, order);
    case 96: return ffn<T, 96, rows_of_tile(96)>(arguments, images, order);
    case 128: return ffn<T, 128, rows_of_tile(128)>(arguments, images, order);
    case 192: return ffn<T, 192, rows_of_tile(192)>(arguments, images, order);
    default: throw std::runtime_error("no such size");
  }
}

}  // namespace

// Each gives null, or what went wrong. Pointers in the order of the arguments' structs.
extern "C" const char* emulate_attention(int half, int C, int clusters, int wide, int images, int rows, int columns,
                                         float eps, void** p, int order) {
  try {
    (half ? attention_typed<fp16> : attention_typed<bf16>)(C, clusters, wide, images, rows, columns, eps, p, order);
    return nullptr;
  } catch (const std::exception& error) {
    return message(error);
  }
}

extern "C" const char* emulate_conv_ffn(int half, int C, int wide, int images, int H, int W, void** p, int order) {
  try {
    (half ? ffn_typed<fp16> : ffn_typed<bf16>)(C, wide, images, H, W, p, order);
    return nullptr;
  } catch (const std::exception& error) {
    return message(error);
  }
}

// The barriers that kernels have come to, one a line, and which of them the next runs go without (see emulator/warp.h).
static std::string lines;
extern "C" const char* barriers() {
  lines.clear();
  for (const std::string& barrier : emulator::barriers) lines += barrier + "\n";
  return lines.c_str();
}
extern "C" void take_out(const char* barrier) { emulator::without = barrier; }
