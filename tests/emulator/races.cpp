// See races.hpp. Compiled by itself, optimised and not instrumented.
#include "races.hpp"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <map>
#include <unordered_map>
#include <vector>

namespace {

typedef std::vector<uint32_t> Clock;  // of every thread, and of every barrier's copies, what is known
struct Access { uint32_t who, when; };
struct Cell {  // two bytes
  Access write = {0, 0};
  std::vector<Access> reads;  // since then
};
const int COPIERS = 16;  // barriers of a block that copies report to

int threads, blocks, me = -1, copiers;
long bytes;
std::vector<char*> bases;
std::vector<Clock> clocks;
std::vector<uint32_t> published;
std::vector<std::vector<Cell>> cells;
std::unordered_map<const void*, Clock> kept;
std::unordered_map<const void*, int> copier_of;
std::map<long, Clock> sent;
std::vector<uint32_t> copies;  // of every copier
long numbers = 0;
char report[200];
bool reported = false;

void join(Clock& into, const Clock& from) {
  if (from.empty()) return;
  if (into.empty()) into.assign(from.size(), 0);
  uint32_t* a = into.data();
  const uint32_t* b = from.data();
  for (size_t n = 0; n < from.size(); ++n) a[n] = std::max(a[n], b[n]);
}

int block_of(const void* p) {
  for (int n = 0; n < blocks; ++n) {
    const long offset = static_cast<const char*>(p) - bases[n];
    if (offset >= 0 && offset < bytes) return n;
  }
  return -1;
}

bool before(const Access& a) { return a.when <= clocks[me][a.who]; }

void tell(const char* what, const Access& other, int block, long offset) {
  if (reported) return;
  reported = true;
  snprintf(report, sizeof report, "byte %ld of block %d: thread %d %s %s %u", offset, block, me, what,
           (int)other.who < threads * blocks ? "thread" : "the copies of barrier", other.who);
}

void look(const void* p, long size, bool writes, uint32_t who, uint32_t when) {
  const int block = block_of(p);
  if (block < 0) return;
  const long offset = static_cast<const char*>(p) - bases[block];
  for (long n = offset / 2; n <= (offset + size - 1) / 2; ++n) {
    Cell& cell = cells[block][n];
    if (!before(cell.write)) tell(writes ? "overwrites what was just written by" : "reads what was just written by", cell.write, block, 2 * n);
    if (writes) {
      for (const Access& a : cell.reads)
        if (a.who != (uint32_t)me && !before(a)) tell("overwrites what is read by", a, block, 2 * n);
      cell.reads.clear();
      cell.write = {who, when};
    } else {
      auto at = std::find_if(cell.reads.begin(), cell.reads.end(), [&](const Access& a) { return a.who == who; });
      if (at == cell.reads.end()) cell.reads.push_back({who, when});
      else at->when = when;
    }
  }
}
void look(const void* p, long size, bool writes) {
  if (me >= 0) look(p, size, writes, me, clocks[me][me]);
}

}  // namespace

namespace races {

void begin(int blocks_, int threads_, char* const* bases_, long bytes_) {
  blocks = blocks_, threads = threads_, bytes = bytes_, bases.assign(bases_, bases_ + blocks), me = -1, copiers = 0;
  const size_t all = (size_t)blocks * threads;
  clocks.assign(all, Clock(all + (size_t)blocks * COPIERS, 0));
  for (size_t n = 0; n < all; ++n) clocks[n][n] = 1;
  published.assign(all, 0), copies.assign((size_t)blocks * COPIERS, 0);
  cells.assign(blocks, std::vector<Cell>(bytes / 2 + 1));
  kept.clear(), copier_of.clear(), sent.clear(), reported = false;
}
void run_as(int who) { me = who; }

void forget(const void* key) { kept.erase(key); }
void release(const void* key) { join(kept[key], clocks[me]), ++clocks[me][me]; }
void acquire(const void* key) {
  const auto at = kept.find(key);
  if (at != kept.end()) join(clocks[me], at->second);
}
void pass_on(const void* from, const void* to) {
  const auto at = kept.find(from);
  if (at == kept.end()) return;
  const Clock clock = std::move(at->second);
  kept.erase(at);
  join(kept[to], clock);
}

void read(const void* from, long size) { look(from, size, false); }
void write(const void* to, long size) { look(to, size, true); }

long send(const void* to, long size, const void* barrier) {
  const auto at = copier_of.try_emplace(barrier, copiers).first;
  if (at->second == copiers) ++copiers;
  const uint32_t who = (uint32_t)(blocks * threads + at->second), when = ++copies.at(at->second);
  look(to, size, true, who, when);
  Clock& clock = sent[++numbers] = clocks[me];
  clock[who] = when;
  ++clocks[me][me];
  return numbers;
}
void arrive(long copy, const void* key) {
  join(kept[key], sent.at(copy));
  sent.erase(copy);
}

void read_by_accelerator(const void* from, long size) {
  const int block = block_of(from);
  if (block < 0) return;
  const long offset = static_cast<const char*>(from) - bases[block];
  for (long n = offset / 2; n <= (offset + size - 1) / 2; ++n) {
    const Access& a = cells[block][n].write;
    if ((int)a.who < blocks * threads && a.when > published[a.who]) tell("stores what was not published by", a, block, 2 * n);
  }
  look(from, size, false);
}
void publish() { published[me] = clocks[me][me]++; }

const char* found() { return reported ? report : nullptr; }

}  // namespace races

// What -fsanitize=thread calls.
#define ACCESS(size)                                                              \
  extern "C" void __tsan_read##size(void* p) { look(p, size, false); }            \
  extern "C" void __tsan_write##size(void* p) { look(p, size, true); }            \
  extern "C" void __tsan_unaligned_read##size(void* p) { look(p, size, false); }  \
  extern "C" void __tsan_unaligned_write##size(void* p) { look(p, size, true); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
extern "C" void __tsan_read_range(void* p, long size) { look(p, size, false); }
extern "C" void __tsan_write_range(void* p, long size) { look(p, size, true); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
