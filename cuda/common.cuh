// Shared by the line-scan kernels: element types, vector access, the geometry of a scan, the weights.
//
// Set by the preamble that the loader puts in front of the source, beside SCALAR (device.cuh):
//   VEC  elements of one vector access
#pragma once

#include "device.cuh"

// ---- vector access ------------------------------------------------------------------------------
// A struct of 16-bit elements would be copied two bytes at a time, so vectors move as 32-bit words.

template <int BYTES> struct Words { unsigned word[BYTES / 4]; };
template <> struct Words<2> { unsigned short word[1]; };
template <> struct __align__(8) Words<8> { unsigned word[2]; };
template <> struct __align__(16) Words<16> { unsigned word[4]; };

union Vector {
  Words<VEC * (int)sizeof(scalar_t)> words;
  scalar_t element[VEC];
  __device__ Vector() {}
};

__device__ __forceinline__ void load_words(Words<2>& out, const void* p) {
  out.word[0] = *reinterpret_cast<const unsigned short*>(p);
}
__device__ __forceinline__ void load_words(Words<4>& out, const void* p) {
  out.word[0] = *reinterpret_cast<const unsigned*>(p);
}
__device__ __forceinline__ void load_words(Words<8>& out, const void* p) {
  uint2 v = *reinterpret_cast<const uint2*>(p);
  out.word[0] = v.x, out.word[1] = v.y;
}
__device__ __forceinline__ void load_words(Words<16>& out, const void* p) {
  uint4 v = *reinterpret_cast<const uint4*>(p);
  out.word[0] = v.x, out.word[1] = v.y, out.word[2] = v.z, out.word[3] = v.w;
}
__device__ __forceinline__ void store_words(const Words<2>& in, void* p) {
  *reinterpret_cast<unsigned short*>(p) = in.word[0];
}
__device__ __forceinline__ void store_words(const Words<4>& in, void* p) {
  *reinterpret_cast<unsigned*>(p) = in.word[0];
}
__device__ __forceinline__ void store_words(const Words<8>& in, void* p) {
  *reinterpret_cast<uint2*>(p) = make_uint2(in.word[0], in.word[1]);
}
__device__ __forceinline__ void store_words(const Words<16>& in, void* p) {
  *reinterpret_cast<uint4*>(p) = make_uint4(in.word[0], in.word[1], in.word[2], in.word[3]);
}

__device__ __forceinline__ void to_floats(float (&out)[VEC], const Vector& v) {
#if SCALAR == 1 && VEC > 1
#pragma unroll
  for (int j = 0; j < VEC; j += 2) {
    out[j] = __uint_as_float(v.words.word[j / 2] << 16);
    out[j + 1] = __uint_as_float(v.words.word[j / 2] & 0xffff0000u);
  }
#else
#pragma unroll
  for (int j = 0; j < VEC; ++j) out[j] = to_float(v.element[j]);
#endif
}

__device__ __forceinline__ void load(float (&out)[VEC], const scalar_t* p) {
  Vector v;
  load_words(v.words, p);
  to_floats(out, v);
}

__device__ __forceinline__ void store(scalar_t* p, const float (&in)[VEC]) {
  Vector v;
#if SCALAR != 0 && VEC > 1
#pragma unroll
  for (int j = 0; j < VEC; j += 2) v.words.word[j / 2] = from_floats(in[j], in[j + 1]);
#else
#pragma unroll
  for (int j = 0; j < VEC; ++j) v.element[j] = from_float(in[j]);
#endif
  store_words(v.words, p);
}

// ---- geometry -----------------------------------------------------------------------------------

// A tensor (B, H, W, ...) seen along one direction: element offset = base + line * t + position * p.
struct View {
  int64 base, line, position;
  __device__ __forceinline__ int64 at(int t, int p) const { return base + line * t + position * p; }
};

enum Direction { DOWN = 0, UP = 1, RIGHT = 2, LEFT = 3 };

__device__ __forceinline__ View view_along(int direction, int lines, int64 base, int64 row, int64 column) {
  View v;
  const bool vertical = direction == DOWN || direction == UP;
  v.line = vertical ? row : column;
  v.position = vertical ? column : row;
  v.base = base;
  if (direction == UP || direction == LEFT) {
    v.base += v.line * (lines - 1);
    v.line = -v.line;
  }
  return v;
}

// A chunk of lines of one direction and batch entry.
struct Stretch {
  int batch, slot, direction;   // slot: index of the direction among the D that were asked for
  int lines, positions;         // T and P along this direction
  int begin, end;               // lines of this chunk
};

// `index` counts the chunks of all directions and batch entries, chunks first; `s` tells how many there are.
template <typename S> __device__ __forceinline__ void find_stretch(Stretch& k, int64 index, const S& s) {
  const int chunk = (int)(index % s.chunks);
  index /= s.chunks;
  k.slot = (int)(index % s.directions);
  k.batch = (int)(index / s.directions);
  k.direction = ((unsigned)s.packed_directions >> (2 * k.slot)) & 3;
  const bool vertical = k.direction == DOWN || k.direction == UP;
  k.lines = (int)(vertical ? s.height : s.width);
  k.positions = (int)(vertical ? s.width : s.height);
  k.begin = (int)min((int64)chunk * s.chunk_size, (int64)k.lines);
  k.end = (int)min((int64)k.begin + s.chunk_size, (int64)k.lines);
}

// What a block of the generic kernels works on: a stretch and a slice of channels.
//
// A thread owns VEC channels of one group at the positions first, first + step, ... `lanes_per_group`
// neighbouring threads (a power of two up to 32) share a group, `groups_per_block` groups share a block.
struct Task : Stretch {
  int lane, lanes;              // this thread's place among the block's threads of one position
  int group_lane;               // its place among the lanes of its group
  int group, channel;           // its group and first channel
  int group_in_block;
  int channel_slice;            // which slice of the group's channels, for partial sums
  bool active;                  // false for threads beyond the last group or channel
  int first, step;              // positions
};

struct Shape {
  int batch, height, width, channels, groups, directions;
  unsigned packed_directions;   // two bits each
  int chunk_size, chunks;
  int lanes_per_group, groups_per_block, channel_slices, group_slices;
};

// As the host packs it: 64-bit integers, in this order.
struct ShapeParameters {
  int64 batch, height, width, channels, groups, directions, packed_directions, chunk_size, chunks, lanes_per_group,
      groups_per_block, channel_slices, group_slices;
};

__device__ __forceinline__ Shape make_shape(const ShapeParameters& s) {
  return {(int)s.batch,      (int)s.height,     (int)s.width,
          (int)s.channels,   (int)s.groups,     (int)s.directions,
          (unsigned)s.packed_directions,        (int)s.chunk_size,
          (int)s.chunks,     (int)s.lanes_per_group, (int)s.groups_per_block,
          (int)s.channel_slices, (int)s.group_slices};
}

__device__ __forceinline__ Task make_task(const Shape& s) {
  Task k;
  int64 index = blockIdx.x;
  k.channel_slice = (int)(index % s.channel_slices), index /= s.channel_slices;
  const int group_slice = (int)(index % s.group_slices);
  find_stretch(k, index / s.group_slices, s);
  k.lanes = s.lanes_per_group * s.groups_per_block;
  k.lane = threadIdx.x % k.lanes;
  k.first = threadIdx.x / k.lanes;
  k.step = blockDim.x / k.lanes;
  k.group_in_block = k.lane / s.lanes_per_group;
  k.group_lane = k.lane % s.lanes_per_group;
  k.group = group_slice * s.groups_per_block + k.group_in_block;
  const int per_group = s.channels / s.groups;
  const int inside = (k.channel_slice * s.lanes_per_group + k.group_lane) * VEC;
  k.channel = k.group * per_group + inside;
  k.active = k.group < s.groups && inside < per_group;
  return k;
}

// ---- weights ------------------------------------------------------------------------------------

struct Weights { float w[3]; };

// Raw coefficients of one position to weights. sigmoid(r_k) / sum_j sigmoid(r_j), every sigmoid scaled by
// exp(-m) with m = min(max r, 0): the same ratio, but the sum cannot underflow to zero.
__device__ __forceinline__ Weights load_weights(const scalar_t* raw, int p, int positions, bool normalize) {
  const bool has[3] = {p > 0, true, p + 1 < positions};
  Weights out;
#pragma unroll
  for (int k = 0; k < 3; ++k) out.w[k] = has[k] ? to_float(raw[k]) : 0.0f;
  if (!normalize) return out;
  float m = out.w[1];
  if (has[0]) m = fmaxf(m, out.w[0]);
  if (has[2]) m = fmaxf(m, out.w[2]);
  m = fminf(m, 0.0f);
  const float offset = expf(m);
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    out.w[k] = has[k] ? 1.0f / (offset + expf(m - out.w[k])) : 0.0f;
    sum += out.w[k];
  }
  const float scale = 1.0f / sum;
#pragma unroll
  for (int k = 0; k < 3; ++k) out.w[k] *= scale;
  return out;
}

// d raw from d W of one position; sigmoid(-raw) = 1 - sigmoid(raw).
__device__ __forceinline__ void weights_backward(float (&grad)[3], const Weights& w, const scalar_t* raw, int p,
                                                 int positions) {
  const float mean = w.w[0] * grad[0] + w.w[1] * grad[1] + w.w[2] * grad[2];
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    const bool has = k == 1 || (k == 0 ? p > 0 : p + 1 < positions);
    // A line of one position has one neighbour of weight 1, whatever its coefficient: exactly no gradient.
    grad[k] = has && positions > 1 ? w.w[k] * (grad[k] - mean) / (1.0f + expf(to_float(raw[k]))) : 0.0f;
  }
}
