// Forward line scan: all directions, batches, groups and channels in one launch.
//
//   h[i, p] = sum_k W[i, p, k] h[i-1, p+k-1] + lam[i, p] x[i, p],   y[i, p] = u[i, p] h[i, p]
//
// Derivation and layout: gspn2_diffusion/ops/README.md. Preamble: SCALAR, VEC.
// u == nullptr means 1; state == nullptr keeps no hidden states.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(512) line_scan_forward(
    const scalar_t* __restrict__ x, const scalar_t* __restrict__ weight, const scalar_t* __restrict__ lam,
    const scalar_t* __restrict__ u, scalar_t* __restrict__ y, scalar_t* __restrict__ state,
    float* __restrict__ scratch, const int64 normalize, SHAPE_PARAMETERS, const int64 x_b, const int64 x_h, const int64 x_w,
    const int64 w_b, const int64 w_h, const int64 w_w, const int64 w_d, const int64 w_g, const int64 l_b,
    const int64 l_h, const int64 l_w, const int64 l_d, const int64 u_b, const int64 u_h, const int64 u_w,
    const int64 u_d) {
  extern __shared__ __align__(16) float shared[];
  const Shape shape = SHAPE_FROM_PARAMETERS;
  const Task k = make_task(shape);
  if (k.begin >= k.end) return;  // directions with fewer lines have fewer chunks

  // Two lines of h, [position][lane][VEC]: the previous line is read while the next is written.
  const int64 line_size = (int64)k.positions * k.lanes * VEC;
  float* const lines_of_h = scratch ? scratch + (int64)blockIdx.x * 2 * max(shape.height, shape.width) * k.lanes * VEC
                                    : shared;
  const int64 o_w = (int64)shape.directions * shape.channels, o_h = o_w * shape.width;
  const int64 o_base = k.batch * o_h * shape.height + (int64)k.slot * shape.channels + k.channel;
  const View vx = view_along(k.direction, k.lines, k.batch * x_b + k.channel, x_h, x_w);
  const View vw = view_along(k.direction, k.lines, k.batch * w_b + k.slot * w_d + k.group * w_g, w_h, w_w);
  const View vl = view_along(k.direction, k.lines, k.batch * l_b + k.slot * l_d + k.channel, l_h, l_w);
  const View vu = view_along(k.direction, k.lines, k.batch * u_b + k.slot * u_d + k.channel, u_h, u_w);
  const View vo = view_along(k.direction, k.lines, o_base, o_h, o_w);

  for (int i = k.begin; i < k.end; ++i) {
    const float* const previous = lines_of_h + ((i + 1) & 1) * line_size;
    float* const current = lines_of_h + (i & 1) * line_size;
    if (k.active) {
      for (int p = k.first; p < k.positions; p += k.step) {
        float h[VEC], gate[VEC];
        load(h, x + vx.at(i, p));
        load(gate, lam + vl.at(i, p));
#pragma unroll
        for (int j = 0; j < VEC; ++j) h[j] *= gate[j];
        const int64 here = ((int64)p * k.lanes + k.lane) * VEC;
        if (i > k.begin) {
          const Weights w = load_weights(weight + vw.at(i, p), p, k.positions, normalize);
          const float* const source = previous + here;
          const int row = k.lanes * VEC;
#pragma unroll
          for (int j = 0; j < VEC; ++j) {
            h[j] = fmaf(w.w[1], source[j], h[j]);
            if (p > 0) h[j] = fmaf(w.w[0], source[j - row], h[j]);
            if (p + 1 < k.positions) h[j] = fmaf(w.w[2], source[j + row], h[j]);
          }
        }
#pragma unroll
        for (int j = 0; j < VEC; ++j) current[here + j] = h[j];
        if (state) store(state + vo.at(i, p), h);
        if (u) {
          load(gate, u + vu.at(i, p));
#pragma unroll
          for (int j = 0; j < VEC; ++j) h[j] *= gate[j];
        }
        store(y + vo.at(i, p), h);
      }
    }
    __syncthreads();
  }
}
