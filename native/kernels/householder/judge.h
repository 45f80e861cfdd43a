// How much variance the codes of transformed rows have.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/householder/householder.h"
#include "kernels/quantize/quantize.h"

namespace fqtstats::householder {

struct Rounding {
  int levels, random_bits;
};

struct Interval {
  double lower, upper;
};

// Sum of leaf(0) .. leaf(count - 1): zeros make the count a power of two, and halves are added to each other until one
// is left. At `width` numbers, the one of `index`.
template <typename Leaf>
auto tree_sum(const Leaf& leaf, std::int64_t count, std::int64_t index = 0, std::int64_t width = 1)
    -> decltype(leaf(index)) {
  if (index >= count) return {};
  if (width >= count) return leaf(index);
  return tree_sum(leaf, count, index, 2 * width) + tree_sum(leaf, count, index + width, 2 * width);
}

// Whether a grid from low to high has a step that float32 has.
bool has_grid(float low, float high);

// Tells the variance of the decoded codes of a row, summed, or bounds of it. In a row that is channels-last in memory,
// element c * positions + s comes c-th of those at s; the others are in order.
class Judge {
 public:
  Judge(const Kernel& kernel, const Rounding& rounding, std::int64_t channels, std::int64_t positions,
        bool channels_last)
      : kernel_(kernel),
        rounding_(rounding),
        channels_(channels),
        positions_(positions),
        columns_(channels * positions),
        channels_last_(channels_last),
        numbers_(std::ldexp(1.0f, rounding.random_bits)),
        slack_(static_cast<double>(columns_) *
               (1 / static_cast<double>(numbers_) + 0x1p-20 + 0x1.8p-22 * rounding.levels)) {}

  // Bounds of exact(); narrow ones take longer. What has no finite variance may be infinite below, too.
  Interval interval(const float* y, float low, float high, bool narrow = false) const;

  // The same bits as _exact() of adaptive.py; takes longest. low and high: the extremes of y. Infinite where a code
  // stands for no finite number.
  double exact(const float* y, float low, float high) const;

 private:
  // False at the very end of float32, where the largest code overflows.
  bool decodes(const quantize::Grid& grid) const;
  Decoding decoding(const quantize::Grid& grid) const;

  const Kernel& kernel_;
  const Rounding rounding_;
  const std::int64_t channels_, positions_, columns_;
  const bool channels_last_;
  const float numbers_;  // that a decision knows
  const double slack_;   // of the sum of f (1 - f)
};

}  // namespace fqtstats::householder
