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
  // A coordinate is not negative, and below 2^9: to cut off is to round down.
  const auto coordinate = [&d](float value) { return ((value - d.offset) * d.prescale) * d.scale; };
  const auto floor = [](float value) { return static_cast<float>(static_cast<std::int32_t>(value)); };
  for (std::int64_t i = 0; i < count; ++i) {
    const float c = coordinate(x[i]), whole = (c - floor(c)) * d.numbers;
    // It can be above the largest int32, and is cut off in two parts.
    const float upper = floor(whole * 0x1p-16f) * 0x1p16f, number = upper + floor(whole - upper);
    const double up = static_cast<double>(number) * unit;
    out[i] = up * (1 - up);
  }
  for (std::int64_t i = 0; i < count; ++i) {
    const float k = floor(coordinate(x[i])), next = k + 1;
    const float low = (k < d.levels ? k : d.levels) * d.step + d.offset;
    const float high = (next < d.levels ? next : d.levels) * d.step + d.offset;
    const double gap = static_cast<double>(high) - static_cast<double>(low);
    out[i] = gap * gap * out[i];
  }
}

}  // namespace
}  // namespace fqtstats::householder
