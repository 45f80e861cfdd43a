// Results that are larger than a core's caches are written past them: else each of their lines would be read before it
// is written.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fqtstats::cpu {

inline constexpr std::int64_t kLine = 64;  // bytes of a cache line

// Whether to write `count` numbers of 4 bytes, in rows of `width`, that way: many of them, all in whole lines.
inline bool streams(const void* out, std::int64_t count, std::int64_t width) {
  constexpr std::int64_t kMany = 1 << 21;
  return count >= kMany && width % (kLine / 4) == 0 && reinterpret_cast<std::uintptr_t>(out) % kLine == 0;
}

// Orders such writes before whatever tells another thread of them.
inline void order_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace fqtstats::cpu
