// Backward line scan: gradients of x, weight, lam and u in one launch.
//
//   g[i] = u[i] dy[i] + W[i+1]^T g[i+1]
//   dx = lam g (summed over the directions afterwards), dlam = x g, du = h dy,
//   dW[i][p, k] = sum over the group's channels of g[i, p] h[i-1, p+k-1], then through the normalisation.
//
// Every sum runs in a fixed order, without atomics: the gradients are the same from run to run.
// Derivation: gspn2_diffusion/ops/README.md. Preamble: SCALAR, VEC.
// u == nullptr means 1; state holds the hidden states that the forward pass kept.
#include "common.cuh"

// d raw from d W of one position; sigmoid(-raw) = 1 - sigmoid(raw).
__device__ __forceinline__ void weights_backward(float (&grad)[3], const Weights& w, const scalar_t* raw, int p,
                                                 int positions) {
  const float mean = w.w[0] * grad[0] + w.w[1] * grad[1] + w.w[2] * grad[2];
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    const bool has = k == 1 || (k == 0 ? p > 0 : p + 1 < positions);
    // A line of one position has one neighbour of weight 1, whatever its coefficient: exactly no gradient.
    grad[k] = has && positions > 1 ? w.w[k] * (grad[k] - mean) / (1.0f + expf(to_float(raw[k]))) : 0.0f;
  }
}

extern "C" __global__ void __launch_bounds__(512) line_scan_backward(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x, const scalar_t* __restrict__ weight,
    const scalar_t* __restrict__ lam, const scalar_t* __restrict__ u, const scalar_t* __restrict__ state,
    float* __restrict__ dx,       // (D, B, H, W, C)
    float* __restrict__ dweight,  // (channel slices, B, H, W, D, G, 3)
    scalar_t* __restrict__ dlam, scalar_t* __restrict__ du, float* __restrict__ scratch, const int64 normalize,
    SHAPE_PARAMETERS, const int64 y_b, const int64 y_h, const int64 y_w, const int64 y_d, const int64 x_b, const int64 x_h,
    const int64 x_w, const int64 w_b, const int64 w_h, const int64 w_w, const int64 w_d, const int64 w_g,
    const int64 l_b, const int64 l_h, const int64 l_w, const int64 l_d, const int64 u_b, const int64 u_h,
    const int64 u_w, const int64 u_d) {
  extern __shared__ __align__(16) float shared[];
  const Shape shape = SHAPE_FROM_PARAMETERS;
  const Task k = make_task(shape);
  if (k.begin >= k.end) return;

  // Two lines of g, [position][lane][VEC], then two lines of weights, [position][group][3].
  const int64 line_size = (int64)k.positions * k.lanes * VEC;
  const int64 weight_line = (int64)k.positions * shape.groups_per_block * 3;
  const int64 longest = max(shape.height, shape.width);
  float* const lines_of_g =
      scratch ? scratch + (int64)blockIdx.x * 2 * longest * (k.lanes * VEC + shape.groups_per_block * 3) : shared;
  float* const lines_of_w = lines_of_g + 2 * line_size;

  const int64 o_w = (int64)shape.directions * shape.channels, o_h = o_w * shape.width;
  const int64 o_base = k.batch * o_h * shape.height + (int64)k.slot * shape.channels + k.channel;
  const int64 s_w = shape.channels, s_h = s_w * shape.width, s_b = s_h * shape.height;
  const int64 dw_w = (int64)shape.directions * shape.groups * 3, dw_h = dw_w * shape.width, dw_b = dw_h * shape.height;
  const View vy = view_along(k.direction, k.lines, k.batch * y_b + k.slot * y_d + k.channel, y_h, y_w);
  const View vx = view_along(k.direction, k.lines, k.batch * x_b + k.channel, x_h, x_w);
  const View vw = view_along(k.direction, k.lines, k.batch * w_b + k.slot * w_d + k.group * w_g, w_h, w_w);
  const View vl = view_along(k.direction, k.lines, k.batch * l_b + k.slot * l_d + k.channel, l_h, l_w);
  const View vu = view_along(k.direction, k.lines, k.batch * u_b + k.slot * u_d + k.channel, u_h, u_w);
  const View vo = view_along(k.direction, k.lines, o_base, o_h, o_w);
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
      const scalar_t* const raw = weight + vw.at(i, p);
      Weights w = {{0.0f, 0.0f, 0.0f}};
      if (k.active) {
        w = load_weights(raw, p, k.positions, normalize);
        float g[VEC], other[VEC], hidden[VEC], result[VEC];
        load(g, dy + vy.at(i, p));
        load(hidden, state + vo.at(i, p));
        if (u) {
          load(other, u + vu.at(i, p));
#pragma unroll
          for (int j = 0; j < VEC; ++j) result[j] = hidden[j] * g[j], g[j] *= other[j];
          store(du + vo.at(i, p), result);
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
        load(other, x + vx.at(i, p));
#pragma unroll
        for (int j = 0; j < VEC; ++j) result[j] = other[j] * g[j];
        store(dlam + vo.at(i, p), result);
        load(other, lam + vl.at(i, p));
        float* const dx_here = dx + vdx.at(i, p);
#pragma unroll
        for (int j = 0; j < VEC; ++j) dx_here[j] = other[j] * g[j];
        if (i > k.begin) {
#pragma unroll
          for (int n = 0; n < 3; ++n) {
            const int q = p + n - 1;
            if (q < 0 || q >= k.positions) continue;
            load(hidden, state + vo.at(i - 1, q));
#pragma unroll
            for (int j = 0; j < VEC; ++j) dw[n] = fmaf(g[j], hidden[j], dw[n]);
          }
        }
      }
      for (int offset = shape.lanes_per_group / 2; offset > 0; offset /= 2) {
#pragma unroll
        for (int n = 0; n < 3; ++n) dw[n] += __shfl_xor_sync(group_mask, dw[n], offset);
      }
      if (k.active && k.group_lane == 0) {
        if (normalize) weights_backward(dw, w, raw, p, k.positions);
        float* const dw_here = dweight + vdw.at(i, p);
#pragma unroll
        for (int n = 0; n < 3; ++n) dw_here[n] = dw[n];
      }
    }
    __syncthreads();
  }
}
