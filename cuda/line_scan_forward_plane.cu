// Forward line scan of one channel: all directions and batches in one launch.
//
//   h[i, p] = sum_k W[i, p, k] h[i-1, p+k-1] + lam[i, p] x[i, p],   y[i, p] = u[i, p] h[i, p]
//
// How the work is spread: plane.cuh and gspn2_diffusion/ops/README.md. u == nullptr means 1; state == nullptr keeps no
// hidden states.
#include "plane.cuh"

struct Parameters {
  const scalar_t *x, *weight, *lam, *u;
  scalar_t *y, *state;
  Tiling tiling;
  int64 x_b, x_h, x_w, w_b, w_h, w_w, w_d, w_g, l_b, l_h, l_w, l_d, u_b, u_h, u_w, u_d, y_b, y_h, y_w, y_d;
};

enum { X = 0, LAM = 1, U = 2, RAW = 3, VECTORS = 6 };

struct Scan {
  const Parameters& a;
  const Tile& k;
  const PlaneMemory<VECTORS>& m;
  Border border;
  float h[RUN];

  // h of the next line.
  __device__ __forceinline__ void advance(const Fours<1>& x, const Fours<1>& lam, const Fours<3>& raw, int step) {
    float next[RUN];
#pragma unroll
    for (int r = 0; r < RUN; ++r) next[r] = lam.value[r][0] * x.value[r][0];
    if (step > 0) {  // the weights of the first line, whatever they are, are not used
      float w[RUN][3];
      weigh(w, raw, k, a.tiling.normalize);
      const float before = shuffle_up(h[RUN - 1], 1), after = shuffle_down(h[0], 1);
      const float left = k.leads ? 0.0f : before, right = k.trails ? 0.0f : after;
#pragma unroll
      for (int r = 0; r < RUN; ++r) {
        next[r] = fmaf(w[r][1], h[r], next[r]);
        next[r] = fmaf(w[r][0], r > 0 ? h[r - 1] : left, next[r]);
        next[r] = fmaf(w[r][2], r < RUN - 1 ? h[r + 1] : right, next[r]);
      }
      if (border.there) {
        const float beside = border.receive(step - 1);
        if (k.leads) next[0] = fmaf(w[0][0], beside, next[0]);
        else next[RUN - 1] = fmaf(w[RUN - 1][2], beside, next[RUN - 1]);
      }
    }
#pragma unroll
    for (int r = 0; r < RUN; ++r) h[r] = next[r];
    if (border.there && step + 1 < k.total) border.send(k.leads ? h[0] : h[RUN - 1], step);
  }

  // Rows of a stage.
  __device__ __forceinline__ void rows(int stage, int64 out, int64 line) {
#pragma unroll 2
    for (int j = 0; j < COLUMNS; ++j) {
      const int step = stage * COLUMNS + j;
      if (step >= k.total) break;
      Fours<1> x, lam, u;
      Fours<3> raw;
      x.load_row(m, stage, j, X), lam.load_row(m, stage, j, LAM), raw.load_row(m, stage, j, RAW);
      advance(x, lam, raw, step);
      if (k.first < k.positions) {
        if (a.state) store(a.state + out + step * line, h);
        float value[VEC];
#pragma unroll
        for (int r = 0; r < RUN; ++r) value[r] = h[r];
        if (a.u) {
          u.load_row(m, stage, j, U);
#pragma unroll
          for (int r = 0; r < RUN; ++r) value[r] *= u.value[r][0];
        }
        store(a.y + out + step * line, value);
      }
    }
  }

  // Columns of a stage, from left to right or the other way round. `out`: its leftmost column at the first position.
  template <bool REVERSED> __device__ __forceinline__ void columns(int stage, int64 out, int64 position) {
    float y[RUN][COLUMNS], states[RUN][COLUMNS];
#pragma unroll
    for (int q = 0; q < COLUMNS / 4; ++q) {
      const int quarter = REVERSED ? COLUMNS / 4 - 1 - q : q;
      Columns<1> x, lam, u;
      Columns<3> raw;
      x.load_quarter(m, stage, quarter, X), lam.load_quarter(m, stage, quarter, LAM);
      raw.load_quarter(m, stage, quarter, RAW);
      if (a.u) u.load_quarter(m, stage, quarter, U);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int column = REVERSED ? 3 - n : n;
        Fours<1> x_at, lam_at, u_at;
        Fours<3> raw_at;
        x.get(x_at, column), lam.get(lam_at, column), raw.get(raw_at, column);
        advance(x_at, lam_at, raw_at, stage * COLUMNS + q * 4 + n);
        if (a.u) u.get(u_at, column);
#pragma unroll
        for (int r = 0; r < RUN; ++r) {
          states[r][quarter * 4 + column] = h[r];
          y[r][quarter * 4 + column] = a.u ? h[r] * u_at.value[r][0] : h[r];
        }
      }
    }
    if (k.first >= k.positions) return;
#pragma unroll
    for (int r = 0; r < RUN; ++r) {
      store_columns(a.y + out + r * position, y[r]);
      if (a.state) store_columns(a.state + out + r * position, states[r]);
    }
  }
};

template <int CLUSTER> __device__ __forceinline__ void line_scan(const Parameters& a) {
  SHARED_MEMORY(shared);
  const Tiling& t = a.tiling;
  const Tile k = make_tile<CLUSTER>(t);
  if (k.begin >= k.end) return;  // the whole cluster: directions with fewer lines have fewer chunks
  const PlaneMemory<VECTORS> m(shared, k, t);
  Scan scan = {a, k, m};
  scan.border.setup<CLUSTER>(m, k, t);
  start_together<CLUSTER>();
  if (k.start >= k.positions) return;  // the whole warp

  const bool vertical = k.direction == DOWN || k.direction == UP;
  const Plane<1> x(a.x + k.batch * a.x_b, a.x_h, a.x_w, k);
  const Plane<1> lam(a.lam + k.batch * a.l_b + k.slot * a.l_d, a.l_h, a.l_w, k);
  const Plane<1> u(a.u + k.batch * a.u_b + k.slot * a.u_d, a.u_h, a.u_w, k);
  const Plane<3> raw(a.weight + k.batch * a.w_b + k.slot * a.w_d, a.w_h, a.w_w, k);
  const auto fetch = [&](int stage) {
    m.fetch(x, X, stage, k, vertical);
    m.fetch(lam, LAM, stage, k, vertical);
    if (a.u) m.fetch(u, U, stage, k, vertical);
    m.fetch(raw, RAW, stage, k, vertical);
    commit_copies_async();
  };
  const Plane<1> y(a.y + k.batch * a.y_b + k.slot * a.y_d, a.y_h, a.y_w, k);
  const int64 out = y.from - a.y;

#pragma unroll
  for (int r = 0; r < RUN; ++r) scan.h[r] = 0.0f;
  fetch(0);
  const int stages = (k.total + COLUMNS - 1) / COLUMNS;
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    fetch(stage + 1);
    wait_copies_async<1>();
    if (vertical) scan.rows(stage, out, y.line);
    else if (k.direction == RIGHT) scan.columns<false>(stage, out + stage * COLUMNS * y.line, y.position);
    else scan.columns<true>(stage, out + stage * COLUMNS * y.line, y.position);
  }
}

#define KERNEL line_scan_forward_plane
#define KERNEL_THREADS 288  // as shared memory allows
#include "entries.cuh"
