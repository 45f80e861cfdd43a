// Block Householder quantizer: groups, transform and stochastic rounding of a tensor in one call.
#pragma once

#include <cstdint>

#include "kernels/householder/groups.h"
#include "kernels/householder/householder.h"
#include "kernels/quantize/quantize.h"

namespace fqtstats::householder {

struct Encoded {
  quantize::Status status;
  std::int64_t groups;  // that were reflected, or kNotTransformed
};

// There is one row, or no row has a positive range: the codes are those of the rows themselves.
inline constexpr std::int64_t kNotTransformed = -1;

// Codes of the transformed samples of `in`, in group order: what forward() and quantize::encode() give for an affine
// grid per row. low and high are the extremes of the samples, or nullptr. Writes `groups`, unless nothing is
// transformed, and the rest as quantize::encode() does, likewise undefined where the status says that the numbers, or
// the transformed ones, are not finite. `adaptive`: with the maps that adapt() chooses; then `groups` has the groups
// that are reflected, and their scales. find_groups() writes these only; low and high are not nullptr.
Encoded encode(const Kernel& kernel, const quantize::Kernel& rounding, const quantize::Input& in, int levels,
               int random_bits, const philox::Stream& key, const quantize::Layout& layout, const float* low,
               const float* high, int threads, bool adaptive, const Groups& groups, std::uint8_t* out, float* step,
               std::int32_t* zero, float* offset);
Encoded find_groups(const Kernel& kernel, const quantize::Input& in, int levels, int random_bits, const float* low,
                    const float* high, int threads, const Groups& groups);

}  // namespace fqtstats::householder
