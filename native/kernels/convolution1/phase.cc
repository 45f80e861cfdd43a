#include "kernels/convolution1/phase.h"

#include <algorithm>

#include "kernels/integers.h"

namespace fqtstats::convolution1 {

Axis forward_axis(std::int64_t taps, std::int64_t count, const Geometry& geometry, int axis) {
  Axis a{0, 1, count, geometry.stride[axis], static_cast<int>(taps), {}, {}};
  for (int t = 0; t < a.taps; ++t) {
    a.offset[t] = geometry.pixel(axis, 0, t);
    a.tap[t] = t;
  }
  return a;
}

Axis gradient_axis(std::int64_t taps, std::int64_t size, const Geometry& geometry, int axis, std::int64_t first) {
  const std::int64_t stride = geometry.stride[axis];
  Axis a{first, stride, std::max<std::int64_t>(0, ceil_div(size - first, stride)), 1, 0, {}, {}};
  for (std::int64_t t = taps - 1; t >= 0; --t) {
    const std::int64_t from = geometry.strided_position(axis, first, t);
    if (from % stride) continue;
    a.offset[a.taps] = from / stride;
    a.tap[a.taps++] = static_cast<int>(t);
  }
  return a;
}

std::int64_t pad_of(const Axis& axis, std::int64_t size) {
  if (axis.count == 0 || axis.taps == 0) return 0;
  const std::int64_t last = (axis.count - 1) * axis.stride + axis.offset[axis.taps - 1];
  return std::max<std::int64_t>({0, -axis.offset[0], last - (size - 1)});
}

void classify(const Axis& axis, std::int64_t size, Classes& classes) {
  classes.count = 0;
  for (std::int64_t j = 0; j < axis.count; ++j) {
    int low = 0, high = axis.taps;
    while (low < high && j * axis.stride + axis.offset[low] < 0) ++low;
    while (low < high && j * axis.stride + axis.offset[high - 1] >= size) --high;
    std::int64_t k = 0;
    while (k < classes.count && (classes.low[k] != low || classes.high[k] != high)) ++k;
    if (k == classes.count) {
      classes.low[k] = low;
      classes.high[k] = high;
      ++classes.count;
    }
    classes.of[j] = static_cast<std::int32_t>(k);
  }
}

}  // namespace fqtstats::convolution1
