// What the convolutions of all widths share: how a kernel slides over an image, and the corrections of its sums.
#pragma once

#include <cstdint>

namespace fqtstats::convolution {

// Pairs are (height, width), indexed by `axis`.
struct Geometry {
  std::int64_t stride[2], padding[2], dilation[2];
  std::int64_t groups = 1;

  // Output positions of a kernel of `taps` taps on `size` pixels; 0 where it is larger than the padded image.
  std::int64_t positions(int axis, std::int64_t size, std::int64_t taps) const {
    const std::int64_t room = size + 2 * padding[axis] - dilation[axis] * (taps - 1) - 1;
    return room < 0 ? 0 : room / stride[axis] + 1;
  }

  // The pixel that an output position reads with a tap; outside the image it is padding.
  std::int64_t pixel(int axis, std::int64_t position, std::int64_t tap) const {
    return position * stride[axis] - padding[axis] + tap * dilation[axis];
  }

  // The other way round: `stride` times the output position that reads a pixel with a tap. Where that is no multiple of
  // the stride, none does.
  std::int64_t strided_position(int axis, std::int64_t pixel, std::int64_t tap) const {
    return pixel + padding[axis] - tap * dilation[axis];
  }
};

// u of fqtstats/ops/products.py for an exact sum of centered codes: in float64, rounded once.
static inline float scaled_sum(float step, std::int64_t centered) {
  return static_cast<float>(static_cast<double>(step) * static_cast<double>(centered));
}

// v, for a sum of `terms` of them; `offset` may be nullptr.
static inline float scaled_sum(float step, std::int64_t centered, std::int64_t terms, const float* offset) {
  double sum = static_cast<double>(step) * static_cast<double>(centered);
  if (offset != nullptr) sum += static_cast<double>(terms) * static_cast<double>(*offset);
  return static_cast<float>(sum);
}

}  // namespace fqtstats::convolution
