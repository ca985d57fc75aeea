// Backward line scan: gradients of x, weight, lam and u in one launch.
//
//   g[i] = u[i] dy[i] + W[i+1]^T g[i+1]
//   dx = lam g (summed over the directions afterwards), dlam = x g, du = h dy,
//   dW[i][p, k] = sum over the group's channels of g[i, p] h[i-1, p+k-1], then through the normalisation.
//
// Every sum runs in a fixed order, without atomics: the gradients are the same from run to run.
// Derivation: gspn2_diffusion/ops/README.md. Preamble: SCALAR, VEC.
// u == nullptr means 1; state holds the hidden states that the forward pass kept; a gradient that is nullptr is not wanted.
#include "common.cuh"

struct Parameters {
  const scalar_t *dy, *x, *weight, *lam, *u, *state;
  float *dx, *dweight;  // (D, B, H, W, C) and (channel slices, B, H, W, D, G, 3): partial sums
  scalar_t *dlam, *du;
  float* scratch;
  int64 normalize;
  ShapeParameters shape;
  int64 y_b, y_h, y_w, y_d, x_b, x_h, x_w, w_b, w_h, w_w, w_d, w_g, l_b, l_h, l_w, l_d, u_b, u_h, u_w, u_d;
  int64 o_b, o_h, o_w, o_d;  // state, dlam, du
};

extern "C" __global__ void __launch_bounds__(512) line_scan_backward(const __grid_constant__ Parameters a) {
  SHARED_MEMORY(bytes);
  float* const shared = reinterpret_cast<float*>(bytes);
  const Shape shape = make_shape(a.shape);
  const Task k = make_task(shape);
  if (k.begin >= k.end) return;

  // Two lines of g, [position][lane][VEC], then two lines of weights, [position][group][3].
  const int64 line_size = (int64)k.positions * k.lanes * VEC;
  const int64 weight_line = (int64)k.positions * shape.groups_per_block * 3;
  const int64 longest = max(shape.height, shape.width);
  float* const lines_of_g =
      a.scratch ? a.scratch + (int64)blockIdx.x * 2 * longest * (k.lanes * VEC + shape.groups_per_block * 3) : shared;
  float* const lines_of_w = lines_of_g + 2 * line_size;

  const int64 s_w = shape.channels, s_h = s_w * shape.width, s_b = s_h * shape.height;
  const int64 dw_w = (int64)shape.directions * shape.groups * 3, dw_h = dw_w * shape.width, dw_b = dw_h * shape.height;
  const View vy = view_along(k.direction, k.lines, k.batch * a.y_b + k.slot * a.y_d + k.channel, a.y_h, a.y_w);
  const View vx = view_along(k.direction, k.lines, k.batch * a.x_b + k.channel, a.x_h, a.x_w);
  const View vw = view_along(k.direction, k.lines, k.batch * a.w_b + k.slot * a.w_d + k.group * a.w_g, a.w_h, a.w_w);
  const View vl = view_along(k.direction, k.lines, k.batch * a.l_b + k.slot * a.l_d + k.channel, a.l_h, a.l_w);
  const View vu = view_along(k.direction, k.lines, k.batch * a.u_b + k.slot * a.u_d + k.channel, a.u_h, a.u_w);
  const View vo = view_along(k.direction, k.lines, k.batch * a.o_b + k.slot * a.o_d + k.channel, a.o_h, a.o_w);
  const View vdx =
      view_along(k.direction, k.lines, (k.slot * (int64)shape.batch + k.batch) * s_b + k.channel, s_h, s_w);
  const View vdw = view_along(k.direction, k.lines,
                              (k.channel_slice * (int64)shape.batch + k.batch) * dw_b +
                                  ((int64)k.slot * shape.groups + k.group) * 3,
                              dw_h, dw_w);
  const unsigned group_mask = (shape.lanes_per_group == 32 ? 0xffffffffu : ((1u << shape.lanes_per_group) - 1u))
                              << ((threadIdx.x & 31) / shape.lanes_per_group * shape.lanes_per_group);
  const int row = k.lanes * VEC, weight_row = shape.groups_per_block * 3;

  for (int i = k.end - 1; i >= k.begin; --i) {
    const float* const next_g = lines_of_g + ((i + 1) & 1) * line_size;
    float* const this_g = lines_of_g + (i & 1) * line_size;
    const float* const next_w = lines_of_w + ((i + 1) & 1) * weight_line;
    float* const this_w = lines_of_w + (i & 1) * weight_line;
    for (int p = k.first; p < k.positions; p += k.step) {
      float dw[3] = {0.0f, 0.0f, 0.0f};
      const scalar_t* const raw = a.weight + vw.at(i, p);
      Weights w = {{0.0f, 0.0f, 0.0f}};
      if (k.active) {
        w = load_weights(raw, p, k.positions, a.normalize);
        float g[VEC], other[VEC], hidden[VEC], result[VEC];
        load(g, a.dy + vy.at(i, p));
        load(hidden, a.state + vo.at(i, p));
        if (a.u) {
          load(other, a.u + vu.at(i, p));
#pragma unroll
          for (int j = 0; j < VEC; ++j) result[j] = hidden[j] * g[j], g[j] *= other[j];
          if (a.du) store(a.du + vo.at(i, p), result);
        }
        const int64 here = ((int64)p * k.lanes + k.lane) * VEC;
        if (i + 1 < k.end) {  // what the next line took from this position: W[i+1]^T g[i+1]
          const float* const source = next_g + here;
          const float* const taken = next_w + (int64)p * weight_row + k.group_in_block * 3;
#pragma unroll
          for (int j = 0; j < VEC; ++j) {
            g[j] = fmaf(taken[1], source[j], g[j]);
            if (p + 1 < k.positions) g[j] = fmaf(taken[weight_row], source[j + row], g[j]);
            if (p > 0) g[j] = fmaf(taken[2 - weight_row], source[j - row], g[j]);
          }
        }
#pragma unroll
        for (int j = 0; j < VEC; ++j) this_g[here + j] = g[j];
        if (k.group_lane == 0) {
#pragma unroll
          for (int n = 0; n < 3; ++n) this_w[(int64)p * weight_row + k.group_in_block * 3 + n] = w.w[n];
        }
        load(other, a.x + vx.at(i, p));
#pragma unroll
        for (int j = 0; j < VEC; ++j) result[j] = other[j] * g[j];
        if (a.dlam) store(a.dlam + vo.at(i, p), result);
        load(other, a.lam + vl.at(i, p));
        if (a.dx) {
          float* const dx_here = a.dx + vdx.at(i, p);
#pragma unroll
          for (int j = 0; j < VEC; ++j) dx_here[j] = other[j] * g[j];
        }
        if (a.dweight && i > k.begin) {
#pragma unroll
          for (int n = 0; n < 3; ++n) {
            const int q = p + n - 1;
            if (q < 0 || q >= k.positions) continue;
            load(hidden, a.state + vo.at(i - 1, q));
#pragma unroll
            for (int j = 0; j < VEC; ++j) dw[n] = fmaf(g[j], hidden[j], dw[n]);
          }
        }
      }
      for (int offset = shape.lanes_per_group / 2; offset > 0; offset /= 2) {
#pragma unroll
        for (int n = 0; n < 3; ++n) dw[n] += shuffle_xor(dw[n], offset, group_mask);
      }
      if (a.dweight && k.active && k.group_lane == 0) {
        if (a.normalize) weights_backward(dw, w, raw, p, k.positions);
        float* const dw_here = a.dweight + vdw.at(i, p);
#pragma unroll
        for (int n = 0; n < 3; ++n) dw_here[n] = dw[n];
      }
    }
    __syncthreads();
  }
}
