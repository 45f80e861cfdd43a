// How the products that slide, the forward one and the input gradient, fall into phases.
#pragma once

#include <cstdint>

#include "kernels/convolution1/convolution1.h"

namespace fqtstats::convolution1 {

// One axis of a product that slides: output first + j * step, 0 <= j < count, reads sources j * stride + offset[t].
struct Axis {
  std::int64_t first, step, count, stride;
  int taps;
  std::int64_t offset[kMaxTaps];  // ascending
  int tap[kMaxTaps];              // of the kernel
};

Axis forward_axis(std::int64_t taps, std::int64_t count, const Geometry& geometry, int axis);

// Of the input gradient, the outputs first, first + stride, ...: they all read the same taps.
Axis gradient_axis(std::int64_t taps, std::int64_t size, const Geometry& geometry, int axis, std::int64_t first);

// Pixels that the source must have before its first or after its last one.
std::int64_t pad_of(const Axis& axis, std::int64_t size);

// Outputs whose taps low[k] ... high[k] - 1 lie inside the source are of class k.
struct Classes {
  std::int32_t* of;  // [axis.count]
  int *low, *high;
  std::int64_t count;
};

void classify(const Axis& axis, std::int64_t size, Classes& classes);

// Outputs that read the same taps: all of a forward product, one residue of the strides of an input gradient.
struct Phase {
  Axis y, x;
  std::int64_t taps;
  const std::uint8_t* panels;  // [panel][tap][step]
  Classes class_y, class_x;
  Columns columns;
  const float* v;  // [class y][class x][column], or null
};

}  // namespace fqtstats::convolution1
