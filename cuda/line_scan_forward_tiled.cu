// Forward line scan, tiled: all directions, batches and channels in one launch.
//
//   h[i, p] = sum_k W[i, p, k] h[i-1, p+k-1] + lam[i, p] x[i, p],   y[i, p] = u[i, p] h[i, p]
//
// The tiles, the roles of the threads and the exchange between the blocks of a cluster: tiled.cuh and
// gspn2_diffusion/ops/README.md. Preamble: SCALAR, VEC, RUN. u == nullptr means 1; state == nullptr keeps no hidden states.
#include "roles.cuh"

struct Parameters {
  Map x_map[2], lam_map[2], u_map[2], y_map[2], state_map[2];  // vertical, horizontal
  const scalar_t *x, *weight, *lam, *u;
  scalar_t *y, *state;
  Tiling tiling;
  int64 x_b, x_h, x_w, w_b, w_h, w_w, w_d, w_g, l_b, l_h, l_w, l_d, u_b, u_h, u_w, u_d, y_b, y_h, y_w, y_d;
};

// Shared memory: ring of stages, weights of two stages, what consumers leave to each other and what the neighbours sent.
struct Memory {
  Layout wide, narrow;      // of stages with the halo and without it
  scalar_t *x, *lam, *u;    // [ring][wide or narrow]; y takes the place of u, the hidden states that of x
  float4* weights;          // [2][stage_lines][weight_pitch]
  float* border;            // [2][border_elements]
  float* received;          // [2][left, right][halo][slice]
  int64* barriers;          // [ring] of what came, [ring] of what is done, two of the exchange
  __device__ Memory(char* base, const Tile& k, const Tiling& t)
      : wide(k.extended, (int)t.stage_lines, (int)t.slice, boxes_of(t)),
        narrow(k.width, (int)t.stage_lines, (int)t.slice, boxes_of(t)) {
    const int slice = (int)t.slice, lines = (int)t.stage_lines, ring = (int)t.ring;
    x = reinterpret_cast<scalar_t*>(base);
    lam = x + ring * wide.elements;
    u = lam + ring * wide.elements;
    weights = reinterpret_cast<float4*>(u + ring * narrow.elements);
    border = reinterpret_cast<float*>(weights + 2 * lines * (int)t.weight_pitch);
    received = border + 2 * border_elements((int)t.consumers, slice);
    barriers = reinterpret_cast<int64*>(received + 4 * k.halo * slice);
  }
};

struct Copier {
  const Parameters& a;
  const Tile& k;
  const Memory& m;
  const int slice, capacity;
  const int64 base;  // of y and state
  __device__ Copier(const Parameters& a, const Tile& k, const Memory& m)
      : a(a), k(k), m(m), slice((int)a.tiling.slice), capacity((int)a.tiling.stage_lines),
        base(k.batch * a.y_b + k.slot * a.y_d + k.channel) {}

#if ACCELERATOR
  __device__ void start() const {
    for (int n = 0; n < 2 * a.tiling.ring; ++n) start_barrier(m.barriers + n);
    publish_barriers();
  }
  __device__ void fetch(int stage, int slot, int) const {
    const int line = k.begin + stage * capacity;
    if (line >= k.end) return;
    const int boxes = boxes_of(a.tiling), kind = k.direction >> 1, low = lowest(line);
    const Corner wide(k, slice, k.start - k.halo, low), narrow(k, slice, k.start, low);
    const int positions = boxes * (2 * m.wide.box_positions + (a.u ? m.narrow.box_positions : 0));
    int64* const barrier = m.barriers + slot;
    expect_bytes(barrier, positions * capacity * slice * (int)sizeof(scalar_t));
    copy_stage(m.x + slot * m.wide.elements, m.wide, boxes, a.x_map[kind], wide, 0, k.batch, barrier);
    copy_stage(m.lam + slot * m.wide.elements, m.wide, boxes, a.lam_map[kind], wide, k.slot, k.batch, barrier);
    if (a.u) copy_stage(m.u + slot * m.narrow.elements, m.narrow, boxes, a.u_map[kind], narrow, k.slot, k.batch, barrier);
  }
  // Of the lines of a stage that begins at `line`, the lowest one in memory.
  __device__ int lowest(int line) const { return k.direction & 1 ? k.lines - line - capacity : line; }
  // Of `step` lines of a stage from the j-th on, the lowest one's place in shared memory.
  __device__ int lowest_of(int step, int j) const { return k.direction & 1 ? capacity - step - j : j; }
  __device__ void store(int stage, int slot, int) const {
    const int line = k.begin + stage * capacity, lines = min(capacity, k.end - line);
    const int boxes = boxes_of(a.tiling), kind = k.direction >> 1;
    const int first = k.start >> k.together, low = lowest(line);
    const scalar_t *const y = m.u + slot * m.narrow.elements, *const h = m.x + slot * m.wide.elements;
    // From one store to the next: states have the halo between their lines.
    const int step = a.tiling.whole ? capacity : 1, state_step = k.halo > 0 ? 1 : step;
#pragma unroll 1
    for (int j = 0; j < lines && !k.across; j += step) {
      const int place = lowest_of(step, j);
#pragma unroll 1
      for (int n = 0; n < boxes; ++n)
        store_box(a.y_map[kind], k.channel, first + n * m.narrow.box_positions, low + place, k.slot, k.batch,
                  y + n * m.narrow.box_elements + place * m.narrow.box_positions * slice);
    }
#pragma unroll 1
    for (int j = 0; j < lines && a.state && boxes == 1 && !k.across; j += state_step) {
      const int place = lowest_of(state_step, j);
      store_box(a.state_map[kind], k.channel, first, low + place, k.slot, k.batch,
                h + (place * m.wide.box_positions + k.halo) * slice);
    }
    if (k.across) {
      store_box(a.y_map[kind], low * slice, first, 0, k.slot, k.batch, y);
      if (a.state) store_box(a.state_map[kind], low * slice, first, 0, k.slot, k.batch, h + k.halo * capacity * slice);
    }
    commit_stores();
    wait_stores();
  }
#else
  __device__ void fetch(int stage, int slot, int thread) const {
    const int line = k.begin + stage * capacity, lines = min(capacity, k.end - line);
    const int left = k.start - k.halo;
    if (lines > 0) {
      const View x = view_along(k.direction, k.lines, k.batch * a.x_b + k.channel, a.x_h, a.x_w);
      copy_lines(thread, m.x + slot * m.wide.elements, a.x, x, line, lines, left, k.extended, k.positions, slice);
      const View lam = view_along(k.direction, k.lines, k.batch * a.l_b + k.slot * a.l_d + k.channel, a.l_h, a.l_w);
      copy_lines(thread, m.lam + slot * m.wide.elements, a.lam, lam, line, lines, left, k.extended, k.positions, slice);
      const View u = view_along(k.direction, k.lines, k.batch * a.u_b + k.slot * a.u_d + k.channel, a.u_h, a.u_w);
      if (a.u)
        copy_lines(thread, m.u + slot * m.narrow.elements, a.u, u, line, lines, k.start, k.width, k.positions, slice);
    }
    commit_copies();
  }
  __device__ void store(int stage, int slot, int thread) const {
    const int line = k.begin + stage * capacity, lines = min(capacity, k.end - line);
    const View y = view_along(k.direction, k.lines, base, a.y_h, a.y_w);
    store_lines(thread, a.y, y, line, lines, k.start, k.own, slice, m.u + slot * m.narrow.elements, k.width);
    if (a.state)
      store_lines(thread, a.state, y, line, lines, k.start, k.own, slice, m.x + slot * m.wide.elements + k.halo * slice,
                  k.extended);
    barrier_of<2>(WEIGHERS);
  }
#endif
};

// What a consumer needs of one line apart from the states; read before the barrier that they wait for.
struct Line {
  float source[RUN][VEC], w[RUN][3];
  Vector gate[RUN];
  __device__ __forceinline__ void load_from(const scalar_t* x, const scalar_t* lam, const scalar_t* u, bool has_u,
                                            const float4* weights, const int (&at)[RUN], const int (&at_narrow)[RUN],
                                            const bool (&own)[RUN], int first, int extended) {
    float factor[VEC];
#pragma unroll
    for (int r = 0; r < RUN; ++r) {
      float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
      for (int n = 0; n < VEC; ++n) source[r][n] = 0.0f;
      if (first + r < extended) {
        load(source[r], x + at[r]);
        load(factor, lam + at[r]);
#pragma unroll
        for (int n = 0; n < VEC; ++n) source[r][n] *= factor[n];
        if (has_u && own[r]) load_words(gate[r].words, u + at_narrow[r]);
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
  const View view = view_along(k.direction, k.lines, k.batch * a.w_b + k.slot * a.w_d + k.group * a.w_g, a.w_h, a.w_w);
  const bool vertical = k.direction == DOWN || k.direction == UP;
  Weigher weigher(a.weight, view, thread, capacity, k.extended, k.begin, k.start - k.halo, k.positions, vertical);
  const int pitch = (int)a.tiling.weight_pitch;
  const auto weigh = [&](int stage) {  // the weights of the first line do not count, as h[-1] = 0
    float4* const out = m.weights + (stage & 1) * capacity * pitch;
    weigher.weigh(stage == 0, total - stage * capacity, normalize, [&](int line, int q, const Weights& w) {
      out[line * pitch + q] = make_float4(w.w[0], w.w[1], w.w[2], 0.0f);
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
  const int slice = (int)a.tiling.slice, capacity = (int)a.tiling.stage_lines, consumers = (int)a.tiling.consumers;
  const int border = border_elements(consumers, slice), apart = border / PARTS;
#pragma unroll 1
  for (int n = thread; n < 2 * border + 4 * k.halo * slice; n += consumers) m.border[n] = 0.0f;

  const Place at(thread, slice);
  const int pitch = k.across ? capacity * slice : slice;  // of positions in shared memory
  const int readable = at.used ? k.extended : 0;  // positions before this one are there to be read
  const Exchange exchange = {m.received, shared_address(m.barriers + 2 * a.tiling.ring), k.halo, k.own, slice, k.rank, CLUSTER};
  int has_u = a.u != nullptr, has_state = a.state != nullptr;
  keep_in_register(has_u), keep_in_register(has_state);
  const bool stores_state = boxes_of(a.tiling) > 1;  // where the accelerator cannot
  const View vy = view_along(k.direction, k.lines, k.batch * a.y_b + k.slot * a.y_d + k.channel, a.y_h, a.y_w);
  int at_wide[RUN], at_narrow[RUN];
  bool own[RUN];
#pragma unroll
  for (int r = 0; r < RUN; ++r) {
    const int q = at.first + r;
    own[r] = at.used && at.c < k.channels && q >= k.halo && q < k.halo + k.own;
    at_wide[r] = m.wide.at(q, pitch) + at.c, at_narrow[r] = m.narrow.at(own[r] ? q - k.halo : 0, pitch) + at.c;
  }
  scalar_t* state = a.state + vy.at(k.begin, k.start - k.halo + at.first) + at.c;
  Carry h;
#pragma unroll
  for (int r = 0; r < RUN; ++r)
#pragma unroll
    for (int n = 0; n < VEC; ++n) h.value[r][n] = 0.0f;
  const bool backwards = ACCELERATOR && (k.direction & 1);
  const int wide_line = m.wide.line(k, slice), narrow_line = m.narrow.line(k, slice);
  const int wide_step = backwards ? -wide_line : wide_line, narrow_step = backwards ? -narrow_line : narrow_line;
  const int first_line = backwards ? capacity - 1 : 0;
  const int lam_after_x = (int)(m.lam - m.x);
  float* previous = m.border;
  float* current = m.border + border;
  int since = 0, exchanges = 0;  // lines since the last exchange
  if (CLUSTER > 1 && thread == 0) exchange.setup();
  cluster_barrier<CLUSTER>();

  Slot slot;
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    int left = min(capacity, k.end - k.begin - stage * capacity);  // lines of the stage
    keep_in_register(left);
#if ACCELERATOR
    wait_barrier(m.barriers + slot.index, slot.phase);
#endif
    scalar_t* x = m.x + slot.index * m.wide.elements + first_line * wide_line;
    scalar_t* u = m.u + slot.index * m.narrow.elements + first_line * narrow_line;
    const float4* weights = m.weights + (stage & 1) * capacity * (int)a.tiling.weight_pitch + at.first;
    Line next;
    next.load_from(x, x + lam_after_x, u, has_u, weights, at_wide, at_narrow, own, at.first, readable);
    while (true) {
      if (CLUSTER > 1 && since == 0 && stage > 0) {
        exchange.take(h, at, exchanges - 1, thread == 0);
        h.publish(previous, at, slice, apart);
        consumer_barrier(consumers);
      }
      h.step(previous, at, slice, apart, next.source, next.w);
      h.publish(current, at, slice, apart);
      const bool more = left > 1 || stage + 1 < stages;
      if (CLUSTER > 1 && since == k.halo - 1 && more && at.used) exchange.give(h, at, exchanges);
#pragma unroll
      for (int r = 0; r < RUN; ++r) {
        if (!own[r]) continue;
        if (has_state && stores_state) {
          store(state + r * vy.position, h.value[r]);
        } else if (has_state) {
          store(x + at_wide[r], h.value[r]);
        }
        if (has_u) {
          float out[VEC];
#pragma unroll
          for (int n = 0; n < VEC; ++n) out[n] = to_float(next.gate[r].element[n]) * h.value[r][n];
          store(u + at_narrow[r], out);
        } else {
          store(u + at_narrow[r], h.value[r]);
        }
      }
      state += vy.line;
      float* const swap = current;
      current = previous, previous = swap;
      if (CLUSTER > 1 && ++since == k.halo) since = 0, ++exchanges;
      if (--left == 0) break;
      x += wide_step, u += narrow_step, weights += (int)a.tiling.weight_pitch;
      next.load_from(x, x + lam_after_x, u, has_u, weights, at_wide, at_narrow, own, at.first, readable);
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

#define KERNEL line_scan_forward_tiled
#define KERNEL_THREADS (RUN > 1 ? 512 : 1024)  // 128 or 64 registers
#include "entries.cuh"
