// Layer norm without parameters, then scale and shift of a whole picture (adaLN), and the gradients:
//   y = (x - mean) * rstd * (1 + scale) + shift
// A row of channels stays in the registers of its warps, so x is read once and y written once.
// Preamble: SCALAR, VEC, RUN: vectors of a row that a thread has at most.
#include "common.cuh"

#define WARPS 8   // of a block at most; each row has `warps` of them

struct Sizes {
  int64 rows, tokens, channels;  // rows: of all pictures
  int64 warps;                   // of a row
  int64 wide;                    // shift and scale are float, not scalar_t
  int64 narrow;                  // y is bfloat16 where x is float
  int64 x_b, x_n, m_b;           // strides of x, and of shift and scale from picture to picture
};

// ---- elements of other types than scalar_t ------------------------------------------------------

__device__ __forceinline__ void load_modulation(float (&out)[VEC], const void* p, int64 index, bool wide) {
  if (wide) {
#pragma unroll
    for (int j = 0; j < VEC; j += 4) {
      Words<16> bits;
      load_words(bits, static_cast<const float*>(p) + index + j);
#pragma unroll
      for (int k = 0; k < 4; ++k) out[j + k] = __uint_as_float(bits.word[k]);
    }
  } else {
    load(out, static_cast<const scalar_t*>(p) + index);
  }
}

__device__ __forceinline__ void load_result(float (&out)[VEC], const void* p, int64 index, bool narrow) {
#if SCALAR == 0
  if (narrow) {
    Words<8> bits;  // VEC is 4 here
    load_words(bits, static_cast<const unsigned short*>(p) + index);
#pragma unroll
    for (int j = 0; j < VEC; j += 2) {
      out[j] = __uint_as_float(bits.word[j / 2] << 16);
      out[j + 1] = __uint_as_float(bits.word[j / 2] & 0xffff0000u);
    }
    return;
  }
#endif
  load(out, static_cast<const scalar_t*>(p) + index);
}

// The bits of the nearest bfloat16.
__device__ __forceinline__ unsigned rounded(float value) {
  const unsigned bits = __float_as_uint(value);
  const bool number = (bits & 0x7fffffffu) <= 0x7f800000u;
  return number ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : 0x7fffu;
}

__device__ __forceinline__ void store_result(void* p, int64 index, const float (&in)[VEC], bool narrow) {
#if SCALAR == 0
  if (narrow) {
    Words<8> out;
#pragma unroll
    for (int j = 0; j < VEC; j += 2) out.word[j / 2] = rounded(in[j]) | rounded(in[j + 1]) << 16;
    store_words(out, static_cast<unsigned short*>(p) + index);
    return;
  }
#endif
  store(static_cast<scalar_t*>(p) + index, in);
}

// ---- rows ---------------------------------------------------------------------------------------

// A thread's part of a row: vectors `first`, `first + step`, ... of its channels, `held` of them.
struct Row {
  int64 index;
  int batch, token;
  int first, step, slot, warp, warps, held;  // slot: of the row in the block
  // Every slot of a block has `repeat` rows, one after the other.
  __device__ __forceinline__ Row(const Sizes& s, int repeat) : warps((int)s.warps) {
    const int lane = threadIdx.x % 32, all = threadIdx.x / 32, vectors = (int)s.channels / VEC;
    slot = all / warps, warp = all % warps, step = 32 * warps, first = warp * 32 + lane;
    held = first < vectors ? (vectors - first + step - 1) / step : 0;
    index = ((int64)blockIdx.x * (blockDim.x / 32 / warps) + slot) * repeat;
    const unsigned at = index < s.rows ? (unsigned)index : 0u, tokens = (unsigned)s.tokens;  // 32 bits divide quickly
    batch = (int)(at / tokens), token = (int)(at % tokens);
  }
  __device__ __forceinline__ void advance(const Sizes& s) {
    ++index;
    if (++token == s.tokens) token = 0, ++batch;
  }
  __device__ __forceinline__ int channel(int n) const { return (first + n * step) * VEC; }

  // The sum over a row, known to all of its threads; every thread of the block takes part.
  __device__ __forceinline__ float sum(float value, float* shared) const {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) value += shuffle_xor(value, mask);
    if (warps == 1) return value;
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[slot * warps + warp] = value;
    __syncthreads();
    value = 0.0f;
    for (int n = 0; n < warps; ++n) value += shared[slot * warps + n];
    return value;
  }
};

struct Parameters {
  const scalar_t* x;
  const void *shift, *scale;
  void* y;                     // contiguous
  float* stats;                // (rows, 2): mean and rstd, or nullptr
  Sizes sizes;
  int64 epsilon;               // the bits of a float
  int64 repeat;                // rows that a warp has one after the other
};

__device__ __forceinline__ void fetch(Vector (&out)[RUN], const scalar_t* x, const Row& row, const Sizes& s) {
  const scalar_t* const from = x + row.batch * s.x_b + row.token * s.x_n;
#pragma unroll
  for (int n = 0; n < RUN; ++n)
    if (row.index < s.rows && n < row.held) load_words(out[n].words, from + row.channel(n));
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) ada_layer_norm(const __grid_constant__ Parameters a) {
  SHARED_MEMORY(shared);
  float* const sums = reinterpret_cast<float*>(shared);
  const Sizes& s = a.sizes;
  const int repeat = (int)a.repeat;
  const float share = 1.0f / (float)s.channels;
  Row row(s, repeat);
  Vector next[RUN];
  fetch(next, a.x, row, s);
#pragma unroll 1
  for (int r = 0; r < repeat; ++r) {
    const Row here = row;
    float x[RUN][VEC];
#pragma unroll
    for (int n = 0; n < RUN; ++n) to_floats(x[n], next[n]);
    row.advance(s);
    if (r + 1 < repeat) fetch(next, a.x, row, s);  // on its way while this row is normalised

    const bool used = here.index < s.rows;
    float total = 0.0f;
#pragma unroll
    for (int n = 0; n < RUN; ++n)
      if (used && n < here.held) {
#pragma unroll
        for (int j = 0; j < VEC; ++j) total += x[n][j];
      }
    const float mean = here.sum(total, sums) * share;
    total = 0.0f;
#pragma unroll
    for (int n = 0; n < RUN; ++n)
      if (used && n < here.held) {
#pragma unroll
        for (int j = 0; j < VEC; ++j) x[n][j] -= mean, total = fmaf(x[n][j], x[n][j], total);
      }
    const float variance = here.sum(total, sums) * share;
    const float rstd = 1.0f / sqrtf(variance + __uint_as_float((unsigned)a.epsilon));
    if (!used) continue;
    if (a.stats && here.first == 0) a.stats[here.index * 2] = mean, a.stats[here.index * 2 + 1] = rstd;
#pragma unroll
    for (int n = 0; n < RUN; ++n)
      if (n < here.held) {
        float shift[VEC], scale[VEC];
        load_modulation(shift, a.shift, here.batch * s.m_b + here.channel(n), s.wide);
        load_modulation(scale, a.scale, here.batch * s.m_b + here.channel(n), s.wide);
#pragma unroll
        for (int j = 0; j < VEC; ++j) x[n][j] = fmaf(x[n][j], fmaf(scale[j], rstd, rstd), shift[j]);
        store_result(a.y, here.index * s.channels + here.channel(n), x[n], s.narrow);
      }
  }
}

struct BackwardParameters {
  const void* dy;              // contiguous, like y
  const scalar_t* x;
  const void* scale;
  const float* stats;
  scalar_t* dx;                // contiguous
  Sizes sizes;
};

// With g = dy (1 + scale) and n = (x - mean) rstd:  dx = rstd (g - mean of g - n * mean of g n).
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    ada_layer_norm_backward(const __grid_constant__ BackwardParameters a) {
  SHARED_MEMORY(shared);
  float* const sums = reinterpret_cast<float*>(shared);
  const Sizes& s = a.sizes;
  const Row row(s, 1);
  const bool used = row.index < s.rows;
  const float mean = used ? a.stats[row.index * 2] : 0.0f, rstd = used ? a.stats[row.index * 2 + 1] : 0.0f;
  float g[RUN][VEC], normed[RUN][VEC];
  float total = 0.0f, product = 0.0f;
#pragma unroll
  for (int n = 0; n < RUN; ++n)
    if (used && n < row.held) {
      float scale[VEC];
      load(normed[n], a.x + row.batch * s.x_b + row.token * s.x_n + row.channel(n));
      load_result(g[n], a.dy, row.index * s.channels + row.channel(n), s.narrow);
      load_modulation(scale, a.scale, row.batch * s.m_b + row.channel(n), s.wide);
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        normed[n][j] = (normed[n][j] - mean) * rstd, g[n][j] = fmaf(g[n][j], scale[j], g[n][j]);
        total += g[n][j], product = fmaf(g[n][j], normed[n][j], product);
      }
    }
  total = row.sum(total, sums) / (float)s.channels;
  product = row.sum(product, sums) / (float)s.channels;
#pragma unroll
  for (int n = 0; n < RUN; ++n)
    if (used && n < row.held) {
#pragma unroll
      for (int j = 0; j < VEC; ++j) g[n][j] = rstd * (g[n][j] - total - normed[n][j] * product);
      store(a.dx + row.index * s.channels + row.channel(n), g[n]);
    }
}

// ---- columns ------------------------------------------------------------------------------------

struct ColumnParameters {
  const void* dy;
  const scalar_t* x;
  const float* stats;
  float* partial;              // (groups, batch, 2, C): gradients of shift and of scale
  Sizes sizes;
  int64 batch, groups;         // groups of blocks that share a picture's tokens
};

// A block has 32 vectors of channels of one picture, its warps take turns with the tokens.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    ada_layer_norm_modulation(const __grid_constant__ ColumnParameters a) {
  SHARED_MEMORY(shared);
  float* const sums = reinterpret_cast<float*>(shared);  // [WARPS][2 * VEC][32]
  const Sizes& s = a.sizes;
  const int slices = (int)((s.channels / VEC + 31) / 32), lane = threadIdx.x % 32, worker = threadIdx.x / 32;
  const int slice = (int)(blockIdx.x % slices), channel = (slice * 32 + lane) * VEC;
  const int64 batch = blockIdx.x / slices % a.batch, group = blockIdx.x / slices / a.batch;
  float shift[VEC], scale[VEC];
#pragma unroll
  for (int j = 0; j < VEC; ++j) shift[j] = 0.0f, scale[j] = 0.0f;
  if (channel < s.channels) {
#pragma unroll 4
    for (int64 token = group * WARPS + worker; token < s.tokens; token += a.groups * WARPS) {
      const int64 row = batch * s.tokens + token;
      float x[VEC], dy[VEC];
      load(x, a.x + batch * s.x_b + token * s.x_n + channel);
      load_result(dy, a.dy, row * s.channels + channel, s.narrow);
      const float mean = a.stats[row * 2], rstd = a.stats[row * 2 + 1];
#pragma unroll
      for (int j = 0; j < VEC; ++j) shift[j] += dy[j], scale[j] = fmaf(dy[j], (x[j] - mean) * rstd, scale[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < VEC; ++j) {
    sums[(worker * 2 * VEC + j) * 32 + lane] = shift[j];
    sums[(worker * 2 * VEC + VEC + j) * 32 + lane] = scale[j];
  }
  __syncthreads();
  for (int n = threadIdx.x; n < 2 * VEC * 32; n += 32 * WARPS) {
    const int at = (slice * 32 + n % 32) * VEC + n / 32 % VEC, which = n / 32 / VEC;
    float total = 0.0f;
    for (int w = 0; w < WARPS; ++w) total += sums[w * 2 * VEC * 32 + n];
    if (at < s.channels) a.partial[((group * a.batch + batch) * 2 + which) * s.channels + at] = total;
  }
}
