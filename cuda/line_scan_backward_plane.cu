// Backward line scan of one channel: one launch; line_scan_finish.cu adds up dx over the directions.
//
//   g[i] = u[i] dy[i] + W[i+1]^T g[i+1],   dlam = x g,   du = h dy,   dx = sum over the directions of lam g
//   dW[i][p, k] = g[i, p] h[i-1, p+k-1]
//
// Steps go from the last line to the first. What passes between positions is already weighted: a position sends
// w[0] g to the one before it and w[2] g to the one after. With one channel dW needs no sum, so it goes through the
// normalisation here. How the work is spread: plane.cuh and gspn2_diffusion/ops/README.md. u == nullptr means 1; a
// gradient that is nullptr is not wanted.
#include "plane.cuh"

struct Parameters {
  const scalar_t *dy, *x, *weight, *lam, *u, *state;
  scalar_t *dx;       // (D, B, H, W), one partial sum for each direction
  scalar_t *dweight;  // whole
  scalar_t *dlam, *du;
  Tiling tiling;
  int64 y_b, y_h, y_w, y_d, x_b, x_h, x_w, w_b, w_h, w_w, w_d, w_g, l_b, l_h, l_w, l_d, u_b, u_h, u_w, u_d;
  int64 o_b, o_h, o_w, o_d;  // state, dlam, du
  int64 g_b, g_h, g_w, g_d;  // dweight
};

enum { DY = 0, U = 1, X = 2, LAM = 3, H = 4, RAW = 5, VECTORS = 8 };
enum { WORD = 4 / (int)sizeof(scalar_t) };  // elements of four bytes
// h of the line after a stage's last, 16 bytes a lane; h beside the warp's first position and its last, 32 bytes each.
enum { NEXT = 0, BESIDE = 32 * 16, EXTRA = BESIDE + 2 * 32 };
typedef PlaneMemory<VECTORS, EXTRA> Room;

__device__ __forceinline__ float at(const char* p, int element) {
  return to_float(reinterpret_cast<const scalar_t*>(p)[element]);
}
__device__ __forceinline__ void set(char* p, int element, float value) {
  reinterpret_cast<scalar_t*>(p)[element] = from_float(value);
}

// A lane's four positions at one line.
struct Step {
  float dlam[RUN], dx[RUN], du[RUN], dw[RUN][3];
};

struct Scan {
  const Parameters& a;
  const Tile& k;
  const Room& m;
  Border border;
  bool has_before, has_after;
  float g[RUN], w[RUN][3];

  // What the gradients of the weights are made of: h[i-1] at the lane's positions and beside them.
  struct Before { float h[RUN], left, right; };

  __device__ __forceinline__ Before look(const float (&h)[RUN], float beside) const {
    Before out;
    const float before = shuffle_up(h[RUN - 1], 1), after = shuffle_down(h[0], 1);
#pragma unroll
    for (int r = 0; r < RUN; ++r) out.h[r] = h[r];
    out.left = !has_before ? 0.0f : k.leads ? beside : before;
    out.right = !has_after ? 0.0f : k.trails ? beside : after;
    return out;
  }

  __device__ __forceinline__ void gradient(float (&out)[3], int r, const float (&raw)[3], const Before& b) const {
    out[0] = g[r] * (r > 0 ? b.h[r > 0 ? r - 1 : 0] : b.left);
    out[1] = g[r] * b.h[r];
    out[2] = g[r] * (r < RUN - 1 ? b.h[r < RUN - 1 ? r + 1 : 0] : b.right);
    if (!a.tiling.normalize) return;
    const Weights made = {{w[r][0], w[r][1], w[r][2]}};
    weights_backward(out, made, raw, r > 0 || has_before, r < RUN - 1 || has_after);
  }

  // Goes to the next line; `next` is h of the line after it, if there is one.
  __device__ __forceinline__ void advance(Step& out, const Fours<1>& dy, const Fours<1>& u, const Fours<1>& x,
                                          const Fours<1>& lam, const Fours<1>& h, const Fours<3>& raw,
                                          const float (&next)[RUN], float beside, int step) {
    float value[RUN];
#pragma unroll
    for (int r = 0; r < RUN; ++r) value[r] = a.u ? dy.value[r][0] * u.value[r][0] : dy.value[r][0];
    if (step > 0) {
      const float before = shuffle_up(w[RUN - 1][2] * g[RUN - 1], 1), after = shuffle_down(w[0][0] * g[0], 1);
      const float left = k.leads ? 0.0f : before, right = k.trails ? 0.0f : after;
#pragma unroll
      for (int r = 0; r < RUN; ++r) {
        value[r] = fmaf(w[r][1], g[r], value[r]);
        value[r] = r > 0 ? fmaf(w[r > 0 ? r - 1 : 0][2], g[r > 0 ? r - 1 : 0], value[r]) : value[r] + left;
        value[r] = r < RUN - 1 ? fmaf(w[r < RUN - 1 ? r + 1 : 0][0], g[r < RUN - 1 ? r + 1 : 0], value[r])
                               : value[r] + right;
      }
      if (border.there) {
        const float sent = border.receive(step - 1);
        if (k.leads) value[0] += sent;
        else value[RUN - 1] += sent;
      }
    }
#pragma unroll
    for (int r = 0; r < RUN; ++r) g[r] = value[r];
    weigh(w, raw, k, a.tiling.normalize);
    const bool more = step + 1 < k.total;
    if (border.there && more) border.send(k.leads ? w[0][0] * g[0] : w[RUN - 1][2] * g[RUN - 1], step);
    const Before b = look(next, beside);
#pragma unroll
    for (int r = 0; r < RUN; ++r) {
      out.dlam[r] = x.value[r][0] * g[r], out.dx[r] = lam.value[r][0] * g[r];
      out.du[r] = h.value[r][0] * dy.value[r][0];
      if (more) gradient(out.dw[r], r, raw.value[r], b);
      else out.dw[r][0] = out.dw[r][1] = out.dw[r][2] = 0.0f;
    }
  }
};

// Where the results of this lane's first position at the first line go, or the column furthest left of a stage.
struct Outputs {
  scalar_t *dx, *dweight, *dlam, *du;
  int64 dx_line, dx_position, line, position, dweight_line, dweight_position;
};

// h beside the warp, for its first lane and its last; the others' neighbours are lanes.
__device__ __forceinline__ float beside_warp(const Scan& scan, int stage, int element) {
  const Tile& k = scan.k;
  return k.leads || k.trails ? at(scan.m.extra(stage) + BESIDE + k.trails * 32, element) : 0.0f;
}

// Rows of a stage.
__device__ __forceinline__ void scan_rows(Scan& scan, const Outputs& to, int stage) {
  const Tile& k = scan.k;
  const Room& m = scan.m;
#pragma unroll 1
  for (int j = 0; j < COLUMNS; ++j) {
    const int step = stage * COLUMNS + j;
    if (step >= k.total) break;
    Fours<1> dy, u, x, lam, h, next;
    Fours<3> raw;
    dy.load_row(m, stage, j, DY), x.load_row(m, stage, j, X), lam.load_row(m, stage, j, LAM);
    h.load_row(m, stage, j, H), raw.load_row(m, stage, j, RAW);
    if (scan.a.u) u.load_row(m, stage, j, U);
    float h_next[RUN];
    if (j + 1 < COLUMNS) {
      next.load_row(m, stage, j + 1, H);
#pragma unroll
      for (int r = 0; r < RUN; ++r) h_next[r] = next.value[r][0];
    } else {
#pragma unroll
      for (int r = 0; r < RUN; ++r) h_next[r] = at(m.extra(stage) + NEXT + k.lane * 16, r);
    }
    const float beside = beside_warp(scan, stage, j * WORD + (k.leads ? WORD - 1 : 0));
    Step out;
    scan.advance(out, dy, u, x, lam, h, raw, h_next, beside, step);
    if (k.first >= k.positions) continue;
    if (to.dlam) store(to.dlam + step * to.line, out.dlam);
    if (to.dx) store(to.dx + step * to.dx_line, out.dx);
    if (to.du) store(to.du + step * to.line, out.du);
    if (to.dweight) {
      float flat[3][VEC];
#pragma unroll
      for (int e = 0; e < 3 * RUN; ++e) flat[e / 4][e % 4] = out.dw[e / 3][e % 3];
#pragma unroll
      for (int n = 0; n < 3; ++n) store(to.dweight + step * to.dweight_line + 4 * n, flat[n]);
    }
  }
}

// Columns of a stage; results take the places of what they were made of, and leave in whole vectors.
template <bool REVERSED> __device__ __forceinline__ void scan_columns(Scan& scan, const Outputs& to, int stage) {
  const Tile& k = scan.k;
  const Room& m = scan.m;
#pragma unroll 1
  for (int q = 0; q < COLUMNS / 4; ++q) {
    const int quarter = REVERSED ? COLUMNS / 4 - 1 - q : q;
    Columns<1> dy, u, x, lam, h;
    Columns<3> raw;
    dy.load_quarter(m, stage, quarter, DY), x.load_quarter(m, stage, quarter, X);
    lam.load_quarter(m, stage, quarter, LAM), h.load_quarter(m, stage, quarter, H);
    raw.load_quarter(m, stage, quarter, RAW);
    if (scan.a.u) u.load_quarter(m, stage, quarter, U);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int column = REVERSED ? 3 - n : n, c = quarter * 4 + column, after = REVERSED ? c - 1 : c + 1;
      const bool inside = after >= 0 && after < COLUMNS;
      const char* const next = m.extra(stage) + NEXT + k.lane * 16;
      float h_next[RUN];
#pragma unroll
      for (int r = 0; r < RUN; ++r)
        h_next[r] = inside ? at(m.of_column(stage, r, H), after) : at(next + 4 * r, REVERSED ? WORD - 1 : 0);
      const int place = inside ? after : 16 / (int)sizeof(scalar_t) + (REVERSED ? WORD - 1 : 0);
      const float beside = beside_warp(scan, stage, place);
      Fours<1> dy_at, u_at, x_at, lam_at, h_at;
      Fours<3> raw_at;
      dy.get(dy_at, column), x.get(x_at, column), lam.get(lam_at, column), h.get(h_at, column), raw.get(raw_at, column);
      if (scan.a.u) u.get(u_at, column);
      Step out;
      scan.advance(out, dy_at, u_at, x_at, lam_at, h_at, raw_at, h_next, beside, stage * COLUMNS + q * 4 + n);
#pragma unroll
      for (int r = 0; r < RUN; ++r) {
        set(m.of_column(stage, r, X), c, out.dlam[r]), set(m.of_column(stage, r, LAM), c, out.dx[r]);
        set(m.of_column(stage, r, DY), c, out.du[r]);
#pragma unroll
        for (int e = 0; e < 3; ++e)
          set(m.of_column(stage, r, RAW + (c * 3 + e) / COLUMNS), (c * 3 + e) % COLUMNS, out.dw[r][e]);
      }
    }
  }
  if (k.first >= k.positions) return;
  const auto leave = [&](scalar_t* p, int r, int vector) {
    Words<16> words;
    load_words(words, m.of_column(stage, r, vector));
    store_words(words, p);
  };
#pragma unroll
  for (int r = 0; r < RUN; ++r) {
    const int64 of_stage = (int64)stage * COLUMNS;
    if (to.dlam) leave(to.dlam + of_stage * to.line + r * to.position, r, X);
    if (to.dx) leave(to.dx + of_stage * to.dx_line + r * to.dx_position, r, LAM);
    if (to.du) leave(to.du + of_stage * to.line + r * to.position, r, DY);
    if (to.dweight)
#pragma unroll
      for (int n = 0; n < 3; ++n)
        leave(to.dweight + of_stage * to.dweight_line + r * to.dweight_position + COLUMNS * n, r, RAW + n);
  }
}

// Copies h of the line after a stage, and at every line of it the one after, beside the warp's positions.
__device__ __forceinline__ void fetch_states(const Room& m, const Plane<1>& h, int stage, const Tile& k,
                                             bool vertical) {
  char *const to = m.extra(stage) + NEXT + k.lane * 16, *const edge = m.extra(stage) + BESIDE + k.trails * 32;
  const int first = stage * COLUMNS, after = first + COLUMNS;
  const bool reversed = h.line < 0, there = after < k.total && k.first < k.positions;
  const bool beside = (k.leads && k.first > 0) || (k.trails && k.first + RUN < k.positions);
  const int word = reversed ? COLUMNS - WORD : 0;  // of the columns of a stage, the one that comes first
  if (vertical) {
    copy_async<FOUR_BYTES>(shared_address(to), h.from + after * h.line, there ? FOUR_BYTES : 0);
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j)
      if (k.leads || k.trails)
        copy_async<4>(shared_address(edge + j * 4), h.from + (first + j + 1) * h.line + (k.leads ? -WORD : RUN),
                      beside && first + j + 1 < k.total ? 4 : 0);
    return;
  }
#pragma unroll
  for (int r = 0; r < RUN; ++r)
    copy_async<4>(shared_address(to + 4 * r), h.from + after * h.line + r * h.position + word, there ? 4 : 0);
  if (k.leads || k.trails) {
    const scalar_t* const from = h.from + (k.leads ? -h.position : RUN * h.position);
    copy_async<16>(shared_address(edge), from + first * h.line, beside && first < k.total ? 16 : 0);
    copy_async<4>(shared_address(edge + 16), from + after * h.line + word, beside && after < k.total ? 4 : 0);
  }
}

template <int CLUSTER> __device__ __forceinline__ void line_scan(const Parameters& a) {
  SHARED_MEMORY(shared);
  const Tiling& t = a.tiling;
  const Tile k = make_tile<CLUSTER>(t);
  if (k.begin >= k.end) return;  // the whole cluster: directions with fewer lines have fewer chunks
  const Room m(shared, k, t);
  Scan scan = {a, k, m};
  scan.border.setup<CLUSTER>(m, k, t);
  scan.has_before = k.first > 0, scan.has_after = k.first + RUN < k.positions;
  start_together<CLUSTER>();
  if (k.start >= k.positions) return;  // the whole warp

  const bool vertical = k.direction == DOWN || k.direction == UP;
  const int64 out = k.batch * a.o_b + k.slot * a.o_d, picture = t.height * t.width;
  const Plane<1> dy(a.dy + k.batch * a.y_b + k.slot * a.y_d, a.y_h, a.y_w, k, true);
  const Plane<1> x(a.x + k.batch * a.x_b, a.x_h, a.x_w, k, true);
  const Plane<1> lam(a.lam + k.batch * a.l_b + k.slot * a.l_d, a.l_h, a.l_w, k, true);
  const Plane<1> u(a.u + k.batch * a.u_b + k.slot * a.u_d, a.u_h, a.u_w, k, true);
  const Plane<1> h(a.state + out, a.o_h, a.o_w, k, true);
  const Plane<3> raw(a.weight + k.batch * a.w_b + k.slot * a.w_d, a.w_h, a.w_w, k, true);
  const Plane<1> dx(a.dx + (k.slot * t.batch + k.batch) * picture, t.width, 1, k, true);
  const Plane<3> dweight(a.dweight + k.batch * a.g_b + k.slot * a.g_d, a.g_h, a.g_w, k, true);
  const auto fetch = [&](int stage) {
    m.fetch(dy, DY, stage, k, vertical);
    if (a.u) m.fetch(u, U, stage, k, vertical);
    m.fetch(x, X, stage, k, vertical);
    m.fetch(lam, LAM, stage, k, vertical);
    m.fetch(h, H, stage, k, vertical);
    m.fetch(raw, RAW, stage, k, vertical);
    fetch_states(m, h, stage, k, vertical);
    commit_copies_async();
  };
  const Outputs to = {a.dx ? a.dx + (dx.from - a.dx) : nullptr,
                      a.dweight ? a.dweight + (dweight.from - a.dweight) : nullptr,
                      a.dlam ? a.dlam + (h.from - a.state) : nullptr,
                      a.du ? a.du + (h.from - a.state) : nullptr,
                      dx.line, dx.position, h.line, h.position, dweight.line, dweight.position};

#pragma unroll
  for (int r = 0; r < RUN; ++r) scan.g[r] = scan.w[r][0] = scan.w[r][1] = scan.w[r][2] = 0.0f;
  fetch(0);
  const int stages = (k.total + COLUMNS - 1) / COLUMNS;
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    fetch(stage + 1);
    wait_copies_async<1>();
    if (vertical) scan_rows(scan, to, stage);
    else if (h.line > 0) scan_columns<false>(scan, to, stage);
    else scan_columns<true>(scan, to, stage);
  }
}

#define KERNEL line_scan_backward_plane
#define KERNEL_THREADS 192  // as shared memory allows
#include "entries.cuh"
