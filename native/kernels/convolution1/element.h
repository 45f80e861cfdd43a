// What every variant does one element at a time. Static: the files that include this are compiled for different
// instruction sets.
#pragma once

#include <cstring>

#include "kernels/convolution1/convolution1.h"

namespace fqtstats::convolution1 {

static inline std::uint64_t load64(const std::uint8_t* p) {
  std::uint64_t word;
  std::memcpy(&word, p, sizeof(word));
  return word;
}

static inline std::uint8_t code_at(const std::uint8_t* packed, int bits, std::int64_t i) {
  return static_cast<std::uint8_t>(packed[i * bits / 8] >> (i * bits % 8) & ((1 << bits) - 1));
}

// The epilogue of one result; `c` counts from the first column of all.
static inline float result(std::int32_t sum, const Row& row, const Columns& columns, std::int64_t c) {
  if (columns.zero) sum -= columns.zero[c] * row.sum;
  if (columns.rest) sum += row.zero * columns.rest[c];
  float y = static_cast<float>(sum) * (row.step * columns.step[c]);
  if (columns.offset) y = y + row.u * columns.offset[c];
  if (row.v) y = y + row.offset * row.v[c];
  if (columns.bias) y = y + columns.bias[c];
  return y;
}

}  // namespace fqtstats::convolution1
