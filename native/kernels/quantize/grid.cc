#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/quantize/quantize.h"

namespace fqtstats::quantize {
namespace {

// The step at which point `zero` is 0 and both ends are covered.
double covering_step(double minimum, double maximum, double zero, double levels) {
  const double below = minimum < 0 ? -minimum / zero : 0;
  const double above = maximum > 0 ? maximum / (levels - zero) : 0;
  return std::max(below, above);
}

Grid finish(double step, bool constant, double zero, float offset, bool from_low) {
  constexpr double kNormal = std::numeric_limits<float>::min(), kSmallest = std::numeric_limits<float>::denorm_min();
  constexpr double kLift = 0x1p100;
  // Rounded down, a subnormal step would no longer reach the largest element.
  if (step < kNormal) step = std::ceil(step / kSmallest) * kSmallest;
  const float rounded = constant ? 0 : static_cast<float>(step);
  const double prescale = rounded > 0 && rounded < 1 / kLift ? kLift : 1;
  const double scale = rounded > 0 ? 1 / (rounded * prescale) : 0;
  return {rounded, offset, static_cast<float>(prescale), static_cast<float>(scale), static_cast<float>(zero), from_low};
}

Grid zero_on_grid(double low, double high, double levels) {
  const double span = high - low, minimum = std::min(low, 0.0), maximum = std::max(high, 0.0);
  const double lowest = minimum < 0 ? 1 : 0, highest = maximum > 0 ? levels - 1 : levels;
  const bool feasible = lowest <= highest;
  if (span == 0 || !feasible) return finish(span / levels, span == 0, 0, static_cast<float>(low), true);
  const double below = std::floor(maximum > minimum ? -minimum * levels / (maximum - minimum) : 0);
  const double first = std::clamp(below, lowest, highest), second = std::clamp(below + 1, lowest, highest);
  const double first_step = covering_step(minimum, maximum, first, levels);
  const double second_step = covering_step(minimum, maximum, second, levels);
  return finish(std::min(first_step, second_step), false, second_step < first_step ? second : first, 0, false);
}

}  // namespace

Grid make_grid(Rule rule, float low, float high, int levels) {
  const double span = static_cast<double>(high) - low;
  switch (rule) {
    case Rule::zero_on_grid:
      return zero_on_grid(low, high, levels);
    case Rule::symmetric: {
      const int half = (levels - 1) / 2;
      const double largest = std::max(std::abs(low), std::abs(high));
      return span == 0 ? finish(0, true, 0, low, true) : finish(largest / half, false, half, 0, false);
    }
    case Rule::log: {
      const int magnitudes = levels / 2;
      const double largest = std::max(std::abs(low), std::abs(high));
      return finish(std::ldexp(largest, 1 - magnitudes), span == 0, magnitudes, span == 0 ? low : 0, span == 0);
    }
    case Rule::mirrored: {
      const float largest = std::max(std::abs(low), std::abs(high));
      if (span > 0) return finish(2 * static_cast<double>(largest) / levels, false, 0, -largest, true);
      break;
    }
    case Rule::affine:
      break;
  }
  return finish(span / levels, span == 0, 0, low, true);
}

}  // namespace fqtstats::quantize
