// What is written in PTX, and the element types. Nothing else is, so that tests can put a version for the processor in
// this file's place.
//
// Set by the preamble that the loader puts in front of the source:
//   SCALAR  0 float32, 1 bfloat16, 2 float16
// No CUDA header is included, so the sources compile with NVRTC alone.
#pragma once

typedef long long int64;

#if SCALAR == 0
typedef float scalar_t;
#else
typedef unsigned short scalar_t;  // the bits of a bfloat16 or float16
#endif

#define SHARED_MEMORY(name) extern __shared__ __align__(128) char name[]

// ---- arithmetic ---------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(scalar_t value) {
#if SCALAR == 0
  return value;
#elif SCALAR == 1
  return __uint_as_float((unsigned)value << 16);
#else
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
  return result;
#endif
}

__device__ __forceinline__ scalar_t from_float(float value) {
#if SCALAR == 0
  return value;
#elif SCALAR == 1
#if __CUDA_ARCH__ >= 800
  unsigned short result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return result;
#else
  unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // NaN
  return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // nearest, ties to even
#endif
#else
  unsigned short result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return result;
#endif
}

#if SCALAR != 0
// Two elements side by side, the first in the lower half.
__device__ __forceinline__ unsigned from_floats(float low, float high) {
#if __CUDA_ARCH__ >= 800
  unsigned result;
#if SCALAR == 1
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
#endif
  return result;
#else
  return (unsigned)from_float(low) | (unsigned)from_float(high) << 16;
#endif
}
#endif

__device__ __forceinline__ float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ float fast_reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Of what follows from a launch's arguments: the compiler would find it anew, from 64 bits, each time that it is used.
__device__ __forceinline__ void keep_in_register(int& value) { asm volatile("" : "+r"(value)); }

// ---- lanes of a warp ----------------------------------------------------------------------------

template <typename T> __device__ __forceinline__ T shuffle_up(T value, int lanes) {
  return __shfl_up_sync(0xffffffffu, value, lanes);
}
template <typename T> __device__ __forceinline__ T shuffle_down(T value, int lanes) {
  return __shfl_down_sync(0xffffffffu, value, lanes);
}
template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask, unsigned lanes = 0xffffffffu) {  // lanes: that take part
  return __shfl_xor_sync(lanes, value, mask);
}

// ---- shared memory ------------------------------------------------------------------------------

__device__ __forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// Copies to shared memory that the copying thread alone waits for; zeros where `bytes` ends early.
template <int SIZE> __device__ __forceinline__ void copy_async(unsigned to, const void* from, int bytes) {
#if __CUDA_ARCH__ >= 800
  if constexpr (SIZE == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(SIZE), "r"(bytes) : "memory");
  }
#endif
}
__device__ __forceinline__ void commit_copies_async() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int PENDING> __device__ __forceinline__ void wait_copies_async() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// 16 bytes; older GPUs copy at once.
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void copy16(unsigned to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
#else
__device__ __forceinline__ void copy16(unsigned to, const void* from) {
  const uint4 v = *reinterpret_cast<const uint4*>(from);
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void commit_copies() {}
template <int PENDING> __device__ __forceinline__ void wait_copies() {}
#endif

// ---- some threads of a block --------------------------------------------------------------------

// A barrier with a number of its own, from 1 on, for so many threads.
template <int NUMBER> __device__ __forceinline__ void barrier_of(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(NUMBER), "r"(threads) : "memory");
}

// ---- barriers in shared memory, by address ------------------------------------------------------

__device__ __forceinline__ void barrier_init(unsigned barrier, int arrivals) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#endif
}
__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
#if __CUDA_ARCH__ >= 800
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
#endif
}
// Arrives, and lets the phase end only when so many bytes have come from another block.
__device__ __forceinline__ void barrier_expect(unsigned barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void barrier_wait(unsigned barrier, int phase) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier), "r"(phase) : "memory");
#elif __CUDA_ARCH__ >= 800
  // test_wait takes a phase's parity from compute capability 8.0 on, too.
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier), "r"(phase) : "memory");
#endif
}

// ---- the blocks of a cluster --------------------------------------------------------------------

// All threads of the block, or of the cluster, pass it together; barriers made before it are known to all.
template <int CLUSTER> __device__ __forceinline__ void start_together() {
#if __CUDA_ARCH__ >= 900
  if (CLUSTER > 1) {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    return;
  }
#endif
  __syncthreads();
}

// The address that something in this block's shared memory has in another block's.
__device__ __forceinline__ unsigned remote_address(unsigned local, int rank) {
  unsigned address = local;
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(local), "r"(rank));
#endif
  return address;
}

// Four floats into another block's shared memory; its barrier counts their bytes when they are there.
__device__ __forceinline__ void send_floats(unsigned to, unsigned barrier, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
      "f"(a), "f"(b), "f"(c), "f"(d), "r"(barrier) : "memory");
#endif
}
__device__ __forceinline__ void send_floats(unsigned to, unsigned barrier, float a, float b) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to), "f"(a),
               "f"(b), "r"(barrier) : "memory");
#endif
}

// ---- tensor memory accelerator, from compute capability 9.0 on ----------------------------------

// A tensor as the accelerator sees it, made by the host: (channels, positions, lines, directions, batch).
struct __align__(64) Map { int64 opaque[16]; };

#if __CUDA_ARCH__ >= 900
// True in one thread of a warp, always the same. The compiler knows that it is one, as it does not of `lane == 0`, and so
// gives the accelerator its operands without a loop over the threads that could be there.
__device__ __forceinline__ bool elected() {
  unsigned yes;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.b32 %0, 1, 0, p; }" : "=r"(yes));
  return yes;
}
// Lets the accelerator use barriers that this thread has made.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void copy_box(const scalar_t* to, const Map& map, int channel, int position, int line, int slot,
                                         int batch, int64* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3, %4, %5, %6}], [%7];" ::"r"(shared_address(to)), "l"(&map), "r"(channel), "r"(position), "r"(line),
      "r"(slot), "r"(batch), "r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void store_box(const Map& map, int channel, int position, int line, int slot, int batch,
                                          const scalar_t* from) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4, %5}], [%6];" ::"l"(&map),
      "r"(channel), "r"(position), "r"(line), "r"(slot), "r"(batch), "r"(shared_address(from)) : "memory");
}
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ __forceinline__ void wait_stores() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// Makes what this thread wrote to shared memory visible to the accelerator.
__device__ __forceinline__ void publish_results() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#else
__device__ __forceinline__ void publish_results() {}
#endif
