// The rate that one core sustains on the instructions that bound the other kernels, with operands in registers: what a
// benchmark divides by. Nothing else uses it.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/isa.h"

namespace fqtstats::peak {

// What a loop of `iterations` did, in the unit of the kernels that it bounds: one multiplication and one addition are
// two operations, whatever their width. The second number keeps the loop alive.
struct Count {
  double operations;
  std::int64_t sink;
};

struct Kernel {
  const char* name;
  cpu::Isa isa;
  Count (*fp32)(std::int64_t iterations);       // fused multiply-add
  Count (*int8)(std::int64_t iterations);       // u8 x s8 dot products
  Count (*bit)(std::int64_t iterations);        // and, popcount, add
  Count (*bit_table)(std::int64_t iterations);  // 4 bit x 1 bit: four look-ups, three additions, one dot product
};

// Every variant that was built, fastest first. The scalar one has no loops (null): there is no peak to speak of.
std::span<const Kernel> kernels();

}  // namespace fqtstats::peak
