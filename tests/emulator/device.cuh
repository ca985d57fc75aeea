// In the place of cuda/device.cuh: the same functions for the processor.
#pragma once

typedef long long int64;

#if SCALAR == 0
typedef float scalar_t;
#else
typedef unsigned short scalar_t;
#endif

#define SHARED_MEMORY(name) char* const name = emulator::current->block->base

inline float to_float(scalar_t value) {
#if SCALAR == 0
  return value;
#else
  return __uint_as_float((unsigned)value << 16);
#endif
}

inline scalar_t from_float(float value) {
#if SCALAR == 0
  return value;
#else
  unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}
#if SCALAR != 0
inline unsigned from_floats(float low, float high) { return (unsigned)from_float(low) | (unsigned)from_float(high) << 16; }
#endif

inline float fast_exp2(float x) { return exp2f(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }

template <typename T> T shuffle_up(T value, int lanes) {
  return emulator::exchange(value, emulator::current->index % 32 - lanes);
}
template <typename T> T shuffle_down(T value, int lanes) {
  return emulator::exchange(value, emulator::current->index % 32 + lanes);
}
template <typename T> T shuffle_xor(T value, int mask, unsigned lanes = 0xffffffffu) {
  return emulator::exchange(value, (emulator::current->index % 32) ^ mask, lanes);
}

inline unsigned shared_address(const void* p) { return emulator::address_of(p); }

template <int SIZE> void copy_async(unsigned to, const void* from, int bytes) {
  char* const target = emulator::pointer(to, SIZE);
  if (bytes > 0 && reinterpret_cast<uintptr_t>(from) % SIZE) emulator::fail("a copy from an unaligned address");
  memset(target, 0xff, SIZE);  // nothing to be read yet
  emulator::current->open.push_back({target, static_cast<const char*>(from), SIZE, bytes});
}
inline void commit_copies_async() {
  emulator::current->groups.push_back(std::move(emulator::current->open));
  emulator::current->open.clear();
}
template <int PENDING> void wait_copies_async() {
  auto& groups = emulator::current->groups;
  while (groups.size() > PENDING) {
    for (const auto& c : groups.front()) {
      memset(c.to, 0, c.size);
      if (c.bytes > 0) memcpy(c.to, c.from, c.bytes);
    }
    groups.pop_front();
  }
}

inline void barrier_init(unsigned barrier, int arrivals) {
  emulator::pointer(barrier, 8);
  emulator::current->block->barrier(barrier) = {arrivals, arrivals, 0, 0, true};
}
inline void barrier_arrive(unsigned barrier) {
  auto& block = emulator::block_of(barrier);
  auto& b = block.barrier(barrier & 0xffffffu);
  if (!b.made) emulator::fail("a barrier that was not made");
  if (b.pending == 0) emulator::fail("too many arrivals");
  --b.pending;
  emulator::settle(block, barrier, b);
}
inline void barrier_expect(unsigned barrier, int bytes) {
  emulator::current->block->barrier(barrier).bytes += bytes;
  barrier_arrive(barrier);
}
inline void barrier_wait(unsigned barrier, int phase) {
  auto* const block = emulator::current->block;
  emulator::wait_until([&] { return (block->barrier(barrier).phase & 1) != phase; });
}

template <int CLUSTER> void start_together() {
  if (CLUSTER == 1) return __syncthreads();
  const long generation = emulator::cluster_generation;
  if (++emulator::cluster_arrived == emulator::block_threads * CLUSTER)
    emulator::cluster_arrived = 0, ++emulator::cluster_generation;
  emulator::wait_until([&] { return emulator::cluster_generation != generation; });
}
inline unsigned remote_address(unsigned local, int rank) {
  if (rank < 0 || rank >= (int)emulator::cluster.size()) emulator::fail("no such block in the cluster");
  return local | (unsigned)(rank + 1) << 24;
}
inline void send_floats(unsigned to, unsigned barrier, float a, float b, float c, float d) {
  emulator::pointer(to, 16);
  auto& block = emulator::block_of(to);
  bool alive = false;
  for (auto& t : block.threads) alive = alive || !t->done;
  if (!alive) emulator::fail("sends to a block that has ended");
  emulator::deliveries.push_back(
      {&block, to & 0xffffffu, barrier & 0xffffffu, {a, b, c, d}, 1 + (int)(emulator::random() % 8)});
}
