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

// GELU as x * sigmoid(x * polynomial(x^2)): the error is at most 3.7e-5. Beyond |x| = 7.2 the polynomial would fall again.
__device__ __forceinline__ float gelu(float x) {
  const float square = fminf(x * x, 52.0f);
  // Of base 2: the coefficients 1.5948, 0.07415 and -0.000713 times -log2(e).
  const float exponent = x * (-2.3008100f + square * (-0.10697584f + square * 0.0010286415f));
  return x * reciprocal(1 + exp2f(exponent));
}

// Rows of a tile: as many as there are registers for. Fewer mean more pixels computed twice.
constexpr int rows_of_tile(int C) { return C <= 96 ? 14 : C <= 128 ? 10 : 6; }

template <typename T, int C, int ROWS>
struct ConvFFN {
  using Tile = svit::Tile<ROWS>;
  static constexpr int WARPS = Tile::HALO_ROWS, THREADS = 32 * WARPS, WIDE = 4 * C, CHUNK = 32, CHUNKS = WIDE / CHUNK;
  // Rows of weights in shared memory, of pixels on their way out.
  static constexpr int STRIDE1 = C % 64 == 32 ? C : C + 32, STRIDE2 = CHUNK, STRIDE_OUT = C + 8;
  static_assert(C % 32 == 0 && Tile::HALO_COLUMNS == 16);

  // Two taps of 8 channels are a right factor, of 5 for 8 channels: 9 taps and the residual. See `prepare_taps`.
  static constexpr int PAIRS = 5, TAPS = PAIRS * (CHUNK / 8) * 32;  // for a chunk, in uint2: two registers of a lane

  // Shared memory: bias2, then what a chunk needs, everything twice: 64 floats of each other bias, taps, weights, hidden
  // channels. The results leave through the space behind bias2.
  static constexpr int BIAS = 2 * CHUNK, HIDDEN = Tile::HIDDEN, WEIGHTS1 = CHUNK * STRIDE1, WEIGHTS2 = C * STRIDE2;
  static constexpr int OF_CHUNK = 2 * BIAS * 4 + TAPS * 8 + (WEIGHTS1 + WEIGHTS2 + HIDDEN) * 2, OUT = ROWS * 16 * STRIDE_OUT * 2;
  static constexpr int BYTES = C * 4 + (2 * OF_CHUNK > OUT ? 2 * OF_CHUNK : OUT);

  const ConvFFNArguments<T>& arg;
  const Tile tile;
  const int warp, lane, g, t;                       // see warp.h; the warp owns the row `warp` of the tile with its sides
  float *const bias2, *const bias1, *const bias;    // (C), (2, 64), (2, 64) of the depthwise convolution
  uint2* const taps;                                // (2, 5, 2, 32, 2)
  T *const weights1, *const weights2, *const hidden;
  uint32_t x[C / 16][4];      // the warp's 16 pixels, as tiles of the first product
  float result[C / 8][4];     // and of the second

  __device__ ConvFFN(const ConvFFNArguments<T>& arg, char* memory)
      : arg(arg),
        tile(Tile::number(blockIdx.x, arg.H, arg.W)),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        g(lane / 4),
        t(lane % 4),
        bias2(reinterpret_cast<float*>(memory)),
        bias1(bias2 + C),
        bias(bias1 + 2 * BIAS),
        taps(reinterpret_cast<uint2*>(bias + 2 * BIAS)),
        weights1(reinterpret_cast<T*>(taps + 2 * TAPS)),
        weights2(weights1 + 2 * WEIGHTS1),
        hidden(weights2 + 2 * WEIGHTS2),
        result{} {}

  __device__ int64_t offset(Place pixel) const {
    return ((static_cast<int64_t>(tile.image) * arg.H + pixel.row) * arg.W + pixel.column) * C;
  }

  // Zeros off the diagonals of the taps, once.
  __device__ void clear_taps() {
    for (int i = threadIdx.x; i < TAPS; i += THREADS) {  // two n at a time
      const int lane = i % 32;
      if (lane % 4 != lane / 8) reinterpret_cast<uint4*>(taps)[i] = make_uint4(0, 0, 0, 0);
    }
  }

  // A bias of a chunk, by one warp; a lane has a channel. Two channels stand twice in a row: what a product begins with.
  __device__ void prepare_bias(float* bias, const Parameters<T>& from, int chunk) {
    float* const to = bias + chunk % 2 * BIAS + lane / 2 * 4 + lane % 2;
    to[0] = to[2] = from[chunk * CHUNK + lane];
  }

  // The taps of a chunk, by one warp; a lane has a channel. The depthwise convolution of 8 channels, the n-th two of each
  // eight of a chunk, is a product of (16 pixels, 16) by (16, 8): its k-th pair of taps times the channels, by channels.
  // The right factor is two diagonal matrices, one for each tap: lanes 4g + g/2 have something of it. The residual is a
  // tenth tap of exactly 1, beside what rounding makes of the others.
  __device__ void prepare_taps(int chunk) {
    constexpr int RESIDUAL = 9, first[PAIRS] = {0, 1, 2, RESIDUAL, 6}, second[PAIRS] = {3, 4, 5, 7, 8};
    const int n = lane % 8 / 2, column = lane / 8 * 2 + lane % 2;
    uint2* const to = taps + chunk % 2 * TAPS + (n / 2 * 32 + 4 * column + column / 2) * 2 + n % 2;
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
        if (there) v = *reinterpret_cast<const uint4*>(arg.x + offset(pixel) + 32 * k + 8 * t);
        x[2 * k][half] = v.x, x[2 * k][2 + half] = v.y;
        x[2 * k + 1][half] = v.z, x[2 * k + 1][2 + half] = v.w;
      }
    }
  }

  __device__ void start_loading_weights1(int chunk) {
    T* const to = weights1 + chunk % 2 * WEIGHTS1;
    const T* const from = arg.weight1 + chunk * CHUNK * C;
    for_pieces<C / 8>([&](int row, int c) { copy(to + row * STRIDE1 + 8 * c, from + row * C + 8 * c); });
  }

  __device__ void start_loading_weights2(int chunk) {
    T* const to = weights2 + chunk % 2 * WEIGHTS2;
    const T* const from = arg.weight2 + chunk * CHUNK;
    for_pieces<CHUNK / 8>([&](int row, int c) { copy(to + row * STRIDE2 + 8 * c, from + row * WIDE + 8 * c); });
  }

  // Calls f(row, c) for the 16 bytes of a chunk's weights. Where rows divide so, a thread's lie the same distance apart,
  // which saves arithmetic.
  template <int A_ROW, typename F>
  static __device__ void for_pieces(F f) {
    constexpr int PIECES = CHUNK * C / 8;
    const int row = threadIdx.x / A_ROW, c = threadIdx.x % A_ROW;
#pragma unroll
    for (int i = 0; i < PIECES; i += THREADS) {
      if (i + THREADS > PIECES && threadIdx.x >= PIECES - i) break;
      if (THREADS % A_ROW == 0) {
        f(row + i / A_ROW, c);
      } else {
        f((i + threadIdx.x) / A_ROW, (i + threadIdx.x) % A_ROW);
      }
    }
  }

  // GELU of the first 1x1 convolution; zero outside the map, as the depthwise convolution pads.
  __device__ void expand(int chunk) {
    const T* const weights = weights1 + chunk % 2 * WEIGHTS1 + g * STRIDE1 + 8 * t;
    const bool there[2] = {Tile::in_map(tile.pixel({warp, g}), arg.H, arg.W),
                           Tile::in_map(tile.pixel({warp, g + 8}), arg.H, arg.W)};
    uint32_t v[2][CHUNK / 8];
#pragma unroll
    for (int n = 0; n < CHUNK / 8; n++) {
      const float4 plus = *reinterpret_cast<const float4*>(bias1 + chunk % 2 * BIAS + 16 * n + 4 * t);
      float u[4] = {plus.x, plus.y, plus.z, plus.w};
#pragma unroll
      for (int k = 0; k < C / 32; k++) {
        const uint4 b = *reinterpret_cast<const uint4*>(weights + 8 * n * STRIDE1 + 32 * k);
        mma<T>(u, x[2 * k], {b.x, b.y});
        mma<T>(u, x[2 * k + 1], {b.z, b.w});
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint32_t both = pack<T>(gelu(u[2 * half]), gelu(u[2 * half + 1]));
        v[half][n] = there[half] ? both : 0;
      }
    }
    T* const to = hidden + chunk % 2 * HIDDEN;
    // So the t-th eight of a place are the channels 2t, 2t + 1 of each eight.
#pragma unroll
    for (int half = 0; half < 2; half++) {
      *reinterpret_cast<uint4*>(to + Tile::hidden({warp, g + 8 * half}, t)) =
          make_uint4(v[half][0], v[half][1], v[half][2], v[half][3]);
    }
  }

  // The depthwise convolution of the warp's pixels, and the second 1x1 convolution, which takes it as it comes.
  __device__ void contract(int chunk) {
    // The first 16 lanes name the pixels as the first tap of a pair sees them, the others as the second does: one below
    // the other, or two columns apart. The outermost columns are no results; what they get does not matter.
    const T* const from = hidden + chunk % 2 * HIDDEN;
    const T* const below = from + Tile::hidden({warp - 1 + lane / 16, lane % 16}, 0);
    const T* const beside = from + Tile::hidden({warp + 1, lane % 16 - 1 + lane / 16 * 2}, 0);
    const T* const pixels[PAIRS] = {below - Tile::PLACE, below, below + Tile::PLACE, below + Tile::ROW, beside};
    const float4* const plus = reinterpret_cast<const float4*>(bias + chunk % 2 * BIAS) + 4 * t;
    const uint4* const right = reinterpret_cast<const uint4*>(taps + chunk % 2 * TAPS) + lane;
    uint32_t d[2][4];  // left factors of the second product
#pragma unroll
    for (int m = 0; m < 2; m++) {
      const float4 b = plus[2 * m], c = plus[2 * m + 1];
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
    const T* const weights = weights2 + chunk % 2 * WEIGHTS2 + g * STRIDE2 + 8 * t;
#pragma unroll
    for (int n = 0; n < C / 8; n++) {
      const uint4 b = *reinterpret_cast<const uint4*>(weights + 8 * n * STRIDE2);
      mma<T>(result[n], d[0], {b.x, b.y});
      mma<T>(result[n], d[1], {b.z, b.w});
    }
  }

  __device__ void finish() {
    T* const staged = reinterpret_cast<T*>(taps) + (warp - 1) * 16 * STRIDE_OUT;
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
    for (int i = lane; i < 16 * C / 8; i += 32) {
      const Place place = {warp, i / (C / 8)};
      const int c = i % (C / 8) * 8;
      if (!tile.in_result(place, arg.H, arg.W)) continue;
      const int64_t at = offset(tile.pixel(place)) + c;
      const uint4 a = *reinterpret_cast<const uint4*>(arg.residual + at);
      const uint4 b = *reinterpret_cast<const uint4*>(staged + place.column * STRIDE_OUT + c);
      *reinterpret_cast<uint4*>(arg.y + at) = make_uint4(add(a.x, b.x), add(a.y, b.y), add(a.z, b.z), add(a.w, b.w));
    }
  }

  static __device__ uint32_t add(uint32_t a, uint32_t b) {
    const float2 x = unpack<T>(a), y = unpack<T>(b);
    return pack<T>(x.x + y.x, x.y + y.y);
  }

  __device__ void run() {
    const bool has_result = warp >= 1 && warp <= ROWS;
    start_loading_weights1(0);
    commit_copies();
    load_pixels();
    clear_taps();
    for (int c = threadIdx.x; c < C; c += THREADS) bias2[c] = arg.bias2[c];
    if (warp == 0) prepare_bias(bias1, arg.bias1, 0);
    // A step expands a chunk and contracts the one before. Warps without a result prepare the next step instead.
    for (int chunk = 0; chunk <= CHUNKS; chunk++) {
      wait_for_copies<0>();
      sync_block();  // what the step reads has come, and nobody reads what the step before did
      if (chunk + 1 < CHUNKS) start_loading_weights1(chunk + 1);
      if (chunk < CHUNKS) start_loading_weights2(chunk);
      commit_copies();
      if (chunk < CHUNKS) expand(chunk);
      if (has_result) {
        if (chunk > 0) contract(chunk - 1);
      } else if (chunk < CHUNKS) {
        if (warp == 0) {
          prepare_taps(chunk);
        } else {
          prepare_bias(bias, arg.depthwise_bias, chunk);
          if (chunk + 1 < CHUNKS) prepare_bias(bias1, arg.bias1, chunk + 1);
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
