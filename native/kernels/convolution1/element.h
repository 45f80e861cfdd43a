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

static inline void count(const std::uint8_t* pixels, std::int64_t n, std::int64_t words, std::int32_t* counts) {
  for (std::int64_t i = 0; i < n; ++i) {
    std::int64_t bits = 0;
    for (std::int64_t k = 0; k < words; ++k, pixels += 8) bits += __builtin_popcountll(load64(pixels));
    counts[i] = static_cast<std::int32_t>(bits);
  }
}

}  // namespace fqtstats::convolution1
