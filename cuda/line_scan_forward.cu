// Forward line scan: all directions, batches, groups and channels in one launch.
//
//   h[i, p] = sum_k W[i, p, k] h[i-1, p+k-1] + lam[i, p] x[i, p],   y[i, p] = u[i, p] h[i, p]
//
// Derivation and layout: gspn2_diffusion/ops/README.md. Preamble: SCALAR, VEC.
// u == nullptr means 1; state == nullptr keeps no hidden states.
#include "common.cuh"

struct Parameters {
  const scalar_t *x, *weight, *lam, *u;
  scalar_t *y, *state;
  float* scratch;
  int64 normalize;
  ShapeParameters shape;
  int64 x_b, x_h, x_w, w_b, w_h, w_w, w_d, w_g, l_b, l_h, l_w, l_d, u_b, u_h, u_w, u_d, y_b, y_h, y_w, y_d;
};

extern "C" __global__ void __launch_bounds__(512) line_scan_forward(const __grid_constant__ Parameters a) {
  SHARED_MEMORY(bytes);
  float* const shared = reinterpret_cast<float*>(bytes);
  const Shape shape = make_shape(a.shape);
  const Task k = make_task(shape);
  if (k.begin >= k.end) return;  // directions with fewer lines have fewer chunks

  // Two lines of h, [position][lane][VEC]: the previous line is read while the next is written.
  const int64 line_size = (int64)k.positions * k.lanes * VEC;
  float* const lines_of_h = a.scratch ? a.scratch + (int64)blockIdx.x * 2 * max(shape.height, shape.width) * k.lanes * VEC
                                    : shared;
  const View vx = view_along(k.direction, k.lines, k.batch * a.x_b + k.channel, a.x_h, a.x_w);
  const View vw = view_along(k.direction, k.lines, k.batch * a.w_b + k.slot * a.w_d + k.group * a.w_g, a.w_h, a.w_w);
  const View vl = view_along(k.direction, k.lines, k.batch * a.l_b + k.slot * a.l_d + k.channel, a.l_h, a.l_w);
  const View vu = view_along(k.direction, k.lines, k.batch * a.u_b + k.slot * a.u_d + k.channel, a.u_h, a.u_w);
  const View vo = view_along(k.direction, k.lines, k.batch * a.y_b + k.slot * a.y_d + k.channel, a.y_h, a.y_w);

  for (int i = k.begin; i < k.end; ++i) {
    const float* const previous = lines_of_h + ((i + 1) & 1) * line_size;
    float* const current = lines_of_h + (i & 1) * line_size;
    if (k.active) {
      for (int p = k.first; p < k.positions; p += k.step) {
        float h[VEC], gate[VEC];
        load(h, a.x + vx.at(i, p));
        load(gate, a.lam + vl.at(i, p));
#pragma unroll
        for (int j = 0; j < VEC; ++j) h[j] *= gate[j];
        const int64 here = ((int64)p * k.lanes + k.lane) * VEC;
        if (i > k.begin) {
          const Weights w = load_weights(a.weight + vw.at(i, p), p, k.positions, a.normalize);
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
        if (a.state) store(a.state + vo.at(i, p), h);
        if (a.u) {
          load(gate, a.u + vu.at(i, p));
#pragma unroll
          for (int j = 0; j < VEC; ++j) h[j] *= gate[j];
        }
        store(a.y + vo.at(i, p), h);
      }
    }
    __syncthreads();
  }
}
