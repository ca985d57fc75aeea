// Shared by the tiled line-scan kernels: parameters, geometry of a tile, asynchronous copies, cluster access.
//
// A tile is a slice of channels of one group at a run of neighbouring positions of one scan. Its block walks the
// lines; a line that is too wide for one block is split over the blocks of a cluster. Lines come in stages, which are
// fetched ahead into a ring in shared memory; results take the place of the inputs that they were made of and leave
// from there. Threads are of three kinds:
//   consumers  RUN positions and VEC channels each, hidden states in registers
//   weighers   WEIGHERS, fetch raw coefficients a stage ahead and turn them into weights
//   a copier   one warp, moves stages between global and shared memory
// From compute capability 9.0 on the tensor memory accelerator does the copier's work; before, the weighers copy 16
// bytes at a time (asynchronously from 8.0 on), and there are no clusters.
#pragma once
#include "common.cuh"

#ifndef ACCELERATOR
#if __CUDA_ARCH__ >= 900
#define ACCELERATOR 1
#else
#define ACCELERATOR 0
#endif
#endif

// RUN is odd, so that a warp reads the rows of shared memory without bank conflicts.
#define WEIGHERS 128
#define ITEMS 4  // positions times lines of a stage that a weigher has at most

struct Tiling {
  int64 batch, height, width, channels, groups, directions, packed_directions, chunk_size, chunks;
  int64 slice, slices;                    // channels of a slice, slices of all channels; the last may overhang
  int64 halo;                             // lines between two exchanges of a cluster; 0 without a cluster
  int64 stage_lines;                      // lines of a stage; divides halo
  int64 ring;                             // stages in shared memory: 4, or 3 where another block fits a multiprocessor then
  int64 weight_pitch;                     // from the weights of a line in shared memory to those of the next
  int64 tile_vertical, tile_horizontal;   // positions of a tile, for the vertical and horizontal directions
  int64 boxes;                            // a line's positions are copied in so many boxes
  int64 consumers;                        // threads, a multiple of 32
  int64 normalize;
  int64 whole;                            // all lines of a stage leave at once: they always are of one chunk
  int64 merged;                           // rows of the accelerator hold several positions or lines: Tile::across
};

// A stage's place in the ring, and the parity of its turn there.
struct Slot {
  int index = 0, phase = 0;
  __device__ __forceinline__ void next(const Tiling& t) {
    if (++index == (int)t.ring) index = 0, phase ^= 1;
  }
};

struct Tile : Stretch {
  int slice, channel, channels, group, rank;  // channels: those that really exist from `channel` on
  int start, width, own;    // first position, nominal width (layout), positions that really exist
  int halo, extended;       // positions on either side, width + 2 halo
  // Rows of few channels are short, and the accelerator takes as long for one as for a longer one. Where all that lies
  // beside each other in memory touches, its rows hold 2^`together` positions of a scan over rows, or all lines of a
  // stage at one position of a scan over columns (`across`).
  int together;
  bool across;
};

// Only the accelerator limits how many rows come at once; without it the boxes would have to be filled alike.
__device__ __forceinline__ int boxes_of(const Tiling& t) { return ACCELERATOR ? (int)t.boxes : 1; }

template <int CLUSTER> __device__ __forceinline__ Tile make_tile(const Tiling& t) {
  Tile k;
  int64 index = blockIdx.x;
  k.rank = (int)(index % CLUSTER), index /= CLUSTER;
  k.slice = (int)(index % t.slices);
  find_stretch(k, index / t.slices, t);
  const bool vertical = k.direction == DOWN || k.direction == UP;
  k.width = (int)(vertical ? t.tile_vertical : t.tile_horizontal);
  k.channel = k.slice * (int)t.slice;
  k.channels = (int)t.channels - k.channel;
  k.group = k.channel / (int)(t.channels / t.groups);
  k.start = k.rank * k.width;
  k.own = max(0, min(k.width, k.positions - k.start));
  k.halo = (int)t.halo;
  k.extended = k.width + 2 * k.halo;
  // More positions a thread leave no registers for it; the copies of older GPUs go line by line.
  const bool merged = ACCELERATOR && RUN == 1 && t.merged;
  k.across = merged && !vertical;
  k.together = merged && vertical ? 31 - __clz(128 / ((int)t.slice * (int)sizeof(scalar_t))) : 0;
  return k;
}

// ---- stages in shared memory --------------------------------------------------------------------

// `count` positions of `lines` lines lie in shared memory as [box][line][box_positions][slice], or, where rows go across
// lines, as [position][line][slice].
struct Layout {
  int box_positions, box_elements, elements;  // elements of a box and of a stage, padded to 128 bytes
  __device__ __forceinline__ Layout(int count, int lines, int slice, int boxes) {
    const int unit = 128 / (int)sizeof(scalar_t);
    box_positions = (count + boxes - 1) / boxes;
    box_elements = (box_positions * lines * slice + unit - 1) / unit * unit;
    elements = box_elements * boxes;
  }
  // From one line to the next.
  __device__ __forceinline__ int line(const Tile& k, int slice) const { return k.across ? slice : box_positions * slice; }
  // Of line 0; `pitch` leads from one position to the next.
  __device__ __forceinline__ int at(int q, int pitch) const {
    return q / box_positions * box_elements + q % box_positions * pitch;
  }
};

#if ACCELERATOR
// Barriers that one thread arrives at: of what comes telling how many bytes the accelerator will bring, of what is done when
// it is.
__device__ __forceinline__ void start_barrier(int64* barrier) { barrier_init(shared_address(barrier), 1); }
__device__ __forceinline__ void expect_bytes(int64* barrier, int bytes) { barrier_expect(shared_address(barrier), bytes); }
__device__ __forceinline__ void finish_stage(int64* barrier) { barrier_arrive(shared_address(barrier)); }
__device__ __forceinline__ void wait_barrier(int64* barrier, int phase) { barrier_wait(shared_address(barrier), phase); }

// Where a box begins, in the dimensions of its map.
struct Corner {
  int channel, position, line;
  __device__ __forceinline__ Corner(const Tile& k, int slice, int position, int line)
      : channel(k.across ? line * slice : k.channel), position(position >> k.together), line(k.across ? 0 : line) {}
};

// Starts the copy of one tensor's part of a stage.
__device__ __forceinline__ void copy_stage(const scalar_t* to, const Layout& layout, int boxes, const Map& map, const Corner& c,
                                          int slot, int batch, int64* barrier) {
#pragma unroll 1
  for (int n = 0; n < boxes; ++n)
    copy_box(to + n * layout.box_elements, map, c.channel, c.position + n * layout.box_positions, c.line, slot, batch, barrier);
}
#endif

// ---- barriers and clusters ----------------------------------------------------------------------

__device__ __forceinline__ void consumer_barrier(int threads) { barrier_of<1>(threads); }

// Ends a stage, for consumers and weighers: the weights of the next one are there, and those of this one are used. The
// copier does not meet them; it is told when there is something to store, and has until the ring comes round for it.
__device__ __forceinline__ void stage_barrier(int consumers) { barrier_of<3>(consumers + WEIGHERS); }

// Before the first stage: the blocks of a cluster start together, and each other's barriers are there.
template <int CLUSTER> __device__ __forceinline__ void cluster_barrier() {
  if (CLUSTER > 1) start_together<CLUSTER>();
  __syncthreads();  // with a cluster, too: compute-sanitizer does not take the barrier above for one of the block
}

// Stores into the shared memory of another block of the cluster, at the address it has in this one. The barrier there
// at the address of `barrier` counts the bytes that have arrived.
__device__ __forceinline__ void send_remote(const float* local, unsigned barrier, int rank, const float (&value)[VEC]) {
  const unsigned to = remote_address(shared_address(local), rank), signal = remote_address(barrier, rank);
#pragma unroll
  for (int j = 0; j < VEC; j += 4) {
    if constexpr (VEC >= 4) {
      send_floats(to + 4 * j, signal, value[j], value[j + 1], value[j + 2], value[j + 3]);
    } else {
      send_floats(to, signal, value[0], value[1]);
    }
  }
}

// ---- float vectors in shared memory -------------------------------------------------------------

// `apart`: from four elements to the next four.
__device__ __forceinline__ void load_floats(float (&out)[VEC], const float* p, int apart = 4) {
#pragma unroll
  for (int j = 0; j < VEC; j += (VEC >= 4 ? 4 : VEC)) {
    if constexpr (VEC >= 4) {
      const float4 v = *reinterpret_cast<const float4*>(p + j / 4 * apart);
      out[j] = v.x, out[j + 1] = v.y, out[j + 2] = v.z, out[j + 3] = v.w;
    } else if constexpr (VEC == 2) {
      const float2 v = *reinterpret_cast<const float2*>(p);
      out[0] = v.x, out[1] = v.y;
    } else {
      out[0] = *p;
    }
  }
}

__device__ __forceinline__ void store_floats(float* p, const float (&in)[VEC], int apart = 4) {
#pragma unroll
  for (int j = 0; j < VEC; j += (VEC >= 4 ? 4 : VEC)) {
    if constexpr (VEC >= 4) {
      *reinterpret_cast<float4*>(p + j / 4 * apart) = make_float4(in[j], in[j + 1], in[j + 2], in[j + 3]);
    } else if constexpr (VEC == 2) {
      *reinterpret_cast<float2*>(p) = make_float2(in[0], in[1]);
    } else {
      *p = in[0];
    }
  }
}

// ---- the copier's work without the accelerator --------------------------------------------------

#if !ACCELERATOR
// Until the stage that is needed next has arrived; those after it may still be on their way.
__device__ __forceinline__ void wait_stage(const Tiling& t) { t.ring == 3 ? wait_copies<1>() : wait_copies<2>(); }

#define CHUNK (16 / (int)sizeof(scalar_t))  // elements of one 16-byte copy

// Calls f(position, line, chunk) for every 16-byte chunk of a part of a stage, shared by the weighers.
template <typename F> __device__ __forceinline__ void for_chunks(int thread, int lines, int count, int slice, F f) {
  const int chunks = slice / CHUNK, items = count * chunks;
#pragma unroll 1
  for (int n = thread; n < items * lines; n += WEIGHERS) f(n % items / chunks, n / items, n % chunks * CHUNK);
}

__device__ __forceinline__ void copy_lines(int thread, const scalar_t* to, const scalar_t* from, const View& view,
                                           int line, int lines, int first_position, int count, int positions,
                                           int slice) {
  for_chunks(thread, lines, count, slice, [&](int q, int j, int chunk) {
    const int p = first_position + q;
    const scalar_t* const target = to + (j * count + q) * slice + chunk;
    if (p >= 0 && p < positions) {
      copy16(shared_address(target), from + view.at(line + j, p) + chunk);
    } else {  // neighbours outside have weight zero, but they must be numbers
      *reinterpret_cast<uint4*>(const_cast<scalar_t*>(target)) = make_uint4(0, 0, 0, 0);
    }
  });
}

__device__ __forceinline__ void store_lines(int thread, scalar_t* to, const View& view, int line, int lines,
                                            int first_position, int count, int slice, const scalar_t* from, int pitch) {
  for_chunks(thread, lines, count, slice, [&](int q, int j, int chunk) {
    *reinterpret_cast<uint4*>(to + view.at(line + j, first_position + q) + chunk) =
        *reinterpret_cast<const uint4*>(from + (j * pitch + q) * slice + chunk);
  });
}
#endif
