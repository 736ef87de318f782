// What svit/ops/csrc/warp.h declares, for a CPU: kernels that include <warp.h> run here lane by lane.
//
// Every lane is a context of its own. It runs until it meets something that lanes do together (a product, a barrier), and
// goes on when all have come. Shared memory begins as NaN; copies arrive when they are waited for, not before; lanes can
// be run in any order. The layouts are those of the PTX ISA. Linked with races.cpp, it fails at the first race on shared
// memory; tests take barriers out one by one to see that.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <set>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#undef __global__
#undef __launch_bounds__
#define __global__
#define __launch_bounds__(...)

namespace emulator {

struct Group {  // of lanes that meet: a warp, a block, a cluster
  const char* what = nullptr;
  int size = 0, come = 0, meeting = 0;
  std::vector<void*> brought;
};

struct Copy {
  void* to;
  const void* from;
};

struct Lane {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int block, thread;
  bool done = false;
  int warp_syncs = 0, block_syncs = 0, cluster_syncs = 0;  // barriers passed
  Group* waits = nullptr;  // for a meeting after this one
  int meeting = 0;
  std::vector<std::vector<Copy>> copies = {{}};  // by commit
};

struct Machine {
  int blocks, threads, bytes;
  std::vector<std::vector<char>> memory;  // shared, by block
  std::vector<Group> warps, block_groups;
  Group cluster;
  std::vector<Lane> lanes;
  Lane* now = nullptr;
  ucontext_t scheduler;
  std::function<void()> kernel;
  int first_block = 0;
  int last_reach = -1;  // the most barriers of the cluster that a lane had passed as it reached into another block
  std::string error;
};

struct Watcher {  // of shared memory: races.cpp has one
  virtual void start(const Machine&) = 0;
  virtual void copy_starts(const void* to) = 0;  // of 16 bytes
  virtual void copy_ends(const void* to) = 0;
};

inline Watcher* watcher = nullptr;
inline Machine* machine = nullptr;
struct Running {
  explicit Running(Machine& m) { machine = &m; }
  ~Running() { machine = nullptr; }
};
inline uint3 threadIdx, blockIdx;

inline void fail(const std::string& message) {
  // An exception cannot leave a context: the scheduler raises it.
  if (machine->error.empty()) machine->error = message;
  swapcontext(&machine->now->context, &machine->scheduler);
}

// Barriers that lanes have come to, as "conv_ffn.cuh:42", and the one that they pass by as if it was not there.
inline std::set<std::string> barriers;
inline std::string without;

inline bool passes_by(const std::source_location& barrier) {
  const std::string path = barrier.file_name();
  const std::string name = path.substr(path.rfind('/') + 1) + ":" + std::to_string(barrier.line());
  barriers.insert(name);
  return name == without;
}

// Waits for the whole group; the last to come calls `act` with what each brought.
template <typename T, typename F>
void meet(Group& group, const char* what, int index, T& brings, F act) {
  Machine& m = *machine;
  if (group.come == 0) {
    group.what = what;
  } else if (group.what != what) {
    fail(std::string("lanes part: ") + group.what + " and " + what);
  }
  group.brought[index] = &brings;
  if (++group.come == group.size) {
    act(reinterpret_cast<T* const*>(group.brought.data()));
    group.come = 0;
    group.meeting++;
  } else {
    m.now->waits = &group;
    m.now->meeting = group.meeting;
    swapcontext(&m.now->context, &m.scheduler);
  }
}

template <typename T, typename F>
void meet_in_warp(const char* what, T& brings, F act) {
  const Lane& lane = *machine->now;
  meet(machine->warps[(lane.block * machine->threads + lane.thread) / 32], what, lane.thread % 32, brings, act);
}

inline void start() {
  machine->kernel();
  machine->now->done = true;
  swapcontext(&machine->now->context, &machine->scheduler);
}

// Runs `blocks` blocks, `cluster` of them together. `order`: 0 lanes by number, 1 backwards, others shuffled by it.
inline void run(std::function<void()> kernel, int blocks, int threads, int bytes, int cluster, int order) {
  constexpr int GUARD = 64;
  for (int first = 0; first < blocks; first += cluster) {
    Machine m;
    const Running running(m);
    m.blocks = cluster, m.threads = threads, m.bytes = bytes, m.first_block = first, m.kernel = kernel;
    m.memory.assign(cluster, std::vector<char>(bytes + GUARD, '\xff'));
    if (watcher) watcher->start(m);
    const auto group = [](int size) {
      Group g;
      g.size = size;
      g.brought.resize(size);
      return g;
    };
    m.warps.assign(cluster * threads / 32, group(32));
    m.block_groups.assign(cluster, group(threads));
    m.cluster = group(cluster * threads);
    m.lanes.resize(cluster * threads);
    std::vector<Lane*> turns;
    for (int i = 0; i < cluster * threads; i++) {
      Lane& lane = m.lanes[i];
      constexpr int STACK = 1 << 16;
      lane.stack.reset(new char[STACK]);
      lane.block = i / threads, lane.thread = i % threads;
      getcontext(&lane.context);
      lane.context.uc_stack.ss_sp = lane.stack.get();
      lane.context.uc_stack.ss_size = STACK;
      makecontext(&lane.context, start, 0);
      turns.push_back(&lane);
    }
    if (order == 1) std::reverse(turns.begin(), turns.end());
    if (order > 1) std::shuffle(turns.begin(), turns.end(), std::mt19937(order));
    for (bool left = true; left;) {
      left = false;
      bool moved = false;
      for (Lane* lane : turns) {
        if (lane->done) continue;
        left = true;
        if (lane->waits && lane->waits->meeting == lane->meeting) continue;
        lane->waits = nullptr;
        moved = true;
        m.now = lane;
        threadIdx = {static_cast<unsigned>(lane->thread), 0, 0};
        blockIdx = {static_cast<unsigned>(first + lane->block), 0, 0};
        swapcontext(&m.scheduler, &lane->context);
        m.now = nullptr;
        if (!m.error.empty()) throw std::runtime_error(m.error);
      }
      if (left && !moved) throw std::runtime_error("all lanes wait");
    }
    if (m.last_reach == m.lanes[0].cluster_syncs) throw std::runtime_error("reached into a block that may have ended");
    for (const auto& memory : m.memory) {
      for (int i = bytes; i < bytes + GUARD; i++) {
        if (memory[i] != '\xff') throw std::runtime_error("written beyond shared memory");
      }
    }
  }
}

}  // namespace emulator

namespace svit {

using emulator::blockIdx;
using emulator::threadIdx;
using std::max;
using std::min;
using bf16 = __nv_bfloat16;
using fp16 = __half;

inline char* shared_memory() { return emulator::machine->memory[emulator::machine->now->block].data(); }

template <typename T>
float value(uint32_t both, int which) {
  T half;
  const uint16_t bits = static_cast<uint16_t>(both >> (16 * which));
  std::memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}

template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    float* d;
    const uint32_t *a, *b;
  } mine = {d, a, b};
  emulator::meet_in_warp("mma", mine, [](Operands* const* all) {
    float A[16][16], B[16][8];
    for (int lane = 0; lane < 32; lane++) {
      const int g = lane / 4, t = lane % 4;
      for (int e = 0; e < 2; e++) {
        for (int i = 0; i < 4; i++) A[g + i % 2 * 8][2 * t + e + i / 2 * 8] = value<T>(all[lane]->a[i], e);
        for (int i = 0; i < 2; i++) B[2 * t + e + i * 8][g] = value<T>(all[lane]->b[i], e);
      }
    }
    for (int lane = 0; lane < 32; lane++) {
      for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
        float sum = all[lane]->d[i];
        for (int k = 0; k < 16; k++) sum += A[row][k] * B[k][column];
        all[lane]->d[i] = sum;
      }
    }
  });
}

struct MatrixLoad {
  uint32_t* r;
  uint4 row;  // as 8 values of 16 bits
  uint32_t value(int i) const { return (&row.x)[i / 2] >> (16 * (i % 2)) & 0xffff; }
};

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  MatrixLoad mine = {r, *static_cast<const uint4*>(row)};
  emulator::meet_in_warp("load_matrices", mine, [](MatrixLoad* const* all) {
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) all[lane]->r[i] = (&all[8 * i + lane / 4]->row.x)[lane % 4];
  });
}

inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  MatrixLoad mine = {r, *static_cast<const uint4*>(row)};
  emulator::meet_in_warp("load_matrices_transposed", mine, [](MatrixLoad* const* all) {
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        const MatrixLoad *const low = all[8 * i + 2 * (lane % 4)], *const high = all[8 * i + 2 * (lane % 4) + 1];
        all[lane]->r[i] = low->value(lane / 4) | high->value(lane / 4) << 16;
      }
  });
}

inline uint32_t transpose(uint32_t r) {
  struct Value {
    uint32_t from, to;
  } mine = {r, 0};
  emulator::meet_in_warp("transpose", mine, [](Value* const* all) {
    const auto element = [&](int row, int column) { return all[4 * row + column / 2]->from >> (16 * (column % 2)) & 0xffff; };
    for (int lane = 0; lane < 32; lane++) {
      const int row = lane / 4, column = 2 * (lane % 4);
      all[lane]->to = element(column, row) | element(column + 1, row) << 16;
    }
  });
  return mine.to;
}

inline float shuffle_xor(float v, int lanes) {
  struct Value {
    float from, to;
    int lanes;
  } mine = {v, 0, lanes};
  emulator::meet_in_warp("shuffle_xor", mine, [](Value* const* all) {
    for (int lane = 0; lane < 32; lane++) all[lane]->to = all[lane ^ all[lane]->lanes]->from;
  });
  return mine.to;
}

// Barriers. `at`: where in the kernels they stand.
inline void sync_warp(std::source_location at = std::source_location::current()) {
  if (emulator::passes_by(at)) return;
  int nothing = 0;
  emulator::meet_in_warp("sync_warp", nothing, [](int* const*) {});
  emulator::machine->now->warp_syncs++;
}

inline void sync_block(std::source_location at = std::source_location::current()) {
  if (emulator::passes_by(at)) return;
  int nothing = 0;
  emulator::Lane& lane = *emulator::machine->now;
  emulator::meet(emulator::machine->block_groups[lane.block], "sync_block", lane.thread, nothing, [](int* const*) {});
  lane.block_syncs++;
}

inline void copy(void* to_shared, const void* from) {
  emulator::machine->now->copies.back().push_back({to_shared, from});
  if (emulator::watcher) emulator::watcher->copy_starts(to_shared);
}
inline void commit_copies() { emulator::machine->now->copies.emplace_back(); }
template <int AHEAD>
void wait_for_copies(std::source_location at = std::source_location::current()) {
  if (emulator::passes_by(at)) return;
  auto& copies = emulator::machine->now->copies;
  for (std::size_t i = 0; i + 1 + AHEAD < copies.size(); i++) {
    for (const emulator::Copy& c : copies[i]) {
      if (emulator::watcher) emulator::watcher->copy_ends(c.to);
      *static_cast<uint4*>(c.to) = *static_cast<const uint4*>(c.from);
    }
    copies[i].clear();
  }
}

inline void stop() { emulator::fail("stopped"); }
inline void hold_loads() {}
inline char* opaque(char* shared) { return shared; }
inline int opaque(int number) { return number; }
constexpr float LOG2_E = 1.44269504f;
inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1 / x; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }

template <bool MANY>
struct Cluster {
  static int rank() { return MANY ? emulator::machine->now->block : 0; }
  static int size() { return MANY ? emulator::machine->blocks : 1; }
  static void sync(std::source_location at = std::source_location::current()) {
    if (!MANY) return sync_block(at);
    if (emulator::passes_by(at)) return;
    int nothing = 0;
    emulator::Machine& m = *emulator::machine;
    emulator::Lane& lane = *m.now;
    emulator::meet(m.cluster, "Cluster::sync", lane.block * m.threads + lane.thread, nothing, [](int* const*) {});
    lane.cluster_syncs++;
  }
  template <typename P>
  static P* in(P* p, int rank) {
    if (!MANY) return p;
    emulator::Machine& m = *emulator::machine;
    const auto offset = reinterpret_cast<char*>(p) - m.memory[m.now->block].data();
    if (rank < 0 || rank >= m.blocks || offset < 0 || offset >= m.bytes) emulator::fail("not in a block's shared memory");
    if (rank != m.now->block) {
      if (m.now->cluster_syncs == 0) emulator::fail("reached into a block that may not have begun");
      m.last_reach = std::max(m.last_reach, m.now->cluster_syncs);
    }
    return reinterpret_cast<P*>(m.memory[rank].data() + offset);
  }
};

template <typename T>
uint32_t pack(float first, float second) {
  const T both[2] = {static_cast<T>(first), static_cast<T>(second)};
  uint32_t bits;
  std::memcpy(&bits, both, 4);
  return bits;
}

template <typename T>
float2 unpack(uint32_t both) {
  return {value<T>(both, 0), value<T>(both, 1)};
}

template <typename T>
uint32_t add(uint32_t a, uint32_t b) {
  const float2 x = unpack<T>(a), y = unpack<T>(b);
  return pack<T>(x.x + y.x, x.y + y.y);
}

template <typename T>
struct Parameters {
  const void* values;
  bool wide;

  float operator[](int i) const {
    return wide ? static_cast<const float*>(values)[i] : static_cast<float>(static_cast<const T*>(values)[i]);
  }
  float2 pair(int i) const { return {(*this)[i], (*this)[i + 1]}; }
};

}  // namespace svit
