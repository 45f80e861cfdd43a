// Static: files that are compiled for different instruction sets include this.
#pragma once

#include <cstdint>

namespace fqtstats {

// For a >= 0 and b > 0.
static constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
static constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

}  // namespace fqtstats
