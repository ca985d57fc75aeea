// What the threads of a tiled line scan do beside copying: weighers make weights, consumers carry states along the
// lines and exchange them with each other and with the neighbouring blocks of a cluster.
#pragma once
#include "tiled.cuh"
#include "weights.cuh"

// ---- weights ------------------------------------------------------------------------------------

// A weigher's positions of a stage. Coefficients stay as they were loaded until they are used a stage later, so that
// nothing waits for them.
struct Weigher {
  const scalar_t* source[ITEMS];
  int line[ITEMS], place[ITEMS];  // line of the stage, position among `count`
  scalar_t raw[ITEMS][3];
  int64 step;
  int first_position, positions, lines;  // lines that are left to fetch

  // Stage 0 starts at line `first_line` of the view; lines before `begin` are not read and weigh nothing. In scans over
  // columns neighbouring threads have neighbouring lines, which lie in the same row of the picture: each row that a
  // warp reads from costs the L1 a cycle.
  __device__ __forceinline__ Weigher(const scalar_t* weight, const View& view, int thread, int capacity, int count,
                                     int first_line, int first_position, int positions, bool vertical)
      : step(view.line * capacity), first_position(first_position), positions(positions) {
    const int shift = 31 - __clz(capacity);  // a power of two
#pragma unroll
    for (int n = 0; n < ITEMS; ++n) {
      const int item = thread + n * WEIGHERS;
      line[n] = vertical ? (unsigned)item / (unsigned)count : item & (capacity - 1);
      place[n] = vertical ? item - line[n] * count : item >> shift;
      if (item >= capacity * count) line[n] = 1 << 30;
      source[n] = weight + view.at(first_line + line[n], first_position + place[n]);
    }
  }

  __device__ __forceinline__ bool inside(int n) const {
    const int p = first_position + place[n];
    return p >= 0 && p < positions;
  }

  // Loads the coefficients of lines [from, to) of the next stage.
  __device__ __forceinline__ void fetch(int from, int to) {
#pragma unroll
    for (int n = 0; n < ITEMS; ++n) {
      if (line[n] >= from && line[n] < to && inside(n)) {
#pragma unroll
        for (int k = 0; k < 3; ++k) raw[n][k] = source[n][k];
      }
      source[n] += step;
    }
  }

  // Calls use(line, place, weights) for every line below `to`; lines before `from` and positions outside weigh nothing.
  template <bool NORMALIZE, typename F> __device__ __forceinline__ void weigh_as(int from, int to, F use) const {
#pragma unroll
    for (int n = 0; n < ITEMS; ++n) {
      if (line[n] >= to) continue;
      const int p = first_position + place[n];
      const float values[3] = {to_float(raw[n][0]), to_float(raw[n][1]), to_float(raw[n][2])};
      Weights w = make_weights(values, p > 0, p + 1 < positions, NORMALIZE);
      if (line[n] < from || !inside(n)) w = {{0.0f, 0.0f, 0.0f}};
      use(line[n], place[n], w);
    }
  }
  template <typename F> __device__ __forceinline__ void weigh(int from, int to, bool normalize, F use) const {
    if (normalize) {
      weigh_as<true>(from, to, use);
    } else {
      weigh_as<false>(from, to, use);
    }
  }
};

// ---- consumers ----------------------------------------------------------------------------------

// A consumer's place: channels from c on of the extended positions first, ..., first + RUN - 1.
struct Place {
  int lanes, lane, warp, c, first;
  bool used, leads, trails;  // whether it has work; first or last position of its warp
  __device__ __forceinline__ Place(int thread, int slice) {
    lanes = slice / VEC, warp = thread / 32;
    const int per_warp = 32 / lanes, l = thread % 32, column = l / lanes;
    lane = l % lanes, c = lane * VEC;
    used = column < per_warp, leads = column == 0, trails = column == per_warp - 1;
    first = (warp * per_warp + min(column, per_warp - 1)) * RUN;
  }
};

// Where consumers leave what others need of their carried values, two such buffers used in turn. With one position a
// thread everybody leaves it and reads the neighbours' there, [parts][positions + 2][lanes][up to four], so that lanes
// side by side touch 16 bytes side by side; with more the neighbours come by shuffles, and only the ends of the warps
// are left there, [warps + 2][2][slice].
#define PARTS (VEC > 4 ? VEC / 4 : 1)
__device__ __forceinline__ int border_elements(int consumers, int slice) {
  return RUN == 1 ? (consumers / 32 * (32 / (slice / VEC)) + 2) * slice : (consumers / 32 + 2) * 2 * slice;
}

// The carried values (h or g) of a consumer's positions.
struct Carry {
  float value[RUN][VEC];

  // `apart`: between the parts of a border.
  __device__ __forceinline__ void publish(float* border, const Place& at, int slice, int apart) const {
    if constexpr (RUN == 1) {
      if (at.used) store_floats(border + ((at.first + 1) * slice + at.c) / PARTS, value[0], apart);
    } else {
      float* const mine = border + (at.warp + 1) * 2 * slice + at.c;
      if (at.leads) store_floats(mine, value[0]);
      if (at.trails && at.used) store_floats(mine + slice, value[RUN - 1]);
    }
  }

  // value[r] = source[r] + weights of the position before, here and after times what they have.
  __device__ __forceinline__ void step(const float* border, const Place& at, int slice, int apart,
                                       const float (&source)[RUN][VEC], const float (&w)[RUN][3]) {
    float before[VEC], after[VEC];
    if constexpr (RUN == 1) {
      const float* const left = border + (at.first * slice + at.c) / PARTS;
      load_floats(before, left, apart), load_floats(after, left + 2 * slice / PARTS, apart);
    } else {
#pragma unroll
      for (int n = 0; n < VEC; ++n) {
        before[n] = shuffle_up(value[RUN - 1][n], at.lanes);
        after[n] = shuffle_down(value[0][n], at.lanes);
      }
      if (at.leads) load_floats(before, border + (at.warp * 2 + 1) * slice + at.c);
      if (at.trails && at.used) load_floats(after, border + (at.warp + 2) * 2 * slice + at.c);
    }
#pragma unroll
    for (int n = 0; n < VEC; ++n) {
      float left = before[n];
#pragma unroll
      for (int r = 0; r < RUN; ++r) {
        const float here = value[r][n], right = r + 1 < RUN ? value[r + 1][n] : after[n];
        value[r][n] = fmaf(w[r][2], right, fmaf(w[r][0], left, fmaf(w[r][1], here, source[r][n])));
        left = here;
      }
    }
  }
};

// The exchange between neighbouring blocks of a cluster, in two buffers used in turn: received is [2][left, right][halo]
// [slice], and a barrier tells when all of a buffer has come. A block sends to a buffer again only after it has got what
// the neighbour sent when done with the buffer before, so that nothing is overwritten.
struct Exchange {
  float* received;
  unsigned barriers;  // two, 8 bytes apart
  int halo, own, slice, rank, cluster;

  __device__ __forceinline__ void expect(int parity) const {
    barrier_expect(barriers + 8 * parity, halo * slice * 4 * ((rank > 0) + (rank < cluster - 1)));
  }
  // By one thread, before the blocks start together.
  __device__ __forceinline__ void setup() const {
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      barrier_init(barriers + 8 * parity, 1);
      expect(parity);
    }
  }

  // Takes what the neighbours sent the n-th time into the positions beside ours.
  __device__ __forceinline__ void take(Carry& carry, const Place& at, int n, bool leader) const {
    const int parity = n & 1;
    barrier_wait(barriers + 8 * parity, n >> 1 & 1);
    const float* const left = received + parity * 2 * halo * slice + at.c;
#pragma unroll
    for (int r = 0; r < RUN; ++r) {
      const int q = at.first + r;
      if (q < halo) load_floats(carry.value[r], left + q * slice);
      if (q >= halo + own && q < 2 * halo + own) load_floats(carry.value[r], left + (q - own) * slice);
    }
    if (leader) expect(parity);
  }

  // Sends the outer positions of ours, which are beside the neighbours'.
  __device__ __forceinline__ void give(const Carry& carry, const Place& at, int n) const {
    const unsigned barrier = barriers + 8 * (n & 1);
    const float* const target = received + (n & 1) * 2 * halo * slice + at.c;
#pragma unroll
    for (int r = 0; r < RUN; ++r) {
      const int q = at.first + r;
      if (q < halo || q >= halo + own) continue;
      if (rank > 0 && q < 2 * halo) send_remote(target + q * slice, barrier, rank - 1, carry.value[r]);
      if (rank < cluster - 1 && q >= own) send_remote(target + (q - own) * slice, barrier, rank + 1, carry.value[r]);
    }
  }
};
