// Instruction sets: what this machine has, and which one may be used.
#pragma once

#include <cstdint>
#include <span>

namespace fqtstats::cpu {

// Ordered: each level includes the ones before it. avx512 is F, BW, DQ and VL; avx512vnni adds VNNI; avx512vbmi adds
// VBMI and VPOPCNTDQ.
enum class Isa : std::uint8_t { scalar, avx2, avx512, avx512vnni, avx512vbmi };

const char* name(Isa isa);

// Does this machine (processor and operating system) run code of that level?
bool supported(Isa isa);

// The highest level that kernels may use: the environment variable FQTSTATS_ISA, or the highest supported one. Read
// once. Throws std::invalid_argument where FQTSTATS_ISA names an unknown or unsupported level; the message lists the
// supported ones.
Isa limit();

// The first row of `rows` (fastest first; the last one is scalar) that limit() allows.
template <typename Kernel>
const Kernel& select(std::span<const Kernel> rows) {
  for (const Kernel& row : rows)
    if (row.isa <= limit()) return row;
  return rows.back();
}

}  // namespace fqtstats::cpu
