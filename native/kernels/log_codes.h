// Logarithmic codes as the integers that products multiply.
#pragma once

#include <array>
#include <cstdint>

namespace fqtstats {

// The bytes that logarithmic 4-bit codes are multiplied as. The codes 0 .. 2 m of m <= 7 magnitudes stand for the steps
// -2^(m - 1), .., -2, -1, 0, 1, 2, .., 2^(m - 1). A byte is 2^(m - 1) more, which is its zero.
static inline std::array<std::uint8_t, 16> log_bytes(int magnitudes) {
  std::array<std::uint8_t, 16> bytes{};
  const int zero = 1 << (magnitudes - 1);
  for (int code = 0; code < 16; ++code) {
    const int k = code - magnitudes, power = k == 0 ? 0 : 1 << ((k < 0 ? -k : k) - 1);
    // Codes beyond 2 m do not occur.
    bytes[code] = static_cast<std::uint8_t>(zero + (k < 0 ? -power : power));
  }
  return bytes;
}

}  // namespace fqtstats
