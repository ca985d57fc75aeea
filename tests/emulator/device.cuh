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

inline void keep_in_register(int&) {}
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
  races::write(target, SIZE);
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
      races::write(c.to, c.size);
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
  races::release(emulator::coming(block, barrier));
  emulator::settle(block, barrier, b);
}
inline void barrier_expect(unsigned barrier, int bytes) {
  emulator::current->block->barrier(barrier).bytes += bytes;
  barrier_arrive(barrier);
}
inline void barrier_wait(unsigned barrier, int phase) {
  auto* const block = emulator::current->block;
  emulator::wait_until([&] { return (block->barrier(barrier).phase & 1) != phase; });
  races::acquire(emulator::brought(*block, barrier));
}

template <int CLUSTER> void start_together() {
  if (CLUSTER == 1) return __syncthreads();
  emulator::gather(emulator::gathering, emulator::block_threads * CLUSTER);
}
inline unsigned remote_address(unsigned local, int rank) {
  if (rank < 0 || rank >= (int)emulator::cluster.size()) emulator::fail("no such block in the cluster");
  return local | (unsigned)(rank + 1) << 24;
}
template <int COUNT> void send_some(unsigned to, unsigned barrier, const float (&values)[COUNT]) {
  char* const target = emulator::pointer(to, 4 * COUNT);
  auto& block = emulator::block_of(to);
  bool alive = false;
  for (auto& t : block.threads) alive = alive || !t->done;
  if (!alive) emulator::fail("sends to a block that has ended");
  std::vector<float> kept(values, values + COUNT);
  emulator::send(block, barrier, target, 4 * COUNT, [=] { memcpy(target, kept.data(), 4 * COUNT); });
}
inline void send_floats(unsigned to, unsigned barrier, float a, float b, float c, float d) {
  send_some<4>(to, barrier, {a, b, c, d});
}
inline void send_floats(unsigned to, unsigned barrier, float a, float b) { send_some<2>(to, barrier, {a, b}); }

inline void copy16(unsigned to, const void* from) { copy_async<16>(to, from, 16); }
inline void commit_copies() { commit_copies_async(); }
template <int PENDING> void wait_copies() { wait_copies_async<PENDING>(); }

template <int NUMBER> void barrier_of(int threads) {
  emulator::gather(emulator::current->block->named[NUMBER], threads);
}

// As tests/emulate.py makes it: address, sizes, strides and box in elements.
struct alignas(8) Map {
  int64 address, size[5], stride[4], box[5], unused;
};

// Calls f(offset from the map's address or -1 outside, number within the box) for the elements of a box.
template <typename F> void for_box(const Map& map, const int64 (&at)[5], F f) {
  int64 n = 0, i[5];
  for (i[4] = 0; i[4] < map.box[4]; ++i[4])
    for (i[3] = 0; i[3] < map.box[3]; ++i[3])
      for (i[2] = 0; i[2] < map.box[2]; ++i[2])
        for (i[1] = 0; i[1] < map.box[1]; ++i[1])
          for (i[0] = 0; i[0] < map.box[0]; ++i[0], ++n) {
            int64 offset = 0;
            bool inside = true;
            for (int d = 0; d < 5; ++d) {
              inside = inside && at[d] + i[d] >= 0 && at[d] + i[d] < map.size[d];
              offset += (at[d] + i[d]) * (d ? map.stride[d - 1] : 1);
            }
            f(inside ? offset : -1, n);
          }
}
inline int64 box_elements(const Map& map) {
  if (!map.address) emulator::fail("a tensor that is not there");
  return map.box[0] * map.box[1] * map.box[2] * map.box[3] * map.box[4];
}
inline bool elected() { return threadIdx.x % 32 == 0; }
inline void publish_barriers() {}
inline void publish_results() { races::publish(); }
inline void copy_box(const scalar_t* to, const Map& map, int channel, int position, int line, int slot, int batch,
                     int64* barrier) {
  const int bytes = (int)(box_elements(map) * sizeof(scalar_t));
  auto* const target = reinterpret_cast<scalar_t*>(emulator::pointer(shared_address(to), 128));
  emulator::pointer(shared_address(to) + (bytes - 1) / 128 * 128, 128);
  memset(target, 0xff, bytes);  // nothing to be read yet
  emulator::send(*emulator::current->block, shared_address(barrier), target, bytes, [=, map = map] {
    const auto* const from = reinterpret_cast<const scalar_t*>(map.address);
    for_box(map, {channel, position, line, slot, batch},
            [&](int64 offset, int64 n) { target[n] = offset < 0 ? (scalar_t)0 : from[offset]; });
  });
}
inline void store_box(const Map& map, int channel, int position, int line, int slot, int batch, const scalar_t* from) {
  box_elements(map);
  if (position < 0 || line < 0 || line + map.box[2] > map.size[2]) emulator::fail("a store of lines that are not there");
  const auto* const source = reinterpret_cast<const scalar_t*>(emulator::pointer(shared_address(from), 128));
  for_box(map, {channel, position, line, slot, batch}, [&](int64 offset, int64 n) {
    if (offset >= 0) races::read_by_accelerator(source + n, sizeof(scalar_t));
  });
  emulator::current->stores.push_back([=, map = map] {
    auto* const to = reinterpret_cast<scalar_t*>(map.address);
    for_box(map, {channel, position, line, slot, batch}, [&](int64 offset, int64 n) {
      if (offset >= 0) to[offset] = source[n];
    });
  });
}
inline void commit_stores() {}
inline void wait_stores() {
  for (const auto& store : emulator::current->stores) store();
  emulator::current->stores.clear();
}
