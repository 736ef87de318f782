// x + scale * attention(norm(x)) in one pass over the map (docs/ops.md).
//
// A warp owns a cell, a block a row of cells. Where there are thread-block clusters (sm_90), the blocks of an image form
// one: its map stays in their shared memory, and they reach into each other's. Without clusters one block goes through
// the rows of its image, three times, and reads them from L2 again.
#pragma once

#include <warp.h>

#include "geometry.h"

namespace svit {

constexpr int MOST_COLUMNS = 8, MOST_TOKENS = 64, MOST_BLOCKS = 8;

template <typename T>
struct AttentionArguments {
  const T* x;                                                  // (B, H, W, C)
  Parameters<T> norm_weight, norm_bias, qkv_bias, proj_bias;   // (C), (C), (3C), (C)
  const T *qkv_weight, *proj_weight;                           // (3C, C), (C, C)
  const float* scale;                                          // (B, C), or null
  T* y;                                                        // (B, H, W, C)
  T* s;                                                        // (B, hh, ww, C), or null
  T* q;                                                        // (B, hh, ww, 9, P); null only with clusters
  float* mass;                                                 // (B, hh, ww), or null
  float eps;
  Grid grid;
};

template <typename T, int C, int HEIGHT, int WIDTH, bool MANY>
struct SuperTokenAttention {
  static constexpr int P = HEIGHT * WIDTH, D = C == 96 ? 48 : 64, HEADS = C / D;
  static constexpr int STRIDE = C + 8;      // of a pixel or token in shared memory: 8 rows of 16 bytes hit all banks once
  static constexpr int SUM_STRIDE = C + 8;  // of a sum in float32, its mass at C: 4 rows of 8 bytes a lane do so
  // A cell in shared memory: its pixels, later its shares of the 9 super tokens that it sees.
  static constexpr int CELL = P * STRIDE > 2 * NEIGHBOURS * SUM_STRIDE ? P * STRIDE : 2 * NEIGHBOURS * SUM_STRIDE;
  static constexpr int VECTORS = C / 32;               // of 8 channels, that each of four lanes has of a pixel
  static constexpr int AHEAD = 2;             // pixels of a lane that are on their way at once
  static constexpr int PAIRS = (C + 63) / 64;          // of channels, that a lane has of a super token
  static_assert(C % 32 == 0 && C % D == 0 && P % 16 == 0 && 8 % WIDTH == 0);

  // Shared memory. What lies over each other is never alive at the same time.
  struct Layout {
    int norm, slots, tokens, map, queries, keys, values, sums, bytes;

    SVIT_BOTH Layout(int rows, int columns) {
      constexpr int ALL = MOST_TOKENS * STRIDE * 2;
      const int own = MANY ? 16 * STRIDE * 2 : (rows * columns + 15) / 16 * 16 * STRIDE * 2;
      norm = MANY ? 0 : 2 * ALL;
      slots = MANY ? ALL : norm + 2 * C * 4;
      // In a cluster, places that do not depend on the grid: their addresses take no registers.
      map = slots + (MANY ? Slots{1, MOST_COLUMNS} : Slots{rows, columns}).count() * STRIDE * 2;
      if (MANY) {  // nothing reads the map after its shares
        tokens = sums = 0;
        queries = map, keys = map + own, values = keys + ALL;
      } else {  // the map is that of a row only, so the sums need a place of their own
        keys = sums = 0, values = ALL;
        tokens = map, queries = map + ALL;
      }
      const int cells = columns * CELL * 2, others = own + ALL * (MANY ? 2 : 1);
      bytes = map + (cells > others ? cells : others);
    }
  };
  static_assert(SUM_STRIDE * 4 == 2 * STRIDE * 2);  // so that the sums fit where keys and values are later

  const AttentionArguments<T>& arg;
  const Grid grid;
  const int rank, blocks, image, rows, first;  // the block owns `rows` rows of cells from `first` on
  const int warp, lane, g, t, threads;         // see warp.h; the warp owns the cells of column `warp`
  const Slots slot;
  T *const map, *const slots, *const tokens, *const queries, *const keys, *const values;
  float *const norm, *const sums;
  uint32_t q[P / 16][4];  // of a cell, as left factors (pixels, super tokens)

  __device__ SuperTokenAttention(const AttentionArguments<T>& arg, char* memory, const Layout& at)
      : arg(arg),
        grid(arg.grid),
        rank(Cluster<MANY>::rank()),
        blocks(Cluster<MANY>::size()),
        image(blockIdx.x / blocks),
        rows(MANY ? 1 : grid.rows),
        first(MANY ? rank : 0),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        g(lane / 4),
        t(lane % 4),
        threads(32 * grid.columns),
        slot{rows, grid.columns},
        map(reinterpret_cast<T*>(memory + at.map)),
        slots(reinterpret_cast<T*>(memory + at.slots)),
        tokens(reinterpret_cast<T*>(memory + at.tokens)),
        queries(reinterpret_cast<T*>(memory + at.queries)),
        keys(reinterpret_cast<T*>(memory + at.keys)),
        values(reinterpret_cast<T*>(memory + at.values)),
        norm(reinterpret_cast<float*>(memory + at.norm)),
        sums(reinterpret_cast<float*>(memory + at.sums)) {}

  // Products leave a lane 2 neighbouring channels of each 8. In rows of super tokens these lie side by side, 8 channels of
  // each 32: so they are written 16 bytes at a time, and a product with such rows leaves 8 neighbouring channels.
  static __device__ int permuted(int c) { return c / 32 * 32 + c % 8 / 2 * 8 + c % 32 / 8 * 2 + c % 2; }

  // Zero to `count` rows of tokens.
  __device__ void clear(T* row, int count) const {
    uint4* const to = reinterpret_cast<uint4*>(row);
    for (int i = threadIdx.x; i < count * (STRIDE / 8); i += threads) to[i] = make_uint4(0, 0, 0, 0);
  }

  __device__ T* own_cell() const { return map + warp * CELL; }

  // Where in x and y the lane's first channels of pixel g of the warp's cell are; pixel g + 8 i is i steps below.
  __device__ int64_t own_pixel(int row) const {
    const int line = (first + row) * HEIGHT + g / WIDTH, column = warp * WIDTH + g % WIDTH;
    return ((static_cast<int64_t>(image) * grid.rows * HEIGHT + line) * grid.columns * WIDTH + column) * C + 8 * t;
  }
  __device__ int step() const { return 8 / WIDTH * grid.columns * WIDTH * C; }

  // Pixels g + 8 i of x; lanes t have 8 of each 32 channels.
  struct Pixels {
    uint4 x[AHEAD][VECTORS];
  };

  __device__ void load(Pixels& pixels, const T* x, int i) const {
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
      pixels.x[i % AHEAD][v] = *reinterpret_cast<const uint4*>(x + static_cast<int64_t>(i) * step() + 32 * v);
    }
  }

  __device__ void start_loading(Pixels& pixels, int row) const {
    const T* const x = arg.x + own_pixel(row);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) load(pixels, x, i);
  }

  struct Affine {
    float4 weight[2], bias[2];
  };

  // The norm's parameters for 8 channels of the lane.
  __device__ Affine affine_of(int v) const {
    const float4* const from = reinterpret_cast<const float4*>(norm + 32 * v + 8 * t);
    return {{from[0], from[1]}, {from[C / 4], from[C / 4 + 1]}};
  }

  // Layer norm of the warp's cell, from x, of which the first pixels are on their way, into shared memory.
  __device__ void normalise(Pixels& pixels, int row) {
    const T* const x = arg.x + own_pixel(row);
    // Parameters stay in registers if there are enough.
    constexpr bool STAY = C == 64;
    Affine affine[STAY ? VECTORS : 1];
    if (STAY) {
#pragma unroll
      for (int v = 0; v < VECTORS; v++) affine[v] = affine_of(v);
    }
    T* const to = own_cell() + g * STRIDE + 8 * t;
#pragma unroll AHEAD
    for (int i = 0; i < P / 8; i++) {
      float z[VECTORS][8];
      float sum = 0, squares = 0;
#pragma unroll
      for (int v = 0; v < VECTORS; v++) {
        unpack8(pixels.x[i % AHEAD][v], z[v]);
#pragma unroll
        for (int e = 0; e < 8; e++) sum += z[v][e];
      }
      if (i + AHEAD < P / 8) load(pixels, x, i + AHEAD);
      const float mean = sum_quad(sum) * (1.0f / C);
#pragma unroll
      for (int v = 0; v < VECTORS; v++)
#pragma unroll
        for (int e = 0; e < 8; e++) {
          z[v][e] -= mean;
          squares += z[v][e] * z[v][e];
        }
      const float rstd = rsqrtf(sum_quad(squares) * (1.0f / C) + arg.eps);
#pragma unroll
      for (int v = 0; v < VECTORS; v++) {
        if (!STAY) affine[0] = affine_of(v);
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float4 weight = affine[STAY ? v : 0].weight[e], bias = affine[STAY ? v : 0].bias[e];
          float* const four = z[v] + 4 * e;
          four[0] = four[0] * rstd * weight.x + bias.x, four[1] = four[1] * rstd * weight.y + bias.y;
          four[2] = four[2] * rstd * weight.z + bias.z, four[3] = four[3] * rstd * weight.w + bias.w;
        }
        *reinterpret_cast<uint4*>(to + 8 * i * STRIDE + 32 * v) = pack8(z[v]);
      }
    }
  }

  // Adds factors (16, P) times the pixels of the warp's cell: sums (16, C).
  template <typename F>
  __device__ void add_products(float (&sum)[C / 8][4], F factors) const {
    const T* const pixel = own_cell() + lane % 16 * STRIDE + lane / 16 * 8;
#pragma unroll
    for (int p = 0; p < P / 16; p++) {
      uint32_t a[4];
      factors(p, a);
#pragma unroll
      for (int n = 0; n < C / 8; n += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, pixel + 16 * p * STRIDE + 8 * n);
        mma<T>(sum[n], a, {b[0], b[1]});
        mma<T>(sum[n + 1], a, {b[2], b[3]});
      }
    }
  }

  // The mean of the warp's cell is the first super token, here and in the slots of the blocks beside.
  __device__ void put_mean(int row) {
    float sum[C / 8][4] = {};
    const uint32_t ones = pack<T>(1, 1);
    add_products(sum, [&](int, uint32_t(&a)[4]) { a[0] = a[1] = a[2] = a[3] = ones; });
    // All lanes have it: those with g = 0, 1, 2 write it into the block above, their own, and the one below.
    const int block = MANY ? rank - 1 + g : 0;
    if (MANY ? g >= 3 || block < 0 || block >= blocks : g > 0) return;
    T* const to = Cluster<MANY>::in(slots + slot.at({MANY ? 1 - g : row, warp}) * STRIDE + 2 * t, block);
#pragma unroll
    for (int n = 0; n < C / 8; n++) {
      *reinterpret_cast<uint32_t*>(to + 8 * n) = pack<T>(sum[n][0] * (1.0f / P), sum[n][1] * (1.0f / P));
    }
  }

  // q of the warp's cell, from its pixels and the super tokens in the slots.
  __device__ void associate(int row) {
    // Lanes 16 to 31 name tokens 8 to 15, every second eight of lanes the second 8 of 16 channels.
    const T* const token =
        slots + slot.neighbour_at({row, warp}, lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8;
    uint32_t b[C / 16][4];
#pragma unroll
    for (int k = 0; k < C / 16; k++) load_matrices(b[k], token + 16 * k);

    const T* const pixel = own_cell() + lane % 16 * STRIDE + lane / 16 * 8;
    const float scale = LOG2_E * rsqrtf(static_cast<float>(C));
#pragma unroll
    for (int p = 0; p < P / 16; p++) {
      float logits[2][4] = {};
#pragma unroll
      for (int k = 0; k < C / 16; k++) {
        uint32_t a[4];
        load_matrices(a, pixel + 16 * p * STRIDE + 16 * k);
        mma<T>(logits[0], a, {b[k][0], b[k][1]});
        mma<T>(logits[1], a, {b[k][2], b[k][3]});
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        // Of tokens 8 to 15 only the first exists: that of the lanes with t = 0.
        float e[3] = {logits[0][2 * i], logits[0][2 * i + 1], t == 0 ? logits[1][2 * i] : -INFINITY};
        const float largest = scale * max_quad(fmaxf(fmaxf(e[0], e[1]), e[2]));
#pragma unroll
        for (int j = 0; j < 3; j++) e[j] = exp2_approx(e[j] * scale - largest);
        const float factor = reciprocal(sum_quad(e[0] + e[1] + e[2]));
        q[p][i] = pack<T>(e[0] * factor, e[1] * factor);
        q[p][2 + i] = pack<T>(e[2] * factor, 0);
      }
    }
  }

  __device__ T* q_of_cell(int row, int k) const {
    return arg.q + ((static_cast<int64_t>(image) * grid.rows + first + row) * grid.columns + warp) * NEIGHBOURS * P +
           k * P + 2 * t;
  }

  __device__ void load_q(int row) {
    const T *const low = q_of_cell(row, g), *const high = q_of_cell(row, 8);
#pragma unroll
    for (int p = 0; p < P / 16; p++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        q[p][i] = transpose(*reinterpret_cast<const uint32_t*>(low + 16 * p + 8 * i));
        q[p][2 + i] = transpose(g == 0 ? *reinterpret_cast<const uint32_t*>(high + 16 * p + 8 * i) : 0);
      }
  }

  // The shares of the warp's cell in its 9 super tokens take the place of its pixels. Stores q.
  __device__ void aggregate(int row) {
    T *const low = q_of_cell(row, g), *const high = q_of_cell(row, 8);
    float share[C / 8][4] = {}, mass[4] = {};
    const uint32_t ones = pack<T>(1, 1);
    add_products(share, [&](int p, uint32_t(&a)[4]) {
      a[0] = transpose(q[p][0]), a[1] = transpose(q[p][2]), a[2] = transpose(q[p][1]), a[3] = transpose(q[p][3]);
      mma<T>(mass, a, {ones, ones});
      if (arg.q) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          *reinterpret_cast<uint32_t*>(low + 16 * p + 8 * i) = a[2 * i];
          if (g == 0) *reinterpret_cast<uint32_t*>(high + 16 * p + 8 * i) = a[2 * i + 1];
        }
      }
    });
    sync_warp();  // all lanes have read the pixels
    float* const to = reinterpret_cast<float*>(own_cell()) + g * SUM_STRIDE;
#pragma unroll
    for (int n = 0; n < C / 8; n++) {
      *reinterpret_cast<float2*>(to + 8 * n + 2 * t) = {share[n][0], share[n][1]};
      if (g == 0) *reinterpret_cast<float2*>(to + 8 * SUM_STRIDE + 8 * n + 2 * t) = {share[n][2], share[n][3]};
    }
    if (t == 0) to[C] = mass[0];
    if (lane == 0) to[8 * SUM_STRIDE + C] = mass[2];
  }

  // The sum of a super token's shares, of which a lane has two of each 64 channels.
  struct Sum {
    float2 channels[PAIRS];
    float mass;

    __device__ void add(const float* from, int lane) {
#pragma unroll
      for (int i = 0; i < PAIRS; i++) {
        const int c = 64 * i + 2 * lane;
        if (C % 64 && c >= C) continue;
        const float2 v = *reinterpret_cast<const float2*>(from + c);
        channels[i].x += v.x, channels[i].y += v.y;
      }
      mass += from[C];
    }
  };

  // Adds the share of the cell whose k-th neighbour a super token is.
  __device__ void add_share(Sum& sum, Place token, int k) const {
    const Place cell = source(token, k);
    if (!grid.holds(cell)) return;
    float* const shares = reinterpret_cast<float*>(map + cell.column * CELL);
    sum.add(Cluster<MANY>::in(shares + k * SUM_STRIDE, cell.row), lane);
  }

  __device__ float* sum_of(int row) const { return sums + (row * grid.columns + warp) * SUM_STRIDE; }

  // Without clusters: adds the shares of a row of cells to the super tokens of the warp's column.
  __device__ void add_row(int row) {
#pragma unroll
    for (int i = 0; i < 3; i++) {
      const Place token = {row + i - 1, warp};
      if (!grid.holds(token)) continue;
      float* const to = sum_of(token.row);
      Sum sum = {};
      if (row > 0 && i < 2) sum.add(to, lane);  // a row before has begun it
#pragma unroll
      for (int k = 3 * i; k < 3 * i + 3; k++) add_share(sum, token, k);
#pragma unroll
      for (int j = 0; j < PAIRS; j++) {
        const int c = 64 * j + 2 * lane;
        if (C % 64 == 0 || c < C) *reinterpret_cast<float2*>(to + c) = sum.channels[j];
      }
      sync_warp();  // all lanes have read the mass
      if (lane == 0) to[C] = sum.mass;
    }
  }

  // The super tokens of the warp's column, in all blocks.
  __device__ void make_tokens() {
    for (int row = 0; row < rows; row++) {
      const Place token = {first + row, warp};
      Sum sum = {};
      if (MANY) {
#pragma unroll
        for (int k = 0; k < NEIGHBOURS; k++) add_share(sum, token, k);
      } else {
        sum.add(sum_of(row), lane);
      }
      const float factor = reciprocal(sum.mass + 1e-12f);
      const int number = grid.token(token);
      const int64_t in_batch = static_cast<int64_t>(image) * grid.rows * grid.columns + number;
#pragma unroll
      for (int i = 0; i < PAIRS; i++) {
        const int c = 64 * i + 2 * lane;
        if (C % 64 && c >= C) continue;
        const uint32_t v = pack<T>(sum.channels[i].x * factor, sum.channels[i].y * factor);
        T* const to = tokens + number * STRIDE + permuted(c);
        for (int block = 0; block < blocks; block++) *reinterpret_cast<uint32_t*>(Cluster<MANY>::in(to, block)) = v;
        if (arg.s) *reinterpret_cast<uint32_t*>(arg.s + in_batch * C + c) = v;
      }
      if (arg.mass && lane == 0) arg.mass[in_batch] = sum.mass;
    }
  }

  // A linear layer for all super tokens, shared out among the warps of the cluster, 32 outputs of 16 tokens at a time:
  // f(the first of 32 outputs, token, 8 of them). These are neighbours if NEIGHBOURING, else as in rows of super tokens.
  template <bool NEIGHBOURING, typename F>
  __device__ void linear(const T* weight, Parameters<T> bias, int outputs, const float* scale, F f) const {
    constexpr int TILES = MOST_TOKENS / 16;
    const int count = grid.rows * grid.columns;
    // The tokens vary first: warps of a block have weights in common.
    for (int task = rank * grid.columns + warp; task < outputs / 32 * TILES; task += blocks * grid.columns) {
      const int output = task / TILES * 32, token = task % TILES * 16;
      if (token >= count) continue;
      const auto place = [&](int n, int column) {
        return output + (NEIGHBOURING ? column / 2 * 8 + 2 * n + column % 2 : 8 * n + column);
      };
      float result[4][4];
#pragma unroll
      for (int n = 0; n < 4; n++) {
        const float2 b = bias.pair(place(n, 2 * t));
        result[n][0] = result[n][2] = b.x, result[n][1] = result[n][3] = b.y;
      }
      const T* const row = tokens + min(token + lane % 16, count - 1) * STRIDE + lane / 16 * 8;
#pragma unroll
      for (int k = 0; k < C / 32; k++) {
        uint32_t a[2][4];
        load_matrices(a[0], row + 32 * k);
        load_matrices(a[1], row + 32 * k + 16);
#pragma unroll
        for (int n = 0; n < 4; n++) {
          const uint4 b = *reinterpret_cast<const uint4*>(weight + place(n, g) * C + 32 * k + 8 * t);
          mma<T>(result[n], a[0], {b.x, b.y});
          mma<T>(result[n], a[1], {b.z, b.w});
        }
      }
      if (scale) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
          const float2 s = *reinterpret_cast<const float2*>(scale + place(n, 2 * t));
          result[n][0] *= s.x, result[n][1] *= s.y, result[n][2] *= s.x, result[n][3] *= s.y;
        }
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (token + 8 * i + g >= count) continue;
        const auto both = [&](int n) { return pack<T>(result[n][2 * i], result[n][2 * i + 1]); };
        f(output, token + 8 * i + g, make_uint4(both(0), both(1), both(2), both(3)));
      }
    }
  }

  // Queries, to the block that owns the super token; keys and values, to all.
  __device__ void make_queries_keys_values() {
    const int own = rows * grid.columns, count = grid.rows * grid.columns;
    clear(values + count * STRIDE, MOST_TOKENS - count);
    linear<true>(arg.qkv_weight, arg.qkv_bias, 3 * C, nullptr, [&](int output, int token, uint4 v) {
      // Outputs come head by head, in each the queries, then the keys, then the values.
      output += 8 * t;
      const int part = output % (3 * D) / D, c = output / (3 * D) * D + output % D;
      const bool query = part == 0;
      const int owner = MANY ? grid.cell(token).row : 0;
      T* const to = (query ? queries - owner * own * STRIDE : part == 1 ? keys : values) + token * STRIDE + c;
      for (int block = query ? owner : 0; block < (query ? owner + 1 : blocks); block++) {
        *reinterpret_cast<uint4*>(Cluster<MANY>::in(to, block)) = v;
      }
    });
  }

  // Attention of the super tokens that the block owns to all; the result replaces the super tokens, in all blocks.
  __device__ void attend() {
    // A block of a cluster owns at most 8, half a tile. Its warps share the output channels of each head; each computes
    // the weights anew, which takes less time than to pass them on.
    constexpr int HALVES = MANY ? 1 : 2, SPLITS = !MANY ? 1 : HEADS == 1 ? 4 : D == 48 ? 3 : 2, N = D / SPLITS / 8;
    static_assert(!MANY || MOST_COLUMNS <= 8);
    const int own = rows * grid.columns, count = grid.rows * grid.columns, tiles = (own + 15) / 16;
    for (int task = warp; task < HEADS * SPLITS * tiles; task += grid.columns) {
      const int head = task / SPLITS % HEADS, m = task / (HEADS * SPLITS), c = head * D + task % SPLITS * (8 * N);
      const T* const query = queries + (16 * m + lane % 16) * STRIDE + head * D + lane / 16 * 8;
      const T* const key = keys + (lane / 16 * 8 + lane % 8) * STRIDE + head * D + lane / 8 % 2 * 8;
      const T* const value = values + lane % 16 * STRIDE + c + lane / 16 * 8;
      float weight[MOST_TOKENS / 8][4] = {};
#pragma unroll
      for (int k = 0; k < D / 16; k++) {
        uint32_t a[4];
        load_matrices(a, query + 16 * k);
#pragma unroll
        for (int n = 0; n < MOST_TOKENS / 8; n += 2) {
          uint32_t b[4];
          load_matrices(b, key + 8 * n * STRIDE + 16 * k);
          mma<T>(weight[n], a, {b[0], b[1]});
          mma<T>(weight[n + 1], a, {b[2], b[3]});
        }
      }
      const float scale = LOG2_E * rsqrtf(static_cast<float>(D));
      float factor[HALVES];
#pragma unroll
      for (int i = 0; i < HALVES; i++) {
        float largest = -INFINITY, sum = 0;
#pragma unroll
        for (int n = 0; n < MOST_TOKENS / 8; n++)
#pragma unroll
          for (int j = 2 * i; j < 2 * i + 2; j++) {
            if (8 * n + 2 * t + j % 2 >= count) weight[n][j] = -INFINITY;
            largest = fmaxf(largest, weight[n][j]);
          }
        largest = scale * max_quad(largest);
#pragma unroll
        for (int n = 0; n < MOST_TOKENS / 8; n++)
#pragma unroll
          for (int j = 2 * i; j < 2 * i + 2; j++) {
            weight[n][j] = exp2_approx(weight[n][j] * scale - largest);
            sum += weight[n][j];
          }
        factor[i] = reciprocal(sum_quad(sum));
      }

      float result[N][4] = {};
#pragma unroll
      for (int k = 0; k < MOST_TOKENS / 16; k++) {
        uint32_t a[4] = {};
#pragma unroll
        for (int i = 0; i < HALVES; i++) {
          a[i] = pack<T>(weight[2 * k][2 * i], weight[2 * k][2 * i + 1]);
          a[2 + i] = pack<T>(weight[2 * k + 1][2 * i], weight[2 * k + 1][2 * i + 1]);
        }
#pragma unroll
        for (int n = 0; n < N; n += 2) {
          uint32_t b[4];
          load_matrices_transposed(b, value + 16 * k * STRIDE + 8 * n);
          mma<T>(result[n], a, {b[0], b[1]});
          mma<T>(result[n + 1], a, {b[2], b[3]});
        }
      }
#pragma unroll
      for (int i = 0; i < HALVES; i++) {
        const int token = 16 * m + 8 * i + g;
        if (token >= own) continue;
#pragma unroll
        for (int n = 0; n < N; n += 2) {
          const float *const a = result[n] + 2 * i, *const b = result[n + 1] + 2 * i;
          const float f = factor[i];
          const uint2 v = make_uint2(pack<T>(a[0] * f, a[1] * f), pack<T>(b[0] * f, b[1] * f));
          T* const to = tokens + (first * grid.columns + token) * STRIDE + permuted(c + 8 * n + 2 * t);
          for (int block = 0; block < blocks; block++) *reinterpret_cast<uint2*>(Cluster<MANY>::in(to, block)) = v;
        }
      }
    }
  }

  // The output projection, into the slots of all blocks that see a super token.
  __device__ void project() {
    const float* const scale = arg.scale ? arg.scale + static_cast<int64_t>(image) * C : nullptr;
    linear<false>(arg.proj_weight, arg.proj_bias, C, scale, [&](int output, int token, uint4 v) {
      const auto [row, column] = grid.cell(token);
      T* const to = slots + output + 8 * t;
      if (!MANY) *reinterpret_cast<uint4*>(to + slot.at({row, column}) * STRIDE) = v;
#pragma unroll
      for (int i = -1; MANY && i <= 1; i++) {
        if (row + i < 0 || row + i >= blocks) continue;
        *reinterpret_cast<uint4*>(Cluster<MANY>::in(to + slot.at({-i, column}) * STRIDE, row + i)) = v;
      }
    });
  }

  // Adds to the pixels of the warp's cell what they get from their super tokens.
  __device__ void spread(Pixels& pixels, int row) {
    const T* const token = slots + slot.neighbour_at({row, warp}, lane % 16) * STRIDE + lane / 16 * 8;
    uint32_t b[C / 16][4];
#pragma unroll
    for (int n = 0; n < C / 16; n++) load_matrices_transposed(b[n], token + 16 * n);
    const T* const x = arg.x + own_pixel(row);
    T* const y = arg.y + own_pixel(row);
#pragma unroll
    for (int p = 0; p < P / 16; p++)
#pragma unroll
      for (int v = 0; v < VECTORS; v++) {
        float sum[2][8];  // of pixels g and g + 8
#pragma unroll
        for (int i = 0; i < 2; i++) unpack8(pixels.x[(2 * p + i) % AHEAD][v], sum[i]);
#pragma unroll
        for (int n = 0; n < 4; n++) {
          float d[4] = {sum[0][2 * n], sum[0][2 * n + 1], sum[1][2 * n], sum[1][2 * n + 1]};
          mma<T>(d, q[p], {b[2 * v + n / 2][n % 2 * 2], b[2 * v + n / 2][n % 2 * 2 + 1]});
          sum[0][2 * n] = d[0], sum[0][2 * n + 1] = d[1], sum[1][2 * n] = d[2], sum[1][2 * n + 1] = d[3];
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
          *reinterpret_cast<uint4*>(y + static_cast<int64_t>(2 * p + i) * step() + 32 * v) = pack8(sum[i]);
          if (v == VECTORS - 1 && 2 * p + i + AHEAD < P / 8) load(pixels, x, 2 * p + i + AHEAD);
        }
      }
  }

  __device__ void run() {
    Pixels pixels;
    start_loading(pixels, 0);
    clear(slots, slot.count());
    for (int c = threadIdx.x; c < C; c += threads) {
      norm[c] = arg.norm_weight[c];
      norm[C + c] = arg.norm_bias[c];
    }
    sync_block();
    if (MANY) {
      normalise(pixels, 0);
      Cluster<MANY>::sync();  // all blocks have begun, and cleared their slots
      put_mean(0);
      Cluster<MANY>::sync();  // the slots hold the first super tokens
      associate(0);
      aggregate(0);
      Cluster<MANY>::sync();  // all shares are there
    } else {
      for (int row = 0; row < rows; row++) {
        if (row > 0) start_loading(pixels, row);
        normalise(pixels, row);
        sync_warp();
        put_mean(row);
        sync_warp();
      }
      sync_block();  // the slots hold the first super tokens
      for (int row = 0; row < rows; row++) {
        start_loading(pixels, row);
        normalise(pixels, row);
        sync_warp();
        associate(row);
        aggregate(row);
        sync_block();  // the shares of the row are there
        add_row(row);
        sync_block();  // and of no use
      }
    }
    make_tokens();
    Cluster<MANY>::sync();  // the super tokens are everywhere, and the shares and sums of no use
    make_queries_keys_values();
    Cluster<MANY>::sync();  // they are everywhere, and the super tokens of no use
    attend();
    Cluster<MANY>::sync();  // its results are everywhere
    project();
    int row = opaque(0);
    start_loading(pixels, row);
    Cluster<MANY>::sync();  // the slots hold the super tokens for spreading; from here on each block is alone
    while (true) {
      if (!MANY) load_q(row);
      spread(pixels, row);
      if (MANY || ++row == rows) break;
      start_loading(pixels, row);
    }
  }

  static __device__ float sum_quad(float v) {
    v += shuffle_xor(v, 1);
    return v + shuffle_xor(v, 2);
  }

  static __device__ float max_quad(float v) {
    v = fmaxf(v, shuffle_xor(v, 1));
    return fmaxf(v, shuffle_xor(v, 2));
  }

  static __device__ void unpack8(uint4 v, float (&x)[8]) {
    const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 both = unpack<T>(pairs[i]);
      x[2 * i] = both.x, x[2 * i + 1] = both.y;
    }
  }

  static __device__ uint4 pack8(const float (&x)[8]) {
    return make_uint4(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7]));
  }
};

template <typename T, int C, int HEIGHT, int WIDTH, bool MANY>
__global__ void __launch_bounds__(32 * MOST_COLUMNS, MANY ? 2 : 1)
    super_token_attention(const AttentionArguments<T> arg) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr bool EXISTS = true;
#else
  constexpr bool EXISTS = !MANY;  // there are no clusters
#endif
  if constexpr (EXISTS) {
    using Kernel = SuperTokenAttention<T, C, HEIGHT, WIDTH, MANY>;
    Kernel(arg, shared_memory(), typename Kernel::Layout(MANY ? 1 : arg.grid.rows, arg.grid.columns)).run();
  } else {
    stop();
  }
}

}  // namespace svit
