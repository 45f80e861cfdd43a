#include "kernels/householder/judge.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/integers.h"

namespace fqtstats::householder {
namespace {

// Twice the relative errors of Kernel::fractions and Kernel::refined, for what is made of their results.
constexpr double kSummation = 0x1p-16, kRefined = 0x1p-18;
constexpr double kLargest = 0x1p125;  // step, so that Kernel::refined can take its inverse
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Consecutive elements that are summed side by side; a power of two, so that the order of additions stays the same.
constexpr std::int64_t kLanes = 128;

// tree_sum() of kLanes numbers each, which leaf(index, to) writes, in place: `to` has room for those of all levels.
template <typename Leaf>
void tree_sums(const Leaf& leaf, std::int64_t count, double* to, std::int64_t index = 0, std::int64_t width = 1) {
  if (width >= count) return leaf(index, to);
  tree_sums(leaf, count, to, index, 2 * width);
  if (index + width >= count) return;
  tree_sums(leaf, count, to + kLanes, index + width, 2 * width);
  for (std::int64_t i = 0; i < kLanes; ++i) to[i] += to[kLanes + i];
}

}  // namespace

bool has_grid(float low, float high) {
  return std::isfinite(low) && std::isfinite(high) &&
         static_cast<double>(high) - low <= std::numeric_limits<float>::max();
}

Interval Judge::interval(const float* y, float low, float high, bool narrow) const {
  if (!has_grid(low, high)) return {kInfinity, kInfinity};
  const quantize::Grid grid = quantize::make_grid(quantize::Rule::affine, low, high, rounding_.levels);
  if (grid.step == 0) return {0, 0};
  if (grid.prescale != 1 || !decodes(grid)) return {0, kInfinity};
  const double step = grid.step;  // without prescale far from the subnormal numbers, and so are its square and inverse
  if (narrow) {
    if (step > kLargest) return {0, kInfinity};
    const double variance = step * step * kernel_.refined(y, columns_, decoding(grid));
    return {variance * (1 - kRefined), variance * (1 + kRefined)};
  }
  constexpr double kEpsilon = std::numeric_limits<float>::epsilon();
  const double total = kernel_.fractions(y, columns_, grid.offset, grid.scale, static_cast<float>(rounding_.levels));
  // A probability lies up to 2^-n below f, and that is rounded: slack_.
  // Two decoded neighbours are a step apart, up to the rounding of product and sum.
  const double span = static_cast<double>(high) - low;
  const double gap = 1.01 * kEpsilon * (span + std::max(std::abs(low), std::abs(high))) / step;
  const double least = step * std::max(1 - gap, 0.0), most = step * (1 + gap);
  return {least * least * std::max(total * (1 - kSummation) - slack_, 0.0),
          most * most * (total * (1 + kSummation) + slack_)};
}

double Judge::exact(const float* y, float low, float high) const {
  if (!has_grid(low, high)) return kInfinity;
  const quantize::Grid grid = quantize::make_grid(quantize::Rule::affine, low, high, rounding_.levels);
  if (!decodes(grid)) return kInfinity;
  const Decoding by = decoding(grid);
  const auto lanes = [&](std::int64_t i, double* v) {
    const std::int64_t first = i * kLanes, count = std::min(columns_ - first, kLanes);
    float numbers[kLanes];
    if (channels_last_)
      for (std::int64_t j = 0; j < count; ++j)
        numbers[j] = y[(first + j) % positions_ * channels_ + (first + j) / positions_];
    kernel_.variances(channels_last_ ? numbers : y + first, count, by, v);
    std::fill(v + count, v + kLanes, 0.0);
  };
  constexpr int kLevels = 40;  // 2^40 lanes are more than any memory has
  double sums[kLevels * kLanes];
  tree_sums(lanes, ceil_div(columns_, kLanes), sums);
  return tree_sum([&](std::int64_t i) { return sums[i]; }, std::min(columns_, kLanes));
}

bool Judge::decodes(const quantize::Grid& grid) const {
  return std::isfinite(static_cast<float>(rounding_.levels) * grid.step + grid.offset);
}

Decoding Judge::decoding(const quantize::Grid& grid) const {
  return {grid.offset, grid.prescale, grid.scale, grid.step, static_cast<float>(rounding_.levels), numbers_};
}

}  // namespace fqtstats::householder
