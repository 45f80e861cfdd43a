// Variance of decoded codes, element by element: plain loops that the compiler vectorizes for the file that includes
// this. All of it has internal linkage.
#pragma once

#include <cstdint>

#include "kernels/householder/householder.h"

namespace fqtstats::householder {
namespace {

void variances(const float* x, std::int64_t count, const Decoding& by, double* out) {
  const Decoding d = by;
  const double unit = 1 / static_cast<double>(d.numbers);
  constexpr std::int64_t kBlock = 64;
  float number[kBlock], low[kBlock], high[kBlock];
  for (std::int64_t first = 0; first < count; first += kBlock) {
    const std::int64_t n = count - first < kBlock ? count - first : kBlock;
    for (std::int64_t i = 0; i < n; ++i) {
      // A coordinate is not negative, and below 2^9: to cut off is to round down. A number can be above the largest
      // int32, and is cut off in two parts.
      const float coordinate = ((x[first + i] - d.offset) * d.prescale) * d.scale;
      const float k = static_cast<float>(static_cast<std::int32_t>(coordinate)), next = k + 1;
      const float whole = (coordinate - k) * d.numbers;
      const float upper = static_cast<float>(static_cast<std::int32_t>(whole * 0x1p-16f)) * 0x1p16f;
      number[i] = upper + static_cast<float>(static_cast<std::int32_t>(whole - upper));
      low[i] = (k < d.levels ? k : d.levels) * d.step + d.offset;
      high[i] = (next < d.levels ? next : d.levels) * d.step + d.offset;
    }
    for (std::int64_t i = 0; i < n; ++i) {
      const double up = static_cast<double>(number[i]) * unit;
      const double gap = static_cast<double>(high[i]) - static_cast<double>(low[i]);
      out[first + i] = gap * gap * (up * (1 - up));
    }
  }
}

}  // namespace
}  // namespace fqtstats::householder
