// Second half of the tiled backward pass: adds up the partial sums of dx (over directions) and of dW (over channel
// slices), always in the same order, and takes dW through the normalisation. Preamble: SCALAR, VEC.
#include "common.cuh"

struct Parameters {
  const scalar_t *dx_partial;   // (D, B, H, W, C)
  const float *dweight_partial; // (slices, D, B, lines, 3, positions)
  const scalar_t *weight;
  scalar_t *dx, *dweight;       // (B, H, W, C), (B, H, W, D, G, 3); nullptr: not wanted
  int64 batch, height, width, channels, groups, directions, packed_directions, slices, normalize, blocks_of_dx;
  int64 apart;  // each direction of a part of the picture by a block of its own, for pictures of few parts
  int64 w_b, w_h, w_w, w_d, w_g;
};

__device__ __forceinline__ bool is_vertical(const Parameters& a, int slot) {
  const int direction = ((unsigned)a.packed_directions >> (2 * slot)) & 3;
  return direction == DOWN || direction == UP;
}

__device__ __forceinline__ void sum_dx(const Parameters& a) {
  const int64 count = a.batch * a.height * a.width * a.channels;
  for (int64 n = ((int64)blockIdx.x * blockDim.x + threadIdx.x) * VEC; n < count;
       n += a.blocks_of_dx * blockDim.x * VEC) {
    float sum[VEC], part[4][VEC];
#pragma unroll
    for (int d = 0; d < 4; ++d)
      if (d < a.directions) load(part[d], a.dx_partial + d * count + n);
#pragma unroll
    for (int j = 0; j < VEC; ++j) sum[j] = part[0][j];
#pragma unroll
    for (int d = 1; d < 4; ++d)
      if (d < a.directions) {
#pragma unroll
        for (int j = 0; j < VEC; ++j) sum[j] += part[d][j];
      }
    store(a.dx + n, sum);
  }
}

// Of a part of the picture, for one weight group, the sums over the slices: where the scan is over columns, positions
// lie along the picture's columns in the partial sums and along its rows in the result.
enum { TILE_ROWS = 16, TILE_COLUMNS = 32, TILE_PIXELS = TILE_ROWS * TILE_COLUMNS, THREADS = 256 };
// Chosen so that neither reading by (column, direction) nor writing by rows or by columns meets the same bank twice.
enum { TILE_PITCH = TILE_COLUMNS + 2, TILE_DIRECTION = 3 * TILE_ROWS * TILE_PITCH + 8 };

struct Part {
  int64 batch, group;
  int row, column;  // of its upper left corner
  int slot, slots;  // the first direction and how many
  __device__ __forceinline__ Part(const Parameters& a, int64 n, int across, int down) {
    slot = a.apart ? (int)(n % a.directions) : 0, slots = a.apart ? 1 : (int)a.directions;
    if (a.apart) n /= a.directions;
    column = (int)(n % across) * TILE_COLUMNS, n /= across;
    row = (int)(n % down) * TILE_ROWS, n /= down;
    group = n % a.groups, batch = n / a.groups;
  }
};

__device__ __forceinline__ void sum_slices(const Parameters& a, const Part& part, int slot, bool vertical, float* tile) {
  enum { ITEMS = 3 * TILE_PIXELS / THREADS };
  const int64 pixels = a.batch * a.height * a.width, per_group = a.slices / a.groups;
  const int positions = (int)(vertical ? a.width : a.height);
  const float* from = a.dweight_partial +
                      ((part.group * per_group * a.directions + slot) * pixels + part.batch * a.height * a.width) * 3;
  int64 at[ITEMS];
  int to[ITEMS];
  float sum[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int n = threadIdx.x + i * THREADS, k = n / TILE_PIXELS, pixel = n % TILE_PIXELS;
    const int r = vertical ? pixel / TILE_COLUMNS : pixel % TILE_ROWS;
    const int c = vertical ? pixel % TILE_COLUMNS : pixel / TILE_ROWS;
    const int row = part.row + r, column = part.column + c;
    const int p = vertical ? column : row, line = vertical ? row : column;
    at[i] = row < a.height && column < a.width ? ((int64)line * 3 + k) * positions + p : -1;
    to[i] = (k * TILE_ROWS + r) * TILE_PITCH + c;
    sum[i] = 0.0f;
  }
  for (int64 s = 0; s < per_group; ++s, from += a.directions * pixels * 3) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
      if (at[i] >= 0) sum[i] += from[at[i]];
  }
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) tile[to[i]] = sum[i];
}

__device__ __forceinline__ void sum_dweight(const Parameters& a) {
  SHARED_MEMORY(shared);
  float* const tile = reinterpret_cast<float*>(shared);  // [slots][TILE_DIRECTION]
  const int across = (int)((a.width + TILE_COLUMNS - 1) / TILE_COLUMNS), directions = (int)a.directions;
  const int down = (int)((a.height + TILE_ROWS - 1) / TILE_ROWS);
  const int64 parts = a.batch * a.groups * down * across * (a.apart ? directions : 1);
  for (int64 n = blockIdx.x - a.blocks_of_dx; n < parts; n += gridDim.x - a.blocks_of_dx) {
    const Part part(a, n, across, down);
    for (int i = 0; i < part.slots; ++i)
      sum_slices(a, part, part.slot + i, is_vertical(a, part.slot + i), tile + i * TILE_DIRECTION);
    __syncthreads();
    for (int item = threadIdx.x; item < part.slots * TILE_PIXELS; item += THREADS) {
      const int i = item % part.slots, slot = part.slot + i, pixel = item / part.slots;
      const int r = pixel / TILE_COLUMNS, c = pixel % TILE_COLUMNS, row = part.row + r, column = part.column + c;
      if (row >= a.height || column >= a.width) continue;
      const bool vertical = is_vertical(a, slot);
      const int p = vertical ? column : row, positions = (int)(vertical ? a.width : a.height);
      float grad[3];
#pragma unroll
      for (int k = 0; k < 3; ++k) grad[k] = tile[i * TILE_DIRECTION + (k * TILE_ROWS + r) * TILE_PITCH + c];
      if (a.normalize) {
        const scalar_t* const raw =
            a.weight + part.batch * a.w_b + row * a.w_h + column * a.w_w + slot * a.w_d + part.group * a.w_g;
        weights_backward(grad, load_weights(raw, p, positions, true), raw, p, positions);
      }
      const int64 at = (part.batch * a.height + row) * a.width + column;
      scalar_t* const to = a.dweight + ((at * directions + slot) * a.groups + part.group) * 3;
#pragma unroll
      for (int k = 0; k < 3; ++k) to[k] = from_float(grad[k]);
    }
    __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) line_scan_finish(const __grid_constant__ Parameters a) {
  if (blockIdx.x < a.blocks_of_dx) {
    sum_dx(a);
  } else {
    sum_dweight(a);
  }
}
