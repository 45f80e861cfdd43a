#include "kernels/householder/encode.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "kernels/codes.h"

namespace fqtstats::householder {
namespace {

// Elements per thread, and at most, that are transformed and then rounded: in float32 they stay in a cache in between.
// A single group can be as large as the tensor.
//
// Rounding cannot start before the extremes of the transformed rows are known. Transforming the rows a second time
// then, rather than keeping them transformed, would take longer than writing and reading them does.
constexpr std::int64_t kChunk = 1 << 17, kMost = 1 << 20;
constexpr std::int64_t kGrain = 1 << 15;

// high - low of every row. Ok where all are finite numbers that float32 has.
quantize::Status find_ranges(const float* low, const float* high, std::int64_t rows, double* ranges) {
  bool finite = true, fits = true;
  for (std::int64_t i = 0; i < rows; ++i) {
    ranges[i] = static_cast<double>(high[i]) - low[i];
    finite = finite && std::isfinite(low[i]) && std::isfinite(high[i]);
    fits = fits && ranges[i] <= std::numeric_limits<float>::max();
  }
  return !finite ? quantize::Status::not_finite : fits ? quantize::Status::ok : quantize::Status::range_overflows;
}

// Rows order[i] of `in` as float32, in that order.
void widen(const quantize::Input& in, const std::int64_t* order, std::int64_t rows, int threads, float* out) {
  const std::int64_t columns = in.c * in.s;
  cpu::split(rows, kGrain / columns + 1, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const auto* from = static_cast<const std::uint16_t*>(in.x) + order[i] * columns;
      for (std::int64_t c = 0; c < columns; ++c)
        out[i * columns + c] = std::bit_cast<float>(static_cast<std::uint32_t>(from[c]) << 16);
    }
  });
}

}  // namespace

Encoded encode(const Kernel& kernel, const quantize::Kernel& rounding, const quantize::Input& in, int levels,
               int random_bits, const philox::Stream& key, const quantize::Layout& layout, const float* low,
               const float* high, int threads, const Groups& groups, std::uint8_t* out, float* step, std::int32_t* zero,
               float* offset) {
  struct Extremes;
  struct Ranges;
  struct Heads;
  struct Identity;
  struct Rows;
  const quantize::Recipe recipe{quantize::Axis::sample, quantize::Rule::affine, levels, random_bits};
  const std::int64_t rows = in.n, columns = in.c * in.s;
  float* lows = cpu::scratch<Extremes, float>(2 * rows);
  float* highs = lows + rows;
  if (low == nullptr) {
    quantize::extremes(rounding, in, quantize::Axis::sample, threads, lows, highs);
    low = lows;
    high = highs;
  }
  double* ranges = cpu::scratch<Ranges, double>(rows);
  const quantize::Status status = find_ranges(low, high, rows, ranges);
  if (status != quantize::Status::ok) return {status, kNotTransformed};
  if (rows < 2 || *std::max_element(ranges, ranges + rows) == 0)
    return {quantize::encode(rounding, in, {}, recipe, key, layout, low, high, threads, out, step, zero, offset),
            kNotTransformed};
  const std::int64_t count = group_rows(ranges, rows, groups);

  const std::int64_t bytes =
      (layout.height + 2 * layout.pad_h) * (layout.width + 2 * layout.pad_w) * row_bytes(in.c, layout.bits);
  const bool wide = in.type == quantize::Type::f32;  // others are widened first, and then transformed in place
  std::int64_t* identity = wide ? nullptr : cpu::scratch<Identity, std::int64_t>(rows);
  if (!wide) std::iota(identity, identity + rows, std::int64_t{0});
  const std::int64_t chunk = std::min(kChunk * threads, kMost);
  std::int64_t* heads = cpu::scratch<Heads, std::int64_t>(count);
  for (std::int64_t first = 0, g = 0; first < rows;) {
    const std::int64_t first_group = g;
    std::int64_t end = first;
    do {
      const bool group = g < count && groups.heads[g] == end;
      if (group) heads[g] = end - first;
      end += group ? static_cast<std::int64_t>(groups.sizes[g++]) : 1;
    } while (end < rows && (end - first) * columns < chunk);
    const std::int64_t many = end - first;
    float* y = cpu::scratch<Rows, float>(many * columns);
    if (!wide) widen(in, groups.order + first, many, threads, y);
    const Transform transform{.rows = many,
                              .groups = g - first_group,
                              .order = wide ? groups.order + first : identity,
                              .heads = heads + first_group,
                              .sizes = groups.sizes + first_group,
                              .scale = groups.scale + first,
                              .read_next = true};
    forward(kernel, transform, wide ? static_cast<const float*>(in.x) : y, columns, threads, y, lows, highs);
    quantize::Input transformed{y, quantize::Type::f32, in.channels_last, many, in.c, in.s};
    transformed.first = first;
    const quantize::Status s = quantize::encode(rounding, transformed, {}, recipe, key, layout, lows, highs, threads,
                                                out + first * bytes, step + first, zero + first, offset + first);
    if (s != quantize::Status::ok && s != quantize::Status::ok_with_offset) return {s, count};
    first = end;
  }
  return {quantize::Status::ok_with_offset, count};
}

}  // namespace fqtstats::householder
