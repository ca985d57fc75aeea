// Forward line scan, a warp for itself: all directions, batches and channels in one launch.
//
//   h[i, p] = sum_k W[i, p, k] h[i-1, p+k-1] + lam[i, p] x[i, p],   y[i, p] = u[i, p] h[i, p]
//
// How the work is spread: warp.cuh and gspn2_diffusion/ops/README.md. Preamble: SCALAR, VEC, RUN. u == nullptr means 1;
// state == nullptr keeps no hidden states.
#include "warp.cuh"

struct Parameters {
  const scalar_t *x, *weight, *lam, *u;
  scalar_t *y, *state;
  Tiling tiling;
  int64 x_b, x_h, x_w, w_b, w_h, w_w, w_d, w_g, l_b, l_h, l_w, l_d, u_b, u_h, u_w, u_d, y_b, y_h, y_w, y_d;
};

enum { X = 0, LAM = RUN, U = 2 * RUN, SLOTS = 3 * RUN };

// A line as it lies in the ring.
struct Line {
  Vector x[RUN], lam[RUN], u[RUN];
  float4 w[RUN];
  __device__ __forceinline__ void load_from(const Memory<SLOTS>& m, const Weigher& weigher, int stage, int line, int place) {
    const float4* const weights = weigher.of(stage, line, place);
#pragma unroll
    for (int r = 0; r < RUN; ++r) {
      load_words(x[r].words, m.at(stage, line, X + r));
      load_words(lam[r].words, m.at(stage, line, LAM + r));
      load_words(u[r].words, m.at(stage, line, U + r));
      w[r] = weights[r];
    }
  }
};

// h of the next step: everything that needs no other warp before waiting for one.
__device__ __forceinline__ void advance(float (&h)[RUN][VEC], const Line& at, const Border& border, const Tile& k, int step) {
  float before[VEC], after[VEC], next[RUN][VEC];
  const float left = k.leads || k.idle ? 0.0f : at.w[0].x, right = k.trails || k.idle ? 0.0f : at.w[RUN - 1].z;
#pragma unroll
  for (int n = 0; n < VEC; ++n) {
    before[n] = shuffle_up(h[RUN - 1][n], k.lanes);
    after[n] = shuffle_down(h[0][n], k.lanes);
  }
#pragma unroll
  for (int r = 0; r < RUN; ++r) {
    float x[VEC], lam[VEC];
    to_floats(x, at.x[r]), to_floats(lam, at.lam[r]);
#pragma unroll
    for (int n = 0; n < VEC; ++n) {
      next[r][n] = fmaf(at.w[r].y, h[r][n], lam[n] * x[n]);
      next[r][n] = fmaf(r > 0 ? at.w[r].x : left, r > 0 ? h[r - 1][n] : before[n], next[r][n]);
      next[r][n] = fmaf(r < RUN - 1 ? at.w[r].z : right, r < RUN - 1 ? h[r + 1][n] : after[n], next[r][n]);
    }
  }
  if (border.there && step > 0) {
    border.receive(before, step - 1);
    const float w = k.leads ? at.w[0].x : at.w[RUN - 1].z;
#pragma unroll
    for (int n = 0; n < VEC; ++n) {
      if (RUN == 1 || k.leads) next[0][n] = fmaf(w, before[n], next[0][n]);
      if (RUN > 1 && !k.leads) next[RUN - 1][n] = fmaf(w, before[n], next[RUN - 1][n]);
    }
  }
#pragma unroll
  for (int r = 0; r < RUN; ++r)
#pragma unroll
    for (int n = 0; n < VEC; ++n) h[r][n] = next[r][n];
}

// What the neighbour beside this lane needs.
__device__ __forceinline__ void send_end(const float (&h)[RUN][VEC], const Border& border, const Tile& k, int step) {
  float end[VEC];
#pragma unroll
  for (int n = 0; n < VEC; ++n) end[n] = k.leads ? h[0][n] : h[RUN - 1][n];
  border.send(end, step);
}

template <int CLUSTER> __device__ __forceinline__ void line_scan(const Parameters& a) {
  SHARED_MEMORY(shared);
  const Tiling& t = a.tiling;
  const Tile k = make_tile<CLUSTER>(t);
  if (k.begin >= k.end) return;  // the whole cluster: directions with fewer lines have fewer chunks
  const Memory<SLOTS> m(shared, k, t);
  Border border;
  border.setup<CLUSTER>(m, k, t);
  start_together<CLUSTER>();
  if (k.start >= k.positions) return;  // the whole warp

  Source x(a.x, view_by_steps(k, k.batch * a.x_b + k.channel, a.x_h, a.x_w, false), k.first);
  Source lam(a.lam, view_by_steps(k, k.batch * a.l_b + k.slot * a.l_d + k.channel, a.l_h, a.l_w, false), k.first);
  Source u(a.u, view_by_steps(k, k.batch * a.u_b + k.slot * a.u_d + k.channel, a.u_h, a.u_w, false), k.first);
  Weigher weigher(
      a.weight, view_by_steps(k, k.batch * a.w_b + k.slot * a.w_d + k.group * a.w_g, a.w_h, a.w_w, false), m, k, t.normalize);
  const auto fetch = [&](int stage) {  // vectors of a stage, coefficients of the one after
    x.fetch(m, X, stage, k, k.total);
    lam.fetch(m, LAM, stage, k, k.total);
    if (a.u) u.fetch(m, U, stage, k, k.total);
    weigher.fetch(stage + 1);
    commit_copies_async();
  };
  const View vy = view_by_steps(k, k.batch * a.y_b + k.slot * a.y_d + k.channel, a.y_h, a.y_w, false);
  int64 out = vy.at(0, k.first);

  float h[RUN][VEC];
#pragma unroll
  for (int r = 0; r < RUN; ++r)
#pragma unroll
    for (int n = 0; n < VEC; ++n) h[r][n] = 0.0f;
  if (!a.u) fill_with_ones(m, U);
  weigher.fetch(0);
#pragma unroll 1
  for (int stage = 0; stage < STAGES - 1; ++stage) fetch(stage);

  const int stages = (k.total + LINES - 1) / LINES;
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    wait_copies_async<STAGES - 2>();
    if (stage == 0) {
      weigher.weigh(0, false);
      __syncwarp();
    }
    fetch(stage + STAGES - 1);  // into the place of the stage before this one
    weigher.weigh(stage + 1, true);
    Line line;
    line.load_from(m, weigher, stage, 0, k.place);
#pragma unroll
    for (int j = 0; j < LINES; ++j) {
      const int step = stage * LINES + j;
      if (step >= k.total) break;
      advance(h, line, border, k, step);
      if (border.there && step + 1 < k.total) send_end(h, border, k, step);
      Vector gate[RUN];
#pragma unroll
      for (int r = 0; r < RUN; ++r) gate[r] = line.u[r];
      if (j + 1 < LINES) line.load_from(m, weigher, stage, j + 1, k.place);
#pragma unroll
      for (int r = 0; r < RUN; ++r) {
        if (k.first + r >= k.positions) continue;
        if (a.state) store(a.state + out + r * vy.position, h[r]);
        float value[VEC];
        to_floats(value, gate[r]);
#pragma unroll
        for (int n = 0; n < VEC; ++n) value[n] *= h[r][n];
        store(a.y + out + r * vy.position, value);
      }
      out += vy.line;
    }
    __syncwarp();  // the next stage's weights are made, this one's are read
  }
}

#define KERNEL line_scan_forward_warp
#define KERNEL_THREADS WARP_THREADS
#include "entries.cuh"
