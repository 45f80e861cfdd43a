// The reference: one block at a time.
#include "kernels/philox/philox.h"

namespace fqtstats::philox {
namespace {

std::array<std::uint32_t, 4> rounds(std::array<std::uint32_t, 4> x, std::uint32_t k0, std::uint32_t k1) {
  for (int r = 0; r < kRounds; ++r, k0 += kW0, k1 += kW1) {
    const std::uint64_t p0 = std::uint64_t{kM0} * x[0], p1 = std::uint64_t{kM1} * x[2];
    x = {static_cast<std::uint32_t>(p1 >> 32) ^ x[1] ^ k0, static_cast<std::uint32_t>(p1),
         static_cast<std::uint32_t>(p0 >> 32) ^ x[3] ^ k1, static_cast<std::uint32_t>(p0)};
  }
  return x;
}

template <typename T>
void fill(const Range& r, T* out) {
  const std::int64_t tile = tile_elements(r.n);
  const bool half = r.n <= 16;
  for (std::int64_t start = 0; start < r.count; start += tile)
    for (int lane = 0; lane < kTileBlocks; ++lane) {
      const auto b = static_cast<std::uint32_t>(r.block + start / tile * kTileBlocks + lane);
      const auto words = rounds({b, r.c1, r.key.c2, r.key.c3}, r.key.k0, r.key.k1);
      std::int64_t i = start + lane;
      for (int q = 0; q < tile / kTileBlocks && i < r.count; ++q, i += kTileBlocks) {
        const std::uint32_t word = half ? words[q / 2] << (q % 2 ? 0 : 16) : words[q];
        out[i] = static_cast<T>(word >> (32 - r.n));
      }
    }
}

}  // namespace

extern const Kernel scalar{"scalar", cpu::Isa::scalar, fill<std::int32_t>, fill<std::int64_t>};

}  // namespace fqtstats::philox
