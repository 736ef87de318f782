// Finds races on shared memory. Code that is compiled with -fsanitize=thread calls a __tsan_ function at each load and
// store; linked with this file, and not with ThreadSanitizer, it calls these.
//
// Of two accesses by different lanes, one of them a write, the barriers that the lanes had passed tell whether a barrier
// of both stands between. The order in which lanes run here does not matter, nor whether the results would differ.
// Products, matrix loads and shuffles are no barriers: they order no memory.
#include <warp.h>

#include <algorithm>
#include <cstdio>

namespace {

using emulator::machine;

struct Access {
  int lane, warp, block;  // numbers in the cluster
  int warp_syncs, block_syncs, cluster_syncs;
};

bool ordered(const Access& a, const Access& b) {
  return a.lane == b.lane || a.cluster_syncs != b.cluster_syncs ||
         (a.block == b.block && a.block_syncs != b.block_syncs) ||
         (a.warp == b.warp && a.warp_syncs != b.warp_syncs);
}

struct Cell {  // two bytes of shared memory
  bool written = false, copy_arrives = false;
  Access write;
  int reads = 0;  // since the write, none of them before another
  Access read[4];

  // Whether whoever races with `access` races with a read that is noted.
  bool covers(const Access& access) const {
    for (int j = 0; j < reads; j++) {
      for (int i = 0; i < j; i++) {
        if (read[i].block != read[j].block) return true;
        if (read[i].block != access.block) continue;
        if (read[i].warp != read[j].warp || read[i].warp == access.warp) return true;
      }
    }
    return false;
  }
};

class Races : public emulator::Watcher {
 public:
  Races() { emulator::watcher = this; }

  void start(const emulator::Machine& m) override {
    cells_of_block = (m.bytes + 1) / 2;
    cells.assign(m.blocks * cells_of_block, {});
  }

  void copy_starts(const void* to) override {
    note(to, 16, true);
    each_cell(to, 16, [](Cell& cell) { cell.copy_arrives = true; });
  }

  void copy_ends(const void* to) override {
    each_cell(to, 16, [](Cell& cell) { cell.copy_arrives = false; });
  }

  void note(const void* address, int size, bool write) {
    if (!machine || !machine->now) return;
    each_cell(address, size, [&](Cell& cell) {
      const emulator::Lane& lane = *machine->now;
      const int number = lane.block * machine->threads + lane.thread;
      const Access now = {number, number / 32, lane.block, lane.warp_syncs, lane.block_syncs, lane.cluster_syncs};
      if (cell.copy_arrives) fail(cell, "copy", cell.write, write ? "write" : "read", now);
      if (cell.written && !ordered(cell.write, now)) fail(cell, "write", cell.write, write ? "write" : "read", now);
      if (write) {
        for (int i = 0; i < cell.reads; i++) {
          if (!ordered(cell.read[i], now)) fail(cell, "read", cell.read[i], "write", now);
        }
        cell.written = true, cell.write = now, cell.reads = 0;
      } else {
        const auto before = [&](const Access& earlier) { return ordered(earlier, now); };
        cell.reads = std::remove_if(cell.read, cell.read + cell.reads, before) - cell.read;
        if (!cell.covers(now)) cell.read[cell.reads++] = now;
      }
    });
  }

 private:
  std::vector<Cell> cells;  // by block, by place in its shared memory
  int cells_of_block = 0;

  template <typename F>
  void each_cell(const void* address, int size, F f) {
    for (int block = 0; block < machine->blocks; block++) {
      const auto offset = static_cast<const char*>(address) - machine->memory[block].data();
      if (offset < 0 || offset >= machine->bytes) continue;
      for (auto i = offset / 2; i < (offset + size + 1) / 2 && i < cells_of_block; i++) {
        f(cells[block * cells_of_block + i]);
      }
      return;
    }
  }

  void fail(const Cell& cell, const char* first, const Access& a, const char* second, const Access& b) {
    const auto i = &cell - cells.data();
    char text[200];
    std::snprintf(text, sizeof text,
                  "race at byte %d of block %d: %s by thread %d of block %d, %s by thread %d of block %d",
                  static_cast<int>(i % cells_of_block * 2), static_cast<int>(i / cells_of_block), first,
                  a.lane % machine->threads, a.block, second, b.lane % machine->threads, b.block);
    emulator::fail(text);
  }
};

Races races;

}  // namespace

extern "C" {
#define ACCESS(size)                                                                  \
  void __tsan_read##size(void* p) { races.note(p, size, false); }                     \
  void __tsan_write##size(void* p) { races.note(p, size, true); }                     \
  void __tsan_unaligned_read##size(void* p) { races.note(p, size, false); }           \
  void __tsan_unaligned_write##size(void* p) { races.note(p, size, true); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* p, long size) { races.note(p, static_cast<int>(size), false); }
void __tsan_write_range(void* p, long size) { races.note(p, static_cast<int>(size), true); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
