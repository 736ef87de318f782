// residual + conv-FFN in one kernel, for inference (docs/ops.md): 1x1 conv, GELU, u + depthwise 3x3 conv of u, 1x1 conv.
//
// A block owns a tile of pixels, with one more on each side for the depthwise convolution; a warp owns a row of 16. The
// hidden map never leaves the chip: 32 of its channels at a time pass through shared memory, and the second 1x1
// convolution sums over them in registers.
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

// Exact GELU; erf by Abramowitz and Stegun, formula 7.1.26 (error 1.5e-7).
__device__ __forceinline__ float gelu(float x) {
  const float z = fabsf(x) * 0.70710678f, k = reciprocal(1 + 0.3275911f * z);
  const float series = k * (0.254829592f + k * (-0.284496736f + k * (1.421413741f + k * (-1.453152027f + k * 1.061405429f))));
  const float tail = 0.5f * series * __expf(-z * z);  // of the normal distribution, beyond |x|
  return x * (x > 0 ? 1 - tail : tail);
}

// Rows of a tile: as many as there are registers for. Fewer mean more pixels computed twice.
constexpr int rows_of_tile(int C) { return C <= 64 ? 14 : C <= 96 ? 7 : 6; }

template <typename T, int C, int ROWS>
struct ConvFFN {
  using Tile = svit::Tile<ROWS>;
  static constexpr int WARPS = Tile::HALO_ROWS, THREADS = 32 * WARPS, WIDE = 4 * C, CHUNK = 32, CHUNKS = WIDE / CHUNK;
  // Rows of weights in shared memory, of pixels on their way out.
  static constexpr int STRIDE1 = C % 64 == 32 ? C : C + 32, STRIDE2 = CHUNK, STRIDE_OUT = C + 8;
  static_assert(C % 32 == 0 && Tile::HALO_COLUMNS == 16);

  // Shared memory: parameters as floats, then what a chunk needs, the weights twice. The results leave through the latter.
  static constexpr int FLOATS = 11 * WIDE + C;
  static constexpr int HIDDEN = WARPS * 16 * CHUNK, WEIGHTS1 = CHUNK * STRIDE1, WEIGHTS2 = C * STRIDE2;
  static constexpr int ON_THE_WAY = HIDDEN + 2 * (WEIGHTS1 + WEIGHTS2), OUT = ROWS * 16 * STRIDE_OUT;
  static constexpr int BYTES = FLOATS * 4 + (ON_THE_WAY > OUT ? ON_THE_WAY : OUT) * 2;

  const ConvFFNArguments<T>& arg;
  const Tile tile;
  const int warp, lane, g, t;                       // see warp.h; the warp owns the row `warp` of the tile with its sides
  float *const taps, *const bias, *const bias1, *const bias2;  // (9, 4C) and (4C) depthwise, (4C), (C)
  T *const hidden, *const weights1, *const weights2;
  uint32_t x[C / 16][4];      // the warp's 16 pixels, as tiles of the first product
  float result[C / 8][4];     // and of the second

  __device__ ConvFFN(const ConvFFNArguments<T>& arg, char* memory)
      : arg(arg),
        tile(Tile::number(blockIdx.x, arg.H, arg.W)),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        g(lane / 4),
        t(lane % 4),
        taps(reinterpret_cast<float*>(memory)),
        bias(taps + 9 * WIDE),
        bias1(bias + WIDE),
        bias2(bias1 + WIDE),
        hidden(reinterpret_cast<T*>(taps + FLOATS)),
        weights1(hidden + HIDDEN),
        weights2(weights1 + 2 * WEIGHTS1),
        result{} {}

  __device__ int64_t offset(Place pixel) const {
    return ((static_cast<int64_t>(tile.image) * arg.H + pixel.row) * arg.W + pixel.column) * C;
  }

  __device__ void load_parameters() {
    // The centre tap takes the residual in, in float32.
    for (int i = threadIdx.x; i < 9 * WIDE; i += THREADS) {
      taps[i % 9 * WIDE + i / 9] = arg.taps[i] + (i % 9 == 4 ? 1.0f : 0.0f);
    }
    for (int i = threadIdx.x; i < WIDE; i += THREADS) {
      bias1[i] = arg.bias1[i];
      bias[i] = arg.depthwise_bias[i];
    }
    for (int i = threadIdx.x; i < C; i += THREADS) bias2[i] = arg.bias2[i];
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

  __device__ void start_loading(int chunk) {
    T* const to1 = weights1 + chunk % 2 * WEIGHTS1;
    T* const to2 = weights2 + chunk % 2 * WEIGHTS2;
#pragma unroll 1
    for (int i = threadIdx.x; i < CHUNK * C / 8; i += THREADS) {
      const int row = i / (C / 8), c = i % (C / 8) * 8;
      copy(to1 + row * STRIDE1 + c, arg.weight1 + (chunk * CHUNK + row) * C + c);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < C * CHUNK / 8; i += THREADS) {
      const int row = i / (CHUNK / 8), c = i % (CHUNK / 8) * 8;
      copy(to2 + row * STRIDE2 + c, arg.weight2 + row * WIDE + chunk * CHUNK + c);
    }
    commit_copies();
  }

  // GELU of the first 1x1 convolution; zero outside the map, as the depthwise convolution pads.
  __device__ void expand(int chunk) {
    const int g = opaque(this->g);
    const T* const weights = weights1 + chunk % 2 * WEIGHTS1 + g * STRIDE1 + 8 * t;
    const bool there[2] = {Tile::in_map(tile.pixel({warp, g}), arg.H, arg.W),
                           Tile::in_map(tile.pixel({warp, g + 8}), arg.H, arg.W)};
#pragma unroll 1
    for (int n = 0; n < CHUNK / 8; n++) {
      float u[4] = {};
#pragma unroll
      for (int k = 0; k < C / 32; k++) {
        const uint4 b = *reinterpret_cast<const uint4*>(weights + 8 * n * STRIDE1 + 32 * k);
        mma<T>(u, x[2 * k], {b.x, b.y});
        mma<T>(u, x[2 * k + 1], {b.z, b.w});
      }
      const float2 plus = *reinterpret_cast<const float2*>(bias1 + chunk * CHUNK + 8 * n + 2 * t);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float first = gelu(u[2 * half] + plus.x), second = gelu(u[2 * half + 1] + plus.y);
        const uint32_t v = there[half] ? pack<T>(first, second) : 0;
        *reinterpret_cast<uint32_t*>(hidden + Tile::hidden({warp, g + 8 * half}, n) + 2 * t) = v;
      }
    }
  }

  // The depthwise convolution of 8 channels of a pixel.
  __device__ uint4 depthwise(int chunk, int column) const {
    const int channel = chunk * CHUNK + 8 * t;
    column = opaque(column);
    float sum[8];
#pragma unroll
    for (int e = 0; e < 8; e++) sum[e] = bias[channel + e];
#pragma unroll 1
    for (int row = 0; row < 3; row++) {
#pragma unroll
      for (int k = 0; k < 3; k++) {
        // The outermost columns are no results; what they get does not matter.
        const int beside = min(max(column + k - 1, 0), 15);
        const uint4 u = *reinterpret_cast<const uint4*>(hidden + Tile::hidden({warp + row - 1, beside}, t));
        const float* const tap = taps + (3 * row + k) * WIDE + channel;
        const uint32_t pairs[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float2 both = unpack<T>(pairs[e]);
          sum[2 * e] += tap[2 * e] * both.x;
          sum[2 * e + 1] += tap[2 * e + 1] * both.y;
        }
      }
    }
    return make_uint4(pack<T>(sum[0], sum[1]), pack<T>(sum[2], sum[3]), pack<T>(sum[4], sum[5]),
                      pack<T>(sum[6], sum[7]));
  }

  // The depthwise convolution of the warp's pixels, which comes just as the second product takes it.
  __device__ void contract(int chunk) {
    const uint4 left = depthwise(chunk, g), right = depthwise(chunk, g + 8);
    const uint32_t low[4] = {left.x, right.x, left.y, right.y}, high[4] = {left.z, right.z, left.w, right.w};
    const T* const weights = weights2 + chunk % 2 * WEIGHTS2 + g * STRIDE2 + 8 * t;
#pragma unroll
    for (int n = 0; n < C / 8; n++) {
      const uint4 b = *reinterpret_cast<const uint4*>(weights + 8 * n * STRIDE2);
      mma<T>(result[n], low, {b.x, b.y});
      mma<T>(result[n], high, {b.z, b.w});
      // The other half of the loads waits: all at once they would drive results out of the registers.
      if (C > 128 && n == C / 16) hold_loads();
    }
  }

  __device__ void finish() {
    T* const staged = hidden + (warp - 1) * 16 * STRIDE_OUT;
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
    start_loading(0);
    load_parameters();
    load_pixels();
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      wait_for_copies<0>();
      sync_block();  // the weights have come, and nobody reads the last chunk's
      if (chunk + 1 < CHUNKS) start_loading(chunk + 1);
      expand(chunk);
      sync_block();
      if (has_result) contract(chunk);
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
