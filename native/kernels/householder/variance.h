// Variance of decoded codes: plain loops that the compiler vectorizes for the file that includes this. All of it has
// internal linkage.
#pragma once

#include <cstdint>

#include "kernels/householder/householder.h"

namespace fqtstats::householder {
namespace {

// The larger neighbour's probability, and the two neighbours, of a number.
struct Rounded {
  float up, low, high;
};

// A coordinate is not negative, and below 2^9: to cut off is to round down.
inline float cut_off(float value) { return static_cast<float>(static_cast<std::int32_t>(value)); }

inline Rounded round(float x, const Decoding& d, float unit) {
  const float c = ((x - d.offset) * d.prescale) * d.scale, k = cut_off(c), next = k + 1;
  const float whole = (c - k) * d.numbers;
  // It can be above the largest int32, and is cut off in two parts.
  const float upper = cut_off(whole * 0x1p-16f) * 0x1p16f, number = upper + cut_off(whole - upper);
  return {number * unit, (k < d.levels ? k : d.levels) * d.step + d.offset,
          (next < d.levels ? next : d.levels) * d.step + d.offset};
}

void variances(const float* x, std::int64_t count, const Decoding& by, double* out) {
  const Decoding d = by;
  const float unit = 1 / d.numbers;
  for (std::int64_t i = 0; i < count; ++i) {
    const Rounded r = round(x[i], d, unit);
    const double up = r.up, gap = static_cast<double>(r.high) - static_cast<double>(r.low);
    out[i] = gap * gap * (up * (1 - up));
  }
}

// Ten roundings of an element, those of the gap counted twice as it is squared: high - low, 1 / step and their product;
// the square, 1 - up, its product with up, and that of both. They are added up in float64.
double refined(const float* x, std::int64_t count, const Decoding& by) {
  constexpr std::int64_t kLanes = 16, kBlock = 16 * kLanes;
  const Decoding d = by;
  const float unit = 1 / d.numbers, inverse = 1 / d.step;
  double sums[kLanes] = {};
  for (std::int64_t first = 0; first < count; first += kBlock) {
    const std::int64_t n = count - first < kBlock ? count - first : kBlock;
    float terms[kBlock] = {};
    for (std::int64_t i = 0; i < n; ++i) {
      const Rounded r = round(x[first + i], d, unit);
      const float gap = (r.high - r.low) * inverse;
      terms[i] = gap * gap * (r.up * (1 - r.up));
    }
    for (std::int64_t i = 0; i < kBlock; i += kLanes)
      for (std::int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += static_cast<double>(terms[i + lane]);
  }
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

}  // namespace
}  // namespace fqtstats::householder
