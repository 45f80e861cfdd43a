// The reference: one row at a time.
#include "kernels/convolution8/portable.h"

namespace fqtstats::convolution8 {
namespace {

void tile(const Tile& t) {
  const int columns = t.vectors * kLanes;
  for (int i = 0; i < t.count; ++i) {
    std::int32_t* out = t.out + i * t.stride;
    for (int j = 0; j < columns && !t.add; ++j) out[j] = 0;
    for (const Run* run = t.runs; run != t.runs + t.run_count; ++run)
      for (std::int64_t w = 0; w < run->words; ++w) {
        const std::uint8_t* a = t.rows[i] + run->row + w * t.step;
        const std::int8_t* b = t.panel + (run->panel + w) * columns * 4;
        for (int j = 0; j < columns; ++j)
          for (int k = 0; k < 4; ++k) out[j] += a[k] * b[4 * j + k];
      }
  }
}

}  // namespace

extern const Kernel scalar{"scalar",         cpu::Isa::scalar,    {1, 1, 1, 1},         tile,
                           portable::finish, portable::transpose, portable::interleave, portable::row_sums};

}  // namespace fqtstats::convolution8
