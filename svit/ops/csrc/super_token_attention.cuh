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
  static constexpr int SUM_STRIDE = C + 4;  // of a super token's sum, its mass at C
  static_assert(C % 32 == 0 && C % D == 0 && P % 16 == 0);

  // Shared memory. What lies over each other is never alive at the same time.
  struct Layout {
    int norm, map, slots, tokens, queries, sums, inbox, keys, values, bytes;

    SVIT_BOTH Layout(int rows, int columns) {
      const int all = MOST_TOKENS * STRIDE * 2, own = (rows * columns + 15) / 16 * 16 * STRIDE * 2;
      const int row_of_sums = columns * SUM_STRIDE * 4;
      norm = 0;
      map = norm + 2 * C * 4;
      int end = map + columns * P * STRIDE * 2;
      if (MANY) {
        tokens = end, queries = tokens + all, end = queries + own;
      } else {  // the map is read again after the attention
        tokens = map, queries = tokens + all, end = end > queries + own ? end : queries + own;
      }
      slots = end;
      sums = slots + Slots{rows, columns}.count() * STRIDE * 2;
      inbox = sums + (rows + 2) * row_of_sums;
      keys = sums, values = keys + all;
      end = inbox + (MANY ? 2 * row_of_sums : 0);
      bytes = end > values + all ? end : values + all;
    }
  };

  const AttentionArguments<T>& arg;
  const Grid grid;
  const int rank, blocks, image, rows, first;  // the block owns `rows` rows of cells from `first` on
  const int warp, lane, g, t, threads;         // see warp.h; the warp owns the cells of column `warp`
  const Slots slot;
  float* const norm;
  T *const map, *const slots, *const tokens, *const queries, *const keys, *const values;
  float *const sums, *const inbox;
  uint32_t q[P / 8][2];  // of a cell, as two tiles of the product over pixels: tokens 0 to 7 and 8 to 15

  __device__ SuperTokenAttention(const AttentionArguments<T>& arg, char* memory, const Layout& at)
      : arg(arg),
        grid(arg.grid),
        rank(Cluster<MANY>::rank()),
        blocks(Cluster<MANY>::size()),
        image(blockIdx.x / blocks),
        rows(MANY ? 1 : grid.rows),
        first(rank * rows),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        g(lane / 4),
        t(lane % 4),
        threads(32 * grid.columns),
        slot{rows, grid.columns},
        norm(reinterpret_cast<float*>(memory + at.norm)),
        map(reinterpret_cast<T*>(memory + at.map)),
        slots(reinterpret_cast<T*>(memory + at.slots)),
        tokens(reinterpret_cast<T*>(memory + at.tokens)),
        queries(reinterpret_cast<T*>(memory + at.queries)),
        keys(reinterpret_cast<T*>(memory + at.keys)),
        values(reinterpret_cast<T*>(memory + at.values)),
        sums(reinterpret_cast<float*>(memory + at.sums)),
        inbox(reinterpret_cast<float*>(memory + at.inbox)) {}

  // Without __syncthreads only the thread sees it.
  __device__ void begin() {
    for (int c = threadIdx.x; c < C; c += threads) {
      norm[c] = arg.norm_weight[c];
      norm[C + c] = arg.norm_bias[c];
    }
    constexpr int VECTORS = STRIDE / 8;
    for (int i = threadIdx.x; i < slot.count() * VECTORS; i += threads) {
      if (slot.outside(i / VECTORS, rank > 0, rank < blocks - 1)) {
        reinterpret_cast<uint4*>(slots)[i] = make_uint4(0, 0, 0, 0);
      }
    }
    for (int i = threadIdx.x; i < (rows + 2) * grid.columns * SUM_STRIDE; i += threads) sums[i] = 0;
  }

  __device__ T* own_cell() const { return map + warp * P * STRIDE; }
  __device__ const T* row_of_map(int row) const {
    return arg.x + (static_cast<int64_t>(image) * grid.rows + first + row) * HEIGHT * grid.columns * WIDTH * C;
  }

  // Calls f(where in the row of cells in global memory, where in shared memory) for each 16 bytes.
  template <typename F>
  __device__ void each_vector(F f) const {
    constexpr int VECTORS = C / 8;
    const int W = grid.columns * WIDTH;
    for (int i = threadIdx.x; i < HEIGHT * W * VECTORS; i += threads) {
      const int c = i % VECTORS * 8;
      const Place at = {i / VECTORS / W, i / VECTORS % W};
      f(i * 8, ((at.column / WIDTH) * P + inside_cell<HEIGHT, WIDTH>(at)) * STRIDE + c);
    }
  }

  __device__ void start_loading(int row) {
    const T* from = row_of_map(row);
    each_vector([&](int global, int shared) { copy(map + shared, from + global); });
    commit_copies();
  }

  __device__ void finish_loading() {
    wait_for_copies<0>();
    sync_block();
  }

  // Layer norm of the cell that the warp owns, in place; its mean becomes the first super token, here and in the slots
  // of the blocks beside. Four lanes have a pixel.
  template <bool MEAN>
  __device__ void normalise(int row) {
    constexpr int VECTORS = C / 32;
    float mean_of_cell[VECTORS][8] = {};
    for (int p = g; p < P; p += 8) {
      uint4* const at = reinterpret_cast<uint4*>(own_cell() + p * STRIDE) + t;
      float x[VECTORS][8];
      float sum = 0, squares = 0;
#pragma unroll
      for (int i = 0; i < VECTORS; i++) {
        const uint4 v = at[4 * i];
        unpack8(v, x[i]);
#pragma unroll
        for (int e = 0; e < 8; e++) sum += x[i][e];
      }
      const float mean = sum_quad(sum) / C;
#pragma unroll
      for (int i = 0; i < VECTORS; i++)
#pragma unroll
        for (int e = 0; e < 8; e++) squares += (x[i][e] - mean) * (x[i][e] - mean);
      const float rstd = rsqrtf(sum_quad(squares) / C + arg.eps);
#pragma unroll
      for (int i = 0; i < VECTORS; i++) {
        const int c = 32 * i + 8 * t;
#pragma unroll
        for (int e = 0; e < 8; e++) x[i][e] = (x[i][e] - mean) * rstd * norm[c + e] + norm[C + c + e];
        const uint4 v = pack8(x[i]);
        at[4 * i] = v;
        if (MEAN) {
          unpack8(v, x[i]);
#pragma unroll
          for (int e = 0; e < 8; e++) mean_of_cell[i][e] += x[i][e];
        }
      }
    }
    if (MEAN) {
#pragma unroll
      for (int i = 0; i < VECTORS; i++) {
#pragma unroll
        for (int e = 0; e < 8; e++) {
          float& m = mean_of_cell[i][e];
          for (int lanes = 4; lanes < 32; lanes *= 2) m += shuffle_xor(m, lanes);
          m /= P;
        }
        if (g == 0) put_into_slots({first + row, warp}, 32 * i + 8 * t, pack8(mean_of_cell[i]));
      }
    }
    sync_warp();
  }

  // Puts a part of a super token, from channel c on, into the slots of all blocks that see it.
  template <typename V>
  __device__ void put_into_slots(Place token, int c, V part) {
    const int owner = token.row / rows;
    for (int block = owner - 1; block <= owner + 1; block++) {
      const int row = token.row - block * rows;
      if (block >= 0 && block < blocks && row >= -1 && row <= rows) {
        T* const to = slots + slot.at({row, token.column}) * STRIDE + c;
        *reinterpret_cast<V*>(Cluster<MANY>::in(to, block)) = part;
      }
    }
  }

  // q of the cell that the warp owns, from its pixels and the super tokens in the slots.
  __device__ void associate(int row) {
    const Place cell = {row, warp};
    // Lanes 8 to 15 and 24 to 31 name tokens 8 to 15, the upper half of the lanes the second 8 of 16 channels.
    const T* const token = slots + slot.neighbour_at(cell, lane % 16) * STRIDE + lane / 16 * 8;
    uint32_t a[C / 16][4];
#pragma unroll
    for (int k = 0; k < C / 16; k++) load_matrices(a[k], token + 16 * k);

    const T* const pixel = own_cell() + (lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8;
    const float scale = rsqrtf(static_cast<float>(C));
#pragma unroll
    for (int p = 0; p < P / 8; p += 2) {
      float logits[2][4] = {};
#pragma unroll
      for (int k = 0; k < C / 16; k++) {
        uint32_t b[4];
        load_matrices(b, pixel + 8 * p * STRIDE + 16 * k);
        mma<T>(logits[0], a[k], {b[0], b[1]});
        mma<T>(logits[1], a[k], {b[2], b[3]});
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        // Of tokens 8 to 15 only the first exists: that of the lanes with g = 0.
        float e[4];
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const float low = logits[i][j] * scale, high = g == 0 ? logits[i][j + 2] * scale : -INFINITY;
          float largest = fmaxf(low, high);
          for (int lanes = 4; lanes < 32; lanes *= 2) largest = fmaxf(largest, shuffle_xor(largest, lanes));
          e[j] = __expf(low - largest), e[j + 2] = __expf(high - largest);
          float sum = e[j] + e[j + 2];
          for (int lanes = 4; lanes < 32; lanes *= 2) sum += shuffle_xor(sum, lanes);
          e[j] *= reciprocal(sum), e[j + 2] *= reciprocal(sum);
        }
        q[p + i][0] = pack<T>(e[0], e[1]);
        q[p + i][1] = pack<T>(e[2], e[3]);
      }
    }
  }

  __device__ T* q_of_cell(int row, int k) const {
    return arg.q + ((static_cast<int64_t>(image) * grid.rows + first + row) * grid.columns + warp) * NEIGHBOURS * P +
           k * P + 2 * t;
  }

  __device__ void store_q(int row) const {
#pragma unroll
    for (int p = 0; p < P / 8; p++) {
      *reinterpret_cast<uint32_t*>(q_of_cell(row, g) + 8 * p) = q[p][0];
      if (g == 0) *reinterpret_cast<uint32_t*>(q_of_cell(row, 8) + 8 * p) = q[p][1];
    }
  }

  __device__ void load_q(int row) {
#pragma unroll
    for (int p = 0; p < P / 8; p++) {
      q[p][0] = *reinterpret_cast<const uint32_t*>(q_of_cell(row, g) + 8 * p);
      q[p][1] = g == 0 ? *reinterpret_cast<const uint32_t*>(q_of_cell(row, 8) + 8 * p) : 0;
    }
  }

  // Adds what a row of cells has for its super tokens and for those above and below. Three cells add to one token: they
  // take turns, in the same order at each run.
  __device__ void aggregate(int row) {
    const T* const pixel = own_cell() + lane % 16 * STRIDE + lane / 16 * 8;
    float total[C / 8][4] = {}, mass[2] = {};
#pragma unroll
    for (int p = 0; p < P / 16; p++) {
      const uint32_t a[4] = {q[2 * p][0], q[2 * p][1], q[2 * p + 1][0], q[2 * p + 1][1]};
#pragma unroll
      for (int n = 0; n < C / 8; n += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, pixel + 16 * p * STRIDE + 8 * n);
        mma<T>(total[n], a, {b[0], b[1]});
        mma<T>(total[n + 1], a, {b[2], b[3]});
      }
#pragma unroll
      for (int i = 0; i < 4; i++) mass[i % 2] += unpack<T>(a[i]).x + unpack<T>(a[i]).y;
    }
    mass[0] = sum_quad(mass[0]), mass[1] = sum_quad(mass[1]);
    for (int turn = 0; turn < 3; turn++) {
      sync_block();
      if (g % 3 == turn) add_to_sums(neighbour({row, warp}, g), total, mass[0], 0);
      if (g == 0 && turn == 2) add_to_sums(neighbour({row, warp}, 8), total, mass[1], 2);
    }
  }

  __device__ void add_to_sums(Place token, const float (&total)[C / 8][4], float mass, int half) {
    if (token.column < 0 || token.column >= grid.columns) return;
    float* const to = sums + ((token.row + 1) * grid.columns + token.column) * SUM_STRIDE;
#pragma unroll
    for (int n = 0; n < C / 8; n++) {
      to[8 * n + 2 * t] += half ? total[n][2] : total[n][0];
      to[8 * n + 2 * t + 1] += half ? total[n][3] : total[n][1];
    }
    if (t == 0) to[C] += mass;
  }

  // Sums for super tokens that other blocks own.
  __device__ void send_sums() {
    const int vectors = grid.columns * SUM_STRIDE / 4;
    float4* const from = reinterpret_cast<float4*>(sums);
    for (int i = threadIdx.x; i < vectors; i += threads) {
      float4* const to = reinterpret_cast<float4*>(inbox) + i;
      if (rank > 0) Cluster<MANY>::in(to, rank - 1)[vectors] = from[i];
      if (rank < blocks - 1) Cluster<MANY>::in(to, rank + 1)[0] = from[i + (rows + 1) * vectors];
    }
  }

  // The super tokens, in all blocks.
  __device__ void make_tokens() {
    constexpr int VECTORS = C / 8;
    const int own = rows * grid.columns;
    for (int i = threadIdx.x; i < own * VECTORS; i += threads) {
      const int c = i % VECTORS * 8, token = i / VECTORS;
      const Place at = {token / grid.columns, token % grid.columns};
      const float* const sum = sums + (token + grid.columns) * SUM_STRIDE;
      const float* const above = inbox + at.column * SUM_STRIDE;
      const float* const below = above + grid.columns * SUM_STRIDE;
      const bool has_above = rank > 0 && at.row == 0, has_below = rank < blocks - 1 && at.row == rows - 1;
      const float mass = sum[C] + (has_above ? above[C] : 0) + (has_below ? below[C] : 0);
      float s[8];
#pragma unroll
      for (int e = 0; e < 8; e++) {
        const float total = sum[c + e] + (has_above ? above[c + e] : 0) + (has_below ? below[c + e] : 0);
        s[e] = total / (mass + 1e-12f);
      }
      const uint4 v = pack8(s);
      const int number = grid.token({first, 0}) + token;
      for (int block = 0; block < blocks; block++) {
        *reinterpret_cast<uint4*>(Cluster<MANY>::in(tokens + number * STRIDE + c, block)) = v;
      }
      const int64_t in_batch = static_cast<int64_t>(image) * grid.rows * grid.columns + number;
      if (arg.s) *reinterpret_cast<uint4*>(arg.s + in_batch * C + c) = v;
      if (arg.mass && c == 0) arg.mass[in_batch] = mass;
    }
    clear_beyond(tokens);
  }

  // Zero to the rows of a tile that stand for no token.
  __device__ void clear_beyond(T* rows_of) const {
    const int beyond = grid.rows * grid.columns * STRIDE / 8;
    for (int i = beyond + threadIdx.x; i < MOST_TOKENS * STRIDE / 8; i += threads) {
      reinterpret_cast<uint4*>(rows_of)[i] = make_uint4(0, 0, 0, 0);
    }
  }

  // 8 outputs of a linear layer for all super tokens in `tokens`: f(token, their value, their neighbour's). A lane takes
  // 8 channels in a row from weights and tokens alike, which permutes the products' sum over channels.
  template <typename F>
  __device__ void linear(const T* weight, int output, F f) const {
    const int count = grid.rows * grid.columns;
    float result[MOST_TOKENS / 16][4] = {};
#pragma unroll
    for (int k = 0; k < C / 32; k++) {
      const int c = 32 * k + 8 * t;
      const uint4 b = *reinterpret_cast<const uint4*>(weight + (output + g) * C + c);
#pragma unroll
      for (int m = 0; m < MOST_TOKENS / 16; m++) {
        if (16 * m < count) {
          const uint4 low = *reinterpret_cast<const uint4*>(tokens + (16 * m + g) * STRIDE + c);
          const uint4 high = *reinterpret_cast<const uint4*>(tokens + (16 * m + 8 + g) * STRIDE + c);
          mma<T>(result[m], {low.x, high.x, low.y, high.y}, {b.x, b.y});
          mma<T>(result[m], {low.z, high.z, low.w, high.w}, {b.z, b.w});
        }
      }
    }
#pragma unroll
    for (int m = 0; m < MOST_TOKENS / 16; m++) {
      const int token = 16 * m + g;
      if (token < count) f(token, result[m][0], result[m][1]);
      if (token + 8 < count) f(token + 8, result[m][2], result[m][3]);
    }
  }

  // Queries, to the block that owns the super token; keys and values, to all. The warps of the cluster share the work.
  __device__ void make_queries_keys_values() {
    clear_beyond(values);
    const int own = rows * grid.columns;
    for (int tile = rank * grid.columns + warp; tile < 3 * C / 8; tile += blocks * grid.columns) {
      // Outputs come head by head, in each the queries, then the keys, then the values.
      const int output = 8 * tile, head = output / (3 * D), part = output % (3 * D) / D;
      const int c = head * D + output % D + 2 * t;
      const float bias[2] = {arg.qkv_bias[output + 2 * t], arg.qkv_bias[output + 2 * t + 1]};
      linear(arg.qkv_weight, output, [&](int token, float first, float second) {
        const uint32_t v = pack<T>(first + bias[0], second + bias[1]);
        if (part == 0) {
          *reinterpret_cast<uint32_t*>(Cluster<MANY>::in(queries + token % own * STRIDE + c, token / own)) = v;
        } else {
          T* const to = (part == 1 ? keys : values) + token * STRIDE + c;
          for (int block = 0; block < blocks; block++) *reinterpret_cast<uint32_t*>(Cluster<MANY>::in(to, block)) = v;
        }
      });
    }
  }

  // Attention of the super tokens that the block owns to all; the result replaces the super tokens, in all blocks.
  __device__ void attend() {
    const int own = rows * grid.columns, count = grid.rows * grid.columns, tiles = (own + 15) / 16;
    for (int task = warp; task < HEADS * tiles; task += grid.columns) {
      const int head = task % HEADS, m = task / HEADS;
      const T* const query = queries + (16 * m + lane % 16) * STRIDE + head * D + lane / 16 * 8;
      const T* const key = keys + (lane / 16 * 8 + lane % 8) * STRIDE + head * D + lane / 8 % 2 * 8;
      const T* const value = values + lane % 16 * STRIDE + head * D + lane / 16 * 8;
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
      float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {};
      const float scale = rsqrtf(static_cast<float>(D));
#pragma unroll
      for (int n = 0; n < MOST_TOKENS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          weight[n][i] = 8 * n + 2 * t + i % 2 < count ? weight[n][i] * scale : -INFINITY;
          largest[i / 2] = fmaxf(largest[i / 2], weight[n][i]);
        }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        for (int lanes = 1; lanes < 4; lanes *= 2) largest[i] = fmaxf(largest[i], shuffle_xor(largest[i], lanes));
      }
#pragma unroll
      for (int n = 0; n < MOST_TOKENS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          weight[n][i] = __expf(weight[n][i] - largest[i / 2]);
          sum[i / 2] += weight[n][i];
        }
      sum[0] = sum_quad(sum[0]), sum[1] = sum_quad(sum[1]);

      float result[D / 8][4] = {};
#pragma unroll
      for (int k = 0; k < MOST_TOKENS / 16; k++) {
        const float(&low)[4] = weight[2 * k], (&high)[4] = weight[2 * k + 1];
        const uint32_t a[4] = {pack<T>(low[0], low[1]), pack<T>(low[2], low[3]), pack<T>(high[0], high[1]),
                               pack<T>(high[2], high[3])};
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
          uint32_t b[4];
          load_matrices_transposed(b, value + 16 * k * STRIDE + 8 * n);
          mma<T>(result[n], a, {b[0], b[1]});
          mma<T>(result[n + 1], a, {b[2], b[3]});
        }
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int token = 16 * m + 8 * i + g;
        if (token >= own) continue;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
          const uint32_t v = pack<T>(result[n][2 * i] / sum[i], result[n][2 * i + 1] / sum[i]);
          T* const to = tokens + (grid.token({first, 0}) + token) * STRIDE + head * D + 8 * n + 2 * t;
          for (int block = 0; block < blocks; block++) *reinterpret_cast<uint32_t*>(Cluster<MANY>::in(to, block)) = v;
        }
      }
    }
  }

  // The output projection, into the slots.
  __device__ void project() {
    for (int tile = rank * grid.columns + warp; tile < C / 8; tile += blocks * grid.columns) {
      const int c = 8 * tile + 2 * t;
      float bias[2] = {arg.proj_bias[c], arg.proj_bias[c + 1]}, scale[2] = {1, 1};
      if (arg.scale) {
        const float* const factors = arg.scale + static_cast<int64_t>(image) * C + c;
        scale[0] = factors[0], scale[1] = factors[1];
      }
      linear(arg.proj_weight, 8 * tile, [&](int token, float first, float second) {
        const uint32_t v = pack<T>((first + bias[0]) * scale[0], (second + bias[1]) * scale[1]);
        put_into_slots(grid.cell(token), c, v);
      });
    }
  }

  // What the pixels of the warp's cell get from their super tokens, in the place of the pixels.
  __device__ void spread(int row) {
    const T* const token = slots + slot.neighbour_at({row, warp}, lane % 16) * STRIDE + lane / 16 * 8;
#pragma unroll
    for (int p = 0; p < P / 16; p++) {
      const uint32_t a[4] = {transpose(q[2 * p][0]), transpose(q[2 * p + 1][0]), transpose(q[2 * p][1]),
                             transpose(q[2 * p + 1][1])};
      T* const pixel = own_cell() + (16 * p + g) * STRIDE + 2 * t;
#pragma unroll
      for (int n = 0; n < C / 8; n += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, token + 8 * n);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float y[4] = {};
          mma<T>(y, a, {b[2 * i], b[2 * i + 1]});
          *reinterpret_cast<uint32_t*>(pixel + 8 * (n + i)) = pack<T>(y[0], y[1]);
          *reinterpret_cast<uint32_t*>(pixel + 8 * STRIDE + 8 * (n + i)) = pack<T>(y[2], y[3]);
        }
      }
    }
  }

  __device__ void add_to_map(int row) {
    const T* const x = row_of_map(row);
    T* const y = arg.y + (x - arg.x);
    each_vector([&](int global, int shared) {
      float a[8], b[8];
      unpack8(*reinterpret_cast<const uint4*>(x + global), a);
      unpack8(*reinterpret_cast<const uint4*>(map + shared), b);
#pragma unroll
      for (int e = 0; e < 8; e++) a[e] += b[e];
      *reinterpret_cast<uint4*>(y + global) = pack8(a);
    });
  }

  __device__ void run() {
    begin();
    if (MANY) {
      start_loading(0);
      Cluster<MANY>::sync();  // no block may reach into one that has not begun
      finish_loading();
      normalise<true>(0);
      Cluster<MANY>::sync();  // the slots hold the first super tokens
      associate(0);
      if (arg.q) store_q(0);
      aggregate(0);
    } else {
      for (int row = 0; row < rows; row++) {
        start_loading(row);
        finish_loading();
        normalise<true>(row);
        sync_block();
      }
      for (int row = 0; row < rows; row++) {
        start_loading(row);
        finish_loading();
        normalise<false>(row);
        associate(row);
        store_q(row);
        aggregate(row);
        sync_block();
      }
    }
    sync_block();
    if (MANY) {
      send_sums();
      Cluster<MANY>::sync();  // all sums have arrived
    }
    make_tokens();
    Cluster<MANY>::sync();  // the super tokens are everywhere, and the sums of no use
    make_queries_keys_values();
    Cluster<MANY>::sync();  // they are everywhere, and the super tokens of no use
    attend();
    Cluster<MANY>::sync();  // its results are everywhere
    project();
    Cluster<MANY>::sync();  // the slots hold the super tokens for spreading; from here on each block is alone
    for (int row = 0; row < rows; row++) {
      if (!MANY) load_q(row);
      spread(row);
      sync_block();
      add_to_map(row);
      if (!MANY) sync_block();
    }
  }

  static __device__ float sum_quad(float v) {
    v += shuffle_xor(v, 1);
    return v + shuffle_xor(v, 2);
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
__global__ void __launch_bounds__(32 * MOST_COLUMNS, 1) super_token_attention(const AttentionArguments<T> arg) {
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
