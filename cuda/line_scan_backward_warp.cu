// Backward line scan, a warp for itself: one launch; partial sums are added up by line_scan_finish.cu.
//
//   g[i] = u[i] dy[i] + W[i+1]^T g[i+1],   dlam = x g,   du = h dy,   dx = sum over the directions of lam g
//   dW[i][p, k] = sum over the group's channels of g[i, p] h[i-1, p+k-1]
//
// Steps go from the last line to the first. What passes between positions is already weighted: a position sends
// w[0] g to the one before it and w[2] g to the one after, so that nobody needs another's weights. Of h the lines
// before are read, and kept for the next step. Every sum runs in a fixed order. How the work is spread: warp.cuh.
// Preamble: SCALAR, VEC, RUN. u == nullptr means 1; a gradient that is nullptr is not wanted.
#include "warp.cuh"

struct Parameters {
  const scalar_t *dy, *x, *weight, *lam, *u, *state;
  scalar_t *dx;      // (D, B, H, W, C), one partial sum for each direction
  float *dweight;    // (slices, D, B, lines, 3, positions), one partial sum for each slice
  scalar_t *dlam, *du;
  Tiling tiling;
  int64 y_b, y_h, y_w, y_d, x_b, x_h, x_w, w_b, w_h, w_w, w_d, w_g, l_b, l_h, l_w, l_d, u_b, u_h, u_w, u_d;
  int64 o_b, o_h, o_w, o_d;  // state, dlam, du
};

// BESIDE: h of the position before the warp's first, for the lanes there, and after its last.
enum { DY = 0, X = RUN, LAM = 2 * RUN, U = 3 * RUN, H = 4 * RUN, BESIDE = 5 * RUN, SLOTS = 5 * RUN + 1 };

// What enters the recurrence at a step, as it lies in the ring.
struct Line {
  Vector dy[RUN], u[RUN];
  float4 w[RUN];
  __device__ __forceinline__ void load_from(const Memory<SLOTS>& m, const Weigher& weigher, int stage, int line, int place) {
    const float4* const weights = weigher.of(stage, line, place);
#pragma unroll
    for (int r = 0; r < RUN; ++r) {
      load_words(dy[r].words, m.at(stage, line, DY + r));
      load_words(u[r].words, m.at(stage, line, U + r));
      w[r] = weights[r];
    }
  }
};

// g of the next step from that of the step before and its weights.
__device__ __forceinline__ void advance(float (&g)[RUN][VEC], const float4 (&w)[RUN], const Line& at, const Border& border,
                                        const Tile& k, int step) {
  float before[VEC], after[VEC], next[RUN][VEC];
#pragma unroll
  for (int n = 0; n < VEC; ++n) {
    before[n] = shuffle_up(w[RUN - 1].z * g[RUN - 1][n], k.lanes);
    after[n] = shuffle_down(w[0].x * g[0][n], k.lanes);
  }
  const float left = k.leads || k.idle ? 0.0f : 1.0f, right = k.trails || k.idle ? 0.0f : 1.0f;
#pragma unroll
  for (int r = 0; r < RUN; ++r) {
    float dy[VEC], u[VEC];
    to_floats(dy, at.dy[r]), to_floats(u, at.u[r]);
#pragma unroll
    for (int n = 0; n < VEC; ++n) {
      next[r][n] = fmaf(w[r].y, g[r][n], u[n] * dy[n]);
      next[r][n] = fmaf(r > 0 ? w[r - 1].z : left, r > 0 ? g[r - 1][n] : before[n], next[r][n]);
      next[r][n] = fmaf(r < RUN - 1 ? w[r + 1].x : right, r < RUN - 1 ? g[r + 1][n] : after[n], next[r][n]);
    }
  }
  if (border.there && step > 0) {
    border.receive(before, step - 1);
#pragma unroll
    for (int n = 0; n < VEC; ++n) {
      if (RUN == 1 || k.leads) next[0][n] += before[n];
      if (RUN > 1 && !k.leads) next[RUN - 1][n] += before[n];
    }
  }
#pragma unroll
  for (int r = 0; r < RUN; ++r)
#pragma unroll
    for (int n = 0; n < VEC; ++n) g[r][n] = next[r][n];
}

// What the neighbour beside this lane gets.
__device__ __forceinline__ void send_end(const float (&g)[RUN][VEC], const float4 (&w)[RUN], const Border& border,
                                         const Tile& k, int step) {
  const float share = k.leads ? w[0].x : w[RUN - 1].z;
  float end[VEC];
#pragma unroll
  for (int n = 0; n < VEC; ++n) end[n] = share * (k.leads ? g[0][n] : g[RUN - 1][n]);
  border.send(end, step);
}

__device__ __forceinline__ void multiply(scalar_t* out, const float (&g)[VEC], const char* factor) {
  float value[VEC];
  load(value, reinterpret_cast<const scalar_t*>(factor));
#pragma unroll
  for (int n = 0; n < VEC; ++n) value[n] *= g[n];
  store(out, value);
}

// dW of a step, added up over the channels of the warp; `hidden` is h of the line before.
__device__ __forceinline__ void weigh_gradients(float (&dw)[RUN][3], const float (&g)[RUN][VEC], const Vector (&hidden)[RUN],
                                                const char* beside, const Tile& k) {
  Vector around[RUN + 2];
#pragma unroll
  for (int r = 0; r < RUN; ++r) around[r + 1] = hidden[r];
#pragma unroll
  for (int n = 0; n < (int)(sizeof(Vector) / 4); ++n) {
    around[0].words.word[n] = shuffle_up(hidden[RUN - 1].words.word[n], k.lanes);
    around[RUN + 1].words.word[n] = shuffle_down(hidden[0].words.word[n], k.lanes);
  }
  if (k.leads) load_words(around[0].words, beside);
  if (k.trails) load_words(around[RUN + 1].words, beside);
#pragma unroll
  for (int r = 0; r < RUN; ++r)
#pragma unroll
    for (int c = 0; c < 3; ++c) dw[r][c] = 0.0f;
#pragma unroll
  for (int q = 0; q < RUN + 2; ++q) {
    float h[VEC];
    to_floats(h, around[q]);
#pragma unroll
    for (int n = 0; n < VEC; ++n)
#pragma unroll
      for (int c = 0; c < 3; ++c)
        if (q - c >= 0 && q - c < RUN) dw[q - c][c] = fmaf(g[q - c][n], h[n], dw[q - c][c]);
  }
#pragma unroll 1
  for (int left = k.lanes; left > 1;) {  // the first lane of a place ends up with the sum
    const int half = (left + 1) / 2;
    const bool adds = k.lane % k.lanes + half < left;
#pragma unroll
    for (int r = 0; r < RUN; ++r)
#pragma unroll
      for (int c = 0; c < 3; ++c) {
        const float other = shuffle_down(dw[r][c], half);
        if (adds) dw[r][c] += other;
      }
    left = half;
  }
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

  const View vo = view_by_steps(k, k.batch * a.o_b + k.slot * a.o_d + k.channel, a.o_h, a.o_w, true);
  const View vx = view_by_steps(k, k.batch * a.x_b + k.channel, a.x_h, a.x_w, true);
  Source dy(a.dy, view_by_steps(k, k.batch * a.y_b + k.slot * a.y_d + k.channel, a.y_h, a.y_w, true), k.first);
  Source x(a.x, vx, k.first);
  Source lam(a.lam, view_by_steps(k, k.batch * a.l_b + k.slot * a.l_d + k.channel, a.l_h, a.l_w, true), k.first);
  Source u(a.u, view_by_steps(k, k.batch * a.u_b + k.slot * a.u_d + k.channel, a.u_h, a.u_w, true), k.first);
  Source h(a.state, vo, k.first);
  h.next += vo.line;  // of the line before
  const int beside = k.leads ? k.first - 1 : k.first + RUN;
  const bool has_beside = (k.leads || k.trails) && beside >= 0 && beside < k.positions;
  const scalar_t* next_beside = a.state + vo.at(1, beside);
  Weigher weigher(
      a.weight, view_by_steps(k, k.batch * a.w_b + k.slot * a.w_d + k.group * a.w_g, a.w_h, a.w_w, true), m, k, t.normalize);
  const auto fetch = [&](int stage) {  // vectors of a stage, coefficients of the one after
    dy.fetch(m, DY, stage, k, k.total);
    x.fetch(m, X, stage, k, k.total);
    lam.fetch(m, LAM, stage, k, k.total);
    if (a.u) u.fetch(m, U, stage, k, k.total);
    h.fetch(m, H, stage, k, k.total - 1);
#pragma unroll
    for (int j = 0; j < LINES; ++j)
      if (k.leads || k.trails)
        copy_async<VECTOR_BYTES>(shared_address(m.at(stage, j, BESIDE)), next_beside + j * vo.line,
                                 has_beside && stage * LINES + j < k.total - 1 ? VECTOR_BYTES : 0);
    next_beside += LINES * vo.line;
    weigher.fetch(stage + 1);
    commit_copies_async();
  };

  int64 out = vo.at(0, k.first), out_x = 0;
  const int64 plane = a.tiling.batch * a.tiling.height * a.tiling.width * a.tiling.channels;
  const View vdx = view_by_steps(k, k.slot * plane + k.batch * (plane / t.batch) + k.channel, t.width * t.channels,
                                 t.channels, true);
  out_x = vdx.at(0, k.first);
  const bool backwards = k.direction & 1;
  const int64 row = 3 * (int64)k.positions;
  float* dweight = a.dweight;
  if (dweight)
    dweight += (((k.slice * t.directions + k.slot) * t.batch + k.batch) * k.lines +
                (backwards ? k.lines - k.end : k.end - 1)) * row + k.first;

  float g[RUN][VEC];
  float4 w[RUN];
  Vector hidden[RUN];  // h of this step
  bool own[RUN];
#pragma unroll
  for (int r = 0; r < RUN; ++r) {
    own[r] = k.first + r < k.positions;
    w[r] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int n = 0; n < VEC; ++n) g[r][n] = 0.0f, hidden[r].element[n] = 0;
    if (own[r] && a.du) load_words(hidden[r].words, a.state + out + r * vo.position);
  }
  if (!a.u) fill_with_ones(m, U);
  weigher.fetch(0);
#pragma unroll 1
  for (int stage = 0; stage < STAGES - 1; ++stage) fetch(stage);

  const int stages = (k.total + LINES - 1) / LINES;
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    wait_copies_async<STAGES - 2>();
    if (stage == 0) {
      weigher.weigh(0, true);
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
      advance(g, w, line, border, k, step);
#pragma unroll
      for (int r = 0; r < RUN; ++r) w[r] = line.w[r];
      if (border.there && step + 1 < k.total) send_end(g, w, border, k, step);
      Vector here[RUN];
#pragma unroll
      for (int r = 0; r < RUN; ++r) here[r] = line.dy[r];
      if (j + 1 < LINES) line.load_from(m, weigher, stage, j + 1, k.place);
#pragma unroll
      for (int r = 0; r < RUN; ++r) {
        if (!own[r]) continue;
        if (a.dlam) multiply(a.dlam + out + r * vo.position, g[r], m.at(stage, j, X + r));
        if (a.dx) multiply(a.dx + out_x + r * vdx.position, g[r], m.at(stage, j, LAM + r));
        if (a.du) {
          float value[VEC], dy[VEC];
          to_floats(value, hidden[r]), to_floats(dy, here[r]);
#pragma unroll
          for (int n = 0; n < VEC; ++n) value[n] *= dy[n];
          store(a.du + out + r * vo.position, value);
        }
      }
#pragma unroll
      for (int r = 0; r < RUN; ++r) load_words(hidden[r].words, m.at(stage, j, H + r));
      if (dweight) {
        float dw[RUN][3];
        weigh_gradients(dw, g, hidden, m.at(stage, j, BESIDE), k);
#pragma unroll
        for (int r = 0; r < RUN; ++r)
          if (own[r] && k.lane % k.lanes == 0) {
#pragma unroll
            for (int c = 0; c < 3; ++c) dweight[c * k.positions + r] = dw[r][c];
          }
        dweight += backwards ? row : -row;
      }
      out += vo.line, out_x += vdx.line;
    }
    __syncwarp();  // the next stage's weights are made, this one's are read
  }
}

#define KERNEL line_scan_backward_warp
#define KERNEL_THREADS WARP_THREADS
#include "entries.cuh"
