// How packed codes lie in memory, as fqtstats/ops/codes.py stores them.
#pragma once

#include <cstdint>

#include "kernels/integers.h"

namespace fqtstats {

// Bytes of a row of `count` codes: whole words, of 8 bytes for 1-bit codes and of 4 bytes for others.
static constexpr std::int64_t row_bytes(std::int64_t count, int bits) {
  return round_up(ceil_div(count * bits, 8), bits == 1 ? 8 : 4);
}

}  // namespace fqtstats
