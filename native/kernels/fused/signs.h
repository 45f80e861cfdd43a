// Signs of weights; included by the files of single instruction sets, which the compiler vectorizes it for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace fqtstats::fused {
namespace {

// Bits of x [channels, taps], whether each is at least 0, as out [taps, row], 8 bytes per 64 channels. Returns whether
// all of x is finite.
static bool signs(const float* x, std::int64_t channels, std::int64_t taps, std::int64_t row, std::uint8_t* out) {
  std::uint32_t bad = 0;
  for (std::int64_t tap = 0; tap < taps; ++tap)
    for (std::int64_t first = 0; first < channels; first += 64) {
      const std::int64_t count = std::min<std::int64_t>(64, channels - first);
      const float* from = x + first * taps + tap;
      std::uint64_t word = 0;
      for (std::int64_t i = 0; i < count; ++i) {
        const float value = from[i * taps];
        std::uint32_t pattern;
        std::memcpy(&pattern, &value, sizeof pattern);
        bad |= static_cast<std::uint32_t>((pattern & 0x7f800000u) == 0x7f800000u);
        word |= static_cast<std::uint64_t>(value >= 0) << i;
      }
      std::memcpy(out + tap * row + first / 8, &word, sizeof word);
    }
  return bad == 0;
}

}  // namespace
}  // namespace fqtstats::fused
