// Backward line scan, tiled: one launch; partial sums are added up by line_scan_finish.cu.
//
//   g[i] = u[i] dy[i] + W[i+1]^T g[i+1],   dlam = x g,   du = h dy,   dx = sum over the directions of lam g
//   dW[i][p, k] = sum over the group's channels of g[i, p] h[i-1, p+k-1]
//
// Lines run from the last to the first. A stage holds, for line i: dy, u, x, lam, h[i-1] and the weights of line i+1,
// so that nothing of another stage is needed; h[i] is the h[i-1] of the step before. Every sum runs in a fixed order.
// The tiles and the roles of the threads: tiled.cuh. Preamble: SCALAR, VEC, RUN. u == nullptr means 1; a gradient that is
// nullptr is not wanted.
#include "roles.cuh"

struct Parameters {
  Map dy_map[2], u_map[2], x_map[2], lam_map[2], state_map[2];  // vertical, horizontal
  Map dx_map[2], dlam_map[2], du_map[2];
  const scalar_t *dy, *x, *weight, *lam, *u, *state;
  scalar_t *dx;      // (D, B, H, W, C), one partial sum for each direction
  float *dweight;    // (slices, D, B, lines, 3, positions), one partial sum for each slice
  scalar_t *dlam, *du;
  Tiling tiling;
  int64 y_b, y_h, y_w, y_d, x_b, x_h, x_w, w_b, w_h, w_w, w_d, w_g, l_b, l_h, l_w, l_d, u_b, u_h, u_w, u_d;
  int64 o_b, o_h, o_w, o_d;  // state, dlam, du
};

// Shared memory: ring of stages, weights of two stages, what consumers leave to each other and what the neighbours sent.
struct Memory {
  Layout wide, narrow, around;     // of stages with the halo, without it, and with one position on either side
  scalar_t *dy, *u, *x, *lam, *h;  // [ring][layout]; du, dlam and dx take the places of dy, x and lam
  float4* weights;                 // [2][stage_lines][weight_pitch]: of the line after, from before, here and after
  float* border;                   // [2][border_elements]
  float* received;                 // [2][left, right][halo][slice]
  int64* barriers;                 // [ring] of what came, [ring] of what is done, two of the exchange
  __device__ Memory(char* base, const Tile& k, const Tiling& t)
      : wide(k.extended, (int)t.stage_lines, (int)t.slice, boxes_of(t)),
        narrow(k.width, (int)t.stage_lines, (int)t.slice, boxes_of(t)),
        around(k.width + 2, (int)t.stage_lines, (int)t.slice, boxes_of(t)) {
    const int slice = (int)t.slice, lines = (int)t.stage_lines, ring = (int)t.ring;
    dy = reinterpret_cast<scalar_t*>(base);
    u = dy + ring * wide.elements;
    x = u + ring * wide.elements;
    lam = x + ring * narrow.elements;
    h = lam + ring * narrow.elements;
    weights = reinterpret_cast<float4*>(h + ring * around.elements);
    border = reinterpret_cast<float*>(weights + 2 * lines * (int)t.weight_pitch);
    received = border + 2 * border_elements((int)t.consumers, slice);
    barriers = reinterpret_cast<int64*>(received + 4 * k.halo * slice);
  }
};

// Views of a scan that visits the lines from the last to the first: step r is line end - 1 - r.
__device__ __forceinline__ View reversed(View v, int end) {
  v.base += v.line * (end - 1);
  v.line = -v.line;
  return v;
}

struct Copier {
  const Parameters& a;
  const Tile& k;
  const Memory& m;
  const int slice, capacity, total;
  __device__ Copier(const Parameters& a, const Tile& k, const Memory& m)
      : a(a), k(k), m(m), slice((int)a.tiling.slice), capacity((int)a.tiling.stage_lines), total(k.end - k.begin) {}

#if ACCELERATOR
  __device__ void start() const {
    for (int n = 0; n < 2 * a.tiling.ring; ++n) start_barrier(m.barriers + n);
    publish_barriers();
  }
  __device__ void fetch(int stage, int slot, int) const {
    const int step = stage * capacity;
    if (step >= total) return;
    const int boxes = boxes_of(a.tiling), kind = k.direction >> 1, low = lowest(step);
    const Corner wide(k, slice, k.start - k.halo, low), narrow(k, slice, k.start, low);
    Corner around(k, slice, 0, k.direction & 1 ? low + 1 : low - 1);
    around.position = k.start - 1;  // its rows never hold several positions, for these would begin between two
    const int positions = (a.u ? 2 : 1) * m.wide.box_positions + 2 * m.narrow.box_positions + m.around.box_positions;
    int64* const barrier = m.barriers + slot;
    expect_bytes(barrier, boxes * positions * capacity * slice * (int)sizeof(scalar_t));
    copy_stage(m.dy + slot * m.wide.elements, m.wide, boxes, a.dy_map[kind], wide, k.slot, k.batch, barrier);
    if (a.u) copy_stage(m.u + slot * m.wide.elements, m.wide, boxes, a.u_map[kind], wide, k.slot, k.batch, barrier);
    copy_stage(m.x + slot * m.narrow.elements, m.narrow, boxes, a.x_map[kind], narrow, 0, k.batch, barrier);
    copy_stage(m.lam + slot * m.narrow.elements, m.narrow, boxes, a.lam_map[kind], narrow, k.slot, k.batch, barrier);
    copy_stage(m.h + slot * m.around.elements, m.around, boxes, a.state_map[kind], around, k.slot, k.batch, barrier);
  }
  // Of the lines of a stage that begins with `step`, the lowest one in memory.
  __device__ int lowest(int step) const {
    const int line = k.end - 1 - step;
    return k.direction & 1 ? k.lines - 1 - line : line - capacity + 1;
  }
  // Of `count` steps of a stage from the j-th on, the lowest line's place in shared memory.
  __device__ int lowest_of(int count, int j) const { return k.direction & 1 ? j : capacity - count - j; }
  __device__ void store(int stage, int slot, int) const {
    const int step = stage * capacity, steps = min(capacity, total - step);
    const int boxes = boxes_of(a.tiling), kind = k.direction >> 1;
    const int first = k.start >> k.together, low = lowest(step);
    const scalar_t *const dlam = m.x + slot * m.narrow.elements, *const dx = m.lam + slot * m.narrow.elements;
    const scalar_t* const du = m.dy + slot * m.wide.elements;
    // From one store to the next: lines of du have the halo between them.
    const int next = a.tiling.whole ? capacity : 1, next_du = k.halo > 0 ? 1 : next;
#pragma unroll 1
    for (int j = 0; j < steps && !k.across; j += next) {
      const int place = lowest_of(next, j);
#pragma unroll 1
      for (int n = 0; n < boxes; ++n) {
        const int from = n * m.narrow.box_elements + place * m.narrow.box_positions * slice;
        const int position = first + n * m.narrow.box_positions;
        if (a.dlam) store_box(a.dlam_map[kind], k.channel, position, low + place, k.slot, k.batch, dlam + from);
        if (a.dx) store_box(a.dx_map[kind], k.channel, position, low + place, k.slot, k.batch, dx + from);
      }
    }
#pragma unroll 1
    for (int j = 0; j < steps && a.du && boxes == 1 && !k.across; j += next_du) {
      const int place = lowest_of(next_du, j);
      store_box(a.du_map[kind], k.channel, first, low + place, k.slot, k.batch,
                du + (place * m.wide.box_positions + k.halo) * slice);
    }
    if (k.across) {
      if (a.dlam) store_box(a.dlam_map[kind], low * slice, first, 0, k.slot, k.batch, dlam);
      if (a.dx) store_box(a.dx_map[kind], low * slice, first, 0, k.slot, k.batch, dx);
      if (a.du) store_box(a.du_map[kind], low * slice, first, 0, k.slot, k.batch, du + k.halo * capacity * slice);
    }
    commit_stores();
    wait_stores();
  }
#else
  __device__ void fetch(int stage, int slot, int thread) const {
    const int step = stage * capacity, steps = min(capacity, total - step);
    if (steps > 0) {
      const auto copy = [&](const scalar_t* to, const scalar_t* from, int64 base, int64 row, int64 column, int first, int count,
                            int shift) {
        const View v = reversed(view_along(k.direction, k.lines, base + k.channel, row, column), k.end);
        copy_lines(thread, to, from, v, step + shift, min(steps, total - step - shift), first, count, k.positions, slice);
      };
      const int left = k.start - k.halo;
      copy(m.dy + slot * m.wide.elements, a.dy, k.batch * a.y_b + k.slot * a.y_d, a.y_h, a.y_w, left, k.extended, 0);
      if (a.u)
        copy(m.u + slot * m.wide.elements, a.u, k.batch * a.u_b + k.slot * a.u_d, a.u_h, a.u_w, left, k.extended, 0);
      copy(m.x + slot * m.narrow.elements, a.x, k.batch * a.x_b, a.x_h, a.x_w, k.start, k.width, 0);
      copy(m.lam + slot * m.narrow.elements, a.lam, k.batch * a.l_b + k.slot * a.l_d, a.l_h, a.l_w, k.start, k.width, 0);
      copy(m.h + slot * m.around.elements, a.state, k.batch * a.o_b + k.slot * a.o_d, a.o_h, a.o_w, k.start - 1, k.width + 2, 1);
    }
    commit_copies();
  }
  __device__ void store(int stage, int slot, int thread) const {
    const int step = stage * capacity, steps = min(capacity, total - step);
    const int64 image = k.batch * a.tiling.height * a.tiling.width, pixels = a.tiling.batch * a.tiling.height * a.tiling.width;
    const View out = reversed(view_along(k.direction, k.lines, k.batch * a.o_b + k.slot * a.o_d + k.channel, a.o_h, a.o_w), k.end);
    const View dx = reversed(view_along(k.direction, k.lines, (k.slot * pixels + image) * a.tiling.channels + k.channel,
                                        a.tiling.width * a.tiling.channels, a.tiling.channels), k.end);
    const int narrow = slot * m.narrow.elements;
    if (a.dlam) store_lines(thread, a.dlam, out, step, steps, k.start, k.own, slice, m.x + narrow, k.width);
    if (a.dx) store_lines(thread, a.dx, dx, step, steps, k.start, k.own, slice, m.lam + narrow, k.width);
    if (a.du)
      store_lines(thread, a.du, out, step, steps, k.start, k.own, slice, m.dy + slot * m.wide.elements + k.halo * slice,
                  k.extended);
    barrier_of<2>(WEIGHERS);
  }
#endif
};

// What a consumer needs of one line for g apart from the g of the line before; read before the barrier that they wait
// for. h of the line stays as it was loaded; its product with dy is du, which takes the place of dy or goes to `du`.
struct Line {
  float source[RUN][VEC], w[RUN][3];
  __device__ __forceinline__ void load_from(scalar_t* dy, const scalar_t* u, bool has_u, const float4* weights,
                                            const int (&at)[RUN], int first, int extended, const Vector (&hidden)[RUN],
                                            const bool (&wants_du)[RUN], scalar_t* du, bool stores_du, int64 du_step) {
    float gate[VEC];
#pragma unroll
    for (int r = 0; r < RUN; ++r) {
      float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
      for (int n = 0; n < VEC; ++n) source[r][n] = 0.0f;
      if (first + r < extended) {
        load(source[r], dy + at[r]);
        if (wants_du[r]) {
#pragma unroll
          for (int n = 0; n < VEC; ++n) gate[n] = source[r][n] * to_float(hidden[r].element[n]);
          if (stores_du) {
            store(du + r * du_step, gate);
          } else {
            store(dy + at[r], gate);
          }
        }
        if (has_u) {
          load(gate, u + at[r]);
#pragma unroll
          for (int n = 0; n < VEC; ++n) source[r][n] *= gate[n];
        }
        v = weights[r];
      }
      w[r][0] = v.x, w[r][1] = v.y, w[r][2] = v.z;
    }
  }
};

template <int CLUSTER>
__device__ __forceinline__ void weigh_stages(const Parameters& a, const Tile& k, const Memory& m, int thread, int stages) {
  const int capacity = (int)a.tiling.stage_lines, total = k.end - k.begin;
  const bool normalize = a.tiling.normalize;
  const View view =
      reversed(view_along(k.direction, k.lines, k.batch * a.w_b + k.slot * a.w_d + k.group * a.w_g, a.w_h, a.w_w), k.end);
  const bool vertical = k.direction == DOWN || k.direction == UP;
  Weigher weigher(a.weight, view, thread, capacity, k.extended + 2, -1, k.start - k.halo - 1, k.positions, vertical);
  const int pitch = (int)a.tiling.weight_pitch;
  const auto weigh = [&](int stage) {  // nothing comes before the first step
    float4* const out = m.weights + (stage & 1) * capacity * pitch;
    weigher.weigh(stage == 0, total - stage * capacity, normalize, [&](int step, int q, const Weights& w) {
      float4* const here = out + step * pitch + q - 1;  // q counts from one position before the tile
      if (q >= 2) here[-1].z = w.w[0];
      if (q >= 1 && q <= k.extended) here[0].y = w.w[1];
      if (q < k.extended) here[1].x = w.w[2];
    });
  };
#if !ACCELERATOR
  const Copier copier(a, k, m);
  const int ring = (int)a.tiling.ring;
#pragma unroll 1
  for (int stage = 0; stage < ring - 1; ++stage) copier.fetch(stage, stage, thread);
  wait_stage(a.tiling);
#endif
  weigher.fetch(1, total);
  weigh(0);
  weigher.fetch(0, total - capacity);
  cluster_barrier<CLUSTER>();
#if ACCELERATOR
  Slot slot;
#endif
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
#if !ACCELERATOR
    const int before = (stage + ring - 1) % ring;
    if (stage > 0) copier.store(stage - 1, before, thread);
    copier.fetch(stage + ring - 1, before, thread);
    wait_stage(a.tiling);
#endif
    weigh(stage + 1);
    weigher.fetch(0, total - (stage + 2) * capacity);
    stage_barrier((int)a.tiling.consumers);
#if ACCELERATOR
    if (thread == 0) finish_stage(m.barriers + a.tiling.ring + slot.index);
    slot.next(a.tiling);
#endif
  }
#if !ACCELERATOR
  copier.store(stages - 1, (stages - 1) % ring, thread);
#endif
}

template <int CLUSTER>
__device__ __forceinline__ void copy_stages(const Parameters& a, const Tile& k, const Memory& m, int stages) {
#if ACCELERATOR
  const Copier copier(a, k, m);
  const int ring = (int)a.tiling.ring;
  if (elected()) {
    copier.start();
#pragma unroll 1
    for (int stage = 0; stage < ring; ++stage) copier.fetch(stage, stage, 0);
  }
  __syncwarp();
#endif
  cluster_barrier<CLUSTER>();
#if ACCELERATOR
  Slot slot;
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    if (elected()) {
      wait_barrier(m.barriers + ring + slot.index, slot.phase);
      copier.store(stage, slot.index, 0);
      copier.fetch(stage + ring, slot.index, 0);
    }
    slot.next(a.tiling);
    __syncwarp();
  }
#endif
}

template <int CLUSTER>
__device__ __forceinline__ void consume_stages(const Parameters& a, const Tile& k, const Memory& m, int thread, int stages) {
  const Tiling& t = a.tiling;
  const int slice = (int)t.slice, capacity = (int)t.stage_lines, consumers = (int)t.consumers, total = k.end - k.begin;
  const int border = border_elements(consumers, slice), apart = border / PARTS;
#pragma unroll 1
  for (int n = thread; n < 2 * border + 4 * k.halo * slice; n += consumers) m.border[n] = 0.0f;

  const Place at(thread, slice);
  const int pitch = k.across ? capacity * slice : slice;  // of positions in shared memory
  const int readable = at.used ? k.extended : 0;  // positions before this one are there to be read
  const Exchange exchange = {m.received, shared_address(m.barriers + 2 * a.tiling.ring), k.halo, k.own, slice, k.rank, CLUSTER};
  const int p = k.start - k.halo + at.first;
  const View out = reversed(
      view_along(k.direction, k.lines, k.batch * a.o_b + k.slot * a.o_d + k.channel, a.o_h, a.o_w), k.end);
  int has_u = a.u != nullptr, has_dweight = a.dweight != nullptr;
  keep_in_register(has_u), keep_in_register(has_dweight);
  const bool stores_du = boxes_of(t) > 1;  // where the accelerator cannot
  scalar_t* du = a.du + out.at(0, p) + at.c;
  const bool backwards = k.direction & 1;
  const int64 plane = 3 * (int64)k.positions;
  float* dweight = a.dweight;
  if (dweight) {
    const int row = backwards ? k.lines - k.end : k.end - 1;
    dweight += (((k.slice * t.directions + k.slot) * t.batch + k.batch) * k.lines + row) * plane + p;
  }
  Carry g;
  Vector hidden[RUN];  // h of this step
  int at_wide[RUN], at_narrow[RUN];
  bool own[RUN], wants_du[RUN];
#pragma unroll
  for (int r = 0; r < RUN; ++r) {
    const int q = at.first + r;
    own[r] = at.used && at.c < k.channels && q >= k.halo && q < k.halo + k.own;
    wants_du[r] = own[r] && a.du;
    at_wide[r] = m.wide.at(q, pitch) + at.c, at_narrow[r] = m.narrow.at(own[r] ? q - k.halo : 0, pitch) + at.c;
#pragma unroll
    for (int n = 0; n < VEC; ++n) g.value[r][n] = 0.0f, hidden[r].element[n] = 0;
    if (wants_du[r]) load_words(hidden[r].words, a.state + out.at(0, p + r) + at.c);
  }
  int at_around[RUN + 2];  // of the positions from one before to one after
#pragma unroll
  for (int r = 0; r < RUN + 2; ++r)
    at_around[r] = m.around.at(max(0, min(at.first + r - k.halo, k.width + 1)), pitch) + at.c;
  const int first_line = ACCELERATOR && !backwards ? capacity - 1 : 0, sign = ACCELERATOR && !backwards ? -1 : 1;
  const int wide_line = m.wide.line(k, slice), narrow_line = m.narrow.line(k, slice), around_line = m.around.line(k, slice);
  const int u_after_dy = a.u ? (int)(m.u - m.dy) : 0, lam_after_x = (int)(m.lam - m.x);
  float* previous = m.border;
  float* current = m.border + border;
  int since = 0, exchanges = 0;  // steps since the last exchange
  if (CLUSTER > 1 && thread == 0) exchange.setup();
  cluster_barrier<CLUSTER>();

  Slot slot;
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    int left = min(capacity, total - stage * capacity);  // steps of the stage
    keep_in_register(left);
#if ACCELERATOR
    wait_barrier(m.barriers + slot.index, slot.phase);
#endif
    scalar_t* dy = m.dy + slot.index * m.wide.elements + first_line * wide_line;
    scalar_t* x = m.x + slot.index * m.narrow.elements + first_line * narrow_line;
    const scalar_t* h = m.h + slot.index * m.around.elements + first_line * around_line;
    const float4* weights = m.weights + (stage & 1) * capacity * (int)t.weight_pitch + at.first;
    Line next;
    next.load_from(dy, dy + u_after_dy, has_u, weights, at_wide, at.first, readable, hidden, wants_du, du, stores_du,
                   out.position);
    while (true) {
      if (CLUSTER > 1 && since == 0 && stage > 0) {
        exchange.take(g, at, exchanges - 1, thread == 0);
        g.publish(previous, at, slice, apart);
        consumer_barrier(consumers);
      }
      g.step(previous, at, slice, apart, next.source, next.w);
      g.publish(current, at, slice, apart);
      const bool more = left > 1 || stage + 1 < stages;
      if (CLUSTER > 1 && since == k.halo - 1 && more && at.used) exchange.give(g, at, exchanges);
      float dw[RUN][3], value[VEC];
#pragma unroll
      for (int r = 0; r < RUN; ++r) {
        dw[r][0] = dw[r][1] = dw[r][2] = 0.0f;
        if (!own[r]) continue;
        scalar_t* const place = x + at_narrow[r];
        load(value, place);
#pragma unroll
        for (int n = 0; n < VEC; ++n) value[n] *= g.value[r][n];
        store(place, value);  // dlam
        load(value, place + lam_after_x);
#pragma unroll
        for (int n = 0; n < VEC; ++n) value[n] *= g.value[r][n];
        store(place + lam_after_x, value);  // dx
      }
      if (more) {
#pragma unroll
        for (int r = 0; r < RUN + 2; ++r) {  // h[i-1] from one position before to one after
          const bool needed = (r > 1 && own[r - 2]) || (r > 0 && r <= RUN && own[r - 1]) || (r < RUN && own[r]);
          if (!needed) continue;
          Vector bits;
          load_words(bits.words, h + at_around[r]);
          if (r > 0 && r <= RUN) hidden[r - 1] = bits;
          if (!has_dweight) continue;
#if !ACCELERATOR  // which brings zeros from outside of the picture
          if (p + r - 1 < 0 || p + r - 1 >= k.positions) continue;
#endif
#pragma unroll
          for (int n = 0; n < VEC; ++n) {
            const float there = to_float(bits.element[n]);
            if (r < RUN) dw[r][0] = fmaf(g.value[r][n], there, dw[r][0]);
            if (r > 0 && r <= RUN) dw[r - 1][1] = fmaf(g.value[r - 1][n], there, dw[r - 1][1]);
            if (r > 1) dw[r - 2][2] = fmaf(g.value[r - 2][n], there, dw[r - 2][2]);
          }
        }
      }
      if (has_dweight) {  // lanes of one position are neighbours in a warp; the first gets the sum
#pragma unroll
        for (int r = 0; r < RUN; ++r) {
          int offset = at.lanes;  // a power of two, or three times one
          if (offset % 3 == 0) {
            offset /= 3;
#pragma unroll
            for (int n = 0; n < 3; ++n)
              dw[r][n] += shuffle_down(dw[r][n], offset) + shuffle_down(dw[r][n], 2 * offset);
          }
          for (offset /= 2; offset > 0; offset /= 2) {
#pragma unroll
            for (int n = 0; n < 3; ++n) dw[r][n] += shuffle_down(dw[r][n], offset);
          }
          if (own[r] && at.lane == 0) {
#pragma unroll
            for (int n = 0; n < 3; ++n) dweight[n * k.positions + r] = dw[r][n];
          }
        }
        dweight += backwards ? plane : -plane;
      }
      if (stores_du) du += out.line;
      float* const swap = current;
      current = previous, previous = swap;
      if (CLUSTER > 1 && ++since == k.halo) since = 0, ++exchanges;
      if (--left == 0) break;
      dy += sign * wide_line, x += sign * narrow_line, h += sign * around_line, weights += (int)t.weight_pitch;
      next.load_from(dy, dy + u_after_dy, has_u, weights, at_wide, at.first, readable, hidden, wants_du, du, stores_du,
                     out.position);
      consumer_barrier(consumers);
    }
    slot.next(a.tiling);
    publish_results();
    stage_barrier(consumers);
  }
}

template <int CLUSTER> __device__ __forceinline__ void line_scan(const Parameters& a) {
  SHARED_MEMORY(shared);
  const Tile k = make_tile<CLUSTER>(a.tiling);
  if (k.begin >= k.end) return;  // the whole cluster: directions with fewer lines have fewer chunks
  const Memory m(shared, k, a.tiling);
  const int thread = threadIdx.x, consumers = (int)a.tiling.consumers, capacity = (int)a.tiling.stage_lines;
  const int stages = (k.end - k.begin + capacity - 1) / capacity;
  if (thread < consumers) {
    consume_stages<CLUSTER>(a, k, m, thread, stages);
  } else if (thread < consumers + WEIGHERS) {
    weigh_stages<CLUSTER>(a, k, m, thread - consumers, stages);
  } else {
    copy_stages<CLUSTER>(a, k, m, stages);
  }
}

#define KERNEL line_scan_backward_tiled
// 80 registers; with three positions a thread 128, or 168 in clusters, where some would be spilled otherwise.
#define KERNEL_THREADS (RUN == 1 ? 736 : BLOCKS == 1 ? 512 : 384)
#include "entries.cuh"
