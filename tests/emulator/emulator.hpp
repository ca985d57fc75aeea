// Runs the kernels on the processor: every thread of a cluster is a fiber, and a scheduler lets the warps run in
// random order. Asynchronous copies arrive as late as they may, their targets are poisoned until then; other blocks'
// floats, and what the tensor memory accelerator copies, arrive after a random delay. What it stores leaves when it is
// waited for. Only the logic is checked, not the memory model of a GPU; races.hpp checks the order of accesses.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "races.hpp"

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __CUDA_ARCH__ 900

struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
// Not functions: -fsanitize=thread does not see what a function's result is written to.
#define make_float4(x, y, z, w) (float4{x, y, z, w})
#define make_float2(x, y) (float2{x, y})
#define make_uint4(x, y, z, w) (uint4{x, y, z, w})
#define make_uint2(x, y) (uint2{x, y})
template <typename T> T min(T a, T b) { return b < a ? b : a; }
template <typename T> T max(T a, T b) { return a < b ? b : a; }
inline unsigned __funnelshift_r(unsigned low, unsigned high, int shift) {
  return (unsigned)((((uint64_t)high << 32) | low) >> (shift & 31));
}
inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }

namespace emulator {

struct Failure { const char* what; };

// Lanes of a warp that meet.
struct Meeting {
  int arrived = 0;
  long generation = 0;
  uint64_t values[2][32];
};

struct Warp {
  Meeting all;
  std::map<unsigned, Meeting> some;  // by the lanes that take part
  Meeting& of(unsigned lanes) { return lanes == 0xffffffffu ? all : some[lanes]; }
};

struct Barrier { int expected, pending, bytes; long phase; bool made; };

struct Copy { char* to; const char* from; int size, bytes; };

struct Block;

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block;
  int index;
  bool done = false;
  std::vector<Copy> open;                  // not yet committed
  std::deque<std::vector<Copy>> groups;
  std::vector<std::function<void()>> stores;  // to global memory, not yet waited for
};

// What arrives later: `write` puts it into a block's shared memory, whose barrier then counts the bytes.
struct Delivery { Block* block; unsigned barrier; int bytes, delay; long copy; std::function<void()> write; };

// A barrier of some number of threads.
struct Gathering { int arrived = 0; long generation = 0; };

struct Block {
  std::vector<char> memory;
  std::map<int, Gathering> named;          // barriers of some of the threads
  char* base;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<Thread>> threads;
  int index, rank;
  Gathering all;
  std::vector<std::pair<unsigned, Barrier>> barriers;
  Barrier& barrier(unsigned address) {
    for (auto& b : barriers)
      if (b.first == address) return b.second;
    barriers.push_back({address, Barrier{0, 0, 0, 0, false}});
    return barriers.back().second;
  }
};

inline Thread* current = nullptr;
inline ucontext_t scheduler;
inline std::vector<std::unique_ptr<Block>> cluster;
inline std::deque<Delivery> deliveries;
inline std::mt19937 random;
inline int block_threads = 0, grid_size = 0;
inline long progress = 0;
inline Gathering gathering;  // of the cluster
inline std::function<void()> body;
inline const char* failure = nullptr;

inline void yield() { swapcontext(&current->context, &scheduler); }
inline void fail(const char* what) {
  fprintf(stderr, "emulator: block %d thread %d: %s\n", current ? current->block->index : -1, current ? current->index : -1, what);
  throw Failure{what};
}

template <typename F> void wait_until(F condition) {
  while (!condition()) yield();
  ++progress;
}

inline void gather(Gathering& g, int count) {
  const long generation = g.generation;
  const void* const key = reinterpret_cast<const char*>(&g) + (generation & 1);
  if (g.arrived == 0) races::forget(key);
  races::release(key);
  if (++g.arrived == count) g.arrived = 0, ++g.generation, ++progress;
  wait_until([&] { return g.generation != generation; });
  races::acquire(key);
}

inline Warp& warp() { return current->block->warps[current->index / 32]; }
inline void meet(Meeting& m, unsigned lanes) {
  const long generation = m.generation;
  if (++m.arrived == __builtin_popcount(lanes)) m.arrived = 0, ++m.generation, ++progress;
  wait_until([&] { return m.generation != generation; });
}
template <typename T> T exchange(T value, int from, unsigned lanes = 0xffffffffu) {
  static_assert(sizeof(T) <= 8);
  Meeting& m = warp().of(lanes);
  const int lane = current->index % 32, buffer = (int)(m.generation & 1);
  if (!(lanes >> lane & 1)) fail("a lane takes part that is not named");
  memcpy(&m.values[buffer][lane], &value, sizeof(T));
  meet(m, lanes);
  T out;
  memcpy(&out, &m.values[buffer][from < 0 || from > 31 ? lane : from], sizeof(T));
  return out;
}

// Addresses of shared memory: the rank of the block in the upper bits, so that other blocks' are told apart.
inline unsigned address_of(const void* p) {
  const Block& b = *current->block;
  const int64_t offset = static_cast<const char*>(p) - b.base;
  if (offset < 0 || offset >= (int64_t)b.memory.size()) fail("an address outside shared memory");
  return (unsigned)offset;
}
inline Block& block_of(unsigned address) {
  return address >> 24 ? *cluster[(address >> 24) - 1] : *current->block;
}
inline char* pointer(unsigned address, int size) {
  Block& b = block_of(address);
  const unsigned offset = address & 0xffffffu;
  if (offset + size > b.memory.size() - 128) fail("shared memory is too small");
  if (offset % size) fail("an unaligned address");
  return b.base + offset;
}

// By which races.hpp knows a barrier in shared memory: what has come to it, what its last phase brought.
inline const void* coming(const Block& block, unsigned barrier) { return block.base + (barrier & 0xffffffu); }
inline const void* brought(const Block& block, unsigned barrier) { return block.base + (barrier & 0xffffffu) + 1; }

inline void settle(Block& block, unsigned address, Barrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  b.pending = b.expected, ++b.phase, ++progress;
  races::pass_on(coming(block, address), brought(block, address));
}

inline void send(Block& block, unsigned barrier, const void* to, int bytes, std::function<void()> write) {
  const long copy = races::send(to, bytes, coming(block, barrier));
  deliveries.push_back({&block, barrier & 0xffffffu, bytes, 1 + (int)(random() % 8), copy, std::move(write)});
}

inline void deliver() {
  for (size_t n = 0; n < deliveries.size();) {
    Delivery& d = deliveries[n];
    if (--d.delay > 0) { ++n; continue; }
    d.write();
    races::arrive(d.copy, coming(*d.block, d.barrier));
    Barrier& b = d.block->barrier(d.barrier);
    b.bytes -= d.bytes;
    settle(*d.block, d.barrier, b);
    deliveries.erase(deliveries.begin() + n);
    ++progress;
  }
}

inline void enter() {
  try {
    body();
  } catch (const Failure& f) {
    failure = f.what;
  }
  current->done = true, ++progress;
  swapcontext(&current->context, &scheduler);
}

inline void make_cluster(int first, int blocks, int threads, int shared_bytes) {
  cluster.clear();
  for (int rank = 0; rank < blocks; ++rank) {
    auto b = std::make_unique<Block>();
    b->memory.assign(shared_bytes + 128, (char)0xff);  // NaN until written
    b->base = b->memory.data() + (128 - (uintptr_t)b->memory.data() % 128) % 128;
    b->index = first + rank, b->rank = rank;
    b->warps.resize((threads + 31) / 32);
    for (int n = 0; n < threads; ++n) {
      auto t = std::make_unique<Thread>();
      t->stack.reset(new char[1 << 16]);
      t->block = b.get(), t->index = n;
      getcontext(&t->context);
      t->context.uc_stack.ss_sp = t->stack.get(), t->context.uc_stack.ss_size = 1 << 16, t->context.uc_link = nullptr;
      makecontext(&t->context, enter, 0);
      b->threads.push_back(std::move(t));
    }
    cluster.push_back(std::move(b));
  }
  std::vector<char*> bases;
  for (const auto& b : cluster) bases.push_back(b->base);
  races::begin(blocks, threads, bases.data(), shared_bytes);
}

// Returns 0, or 1 where nothing could go on.
inline int run_cluster() {
  std::vector<std::pair<Block*, int>> warps;
  for (auto& b : cluster)
    for (size_t w = 0; w < b->warps.size(); ++w) warps.push_back({b.get(), (int)w});
  for (long idle = 0; !warps.empty();) {
    const size_t pick = random() % warps.size();
    auto [block, w] = warps[pick];
    const long before = progress;
    bool alive = false;
    const int first = random() % 32;
    for (int n = 0; n < 32; ++n) {
      const size_t index = w * 32 + (first + n) % 32;
      if (index >= block->threads.size() || block->threads[index]->done) continue;
      Thread* t = block->threads[index].get();
      current = t;
      races::run_as(block->rank * block_threads + t->index);
      swapcontext(&scheduler, &t->context);
      races::run_as(-1);
      alive = alive || !t->done;
    }
    if (failure) return 3;
    if (const char* what = races::found()) {
      fprintf(stderr, "emulator: %s\n", what);
      return 4;
    }
    deliver();
    if (!alive) warps.erase(warps.begin() + pick);
    idle = progress == before ? idle + 1 : 0;
    if (idle > 4000 + 200 * (long)warps.size()) return 1;
  }
  return deliveries.empty() ? 0 : 2;  // 2: something was sent that nobody waits for
}

inline int launch(int grid, int threads, int blocks, int shared_bytes, unsigned seed, std::function<void()> kernel) {
  failure = nullptr, random.seed(seed), block_threads = threads, grid_size = grid, body = std::move(kernel);
  for (int first = 0; first < grid; first += blocks) {
    deliveries.clear(), gathering = {};
    make_cluster(first, blocks, threads, shared_bytes);
    if (const int status = run_cluster()) return status;
  }
  return 0;
}

struct Index { struct { operator int() const { return get(); } int (*get)(); } x; };
inline Index thread_index{{[] { return current->index; }}}, block_index{{[] { return current->block->index; }}},
    block_dim{{[] { return block_threads; }}}, grid_dim{{[] { return grid_size; }}};
}  // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_dim
#define gridDim emulator::grid_dim

inline void __syncwarp() {
  auto& m = emulator::warp().all;
  const void* const key = reinterpret_cast<const char*>(&m) + (m.generation & 1);
  if (m.arrived == 0) races::forget(key);
  races::release(key);
  emulator::meet(m, 0xffffffffu);
  races::acquire(key);
}
inline int __clz(int value) { return value ? __builtin_clz((unsigned)value) : 32; }

inline void __syncthreads() { emulator::gather(emulator::current->block->all, emulator::block_threads); }
