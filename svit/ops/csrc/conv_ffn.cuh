// residual + conv-FFN in one kernel, for inference (docs/ops.md): 1x1 conv, GELU, u + depthwise 3x3 conv of u, 1x1 conv.
//
// A block owns a tile of pixels, with one more on each side for the depthwise convolution; a warp owns a row of 16. The
// hidden map never leaves the chip: 32 of its channels at a time pass through shared memory, and the second 1x1
// convolution sums over them in registers. All three convolutions are products on the tensor cores.
#pragma once

#include <warp.h>

#include "geometry.h"

namespace svit {

template <typename T>
struct ConvFFNArguments {
  const T *x, *residual;                // (B, H, W, C)
  const T *weight1, *weight2;           // (4C, C), (C, 4C)
  Parameters<T> bias1, bias2;           // (4C), (C)
  Parameters<T> taps, depthwise_bias;   // (4C, 9), (4C)
  T* y;                                 // (B, H, W, C)
  int H, W;
};

// GELU, in error by at most 3.7e-5: x * sigmoid(x * (1.5948 + 0.07415 x^2 - 0.000713 x^4)).
__device__ __forceinline__ float gelu(float x) {
  constexpr float a = -1.5948f * LOG2_E, b = -0.07415f * LOG2_E, c = 0.000713f * LOG2_E;
  const float square = fminf(x * x, 52.0f);  // beyond, the polynomial would fall again
  return x * reciprocal(1 + exp2_approx(x * (a + square * (b + square * c))));
}

// Rows of a tile: as many as there are registers for, and with the sides a multiple of 4, since a multiprocessor has 4
// schedulers for its warps. Fewer mean more pixels computed twice.
constexpr int rows_of_tile(int C) { return C <= 96 ? 14 : C <= 128 ? 10 : 6; }

template <typename T, int C, int ROWS>
struct ConvFFN {
  using Tile = svit::Tile<ROWS>;
  static constexpr int WARPS = Tile::HALO_ROWS, THREADS = 32 * WARPS, WIDE = 4 * C, CHUNK = 32, CHUNKS = WIDE / CHUNK;
  // Rows of weights in shared memory, of pixels on their way out.
  static constexpr int STRIDE1 = C % 64 == 32 ? C : C + 32, STRIDE2 = CHUNK, STRIDE_OUT = C + 8;
  static_assert(C % 32 == 0 && C <= THREADS && Tile::HALO_COLUMNS == 16);

  // Taps come in pairs, a right factor of a product for 8 channels: 9 taps and the residual. See `prepare_taps`.
  static constexpr int PAIRS = 5;

  // Shared memory, in bytes: bias2, then twice what is needed of a chunk. The results leave through the latter.
  static constexpr int BIAS1 = 0, BIAS = BIAS1 + 2 * CHUNK * 4, TAPS = BIAS + 2 * CHUNK * 4;
  static constexpr int WEIGHTS1 = TAPS + PAIRS * CHUNK / 8 * 32 * 8, WEIGHTS2 = WEIGHTS1 + CHUNK * STRIDE1 * 2;
  static constexpr int HIDDEN = WEIGHTS2 + C * STRIDE2 * 2, OF_CHUNK = HIDDEN + Tile::HIDDEN * 2;
  static constexpr int OUT = ROWS * 16 * STRIDE_OUT * 2, BYTES = C * 4 + (2 * OF_CHUNK > OUT ? 2 * OF_CHUNK : OUT);

  const ConvFFNArguments<T>& arg;
  const Tile tile;
  const int warp, lane, g, t;  // see warp.h; the warp owns the row `warp` of the tile with its sides
  float* const bias2;
  char* const chunks;
  const int weights1, hidden, below, beside;  // where a lane reads and writes in a chunk, in bytes
  const int to1, to2, from1, from2;           // and where a thread copies its weights, in elements
  uint32_t x[C / 16][4];   // the warp's 16 pixels, as tiles of the first product
  float result[C / 8][4];  // and of the second

  __device__ ConvFFN(const ConvFFNArguments<T>& arg, char* memory)
      : arg(arg),
        tile(Tile::number(blockIdx.x, arg.H, arg.W)),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        g(lane / 4),
        t(lane % 4),
        bias2(reinterpret_cast<float*>(memory)),
        chunks(opaque(memory + C * 4)),
        weights1(opaque(WEIGHTS1 + (g * STRIDE1 + 8 * t) * 2)),
        hidden(opaque(HIDDEN + Tile::hidden({warp, g}, t) * 2)),
        below(opaque(HIDDEN + Tile::hidden({warp - 1 + lane / 16, lane % 16}, 0) * 2)),
        beside(opaque(HIDDEN + Tile::hidden({warp + 1, lane % 16 - 1 + lane / 16 * 2}, 0) * 2)),
        to1(first_copy<C / 8>(STRIDE1)),
        to2(first_copy<CHUNK / 8>(STRIDE2)),
        from1(first_copy<C / 8>(C)),
        from2(first_copy<CHUNK / 8>(WIDE)),
        result{} {}

  __device__ int64_t offset(const Tile& tile, Place place) const {
    const Place pixel = tile.pixel(place);
    return ((static_cast<int64_t>(tile.image) * arg.H + pixel.row) * arg.W + pixel.column) * C;
  }

  // Shared memory of a chunk, from the byte `offset` on. Two chunks are there at a time.
  template <typename V>
  __device__ V* of(int chunk, int offset) const {
    return reinterpret_cast<V*>(chunks + (chunk & 1) * OF_CHUNK + offset);
  }

  // Zeros off the diagonals of the taps, for all chunks.
  __device__ void clear_taps() {
    constexpr int VECTORS = (WEIGHTS1 - TAPS) / 16;
#pragma unroll 1
    for (unsigned i = threadIdx.x; i < 2 * VECTORS; i += THREADS) {
      const unsigned lane = i % 32;
      if (lane % 4 != lane / 8) of<uint4>(i / VECTORS, TAPS)[i % VECTORS] = make_uint4(0, 0, 0, 0);
    }
  }

  // A bias of a chunk, by one warp; a lane has a channel. Two channels stand twice in a row: a product begins with them.
  __device__ void prepare_bias(int chunk, int offset, const Parameters<T>& from, int pair) {
    float* const to = of<float>(chunk, offset) + 4 * pair + lane % 2;
    to[0] = to[2] = from[chunk * CHUNK + lane];
  }
  __device__ void prepare_bias1(int chunk) { prepare_bias(chunk, BIAS1, arg.bias1, lane / 2); }

  // The taps of a chunk, by one warp; a lane has a channel. The depthwise convolution is a sum of products of (16 pixels,
  // 16) by (16, 8): 8 channels as one tap sees them and as another does, times two diagonal matrices. The channels are
  // the n-th two of each eight of the chunk; lane 4g + g/2 has what is not zero for the g-th of them. The tenth tap is
  // the residual: exactly 1, whatever rounding makes of the others.
  __device__ void prepare_taps(int chunk) {
    constexpr int RESIDUAL = 9, first[PAIRS] = {0, 1, 2, RESIDUAL, 6}, second[PAIRS] = {3, 4, 5, 7, 8};
    const int n = lane % 8 / 2, column = lane / 8 * 2 + lane % 2;
    uint2* const to = of<uint2>(chunk, TAPS) + (n / 2 * 32 + 4 * column + column / 2) * 2 + n % 2;
    float tap[10];
#pragma unroll
    for (int k = 0; k < RESIDUAL; k++) tap[k] = arg.taps[(chunk * CHUNK + lane) * 9 + k];
    tap[RESIDUAL] = 1;
#pragma unroll
    for (int k = 0; k < PAIRS; k++) {
      const float a = tap[first[k]], b = tap[second[k]];
      to[128 * k] = lane % 2 ? make_uint2(pack<T>(0, a), pack<T>(0, b)) : make_uint2(pack<T>(a, 0), pack<T>(b, 0));
    }
  }

  // A lane takes 8 channels in a row from pixels and weights alike, which permutes the products' sums.
  __device__ void load_pixels() {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const Place pixel = tile.pixel({warp, g + 8 * half});
      const bool there = Tile::in_map(pixel, arg.H, arg.W);
#pragma unroll
      for (int k = 0; k < C / 32; k++) {
        uint4 v = make_uint4(0, 0, 0, 0);
        if (there) v = *reinterpret_cast<const uint4*>(arg.x + offset(tile, {warp, g + 8 * half}) + 32 * k + 8 * t);
        x[2 * k][half] = v.x, x[2 * k][2 + half] = v.y;
        x[2 * k + 1][half] = v.z, x[2 * k + 1][2 + half] = v.w;
      }
    }
  }

  // Weights are copied 16 bytes at a time, A_ROW of them a row. All threads together take whole rows: so the copies of
  // a thread lie the same distance apart. This is its first.
  template <int A_ROW>
  static __device__ int first_copy(int stride) {
    return stride == 8 * A_ROW ? threadIdx.x * 8 : opaque(threadIdx.x / A_ROW * stride + threadIdx.x % A_ROW * 8);
  }
  template <int A_ROW, int STRIDE_TO, int STRIDE_FROM>
  static __device__ void start_loading(T* to, const T* from, bool exists) {
    constexpr int COPIES = CHUNK * C / 8, ROWS_AT_ONCE = THREADS / A_ROW, COPIERS = ROWS_AT_ONCE * A_ROW;
#pragma unroll
    for (int i = 0; i * COPIERS < COPIES; i++) {
      const int row = i * ROWS_AT_ONCE;
      if (exists && threadIdx.x < min(COPIERS, COPIES - i * COPIERS)) {
        copy(to + row * STRIDE_TO, from + row * STRIDE_FROM);
      }
    }
  }
  __device__ void start_loading_weights1(int chunk) {
    const int from = chunk * CHUNK * C + from1;
    start_loading<C / 8, STRIDE1, C>(of<T>(chunk, WEIGHTS1) + to1, arg.weight1 + from, chunk < CHUNKS);
  }
  __device__ void start_loading_weights2(int chunk) {
    const int from = chunk * CHUNK + from2;
    start_loading<CHUNK / 8, STRIDE2, WIDE>(of<T>(chunk, WEIGHTS2) + to2, arg.weight2 + from, chunk < CHUNKS);
  }

  // GELU of the first 1x1 convolution; zero outside the map, as the depthwise convolution pads.
  __device__ void expand(int chunk) {
    const T* const weights = of<T>(chunk, weights1);
    const bool there[2] = {Tile::in_map(tile.pixel({warp, g}), arg.H, arg.W),
                           Tile::in_map(tile.pixel({warp, g + 8}), arg.H, arg.W)};
    uint32_t v[2][CHUNK / 8];
#pragma unroll
    for (int n = 0; n < CHUNK / 8; n++) {
      const float4 plus = of<float4>(chunk, BIAS1)[4 * n + t];
      float u[4] = {plus.x, plus.y, plus.z, plus.w};
#pragma unroll
      for (int k = 0; k < C / 32; k++) {
        const uint4 b = *reinterpret_cast<const uint4*>(weights + 8 * n * STRIDE1 + 32 * k);
        mma<T>(u, x[2 * k], {b.x, b.y});
        mma<T>(u, x[2 * k + 1], {b.z, b.w});
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {
        v[half][n] = pack<T>(gelu(u[2 * half]), gelu(u[2 * half + 1]));
      }
    }
    // So the t-th eight of a place are the channels 2t, 2t + 1 of each eight.
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint4& to = of<uint4>(chunk, hidden)[half * Tile::PLACE];
      if (there[half]) {
        to = make_uint4(v[half][0], v[half][1], v[half][2], v[half][3]);
      } else {
        to = make_uint4(0, 0, 0, 0);
      }
    }
  }

  // The depthwise convolution of the warp's pixels, and the second 1x1 convolution, which takes it as it comes.
  __device__ void contract(int chunk) {
    // The first 16 lanes name the pixels as the first tap of a pair sees them, the others as the second does: one below
    // the other, or two columns apart. The outermost columns are no results; what they get does not matter.
    const T* const middle = of<T>(chunk, below);
    const T* const pixels[PAIRS] = {middle - Tile::PLACE, middle, middle + Tile::PLACE, middle + Tile::ROW,
                                    of<T>(chunk, beside)};
    const float4* const plus = of<float4>(chunk, BIAS) + t;
    const uint4* const right = of<uint4>(chunk, TAPS) + lane;
    uint32_t d[2][4];  // left factors of the second product
#pragma unroll
    for (int m = 0; m < 2; m++) {
      const float4 b = plus[8 * m], c = plus[8 * m + 4];
      float sum[2][4] = {{b.x, b.y, b.z, b.w}, {c.x, c.y, c.z, c.w}};
#pragma unroll
      for (int k = 0; k < PAIRS; k++) {
        const uint4 tap = right[(2 * k + m) * 32];
        uint32_t a[4];
        load_matrices(a, pixels[k] + 16 * m);
        mma<T>(sum[0], a, {tap.x, tap.y});
        load_matrices(a, pixels[k] + 16 * m + 8);
        mma<T>(sum[1], a, {tap.z, tap.w});
      }
#pragma unroll
      for (int i = 0; i < 4; i++) d[m][i] = pack<T>(sum[i / 2][i % 2 * 2], sum[i / 2][i % 2 * 2 + 1]);
    }
    const T* const weights = of<T>(chunk, WEIGHTS2) + g * STRIDE2 + 8 * t;
#pragma unroll
    for (int n = 0; n < C / 8; n++) {
      const uint4 b = *reinterpret_cast<const uint4*>(weights + 8 * n * STRIDE2);
      mma<T>(result[n], d[0], {b.x, b.y});
      mma<T>(result[n], d[1], {b.z, b.w});
      // The other half of the loads waits: all at once they would drive results out of the registers.
      if (C > 64 && n == C / 16) hold_loads();
    }
  }

  __device__ void finish() {
    T* const staged = reinterpret_cast<T*>(chunks) + (warp - 1) * 16 * STRIDE_OUT;
#pragma unroll
    for (int n = 0; n < C / 8; n++) {
      const int c = 8 * n + 2 * t;
      const float2 plus = *reinterpret_cast<const float2*>(bias2 + c);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint32_t v = pack<T>(result[n][2 * half] + plus.x, result[n][2 * half + 1] + plus.y);
        *reinterpret_cast<uint32_t*>(staged + (g + 8 * half) * STRIDE_OUT + c) = v;
      }
    }
    sync_warp();
    // Found again: kept, it would take registers until here.
    const Tile tile = Tile::number(opaque(blockIdx.x), arg.H, arg.W);
    const int64_t row = offset(tile, {warp, 1});
    for (int i = lane; i < Tile::COLUMNS * C / 8; i += 32) {
      const Place place = {warp, 1 + i / (C / 8)};
      if (!tile.in_result(place, arg.H, arg.W)) break;
      const uint4 a = *reinterpret_cast<const uint4*>(arg.residual + row + 8 * i);
      const uint4 b = *reinterpret_cast<const uint4*>(staged + place.column * STRIDE_OUT + i % (C / 8) * 8);
      *reinterpret_cast<uint4*>(arg.y + row + 8 * i) =
          make_uint4(add<T>(a.x, b.x), add<T>(a.y, b.y), add<T>(a.z, b.z), add<T>(a.w, b.w));
    }
  }

  __device__ void run() {
    const bool has_result = warp >= 1 && warp <= ROWS;
    start_loading_weights1(0);
    commit_copies();
    load_pixels();
    clear_taps();
    if (threadIdx.x < C) bias2[threadIdx.x] = arg.bias2[threadIdx.x];
    if (warp == 0) prepare_bias1(0);
    // A step expands a chunk and contracts the one before. The two warps without a result prepare the next one instead.
    for (int chunk = 0; chunk <= CHUNKS; chunk++) {
      wait_for_copies<0>();
      sync_block();  // what the step reads has come, and nobody reads what the step before did
      start_loading_weights1(chunk + 1);
      start_loading_weights2(chunk);
      commit_copies();
      if (chunk < CHUNKS) expand(chunk);
      if (has_result) {
        if (chunk > 0) contract(chunk - 1);
      } else if (chunk < CHUNKS) {
        if (warp == 0) prepare_taps(chunk);
        if (warp == ROWS + 1) {
          prepare_bias(chunk, BIAS, arg.depthwise_bias, lane % 8 / 2 * 4 + lane / 8);
          if (chunk + 1 < CHUNKS) prepare_bias1(chunk + 1);
        }
      }
    }
    sync_block();
    if (has_result) finish();
  }
};

template <typename T, int C, int ROWS>
__global__ void __launch_bounds__(ConvFFN<T, C, ROWS>::THREADS, 1) conv_ffn(const ConvFFNArguments<T> arg) {
  ConvFFN<T, C, ROWS>(arg, shared_memory()).run();
}

}  // namespace svit
