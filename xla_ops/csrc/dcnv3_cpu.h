// DCNv3 on CPU: compute functions over raw buffers; XLA and Python are elsewhere.
#pragma once

#include <cstdint>

#include "cpu_types.h"
#include "dcnv3_call.h"

namespace dcnv3::cpu {

// Computes y of the (position, group) pairs [begin, end) of N * Ho * Wo * G.
void forward(const Call& call, int64_t begin, int64_t end);

// Computes all gradients of groups [begin, end) of one image. Every element of a gradient is the
// work of one such call, in an order that does not depend on how the groups are divided.
void backward(const Call& call, int64_t image, int64_t begin, int64_t end);

}  // namespace dcnv3::cpu
