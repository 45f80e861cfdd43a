// Checks of the arguments that all functions of codes have.
#pragma once

#include <array>
#include <cstdint>

#include "bind/arrays.h"
#include "kernels/quantize/quantize.h"

namespace fqtstats::bind {

using Pair = std::array<std::int64_t, 2>;

// Of sizes, channels and pads, so that no product of two of them overflows.
inline constexpr std::int64_t kMaxSize = 1 << 30;

// x is [N, C, S], or [N, S, C] where channels_last; not empty.
quantize::Input input_of(const Array& x, bool channels_last);

quantize::Layout layout_of(int bits, const Pair& size, const Pair& pad);

// Codes of n samples with c channels.
std::uint8_t* codes_of(const char* name, const Array& a, const quantize::Layout& l, std::int64_t n, std::int64_t c);

}  // namespace fqtstats::bind
