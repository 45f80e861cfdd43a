// Checks of the arguments that functions which quantize have.
#pragma once

#include <cstdint>

#include "bind/arrays.h"
#include "kernels/quantize/quantize.h"

namespace fqtstats::bind {

// x is [N, C, S], or [N, S, C] where channels_last; not empty.
quantize::Input input_of(const Array& x, bool channels_last);

quantize::Layout layout_of(int bits, const Pair& size, const Pair& pad);

// Codes of n samples with c channels.
std::uint8_t* codes_of(const char* name, const Array& a, const quantize::Layout& l, std::int64_t n, std::int64_t c);

}  // namespace fqtstats::bind
