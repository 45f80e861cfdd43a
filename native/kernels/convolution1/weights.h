// The weights of a product that slides: panels, and the sums of their codes that corrections need.
#pragma once

#include <cstdint>

#include "kernels/convolution1/convolution1.h"
#include "kernels/convolution1/phase.h"

namespace fqtstats::convolution1 {

// How a tile reads its operands.
struct Tile {
  void (*run)(const std::uint8_t* const* source, const Runs& runs, const std::uint8_t* panel, bool add,
              std::int32_t* sums, std::int64_t ld);
  int rows;
  std::int64_t step, panel_step;
};

// Weights [O, I, kh, kw] as a popcount panel of 32 output channels.
void pack_words(const Image& w, const Phase& phase, std::int64_t panel, std::uint8_t* out);

// Weights as two lookup panels of 64 input channels, those of a word, contracted over the output channels.
void pack_blocks(const Kernel& kernel, const Image& w, const Phase& phase, std::int64_t word, std::uint8_t* low,
                 std::uint8_t* high);

// tap_sums[tap][column] = sum of the weights' codes in `panels` panels, by way of a source of ones.
void sum_taps(const Tile& tile, const Phase& phase, const std::uint8_t* ones, std::int64_t steps, std::int64_t panels,
              std::int32_t* tap_sums);

// rest[column] = n zb - sum cb over all taps, from sums of `ld` columns.
void sum_rest(const Phase& phase, std::int64_t channels, std::int64_t columns, std::int64_t ld,
              const std::int32_t* tap_sums, std::int32_t* rest);

// v[class y][class x][column]: sums over the taps inside the image.
void sum_v(const Phase& phase, std::int64_t channels, std::int64_t columns, std::int64_t ld,
           const std::int32_t* tap_sums, float* v);

}  // namespace fqtstats::convolution1
