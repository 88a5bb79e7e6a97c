// The fused form's nine points, made by three threads of a warp for each position: a thread has a column of
// three points, and reads its share of the record where it is. So a warp makes the cells of up to ten
// positions of a group at once, each cell once, for whoever spreads or gathers the channels.
#pragma once

#include "dcnv3_cuda_device.h"
#include "dcnv3_cuda_nine.h"

namespace dcnv3::cuda {

// A point's cell: row and column of its first pixel, and the weights of its four pixels.
struct PlacedCell {
  int row, column;
  float weight[4];
};

// The records' numbers are N: of x's dtype, or float32. A warp has kPositions at once; the threads that are
// left over do what some others do.
template <class N, int kPositions>
struct PointColumns {
  static_assert(3 * kPositions <= 32, "");
  __device__ __forceinline__ PointColumns(const Call& c, int64_t image, int group)
      : call(c),
        height(extent<float>(c.problem.height)),
        width(extent<float>(c.problem.width)),
        scale(float(c.problem.offset_scale)),
        row(uint32_t(c.offset.row)),
        positions(int(c.problem.positions())),
        out_width(int(c.problem.out_width)) {
    const Problem& s = c.problem;
    const int lane = int(threadIdx.x % 32);
    slot = lane / 3 < kPositions ? lane / 3 : kPositions - 1;
    column = lane % 3;
    first_h = int(grid(0, s.stride_h, s.pad_h, 3, s.dilation_h));
    first_w = int(grid(0, s.stride_w, s.pad_w, 3, s.dilation_w));
    dilation_h = float(int(s.dilation_h));
    step_w = float(int(s.dilation_w) * (column - 1));
    records = static_cast<const N*>(c.offset.data) + image * s.positions() * c.offset.row + group * kNumbers;
    hold(records);
    hold(scale);
    hold(height.end);
    hold(width.end);
    hold(dilation_h);
    hold(step_w);
  }

  // Whether this thread is not one that is left over.
  __device__ __forceinline__ bool counts() const { return threadIdx.x % 32 < 3 * kPositions; }

  // Starts to read the records of the positions from `start` on. Beyond the last it reads the last again.
  __device__ __forceinline__ void fetch(int start) {
    position = start + slot < positions ? start + slot : positions - 1;
    const N* record = records + uint32_t(position) * row;
    const Word<N, 2>* pairs = reinterpret_cast<const Word<N, 2>*>(record) + 3 * column;
#pragma unroll
    for (int k = 0; k < 3; ++k) offsets[k] = pairs[k];
#pragma unroll
    for (int k = 0; k < 3; ++k) logits[k] = record[18 + 3 * column + k];
    if (call.centre) centre = record[27];
  }

  // Makes what was fetched into the cells of the column's points, whose weights have the softmax and the
  // blend in them. Afterwards i, j and blend are the position's. Whether all is finite. All threads of the
  // warp take part.
  __device__ __forceinline__ bool make(PlacedCell (&cells)[3]) {
    float weight[3], top = -INFINITY, total = 0;
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      weight[k] = to_real(logits[k]);
      top = larger(top, weight[k]);
    }
    const int first = slot * 3;
    const float tops[3] = {from(top, first), from(top, first + 1), from(top, first + 2)};
    top = larger(larger(tops[0], tops[1]), tops[2]);
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      weight[k] = exp_of(weight[k] - top);
      total += weight[k];
    }
    const float totals[3] = {from(total, first), from(total, first + 1), from(total, first + 2)};
    float share = 1 / (totals[0] + totals[1] + totals[2]);
    blend = 0;
    if (call.centre) {
      blend = sigmoid(to_real(centre));
      share *= 1 - blend;
    }
    i = position / out_width;
    j = position - i * out_width;
    const float grid_h = float(first_h + i * int(call.problem.stride_h));
    const float grid_w = float(first_w + j * int(call.problem.stride_w));
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      float offset[2];
      unpack_word<N>(offsets[k], offset);
      const Axis<float> h = locate(grid_h + (dilation_h * float(k - 1) + offset[1]) * scale, height);
      const Axis<float> w = locate(grid_w + (step_w + offset[0]) * scale, width);
      const float upper = weight[k] * share * h.weight0, lower = weight[k] * share * h.weight1;
      cells[k] = {int(h.first),
                  int(w.first),
                  {upper * w.weight0, upper * w.weight1, lower * w.weight0, lower * w.weight1}};
    }
    return is_finite(share + blend);
  }

  static __device__ __forceinline__ float from(float v, int lane) {
    return __shfl_sync(0xffffffffu, v, lane);
  }

  const Call& call;
  Extent<float> height, width;
  const N* records;  // from the image's first on
  float scale, dilation_h, step_w;
  uint32_t row;
  int positions, out_width, first_h, first_w;
  int slot, column;  // which of the positions, and of the three columns
  int position;      // and what was fetched of it
  Word<N, 2> offsets[3];
  N logits[3], centre;
  int i, j;
  float blend;
};

}  // namespace dcnv3::cuda
