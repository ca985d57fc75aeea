// What the plane kernel is made of: scans of a single channel, whose rows of a picture lie in one piece each.
//
// With one channel there is nothing to share between lanes: a lane copies, weighs and scans four positions by itself,
// and only states pass between lanes, by shuffles, and between warps. A warp leaves the states at the ends of its
// positions in shared memory, in another block of the cluster where the line is cut there, and tells so by a barrier
// that the receiver alone waits for: nothing else synchronises. A stage is as many lines as a vector of 16 bytes of a
// row has columns. A scan over rows copies four positions of every line; a scan over columns copies such a vector of
// every position, so that both read whole pieces of rows. Rows are multiples of such a vector, columns multiples of
// four.
// Preamble: VEC = RUN = 4.
#pragma once
#include "weights.cuh"

#define COLUMNS (16 / (int)sizeof(scalar_t))
#define FOUR_BYTES (4 * (int)sizeof(scalar_t))
#define PLANE_STAGES 2

struct Tiling {
  int64 batch, height, width, channels, groups, directions, packed_directions, chunk_size, chunks;
  int64 warps;  // of a block, one after the other along the line
  int64 normalize;
};

struct Tile : Stretch {
  int total;             // lines from begin to end
  int lane, warp, rank;  // warp of the block, block of the cluster
  int start, first;      // first position of the warp and of the lane
  bool leads, trails;    // at the first and last place of its warp
};

template <int CLUSTER> __device__ __forceinline__ Tile make_tile(const Tiling& t) {
  Tile k;
  k.rank = (int)((int64)blockIdx.x % CLUSTER);
  find_stretch(k, (int64)blockIdx.x / CLUSTER, t);
  k.total = k.end - k.begin;
  k.lane = threadIdx.x % 32, k.warp = threadIdx.x / 32;
  k.leads = k.lane == 0, k.trails = k.lane == 31;
  k.start = (k.rank * (int)t.warps + k.warp) * 32 * RUN;
  k.first = k.start + k.lane * RUN;
  return k;
}

// Where one tensor of COUNT elements a pixel lies, for a lane.
template <int COUNT> struct Plane {
  const scalar_t* from;  // this lane's first position at the first line, or at the column furthest left of a stage
  int64 line, position;  // strides in elements

  // Steps go from the first line of the chunk to the last, or the other way round.
  __device__ __forceinline__ Plane(const scalar_t* p, int64 row, int64 column, const Tile& k, bool backwards = false) {
    View v = view_along(k.direction, k.lines, 0, row, column);
    v.base += v.line * (backwards ? k.end - 1 : k.begin);
    if (backwards) v.line = -v.line;
    const bool vertical = k.direction == DOWN || k.direction == UP;
    line = v.line, position = v.position;
    from = p + v.at(0, k.first);
    if (!vertical && line < 0) from -= (COLUMNS - 1) * column;
  }
};

// Of each warp: [PLANE_STAGES][vectors of a stage][32 lanes], [PLANE_STAGES][EXTRA bytes]. Of the block:
// [warps][parity][side] states that neighbours sent, as many barriers.
template <int VECTORS, int EXTRA = 0> struct PlaneMemory {
  char* ring;  // this warp's
  float* borders;
  char* barriers;
  int lane;
  static constexpr int stage_bytes = VECTORS * COLUMNS * 32 * FOUR_BYTES;  // VECTORS: elements of a pixel

  __device__ __forceinline__ PlaneMemory(char* base, const Tile& k, const Tiling& t) : lane(k.lane) {
    ring = base + k.warp * (PLANE_STAGES * (stage_bytes + EXTRA));
    borders = reinterpret_cast<float*>(base + t.warps * (PLANE_STAGES * (stage_bytes + EXTRA)));
    barriers = reinterpret_cast<char*>(borders + t.warps * 16);
  }
  // Four positions of a line of a stage, or a quarter of three coefficients of each.
  __device__ __forceinline__ char* of_row(int stage, int j, int vector) const {
    return ring + stage % PLANE_STAGES * stage_bytes + ((j * VECTORS + vector) * 32 + lane) * FOUR_BYTES;
  }
  // The columns of a stage of one position.
  __device__ __forceinline__ char* of_column(int stage, int r, int vector) const {
    return ring + stage % PLANE_STAGES * stage_bytes + ((r * VECTORS + vector) * 32 + lane) * 16;
  }
  __device__ __forceinline__ char* extra(int stage) const {
    return ring + PLANE_STAGES * stage_bytes + stage % PLANE_STAGES * EXTRA;
  }
  // Copies a stage of a tensor whose vectors start at `vector`.
  template <int COUNT>
  __device__ __forceinline__ void fetch(const Plane<COUNT>& p, int vector, int stage, const Tile& k,
                                        bool vertical) const {
    if (vertical) {
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        const int step = stage * COLUMNS + j;
        const bool there = step < k.total && k.first < k.positions;
#pragma unroll
        for (int n = 0; n < COUNT; ++n)
          copy_async<FOUR_BYTES>(shared_address(of_row(stage, j, vector + n)), p.from + step * p.line + 4 * n,
                                 there ? FOUR_BYTES : 0);
      }
    } else {
      const bool there = stage * COLUMNS < k.total && k.first < k.positions;
#pragma unroll
      for (int r = 0; r < RUN; ++r) {
#pragma unroll
        for (int n = 0; n < COUNT; ++n)
          copy_async<16>(shared_address(of_column(stage, r, vector + n)),
                         p.from + stage * COLUMNS * p.line + r * p.position + COLUMNS * n, there ? 16 : 0);
      }
    }
  }
};

// What a warp leaves to its neighbours and gets from them at every line. Its first lane deals with the neighbour on the
// left, its last with the one on the right; the others have none. Two buffers are enough: a neighbour that is two lines
// ahead would need what this warp has not sent yet. States travel in vectors of four, of which the first counts.
struct Border {
  bool there, far;        // this lane has a neighbour; which is in another block
  float* slot;            // received: parities are 8 floats apart
  unsigned barrier;       // parities are 16 bytes apart
  float* target;          // where the neighbour receives, in this block
  unsigned far_target, signal;

  // Warps beyond the last position only set their barriers up.
  template <int CLUSTER, typename M>
  __device__ __forceinline__ void setup(const M& m, const Tile& k, const Tiling& t) {
    const int side = k.trails;
    there = (k.leads && k.start > 0) || (k.trails && k.start + 32 * RUN < k.positions);
    far = CLUSTER > 1 && k.warp == (side ? (int)t.warps - 1 : 0);
    const int hop = there ? far ? 1 - (int)t.warps : 1 : 0, other = side ? k.warp + hop : k.warp - hop;
    slot = m.borders + k.warp * 16 + side * 4;
    barrier = shared_address(m.barriers + k.warp * 32 + side * 8);
    // What goes left arrives on the neighbour's right side, and the other way round.
    target = m.borders + other * 16 + (1 - side) * 4;
    signal = shared_address(m.barriers + other * 32 + (1 - side) * 8);
    if (there && far) {
      const int rank = side ? k.rank + 1 : k.rank - 1;
      far_target = remote_address(shared_address(target), rank), signal = remote_address(signal, rank);
    }
    if (k.leads || k.trails) {
#pragma unroll
      for (int parity = 0; parity < 2; ++parity) {
        barrier_init(barrier + parity * 16, 1);
        if (far) barrier_expect(barrier + parity * 16, 16);
      }
    }
  }

  // What the neighbour sent after `step`.
  __device__ __forceinline__ float receive(int step) const {
    const int parity = step & 1;
    barrier_wait(barrier + parity * 16, step >> 1 & 1);
    const float value = slot[parity * 8];
    if (far) barrier_expect(barrier + parity * 16, 16);
    return value;
  }

  // Sends the state after `step`.
  __device__ __forceinline__ void send(float value, int step) const {
    const int parity = step & 1;
    if (far) {
      send_floats(far_target + 32 * parity, signal + parity * 16, value, 0.0f, 0.0f, 0.0f);
    } else {
      target[parity * 8] = value;
      barrier_arrive(signal + parity * 16);
    }
  }
};

// Four elements each, of this lane's positions at one line: COUNT of every pixel.
template <int COUNT> struct Fours {
  float value[RUN][COUNT];

  // Of a line that was fetched by rows.
  template <typename M> __device__ __forceinline__ void load_row(const M& m, int stage, int j, int vector) {
    float flat[COUNT][VEC];
#pragma unroll
    for (int n = 0; n < COUNT; ++n) load(flat[n], reinterpret_cast<const scalar_t*>(m.of_row(stage, j, vector + n)));
#pragma unroll
    for (int r = 0; r < RUN; ++r)
#pragma unroll
      for (int c = 0; c < COUNT; ++c) value[r][c] = flat[(r * COUNT + c) / 4][(r * COUNT + c) % 4];
  }
};

// Four columns of this lane's positions, as they lie in memory.
template <int COUNT> struct Columns {
  Vector four[RUN][COUNT];

  template <typename M> __device__ __forceinline__ void load_quarter(const M& m, int stage, int quarter, int vector) {
#pragma unroll
    for (int r = 0; r < RUN; ++r)
#pragma unroll
      for (int n = 0; n < COUNT; ++n) {
        const int at = (quarter * COUNT + n) * FOUR_BYTES;  // of the vectors of 16 bytes, one after the other
        load_words(four[r][n].words, m.of_column(stage, r, vector + at / 16) + at % 16);
      }
  }
  __device__ __forceinline__ void get(Fours<COUNT>& out, int column) const {
#pragma unroll
    for (int r = 0; r < RUN; ++r)
#pragma unroll
      for (int c = 0; c < COUNT; ++c)
        out.value[r][c] = to_float(four[r][(column * COUNT + c) / 4].element[(column * COUNT + c) % 4]);
  }
};

__device__ __forceinline__ void store_columns(scalar_t* p, const float (&in)[COLUMNS]) {
  Words<16> out;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#if SCALAR == 0
    out.word[n] = __float_as_uint(in[n]);
#else
    out.word[n] = from_floats(in[2 * n], in[2 * n + 1]);
#endif
  }
  store_words(out, p);
}

// The weights of this lane's positions, which all exist or none of them.
__device__ __forceinline__ void weigh(float (&w)[RUN][3], const Fours<3>& raw, const Tile& k, bool normalize) {
  const bool has_before = k.first > 0, has_after = k.first + RUN < k.positions;
  if (normalize) {
#pragma unroll
    for (int r = 0; r < RUN; ++r) {
      const Weights found = make_weights(raw.value[r], r > 0 || has_before, r < RUN - 1 || has_after, true);
#pragma unroll
      for (int c = 0; c < 3; ++c) w[r][c] = found.w[c];
    }
  } else {
#pragma unroll
    for (int r = 0; r < RUN; ++r)
#pragma unroll
      for (int c = 0; c < 3; ++c) w[r][c] = raw.value[r][c];
    if (!has_before) w[0][0] = 0.0f;
    if (!has_after) w[RUN - 1][2] = 0.0f;
  }
}
