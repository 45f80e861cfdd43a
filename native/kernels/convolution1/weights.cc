#include "kernels/convolution1/weights.h"

#include <algorithm>
#include <cstring>

#include "kernels/convolution1/images.h"

namespace fqtstats::convolution1 {

void pack_words(const Image& w, const Phase& phase, std::int64_t panel, std::uint8_t* out) {
  const std::int64_t steps = words(w);
  for (std::int64_t c = 0; c < kColumns; ++c) {
    const std::int64_t o = panel * kColumns + c;
    std::uint8_t* to = out + 8 * c;
    for (int ty = 0; ty < phase.y.taps; ++ty)
      for (int tx = 0; tx < phase.x.taps; ++tx)
        for (std::int64_t k = 0; k < steps; ++k, to += kPopcountPanel) {
          std::uint64_t word = 0;
          if (o < w.n) std::memcpy(&word, pixel(w, o, phase.y.tap[ty], phase.x.tap[tx]) + 8 * k, 8);
          std::memcpy(to, &word, 8);
        }
  }
}

void pack_blocks(const Kernel& kernel, const Image& w, const Phase& phase, std::int64_t word, std::uint8_t* low,
                 std::uint8_t* high) {
  alignas(8) static constexpr std::uint8_t kNoCodes[8] = {};
  const std::int64_t steps = ceil_div(w.n, 64);
  for (int ty = 0; ty < phase.y.taps; ++ty)
    for (int tx = 0; tx < phase.x.taps; ++tx)
      for (std::int64_t k = 0; k < steps; ++k, low += kLookupPanel, high += kLookupPanel)
        for (int q = 0; q < 4; ++q) {
          const std::uint8_t* row[16];
          for (int i = 0; i < 16; ++i) {
            const std::int64_t o = k * 64 + q * 16 + i;
            row[i] = o < w.n ? pixel(w, o, phase.y.tap[ty], phase.x.tap[tx]) + 8 * word : kNoCodes;
          }
          kernel.blocks(row, 0, low + 64 * q, high + 64 * q);
        }
}

void sum_taps(const Tile& tile, const Phase& phase, const std::uint8_t* ones, std::int64_t steps, std::int64_t panels,
              std::int32_t* tap_sums) {
  const std::int64_t offset = 0;
  const Runs one_tap{&offset, 1, steps};
  const std::uint8_t* same[8] = {ones, ones, ones, ones, ones, ones, ones, ones};
  for (std::int64_t panel = 0; panel < panels; ++panel)
    for (std::int64_t t = 0; t < phase.taps; ++t) {
      std::int32_t sums[8 * kColumns];
      tile.run(same, one_tap, phase.panels + (panel * phase.taps + t) * steps * tile.panel_step, false, sums, kColumns);
      std::copy_n(sums, kColumns, tap_sums + (t * panels + panel) * kColumns);
    }
}

void sum_rest(const Phase& phase, std::int64_t channels, std::int64_t columns, std::int64_t ld,
              const std::int32_t* tap_sums, std::int32_t* rest) {
  for (std::int64_t c = 0; c < columns; ++c) {
    std::int64_t value = phase.columns.zero ? phase.taps * channels * phase.columns.zero[c] : 0;
    for (std::int64_t t = 0; t < phase.taps; ++t) value -= tap_sums[t * ld + c];
    rest[c] = static_cast<std::int32_t>(value);
  }
}

void sum_v(const Phase& phase, std::int64_t channels, std::int64_t columns, std::int64_t ld,
           const std::int32_t* tap_sums, float* v) {
  const Columns& b = phase.columns;
  const Classes &y = phase.class_y, &x = phase.class_x;
  for (std::int64_t cy = 0; cy < y.count; ++cy)
    for (std::int64_t cx = 0; cx < x.count; ++cx) {
      const std::int64_t terms = (y.high[cy] - y.low[cy]) * (x.high[cx] - x.low[cx]) * channels;
      for (std::int64_t c = 0; c < columns; ++c) {
        std::int64_t sum = b.zero ? -terms * b.zero[c] : 0;
        for (int ty = y.low[cy]; ty < y.high[cy]; ++ty)
          for (int tx = x.low[cx]; tx < x.high[cx]; ++tx) sum += tap_sums[(ty * phase.x.taps + tx) * ld + c];
        *v++ = convolution::scaled_sum(b.step[c], sum, terms, b.offset ? b.offset + c : nullptr);
      }
    }
}

}  // namespace fqtstats::convolution1
