// Raw coefficients to weights, the fast way: what the tiled and the warp kernels do for every position of a line.
#pragma once
#include "common.cuh"

// The same weights as load_weights with one division. sigmoid(r_k) is proportional to 1 / a_k with
// a_k = exp(m) + exp(m - r_k), so weight k is the product of the other two a over the sum of such products.
// The exponents stop at 40: a weight below exp(-40) is rounding error beside the others.
__device__ __forceinline__ Weights make_weights(const float (&raw)[3], bool has_before, bool has_after, bool normalize) {
  Weights out = {{has_before ? raw[0] : 0.0f, raw[1], has_after ? raw[2] : 0.0f}};
  if (!normalize) return out;
  float m = raw[1];
  m = has_before ? fmaxf(m, raw[0]) : m;
  m = has_after ? fmaxf(m, raw[2]) : m;
  m = fminf(m, 0.0f);
  const float offset = fast_exp(m);
  float a[3];
#pragma unroll
  for (int k = 0; k < 3; ++k) a[k] = offset + fast_exp(fminf(m - raw[k], 40.0f));
  const float before = has_before ? a[0] : 1.0f, after = has_after ? a[2] : 1.0f;
  out.w[0] = has_before ? a[1] * after : 0.0f;
  out.w[1] = before * after;
  out.w[2] = has_after ? a[1] * before : 0.0f;
  const float scale = fast_reciprocal(out.w[0] + out.w[1] + out.w[2]);
#pragma unroll
  for (int k = 0; k < 3; ++k) out.w[k] *= scale;
  return out;
}
