#include <algorithm>

#include "cpu/parallel.h"
#include "kernels/integers.h"
#include "kernels/philox/philox.h"

namespace fqtstats::philox {

#define FQTSTATS_KERNEL(variant) extern const Kernel variant;
#include "kernels/philox/kernels.inc"
#undef FQTSTATS_KERNEL

std::span<const Kernel> kernels() {
  static const Kernel rows[] = {
#define FQTSTATS_KERNEL(variant) variant,
#include "kernels/philox/kernels.inc"
#undef FQTSTATS_KERNEL
  };
  return rows;
}

template <typename T>
void bits(const Kernel& kernel, const Stream& key, int n, std::uint64_t first_tile, std::int64_t count, int threads,
          T* out) {
  constexpr std::int64_t kGrain = 512;                          // tiles: about 10 us, several times a thread's wake-up
  constexpr std::uint64_t kCarry = (1ULL << 32) / kTileBlocks;  // tiles with the same counter word c1
  const auto fill = [&] {
    if constexpr (sizeof(T) == 4)
      return kernel.fill32;
    else
      return kernel.fill64;
  }();
  const std::int64_t tile = tile_elements(n);
  cpu::split(ceil_div(count, tile), kGrain, threads, [&](std::int64_t begin, std::int64_t end) {
    while (begin < end) {
      const std::uint64_t t = first_tile + begin;
      const std::int64_t stop = begin + std::min<std::uint64_t>(end - begin, kCarry - t % kCarry);
      const Range range{key, static_cast<std::uint32_t>(t / kCarry), static_cast<std::uint32_t>(t * kTileBlocks),
                        std::min(stop * tile, count) - begin * tile, n};
      fill(range, out + begin * tile);
      begin = stop;
    }
  });
}

template void bits(const Kernel&, const Stream&, int, std::uint64_t, std::int64_t, int, std::int32_t*);
template void bits(const Kernel&, const Stream&, int, std::uint64_t, std::int64_t, int, std::int64_t*);

std::array<std::uint32_t, 4> block(const Kernel& kernel, const std::array<std::uint32_t, 4>& counter, std::uint32_t k0,
                                   std::uint32_t k1) {
  std::int64_t tile[4 * kTileBlocks];
  const std::uint32_t lane = counter[0] % kTileBlocks;
  kernel.fill64({{k0, k1, counter[2], counter[3]}, counter[1], counter[0] - lane, tile_elements(32), 32}, tile);
  std::array<std::uint32_t, 4> words;
  for (int j = 0; j < 4; ++j) words[j] = static_cast<std::uint32_t>(tile[kTileBlocks * j + lane]);
  return words;
}

}  // namespace fqtstats::philox
