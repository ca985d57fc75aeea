// What the plane kernel is made of: scans of a single channel, whose rows of a picture lie in one piece each.
//
// With one channel there is nothing to share between lanes: a lane copies, weighs and scans four positions by itself,
// and only states pass between lanes and, as in warp.cuh, between warps. A stage is as many lines as a vector of 16
// bytes of a row has columns. A scan over rows copies four positions of every line; a scan over columns copies such a
// vector of every position, so that both read whole pieces of rows. Rows are multiples of such a vector, columns
// multiples of four. Preamble: VEC = RUN = 4.
#pragma once
#include "warp.cuh"

#define COLUMNS (16 / (int)sizeof(scalar_t))
#define FOUR_BYTES (4 * (int)sizeof(scalar_t))
#define PLANE_STAGES 2
#define PLANE_THREADS 288  // of a block at most, as shared memory allows

// Where one tensor of COUNT elements a pixel lies, for a lane.
template <int COUNT> struct Plane {
  const scalar_t* from;  // this lane's first position at the first line of the chunk, or the column furthest left of a stage
  int64 line, position;  // strides in elements

  __device__ __forceinline__ Plane(const scalar_t* p, int64 row, int64 column, const Tile& k) {
    const View v = view_by_steps(k, 0, row, column, false);
    const bool vertical = k.direction == DOWN || k.direction == UP;
    line = v.line, position = v.position;
    from = p + v.at(0, k.first);
    if (!vertical && k.direction == LEFT) from -= (COLUMNS - 1) * column;
  }
};

// Of each warp: [PLANE_STAGES][vectors of a stage][32 lanes]. Of the block: what Border wants, as in Memory.
template <int VECTORS> struct PlaneMemory {
  char* ring;  // this warp's
  float* borders;
  char* barriers;
  int lane;
  static constexpr int stage_bytes = VECTORS * COLUMNS * 32 * FOUR_BYTES;  // VECTORS: elements of a pixel

  __device__ __forceinline__ PlaneMemory(char* base, const Tile& k, const Tiling& t) : lane(k.lane) {
    ring = base + k.warp * (PLANE_STAGES * stage_bytes);
    borders = reinterpret_cast<float*>(base + t.position_warps * (PLANE_STAGES * stage_bytes));
    barriers = reinterpret_cast<char*>(borders + t.position_warps * 4 * VEC);
  }
  // Four positions of a line of a stage, or a quarter of three coefficients of each.
  __device__ __forceinline__ char* of_row(int stage, int j, int vector) const {
    return ring + stage % PLANE_STAGES * stage_bytes + ((j * VECTORS + vector) * 32 + lane) * FOUR_BYTES;
  }
  // The columns of a stage of one position.
  __device__ __forceinline__ char* of_column(int stage, int r, int vector) const {
    return ring + stage % PLANE_STAGES * stage_bytes + ((r * VECTORS + vector) * 32 + lane) * 16;
  }
  // Copies a stage of a tensor whose vectors start at `vector`.
  template <int COUNT>
  __device__ __forceinline__ void fetch(const Plane<COUNT>& p, int vector, int stage, const Tile& k, bool vertical) const {
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

// Four elements each, of this lane's positions at one line: COUNT of every pixel.
template <int COUNT> struct Fours {
  float value[RUN][COUNT];

  // Of a line that was fetched by rows.
  template <int VECTORS> __device__ __forceinline__ void load_row(const PlaneMemory<VECTORS>& m, int stage, int j, int vector) {
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

  template <int VECTORS>
  __device__ __forceinline__ void load_quarter(const PlaneMemory<VECTORS>& m, int stage, int quarter, int vector) {
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
