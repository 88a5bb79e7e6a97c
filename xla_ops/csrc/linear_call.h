// One call of y = f(x kernel + bias) over raw buffers, f GELU, gelu(z) = z * Phi(z), or nothing. A
// convolution is the same with rows of x made of the pixels that go into a pixel of y, and the gradient of a
// kernel with rows that are the columns of x.
#pragma once

#include <cstdint>

#include "types.h"

namespace linear {

using xla_ops::Type;

// The map of a convolution of 3 x 3 pixels, stride 2 and padding 1 on all sides.
struct Map {
  int64_t height, width, channels;

  int64_t rows() const { return (height + 1) / 2; }  // of the result
  int64_t columns() const { return (width + 1) / 2; }
};

constexpr int64_t kPanelColumns = 32;

struct Call {
  Map map;  // no channels where this is no convolution, else 9 times as many are the inputs
  int64_t rows, inputs, outputs;
  int64_t image_rows;  // of an image; a form that is chosen by them does not depend on the batch
  bool gelu;
  bool transposed;  // x comes as (inputs, rows)
  Type type;        // of x, kernel and y
  Type bias_type;
  bool panels;         // the kernel's columns come in panels of kPanelColumns, one after the other
  const void* x;       // (rows, inputs), or transposed, or the map of each image
  const void* kernel;  // (inputs, outputs), or (outputs / kPanelColumns rounded up, inputs, kPanelColumns)
  const void* bias;    // (outputs)
  void* y;             // (rows, outputs)

  // Numbers between rows of the kernel, before one of its numbers, and in all.
  int64_t kernel_stride() const { return panels ? kPanelColumns : outputs; }
  int64_t kernel_at(int64_t row, int64_t column) const {
    if (!panels) return row * outputs + column;
    return (column / kPanelColumns * inputs + row) * kPanelColumns + column % kPanelColumns;
  }
  int64_t kernel_numbers() const {
    return panels ? (outputs + kPanelColumns - 1) / kPanelColumns * inputs * kPanelColumns : inputs * outputs;
  }

  int64_t numbers() const {  // of x
    if (!map.channels) return rows * inputs;
    const int64_t pixels = transposed ? inputs : rows;
    return pixels == 0 ? 0 : pixels / (map.rows() * map.columns()) * map.height * map.width * map.channels;
  }
};

}  // namespace linear
