// Raw coefficients to weights, the fast way: what the tiled and the plane kernels do for every position of a line.
#pragma once
#include "common.cuh"

// The same weights as load_weights with one division. sigmoid(r_k) is proportional to 1 / a_k with
// a_k = exp(m) + exp(m - r_k), so weight k is the product of the other two a over the sum of such products. The
// exponents, of two, stop at 58: a weight below 2^-58 is rounding error beside the others, so a neighbour that does not
// exist only needs a coefficient of minus infinity, and its own weight set to zero.
__device__ __forceinline__ Weights make_weights(const float (&raw)[3], bool has_before, bool has_after, bool normalize,
                                                bool counts = true) {
  Weights out = {{has_before ? raw[0] : 0.0f, raw[1], has_after ? raw[2] : 0.0f}};
  if (!normalize) return counts ? out : Weights{{0.0f, 0.0f, 0.0f}};
  const float log2_e = 1.4426950408889634f, missing = -__uint_as_float(0x7f800000u);
  const float r[3] = {has_before ? raw[0] * log2_e : missing, raw[1] * log2_e, has_after ? raw[2] * log2_e : missing};
  const float m = fminf(fmaxf(r[1], fmaxf(r[0], r[2])), 0.0f), offset = fast_exp2(m);
  float a[3];
#pragma unroll
  for (int k = 0; k < 3; ++k) a[k] = offset + fast_exp2(fminf(m - r[k], 58.0f));
  const float w[3] = {a[1] * a[2], a[0] * a[2], a[0] * a[1]};
  const float scale = counts ? fast_reciprocal(w[0] + w[1] + w[2]) : 0.0f;
  out.w[0] = has_before ? w[0] * scale : 0.0f;
  out.w[1] = w[1] * scale;
  out.w[2] = has_after ? w[2] * scale : 0.0f;
  return out;
}

// The gradient of the coefficients in place of that of the weights: dr_k = w_k (1 - sigmoid(r_k)) (dw_k - sum of w dw).
__device__ __forceinline__ void weights_backward(float (&grad)[3], const Weights& made, const float (&raw)[3],
                                                 bool has_before, bool has_after) {
  const float log2_e = 1.4426950408889634f;
  const float mean = made.w[0] * grad[0] + made.w[1] * grad[1] + made.w[2] * grad[2];
  const bool has[3] = {has_before, has_before || has_after, has_after};  // one position alone: weight 1, whatever r is
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    const float slope = made.w[k] * fast_reciprocal(1.0f + fast_exp2(raw[k] * log2_e));
    grad[k] = has[k] ? slope * (grad[k] - mean) : 0.0f;
  }
}
