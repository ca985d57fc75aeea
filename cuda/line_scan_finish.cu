// Second half of the tiled backward pass: adds up the partial sums of dx (over directions) and of dW (over channel
// slices), always in the same order, and takes dW through the normalisation. Preamble: SCALAR, VEC.
#include "weights.cuh"

struct Parameters {
  const scalar_t *dx_partial;   // (D, B, H, W, C)
  const float *dweight_partial; // (slices, D, B, lines, 3, positions)
  const scalar_t *weight;
  scalar_t *dx, *dweight;       // (B, H, W, C), (B, H, W, D, G, 3); nullptr: not wanted
  int64 batch, height, width, channels, groups, directions, packed_directions, slices, normalize, blocks_of_dx;
  int64 apart;  // each direction of a part of the picture by a block of its own, for pictures of few parts
  int64 share;  // warps that share the slices of 32 positions, a power of two; 0: sums by parts of the picture
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

enum { THREADS = 256, WARPS = THREADS / 32 };

// From the gradient of three weights, whose coefficients and result lie at `raw` and `to`.
__device__ __forceinline__ void store_dweight(const Parameters& a, scalar_t* to, const scalar_t* raw, int p,
                                              int positions, float (&grad)[3]) {
  if (a.normalize) {
    const bool has_before = p > 0, has_after = p + 1 < positions;
    const float r[3] = {has_before ? to_float(raw[0]) : 0.0f, to_float(raw[1]), has_after ? to_float(raw[2]) : 0.0f};
    weights_backward(grad, make_weights(r, has_before, has_after, true), r, has_before, has_after);
  }
#pragma unroll
  for (int k = 0; k < 3; ++k) to[k] = from_float(grad[k]);
}

// ---- small pictures: 32 positions of a line at a time ---------------------------------------------
// The slices of one are shared by several warps, as there is not much else to do at the same time.

__device__ __forceinline__ void sum_lines(const Parameters& a, float* sums) {  // sums: [WARPS][3][32]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, share = (int)a.share;
  const int height = (int)a.height, width = (int)a.width, directions = (int)a.directions, groups = (int)a.groups;
  const int per_group = (int)a.slices / groups;
  const int pieces = max(height * ((width + 31) / 32), width * ((height + 31) / 32));  // of a direction, at most
  const int total = (int)a.batch * groups * directions * pieces, at_once = WARPS / share, mine = warp % share;
  const int64 pixels = a.batch * height * width, next_slice = directions * pixels * 3;
  for (int first = (int)(blockIdx.x - a.blocks_of_dx) * at_once; first < total;
       first += (int)(gridDim.x - a.blocks_of_dx) * at_once) {
    int n = first + warp / share;
    const int piece = n % pieces;
    n /= pieces;
    const int slot = n % directions;
    n /= directions;
    const int group = n % groups, batch = n / groups;
    const bool vertical = is_vertical(a, slot);
    const int positions = vertical ? width : height, across = (positions + 31) / 32;
    const int line = piece / across, p = piece % across * 32 + lane;
    const bool there = batch < a.batch && line < (vertical ? height : width) && p < positions;
    float grad[3] = {0.0f, 0.0f, 0.0f};
    if (there) {
      const float* from = a.dweight_partial + ((int64)group * per_group + mine) * next_slice +
                          (slot * pixels + (int64)batch * height * width + (int64)line * positions) * 3 + p;
#pragma unroll 4
      for (int s = mine; s < per_group; s += share, from += share * next_slice) {
#pragma unroll
        for (int k = 0; k < 3; ++k) grad[k] += from[k * positions];
      }
    }
    if (share > 1) {
#pragma unroll
      for (int k = 0; k < 3; ++k) sums[(warp * 3 + k) * 32 + lane] = grad[k];
      __syncthreads();
      for (int other = warp + 1; mine == 0 && other < warp + share; ++other) {
#pragma unroll
        for (int k = 0; k < 3; ++k) grad[k] += sums[(other * 3 + k) * 32 + lane];
      }
      __syncthreads();
    }
    if (!there || mine) continue;
    const int row = vertical ? line : p, column = vertical ? p : line;
    const int64 at = (((int64)batch * height + row) * width + column) * directions + slot;
    const scalar_t* const raw = a.weight + batch * a.w_b + row * a.w_h + column * a.w_w + slot * a.w_d + group * a.w_g;
    store_dweight(a, a.dweight + (at * groups + group) * 3, raw, p, positions, grad);
  }
}

// ---- others: a part of the picture at a time --------------------------------------------------------
// By way of shared memory: where the scan is over columns, positions lie along the picture's columns in the partial sums
// and along its rows in the result.

enum { TILE_ROWS = 16, TILE_COLUMNS = 32, TILE_PIXELS = TILE_ROWS * TILE_COLUMNS };
// Chosen so that neither reading by (column, direction) nor writing by rows or by columns meets the same bank twice.
enum { TILE_PITCH = TILE_COLUMNS + 2, TILE_DIRECTION = 3 * TILE_ROWS * TILE_PITCH + 8 };

struct Part {
  int64 batch, group;
  int row, column;  // of its upper left corner
  int slot;         // the first direction
  __device__ __forceinline__ Part(const Parameters& a, unsigned n, unsigned across, unsigned down) {
    slot = a.apart ? (int)(n % (unsigned)a.directions) : 0;
    if (a.apart) n /= (unsigned)a.directions;
    column = (int)(n % across) * TILE_COLUMNS, n /= across;
    row = (int)(n % down) * TILE_ROWS, n /= down;
    group = n % (unsigned)a.groups, batch = n / (unsigned)a.groups;
  }
};

// Of two pixels, half a part from each other.
__device__ __forceinline__ void sum_slices(const Parameters& a, const Part& part, int slot, bool vertical, float* tile) {
  enum { HALF = TILE_PIXELS / THREADS };
  const int64 pixels = a.batch * a.height * a.width;
  const int per_group = (int)a.slices / (int)a.groups;
  const int across = vertical ? TILE_COLUMNS : TILE_ROWS, positions = (int)(vertical ? a.width : a.height);
  const int q = threadIdx.x % across, l = threadIdx.x / across, apart = THREADS / across;  // position, line, lines
  const int first_line = vertical ? part.row : part.column, first = vertical ? part.column : part.row;
  const int lines = (int)(vertical ? a.height : a.width) - first_line;
  const int64 picture = (part.group * per_group * a.directions + slot) * pixels + part.batch * a.height * a.width;
  const float* from = a.dweight_partial + picture * 3 + (int64)(first_line + l) * 3 * positions + first + q;
  const int64 next_slice = a.directions * pixels * 3, next = (int64)apart * 3 * positions;
  bool there[HALF];
  float sum[HALF][3];
#pragma unroll
  for (int i = 0; i < HALF; ++i) {
    there[i] = first + q < positions && l + i * apart < lines;
#pragma unroll
    for (int k = 0; k < 3; ++k) sum[i][k] = 0.0f;
  }
#pragma unroll 2
  for (int s = 0; s < per_group; ++s, from += next_slice) {
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
#pragma unroll
      for (int k = 0; k < 3; ++k)
        if (there[i]) sum[i][k] += from[i * next + k * positions];
    }
  }
  tile += vertical ? l * TILE_PITCH + q : q * TILE_PITCH + l;
#pragma unroll
  for (int i = 0; i < HALF; ++i) {
#pragma unroll
    for (int k = 0; k < 3; ++k) tile[k * TILE_ROWS * TILE_PITCH + i * apart * (vertical ? TILE_PITCH : 1)] = sum[i][k];
  }
}

__device__ __forceinline__ void sum_parts(const Parameters& a, float* tile) {  // tile: [slots][TILE_DIRECTION]
  const unsigned across = ((unsigned)a.width + TILE_COLUMNS - 1) / TILE_COLUMNS;
  const unsigned down = ((unsigned)a.height + TILE_ROWS - 1) / TILE_ROWS;
  const int directions = (int)a.directions, slots = a.apart ? 1 : directions;
  // A thread keeps to one direction, so that what depends on it is found once.
  const int mine = threadIdx.x % slots, step = THREADS / slots, begin = threadIdx.x / slots;
  const unsigned parts = (unsigned)(a.batch * a.groups) * down * across * (a.apart ? directions : 1);
  for (unsigned n = blockIdx.x - (unsigned)a.blocks_of_dx; n < parts; n += gridDim.x - (unsigned)a.blocks_of_dx) {
    const Part part(a, n, across, down);
    for (int i = 0; i < slots; ++i)
      sum_slices(a, part, part.slot + i, is_vertical(a, part.slot + i), tile + i * TILE_DIRECTION);
    __syncthreads();
    const int slot = part.slot + mine;
    const bool vertical = is_vertical(a, slot);
    const int positions = (int)(vertical ? a.width : a.height);
    const scalar_t* const raw =
        a.weight + part.batch * a.w_b + part.row * a.w_h + part.column * a.w_w + slot * a.w_d + part.group * a.w_g;
    const int64 at = (part.batch * a.height + part.row) * a.width + part.column;
    const int pitch = directions * (int)a.groups * 3;
    scalar_t* const to = a.dweight + at * pitch + (slot * a.groups + part.group) * 3;
    for (int pixel = begin; begin < step && pixel < TILE_PIXELS; pixel += step) {
      const int r = pixel / TILE_COLUMNS, c = pixel % TILE_COLUMNS;
      if (part.row + r >= a.height || part.column + c >= a.width) continue;
      float grad[3];
#pragma unroll
      for (int k = 0; k < 3; ++k) grad[k] = tile[mine * TILE_DIRECTION + (k * TILE_ROWS + r) * TILE_PITCH + c];
      const int p = vertical ? part.column + c : part.row + r;
      store_dweight(a, to + (r * a.width + c) * pitch, raw + r * a.w_h + c * a.w_w, p, positions, grad);
    }
    __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) line_scan_finish(const __grid_constant__ Parameters a) {
  SHARED_MEMORY(shared);
  float* const room = reinterpret_cast<float*>(shared);
  if (blockIdx.x < a.blocks_of_dx) {
    sum_dx(a);
  } else if (a.share) {
    sum_lines(a, room);
  } else {
    sum_parts(a, room);
  }
}
