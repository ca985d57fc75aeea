// Second half of the tiled backward pass: adds up the partial sums of dx (over directions) and of dW (over channel
// slices), always in the same order, and takes dW through the normalisation. Preamble: SCALAR, VEC.
#include "common.cuh"

struct Parameters {
  const scalar_t *dx_partial;   // (D, B, H, W, C)
  const float *dweight_partial; // (slices, D, B, lines, 3, positions)
  const scalar_t *weight;
  scalar_t *dx, *dweight;       // (B, H, W, C), (B, H, W, D, G, 3); nullptr: not wanted
  int64 batch, height, width, channels, groups, directions, packed_directions, slices, normalize, blocks_of_dx;
  int64 w_b, w_h, w_w, w_d, w_g;
};

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

__device__ __forceinline__ void sum_dweight(const Parameters& a) {
  const int64 pixels = a.batch * a.height * a.width, count = pixels * a.directions * a.groups;
  const int per_group = (int)(a.slices / a.groups);
  const int64 stride = (gridDim.x - a.blocks_of_dx) * blockDim.x;
  for (int64 n = (blockIdx.x - a.blocks_of_dx) * blockDim.x + threadIdx.x; n < count; n += stride) {
    const int group = (int)(n % a.groups), slot = (int)(n / a.groups % a.directions);
    const int64 pixel = n / (a.groups * a.directions);
    const int column = (int)(pixel % a.width), row = (int)(pixel / a.width % a.height);
    const int64 batch = pixel / (a.width * a.height);
    const int direction = ((unsigned)a.packed_directions >> (2 * slot)) & 3;
    const bool vertical = direction == DOWN || direction == UP;
    const int p = vertical ? column : row, positions = (int)(vertical ? a.width : a.height);
    const int line = vertical ? row : column;
    const float* part = a.dweight_partial + (((int64)group * per_group * a.directions + slot) * pixels +
                                             batch * a.height * a.width + (int64)line * positions) * 3 + p;
    float grad[3] = {0.0f, 0.0f, 0.0f};
    for (int s = 0; s < per_group; ++s) {
#pragma unroll
      for (int k = 0; k < 3; ++k) grad[k] += part[k * positions];
      part += a.directions * pixels * 3;
    }
    if (a.normalize) {
      const scalar_t* const raw =
          a.weight + batch * a.w_b + row * a.w_h + column * a.w_w + slot * a.w_d + group * a.w_g;
      weights_backward(grad, load_weights(raw, p, positions, true), raw, p, positions);
    }
#pragma unroll
    for (int k = 0; k < 3; ++k) a.dweight[n * 3 + k] = from_float(grad[k]);
  }
}

extern "C" __global__ void __launch_bounds__(256) line_scan_finish(const __grid_constant__ Parameters a) {
  if (blockIdx.x < a.blocks_of_dx) {
    sum_dx(a);
  } else {
    sum_dweight(a);
  }
}
