// The scheme of GSPN-1 (arXiv 2501.12381), written anew from the paper as the bar that the line scan is measured
// against: NCHW, weights for every channel, one launch for every line, 512 flat threads. Already normalised weights.
//
// Preamble: element = a CUDA half type's bits as bfloat16.
typedef unsigned short element;

__device__ __forceinline__ float value(element e) { return __uint_as_float((unsigned)e << 16); }
__device__ __forceinline__ element rounded(float f) {
  element e;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(e) : "f"(f));
  return e;
}

struct Line {
  long long images;             // batch times channels
  long long positions, area;    // of a line, of a picture
  long long here, before, step; // offsets of this line and of the one before, distance of two positions
};

#define LINE_ARGUMENTS \
  long long images, long long positions, long long area, long long here, long long before, long long step

__device__ __forceinline__ bool locate(const Line& l, long long& at, int& p) {
  const long long n = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (n >= l.images * l.positions) return false;
  p = (int)(n % l.positions);
  at = n / l.positions * l.area + p * l.step;
  return true;
}

extern "C" __global__ void forward_line(const element* x, const element* lam, const element* w0, const element* w1,
                                        const element* w2, const element* u, element* h, element* y, const LINE_ARGUMENTS) {
  const Line l = {images, positions, area, here, before, step};
  long long at;
  int p;
  if (!locate(l, at, p)) return;
  const long long i = at + l.here, j = at + l.before;
  float sum = value(lam[i]) * value(x[i]);
  if (l.before >= 0) {
    sum += value(w1[i]) * value(h[j]);
    if (p > 0) sum += value(w0[i]) * value(h[j - l.step]);
    if (p + 1 < l.positions) sum += value(w2[i]) * value(h[j + l.step]);
  }
  h[i] = rounded(sum);
  y[i] = rounded(value(u[i]) * sum);
}

// `before` is the line that the scan visited after this one: the gradient comes from there.
extern "C" __global__ void backward_line(const element* dy, const element* x, const element* lam, const element* w0,
                                         const element* w1, const element* w2, const element* u, const element* h,
                                         element* g, element* dx, element* dlam, element* d0, element* d1, element* d2,
                                         element* du, const LINE_ARGUMENTS, const long long earlier) {
  const Line l = {images, positions, area, here, before, step};
  long long at;
  int p;
  if (!locate(l, at, p)) return;
  const long long i = at + l.here, j = at + l.before;
  float sum = value(u[i]) * value(dy[i]);
  if (l.before >= 0) {
    sum += value(w1[j]) * value(g[j]);
    if (p > 0) sum += value(w2[j - l.step]) * value(g[j - l.step]);
    if (p + 1 < l.positions) sum += value(w0[j + l.step]) * value(g[j + l.step]);
  }
  g[i] = rounded(sum);
  dx[i] = rounded(value(lam[i]) * sum);
  dlam[i] = rounded(value(x[i]) * sum);
  du[i] = rounded(value(h[i]) * value(dy[i]));
  if (earlier < 0) {
    d0[i] = d1[i] = d2[i] = 0;
    return;
  }
  const long long e = at + earlier;
  d1[i] = rounded(sum * value(h[e]));
  d0[i] = p > 0 ? rounded(sum * value(h[e - l.step])) : 0;
  d2[i] = p + 1 < l.positions ? rounded(sum * value(h[e + l.step])) : 0;
}
