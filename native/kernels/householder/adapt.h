// Which map a group of the block Householder quantizer gets: fqtstats/quantizers/adaptive.py.
#pragma once

#include <cstdint>

#include "kernels/householder/householder.h"
#include "kernels/householder/judge.h"

namespace fqtstats::householder {

// Rows as they are before the transform; the one at position i is x + order[i] * channels * positions, with extremes
// low[row[i]] and high[row[i]], whose difference float32 has.
struct Source {
  const float* x;
  const std::int64_t *order, *row;
  const float *low, *high;
  std::int64_t channels, positions;
  bool channels_last;  // in memory; element c * positions + s comes c-th of those at s
};

// Chooses for every group of `published` and writes its rows, transformed as chosen, to `out`, and their extremes, as
// forward() does, also those outside of groups. kept[g] is 0 where the rows of group g stay alone. scale: [rows], that
// of `published`; becomes that of the chosen maps.
void adapt(const Kernel& kernel, const Transform& published, const Source& source, const Rounding& rounding,
           int threads, float* out, float* low, float* high, float* scale, std::uint8_t* kept);

}  // namespace fqtstats::householder
