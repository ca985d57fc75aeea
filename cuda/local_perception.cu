// Local perception unit: y = x + depthwise 3x3 convolution of x, channels last, and its gradients. A channel meets no
// other one, so the arithmetic is little and a pass should take no longer than reading x and writing y.
// Preamble: SCALAR, VEC.
#include "common.cuh"

#define COLUMNS 4   // positions of a row that a thread computes side by side
#define WORKERS 8   // warps of a block of local_perception_weight, each with its own part of the picture
#define SUMS (10 * VEC)  // nine taps and the bias

struct Grid {
  int64 batch, height, width, channels, rows;  // rows: of the band that a thread walks down
  __device__ __forceinline__ int64 tiles() const { return (width + COLUMNS - 1) / COLUMNS; }
  __device__ __forceinline__ int64 bands() const { return (height + rows - 1) / rows; }
};

struct Strides { int64 batch, row, column; };

// A band of rows at COLUMNS columns of one picture, VEC channels from `channel` on.
struct Part {
  int batch, first_row, end_row, column, channel;
  // `index` counts the column tiles of all bands and pictures, tiles first.
  __device__ __forceinline__ Part(const Grid& g, int64 index, int channel)
      : column((int)(index % g.tiles()) * COLUMNS), channel(channel) {
    index /= g.tiles();
    first_row = (int)(index % g.bands() * g.rows);
    end_row = min(first_row + (int)g.rows, (int)g.height);
    batch = (int)(index / g.bands());
  }
};

// COUNT vectors side by side from `column` on; zeros outside of the picture.
template <int COUNT>
__device__ __forceinline__ void load_row(Vector (&out)[COUNT], const scalar_t* from, const Strides& s, const Grid& g,
                                         const Part& at, int row, int column) {
#pragma unroll
  for (int n = 0; n < COUNT; ++n) {
    if (row >= 0 && row < g.height && column + n >= 0 && column + n < g.width) {
      load_words(out[n].words, from + at.batch * s.batch + row * s.row + (column + n) * s.column + at.channel);
    } else {
#pragma unroll
      for (int j = 0; j < (int)(sizeof(out[n].words) / sizeof(out[n].words.word[0])); ++j) out[n].words.word[j] = 0;
    }
  }
}

// ---- the convolution ----------------------------------------------------------------------------

struct Parameters {
  const scalar_t* x;
  const void *weight, *bias;   // (C, 3, 3) and (C), float or scalar_t; bias == nullptr means 0
  scalar_t* y;                 // contiguous
  Grid grid;
  int64 flip, weight_is_float; // flip: the gradient of x from that of y, which turns the taps round
  Strides strides;
};

__device__ __forceinline__ float weight_at(const void* weight, int64 index, bool is_float) {
  return is_float ? static_cast<const float*>(weight)[index] : to_float(static_cast<const scalar_t*>(weight)[index]);
}

extern "C" __global__ void __launch_bounds__(256) local_perception(const __grid_constant__ Parameters a) {
  const Grid& g = a.grid;
  const int vectors = (int)(g.channels / VEC);
  const int64 index = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (index / vectors >= g.batch * g.bands() * g.tiles()) return;
  const Part at(g, index / vectors, (int)(index % vectors) * VEC);

  float tap[9][VEC], offset[VEC];
#pragma unroll
  for (int j = 0; j < VEC; ++j) {
#pragma unroll
    for (int k = 0; k < 9; ++k)
      tap[k][j] = weight_at(a.weight, (int64)(at.channel + j) * 9 + (a.flip ? 8 - k : k), a.weight_is_float);
    offset[j] = a.bias ? weight_at(a.bias, at.channel + j, a.weight_is_float) : 0.0f;
  }

  // Of the rows before, at and after the one that was read.
  float sum[3][COLUMNS][VEC];
#pragma unroll
  for (int n = 0; n < 3; ++n)
#pragma unroll
    for (int p = 0; p < COLUMNS; ++p)
#pragma unroll
      for (int j = 0; j < VEC; ++j) sum[n][p][j] = offset[j];

  Vector next[COLUMNS + 2];
  load_row(next, a.x, a.strides, g, at, at.first_row - 1, at.column - 1);
#pragma unroll 3
  for (int row = at.first_row - 1; row <= at.end_row; ++row) {
    Vector here[COLUMNS + 2];
#pragma unroll
    for (int q = 0; q < COLUMNS + 2; ++q) here[q].words = next[q].words;
    if (row < at.end_row) load_row(next, a.x, a.strides, g, at, row + 1, at.column - 1);
#pragma unroll
    for (int q = 0; q < COLUMNS + 2; ++q) {
      float value[VEC];
      to_floats(value, here[q]);
#pragma unroll
      for (int p = max(q - 2, 0); p <= min(q, COLUMNS - 1); ++p)  // column q - 1 of the tile meets tap q - p
#pragma unroll
        for (int n = 0; n < 3; ++n)
#pragma unroll
          for (int j = 0; j < VEC; ++j) sum[n][p][j] = fmaf(tap[(2 - n) * 3 + q - p][j], value[j], sum[n][p][j]);
      if (q > 0 && q <= COLUMNS) {
#pragma unroll
        for (int j = 0; j < VEC; ++j) sum[1][q - 1][j] += value[j];
      }
    }
    if (row > at.first_row) {
#pragma unroll
      for (int p = 0; p < COLUMNS; ++p)
        if (at.column + p < g.width)
          store(a.y + ((at.batch * g.height + row - 1) * g.width + at.column + p) * g.channels + at.channel, sum[0][p]);
    }
#pragma unroll
    for (int p = 0; p < COLUMNS; ++p)
#pragma unroll
      for (int j = 0; j < VEC; ++j) sum[0][p][j] = sum[1][p][j], sum[1][p][j] = sum[2][p][j], sum[2][p][j] = offset[j];
  }
}

// ---- the gradients of weight and bias -----------------------------------------------------------

struct WeightParameters {
  const scalar_t *dy, *x;
  float* partial;              // (groups, 10, C): nine taps and the bias, of a group of blocks
  Grid grid;
  int64 groups;
  Strides dy_strides, x_strides;
};

// The sums of one part of the picture.
__device__ __forceinline__ void add_part(float (&sum)[10][VEC], const WeightParameters& a, const Part& at) {
  const Grid& g = a.grid;
  float dy[3][COLUMNS][VEC];  // of the rows after, at and before that of x: those which tap 0, 1, 2 of it belong to
#pragma unroll
  for (int n = 0; n < 3; ++n)
#pragma unroll
    for (int p = 0; p < COLUMNS; ++p)
#pragma unroll
      for (int j = 0; j < VEC; ++j) dy[n][p][j] = 0.0f;
#pragma unroll 1
  for (int row = at.first_row - 1; row <= at.end_row; ++row) {
    Vector x[COLUMNS + 2], after[COLUMNS];
    load_row(x, a.x, a.x_strides, g, at, row, at.column - 1);
    load_row(after, a.dy, a.dy_strides, g, at, row + 1 < at.end_row ? row + 1 : -1, at.column);
#pragma unroll
    for (int p = 0; p < COLUMNS; ++p) {
#pragma unroll
      for (int j = 0; j < VEC; ++j) dy[2][p][j] = dy[1][p][j], dy[1][p][j] = dy[0][p][j];
      to_floats(dy[0][p], after[p]);
#pragma unroll
      for (int j = 0; j < VEC; ++j) sum[9][j] += dy[0][p][j];
    }
#pragma unroll
    for (int q = 0; q < COLUMNS + 2; ++q) {
      float value[VEC];
      to_floats(value, x[q]);
#pragma unroll
      for (int p = max(q - 2, 0); p <= min(q, COLUMNS - 1); ++p)
#pragma unroll
        for (int n = 0; n < 3; ++n)
#pragma unroll
          for (int j = 0; j < VEC; ++j) sum[n * 3 + q - p][j] = fmaf(dy[n][p][j], value[j], sum[n * 3 + q - p][j]);
    }
  }
}

// A block has 32 vectors of channels, its warps take turns with the parts of the picture.
extern "C" __global__ void __launch_bounds__(32 * WORKERS) local_perception_weight(const __grid_constant__ WeightParameters a) {
  SHARED_MEMORY(shared);
  float* const sums = reinterpret_cast<float*>(shared);  // [WORKERS][SUMS][32]
  const Grid& g = a.grid;
  const int slices = (int)((g.channels / VEC + 31) / 32), lane = threadIdx.x % 32, worker = threadIdx.x / 32;
  const int slice = (int)(blockIdx.x % slices), group = (int)(blockIdx.x / slices);
  const int channel = (slice * 32 + lane) * VEC;

  float sum[10][VEC];
#pragma unroll
  for (int k = 0; k < 10; ++k)
#pragma unroll
    for (int j = 0; j < VEC; ++j) sum[k][j] = 0.0f;
  if (channel < g.channels) {
    const int64 parts = g.batch * g.bands() * g.tiles();
#pragma unroll 1
    for (int64 n = group * WORKERS + worker; n < parts; n += a.groups * WORKERS) add_part(sum, a, Part(g, n, channel));
  }
#pragma unroll
  for (int k = 0; k < 10; ++k)
#pragma unroll
    for (int j = 0; j < VEC; ++j) sums[(worker * SUMS + k * VEC + j) * 32 + lane] = sum[k][j];
  __syncthreads();
  for (int n = threadIdx.x; n < SUMS * 32; n += 32 * WORKERS) {
    const int at = (slice * 32 + n % 32) * VEC + n / 32 % VEC, k = n / 32 / VEC;
    float total = 0.0f;
    for (int w = 0; w < WORKERS; ++w) total += sums[w * SUMS * 32 + n];
    if (at < g.channels) a.partial[((int64)group * 10 + k) * g.channels + at] = total;
  }
}
