// Shared by the warp kernels: every warp scans its own run of positions and slice of channels by itself.
//
// A lane has VEC channels of RUN neighbouring positions and keeps their hidden states in registers; `lanes` lanes share
// a position. Lines come in stages of LINES lines, which each lane copies for itself, STAGES - 1 stages ahead, so that
// nothing but the coefficients' weights passes between lanes through shared memory. Beyond the ends of its positions a
// warp needs the neighbouring warp's state of the line before. That warp leaves it in shared memory, in another block
// of the cluster where the line is cut there, and tells so by a barrier that the receiver alone waits for. Nothing else
// synchronises, so warps run as far apart as their neighbours let them.
#pragma once
#include "weights.cuh"

#define STAGES 4
#define WARP_THREADS (VEC * RUN <= 4 ? 640 : RUN == 1 ? 512 : RUN == 2 ? 384 : 256)  // of a block at most
#define VECTOR_BYTES (VEC * (int)sizeof(scalar_t))
#define LINES (VECTOR_BYTES * RUN <= 8 ? 4 : RUN == 1 ? 2 : 1)
#define RAW_BYTES (SCALAR == 0 ? 16 : 8)  // three coefficients in whole words

struct Tiling {
  int64 batch, height, width, channels, groups, directions, packed_directions, chunk_size, chunks;
  int64 lanes;           // of a position, up to 16; what is left of 32 idles
  int64 channel_warps;   // of a block, each with other channels of the same positions
  int64 position_warps;  // of a block, one after the other along the line
  int64 slices;          // blocks beside each other over the channels
  int64 normalize;
};

struct Tile {
  int direction, slot, batch, channel, group, slice;  // slice: which of all warps' slices of channels
  int lines, positions, begin, end, total;            // total: lines from begin to end
  int lane, lanes, place, places, span;               // place: of this lane in its warp; span: positions of a warp
  int warp, rank, blocks;                             // warp of the block, block of the cluster
  int start, first;                                   // first position of the warp and of the lane
  bool leads, trails, idle;                           // at the first and last place of its warp, at none
};

template <int CLUSTER> __device__ __forceinline__ Tile make_tile(const Tiling& t) {
  Tile k;
  int64 index = blockIdx.x;
  k.rank = (int)(index % CLUSTER), index /= CLUSTER;
  const int block_slice = (int)(index % t.slices);
  index /= t.slices;
  const int chunk = (int)(index % t.chunks);
  index /= t.chunks;
  k.slot = (int)(index % t.directions);
  k.batch = (int)(index / t.directions);
  k.direction = ((unsigned)t.packed_directions >> (2 * k.slot)) & 3;
  const bool vertical = k.direction == DOWN || k.direction == UP;
  k.lines = (int)(vertical ? t.height : t.width);
  k.positions = (int)(vertical ? t.width : t.height);
  k.begin = (int)min((int64)chunk * t.chunk_size, (int64)k.lines);
  k.end = (int)min((int64)k.begin + t.chunk_size, (int64)k.lines);
  k.total = k.end - k.begin;
  k.lanes = (int)t.lanes, k.lane = threadIdx.x % 32;
  k.places = 32 / k.lanes, k.span = k.places * RUN;
  k.idle = k.lane >= k.places * k.lanes;
  k.place = k.idle ? k.places - 1 : k.lane / k.lanes;
  k.leads = k.place == 0, k.trails = k.place == k.places - 1 && !k.idle;
  k.warp = threadIdx.x / 32, k.blocks = CLUSTER;
  const int column = k.warp / (int)t.channel_warps;
  k.slice = block_slice * (int)t.channel_warps + k.warp % (int)t.channel_warps;
  k.channel = (k.slice * k.lanes + k.lane % k.lanes) * VEC;
  k.group = k.channel / (int)(t.channels / t.groups);
  k.start = (k.rank * (int)t.position_warps + column) * k.span;
  k.first = k.idle ? k.positions : k.start + k.place * RUN;
  return k;
}

// A view by steps instead of lines: step 0 is the first line of the chunk, or the last one going backwards.
__device__ __forceinline__ View view_by_steps(const Tile& k, int64 base, int64 row, int64 column, bool backwards) {
  View v = view_along(k.direction, k.lines, base, row, column);
  v.base += v.line * (backwards ? k.end - 1 : k.begin);
  if (backwards) v.line = -v.line;
  return v;
}

// ---- float vectors in shared memory -------------------------------------------------------------

__device__ __forceinline__ void load_floats(float (&out)[VEC], const float* p) {
#pragma unroll
  for (int j = 0; j < VEC; j += 4) {
    const float4 v = *reinterpret_cast<const float4*>(p + j);
    out[j] = v.x, out[j + 1] = v.y, out[j + 2] = v.z, out[j + 3] = v.w;
  }
}

__device__ __forceinline__ void store_floats(float* p, const float (&in)[VEC]) {
#pragma unroll
  for (int j = 0; j < VEC; j += 4) *reinterpret_cast<float4*>(p + j) = make_float4(in[j], in[j + 1], in[j + 2], in[j + 3]);
}

// ---- shared memory of a block -------------------------------------------------------------------

// Of each warp: [STAGES][LINES][SLOTS][32] vectors, [STAGES][LINES][span] raw coefficients, [2][LINES][span] weights.
// Of the block: [warps][parity][side][slice] states that neighbours sent, and as many barriers.
template <int SLOTS> struct Memory {
  char* vectors;    // this lane's first
  char* raw;        // this warp's
  float4* weights;  // this warp's
  float* borders;   // of the block
  char* barriers;   // of the block
  __device__ __forceinline__ Memory(char* base, const Tile& k, const Tiling& t) {
    const int warps = (int)(t.channel_warps * t.position_warps), items = LINES * k.span;
    const int ring = STAGES * LINES * SLOTS * 32 * VECTOR_BYTES, of_warp = ring + items * (STAGES * RAW_BYTES + 2 * 16);
    char* const mine = base + k.warp * of_warp;
    vectors = mine + k.lane * VECTOR_BYTES;
    raw = mine + ring;
    weights = reinterpret_cast<float4*>(raw + STAGES * items * RAW_BYTES);
    borders = reinterpret_cast<float*>(base + warps * of_warp);
    barriers = reinterpret_cast<char*>(borders + warps * 4 * k.lanes * VEC);
  }
  // This lane's vector of a line of a stage.
  __device__ __forceinline__ char* at(int stage, int line, int slot) const {
    return vectors + ((stage % STAGES * LINES + line) * SLOTS + slot) * (32 * VECTOR_BYTES);
  }
};

// ---- weights ------------------------------------------------------------------------------------

// The warp's coefficients: copied like the vectors, a lane for every position of a stage, then made into weights.
struct Weigher {
  const scalar_t* next;      // this lane's first coefficients of the stage that is fetched next
  unsigned here;             // lower half of that address for the stage that is weighed next
  int64 line, position;      // strides in elements
  char* raw;
  float4* weights;
  int item, span, lines;     // this lane's first item of a stage; lines that 32 items take up, at least one
  int first_line, start, positions, total;
  bool normalize;

  // The view is by steps.
  template <int SLOTS>
  __device__ __forceinline__ Weigher(const scalar_t* weight, const View& view, const Memory<SLOTS>& m, const Tile& k,
                                     bool normalize)
      : line(view.line), position(view.position), raw(m.raw), weights(m.weights), item(k.lane), span(k.span),
        lines(max(1, 32 / k.span)), first_line(k.lane / k.span), start(k.start + k.lane % k.span), positions(k.positions),
        total(k.total), normalize(normalize) {
    next = weight + view.at(first_line, start);
    here = (unsigned)reinterpret_cast<size_t>(next);
  }

  // Calls use(item, step, position, elements from this lane's first item) for this lane's items of a stage.
  template <typename F> __device__ __forceinline__ void for_items(int stage, F use) const {
    const scalar_t* const nothing = nullptr;
#pragma unroll 1
    for (int q = 0; q < span; q += 32)
#pragma unroll 1
      for (int j = first_line < lines ? 0 : LINES; first_line + j < LINES; j += lines)
        use(j * span + q + item, stage * LINES + first_line + j, start + q, nothing + j * line + q * position);
  }

  __device__ __forceinline__ void fetch(int stage) {
    const unsigned to_stage = shared_address(raw + stage % STAGES * LINES * span * RAW_BYTES);
    for_items(stage, [&](int n, int step, int p, const scalar_t* offset) {
      const bool there = step < total && p < positions;
      const char* const from = reinterpret_cast<const char*>(next) + reinterpret_cast<size_t>(offset);
      const unsigned to = to_stage + n * RAW_BYTES;
      if constexpr (SCALAR == 0) {
#pragma unroll
        for (int k = 0; k < 3; ++k) copy_async<4>(to + 4 * k, from + 4 * k, there ? 4 : 0);
      } else {  // six bytes that start at an even address lie in two words
        const int odd = (int)reinterpret_cast<size_t>(from) & 2;
        copy_async<4>(to, from - odd, there ? 4 : 0);
        copy_async<4>(to + 4, from - odd + 4, there ? 2 + odd : 0);
      }
    });
    next += LINES * line;
  }

  // The weights of a stage, which has arrived; those of the first step are zero where they do not count.
  __device__ __forceinline__ void weigh(int stage, bool first_counts) {
    const char* const from_stage = raw + stage % STAGES * LINES * span * RAW_BYTES;
    float4* const to_stage = weights + (stage & 1) * LINES * span;
    for_items(stage, [&](int n, int step, int p, const scalar_t* offset) {
      const char* const from = from_stage + n * RAW_BYTES;
      float values[3];
      if constexpr (SCALAR == 0) {
        const float4 v = *reinterpret_cast<const float4*>(from);
        values[0] = v.x, values[1] = v.y, values[2] = v.z;
      } else {
        const uint2 v = *reinterpret_cast<const uint2*>(from);
        const int shift = (int)(here + (unsigned)reinterpret_cast<size_t>(offset)) & 2 ? 16 : 0;
        const unsigned low = __funnelshift_r(v.x, v.y, shift), high = v.y >> shift;
        values[0] = to_float((scalar_t)low), values[1] = to_float((scalar_t)(low >> 16));
        values[2] = to_float((scalar_t)high);
      }
      const bool counts = p < positions && (first_counts || step > 0);
      const Weights w = make_weights(values, p > 0, p + 1 < positions, normalize, counts);
      to_stage[n] = make_float4(w.w[0], w.w[1], w.w[2], 0.0f);
    });
    here += (unsigned)(LINES * line * (int)sizeof(scalar_t));
  }

  __device__ __forceinline__ const float4* of(int stage, int line, int place) const {
    return weights + ((stage & 1) * LINES + line) * span + place * RUN;
  }
};

// ---- the ends of a warp's positions -------------------------------------------------------------

// What a warp leaves to its neighbours and gets from them at every step. The lanes at its first place deal with the
// neighbour on the left, those at its last place with the one on the right; the others have none. Two buffers are
// enough: a neighbour that is two steps ahead would need what this warp has not sent yet.
struct Border {
  bool there, far;        // this lane has a neighbour; which is in another block
  bool settles;           // the one lane of its place that counts what comes from afar
  int slice;
  float* slot;            // received: parities are 2 * slice apart
  unsigned barrier;       // parities are 16 bytes apart
  float* target;          // where the neighbour receives, in this block
  unsigned far_target, signal;

  // Warps beyond the last position only set their barriers up.
  template <int CLUSTER, typename M>
  __device__ __forceinline__ void setup(const M& m, const Tile& k, const Tiling& t) {
    const int rows = (int)t.position_warps, columns = (int)t.channel_warps, row = k.warp / columns;
    const int side = k.trails, c = k.lane % k.lanes * VEC;
    slice = k.lanes * VEC, settles = c == 0;
    there = (k.leads && k.start > 0) || (k.trails && k.start + k.span < k.positions);
    far = CLUSTER > 1 && (side ? row == rows - 1 : row == 0);
    const int hop = there ? far ? (1 - rows) * columns : columns : 0, other = side ? k.warp + hop : k.warp - hop;
    slot = m.borders + (k.warp * 4 + side) * slice + c;
    barrier = shared_address(m.barriers + k.warp * 32 + side * 8);
    // What goes left arrives on the neighbour's right side, and the other way round.
    target = m.borders + (other * 4 + 1 - side) * slice + c;
    signal = shared_address(m.barriers + other * 32 + (1 - side) * 8);
    if (there && far) {
      const int rank = side ? k.rank + 1 : k.rank - 1;
      far_target = remote_address(shared_address(target), rank), signal = remote_address(signal, rank);
    }
    if ((k.leads || k.trails) && settles) {
#pragma unroll
      for (int parity = 0; parity < 2; ++parity) {
        barrier_init(barrier + parity * 16, far ? 1 : k.lanes);
        if (far) barrier_expect(barrier + parity * 16, slice * 4);
      }
    }
  }

  // What the neighbour sent after `step`.
  __device__ __forceinline__ void receive(float (&out)[VEC], int step) const {
    const int parity = step & 1;
    barrier_wait(barrier + parity * 16, step >> 1 & 1);
    load_floats(out, slot + parity * 2 * slice);
    if (far && settles) barrier_expect(barrier + parity * 16, slice * 4);
  }

  // Sends the states after `step`.
  __device__ __forceinline__ void send(const float (&value)[VEC], int step) const {
    const int parity = step & 1;
    if (far) {
#pragma unroll
      for (int n = 0; n < VEC; n += 4)
        send_floats(far_target + 4 * (parity * 2 * slice + n), signal + parity * 16, value[n], value[n + 1], value[n + 2],
                    value[n + 3]);
    } else {
      store_floats(target + parity * 2 * slice, value);
      barrier_arrive(signal + parity * 16);
    }
  }
};

// Ones in this lane's place of a ring slot for good, for a tensor that is not there.
template <int SLOTS> __device__ __forceinline__ void fill_with_ones(const Memory<SLOTS>& m, int slot) {
  float ones[VEC];
#pragma unroll
  for (int n = 0; n < VEC; ++n) ones[n] = 1.0f;
#pragma unroll 1
  for (int n = 0; n < STAGES * LINES; ++n)
#pragma unroll
    for (int r = 0; r < RUN; ++r) store(reinterpret_cast<scalar_t*>(m.at(n / LINES, n % LINES, slot + r)), ones);
}

// One tensor's vectors on their way into the ring.
struct Source {
  const scalar_t* next;  // this lane's first position at the first step of the next stage to fetch
  int64 line, position;
  __device__ __forceinline__ Source(const scalar_t* p, const View& v, int first)
      : next(p + v.at(0, first)), line(v.line), position(v.position) {}
  template <int SLOTS>
  __device__ __forceinline__ void fetch(const Memory<SLOTS>& m, int slot, int stage, const Tile& k, int total) {
#pragma unroll
    for (int j = 0; j < LINES; ++j)
#pragma unroll
      for (int r = 0; r < RUN; ++r) {
        const bool there = stage * LINES + j < total && k.first + r < k.positions;
        copy_async<VECTOR_BYTES>(shared_address(m.at(stage, j, slot + r)), next + j * line + r * position,
                                 there ? VECTOR_BYTES : 0);
      }
    next += LINES * line;
  }
};
