// The fused form's nine points by columns of the kernel. Three threads of a warp own a pair (position,
// group), a column of three points each: a record is read where it is, and a point's location and weight are
// made once, for whoever spreads or gathers the channels.
#pragma once

#include "dcnv3_cuda_device.h"
#include "dcnv3_cuda_nine.h"

namespace dcnv3::cuda {

// What a thread reads of records of N: its column's three offsets and logits, and the last number.
template <class N>
struct ColumnOfRecord {
  __device__ __forceinline__ ColumnOfRecord(const N* records, int column)
      : column(column), offsets(records + 6 * column), logits(records + 18 + 3 * column / 2 * 2) {
    hold(offsets);
    hold(logits);
  }
  // Half precision: three words of offsets, two that the logits are in.
  __device__ __forceinline__ void read(uint32_t element, bool) {
#pragma unroll
    for (int i = 0; i < 3; ++i) word[i] = reinterpret_cast<const uint32_t*>(offsets + element)[i];
#pragma unroll
    for (int i = 0; i < 2; ++i) word[3 + i] = reinterpret_cast<const uint32_t*>(logits + element)[i];
  }
  __device__ __forceinline__ void values(float* offset, float* logit, float* centre) const {
#pragma unroll
    for (int i = 0; i < 3; ++i) unpack(word[i], N(), offset + 2 * i);
    float v[4];
    unpack(word[3], N(), v);
    unpack(word[4], N(), v + 2);
#pragma unroll
    for (int i = 0; i < 3; ++i) logit[i] = column == 1 ? v[i + 1] : v[i];
    *centre = v[3];  // the last column's
  }
  int column;
  const N *offsets, *logits;
  uint32_t word[5] = {};
};
template <>
struct ColumnOfRecord<float> {
  __device__ __forceinline__ ColumnOfRecord(const float* records, int column)
      : column(column), records(records) {
    hold(this->records);
  }
  __device__ __forceinline__ void read(uint32_t element, bool with_centre) {
    const float* record = records + element;
#pragma unroll
    for (int i = 0; i < 3; ++i) load<2>(record + 6 * column + 2 * i, number + 2 * i);
#pragma unroll
    for (int i = 0; i < 3; ++i) number[6 + i] = record[18 + 3 * column + i];
    if (with_centre) number[9] = record[27];
  }
  __device__ __forceinline__ void values(float* offset, float* logit, float* centre) const {
#pragma unroll
    for (int i = 0; i < 6; ++i) offset[i] = number[i];
#pragma unroll
    for (int i = 0; i < 3; ++i) logit[i] = number[6 + i];
    *centre = number[9];
  }
  int column;
  const float* records;
  float number[10] = {};
};

// Pairs count positions, of each the groups; a thread's next is always as far.
struct Walk {
  __device__ __forceinline__ Walk(const Problem& s, int groups, int first, int step)
      : groups(groups), width(int(s.out_width)), pair(first), step(step) {
    const auto split = [&](int n, int* group, int* i, int* j) {
      const int position = n / groups;
      *group = n - position * groups;
      *i = position / width;
      *j = position - *i * width;
    };
    split(first, &group, &i, &j);
    split(step, &step_group, &step_i, &step_j);
  }
  __device__ __forceinline__ void next() {
    pair += step, group += step_group, i += step_i, j += step_j;
    if (group >= groups) group -= groups, ++j;
    if (j >= width) j -= width, ++i;
  }
  __device__ __forceinline__ uint32_t position() const { return uint32_t(i * width + j); }
  int groups, width;
  int pair, group, i, j;  // the group counts from the block's first
  int step, step_group, step_i, step_j;
};

// A column of a pair's points: their locations, the softmax, and the share of the pixel at the position.
struct ColumnOfPoints {
  float h[3], w[3], weight[3];
  float share;  // what times an exponential is a weight
  float blend;  // the softmax's share is the rest
};

// Makes them; a warp has kPairs at once. Threads of a column lie side by side: so what they write to shared
// memory is in different banks.
template <int kPairs>
struct PointColumns {
  static_assert(3 * kPairs <= 32, "");
  // `centre`: whether there is the pixel at the position, as call.centre has it.
  __device__ __forceinline__ PointColumns(const Call& call, bool centre)
      : slot(threadIdx.x % 32 % kPairs),
        column(threadIdx.x % 32 / kPairs),
        scale(float(call.problem.offset_scale)),
        with_centre(centre) {
    const Problem& s = call.problem;
    height = extent<float>(s.height), width = extent<float>(s.width);
    dilation_h = float(int(s.dilation_h)), step_w = float(int(s.dilation_w)) * float(column - 1);
    stride_h = int(s.stride_h), stride_w = int(s.stride_w);
    start_h = int(grid(0, s.stride_h, s.pad_h, 3, s.dilation_h));
    start_w = int(grid(0, s.stride_w, s.pad_w, 3, s.dilation_w));
    hold(scale), hold(dilation_h), hold(step_w);
    hold(height.last), hold(height.end), hold(width.last), hold(width.end);
    hold(start_h), hold(start_w), hold(slot), hold(column);
  }

  // Whether this thread is not one that is left over: those have a column of no pair.
  __device__ __forceinline__ bool counts() const { return column < 3; }

  // All threads of the warp take part.
  template <class N>
  __device__ __forceinline__ ColumnOfPoints make(const ColumnOfRecord<N>& record, const Walk& at) const {
    ColumnOfPoints points;
    float offset[6], logit[3], centre;
    record.values(offset, logit, &centre);
    float top = larger(larger(logit[0], logit[1]), logit[2]);
    top = larger(larger(of(top, 0), of(top, 1)), of(top, 2));
#pragma unroll
    for (int row = 0; row < 3; ++row) points.weight[row] = exp_of(logit[row] - top);
    const float sum = points.weight[0] + points.weight[1] + points.weight[2];
    points.share = reciprocal(of(sum, 0) + of(sum, 1) + of(sum, 2));
    points.blend = with_centre ? sigmoid(of(centre, 2)) : 0.0f;

    const float grid_h = float(at.i * stride_h + start_h), grid_w = float(at.j * stride_w + start_w);
#pragma unroll
    for (int row = 0; row < 3; ++row) {
      points.weight[row] *= points.share;
      points.h[row] = grid_h + (dilation_h * float(row - 1) + offset[2 * row + 1]) * scale;
      points.w[row] = grid_w + (step_w + offset[2 * row]) * scale;
    }
    return points;
  }

  // v of another column of the pair.
  __device__ __forceinline__ float of(float v, int column) const {
    return __shfl_sync(~0u, v, slot + column * kPairs);
  }

  int slot, column;  // which of the pairs, and of the three columns
  float scale, dilation_h, step_w;
  bool with_centre;
  Extent<float> height, width;
  int stride_h, stride_w, start_h, start_w;
};

}  // namespace dcnv3::cuda
