#include "kernels/householder/encode.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "kernels/codes.h"
#include "kernels/householder/adapt.h"

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

// Transforms the rows of `in` part by part, with the maps that adapt() chooses where there is a rounding to choose by.
// consume(transformed, lows, highs) takes the rows from position transformed.first on, with their extremes, and
// returns a status. Writes `groups`. Precondition: those of group_rows().
template <typename Consume>
Encoded transform_parts(const Kernel& kernel, const quantize::Input& in, const double* ranges, const float* low,
                        const float* high, int threads, const Rounding* adaptive, const Groups& groups,
                        const Consume& consume) {
  struct Heads;
  struct Identity;
  struct Rows;
  struct Wide;
  struct Extremes;
  struct Kept;
  const std::int64_t rows = in.n, columns = in.c * in.s;
  const std::int64_t count = group_rows(ranges, rows, groups);
  const bool wide = in.type == quantize::Type::f32;  // others are widened first, and then transformed in place
  std::int64_t* identity = wide ? nullptr : cpu::scratch<Identity, std::int64_t>(rows);
  if (!wide) std::iota(identity, identity + rows, std::int64_t{0});
  const std::int64_t chunk = std::min(kChunk * threads, kMost);
  std::int64_t* heads = cpu::scratch<Heads, std::int64_t>(count);
  std::uint8_t* kept = cpu::scratch<Kept, std::uint8_t>(count);
  float* lows = cpu::scratch<Extremes, float>(2 * rows);
  float* highs = lows + rows;
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
    float* x = wide || adaptive == nullptr ? y : cpu::scratch<Wide, float>(many * columns);
    if (!wide) widen(in, groups.order + first, many, threads, x);
    const float* from = wide ? static_cast<const float*>(in.x) : x;
    const Transform transform{.rows = many,
                              .groups = g - first_group,
                              .order = wide ? groups.order + first : identity,
                              .heads = heads + first_group,
                              .sizes = groups.sizes + first_group,
                              .scale = groups.scale + first,
                              .read_next = true};
    if (adaptive != nullptr && transform.groups > 0) {
      const Source source{from, transform.order, groups.order + first, low, high, in.c, in.s, in.channels_last};
      adapt(kernel, transform, source, *adaptive, threads, y, lows, highs, groups.scale + first, kept + first_group);
    } else {
      forward(kernel, transform, from, columns, threads, y, lows, highs);
    }
    quantize::Input transformed{y, quantize::Type::f32, in.channels_last, many, in.c, in.s};
    transformed.first = first;
    const quantize::Status s = consume(transformed, lows, highs);
    if (s != quantize::Status::ok && s != quantize::Status::ok_with_offset) return {s, count};
    first = end;
  }
  std::int64_t left = 0;
  for (std::int64_t g = 0; g < count; ++g)
    if (adaptive == nullptr || kept[g]) {
      groups.heads[left] = groups.heads[g];
      groups.sizes[left++] = groups.sizes[g];
    }
  return {quantize::Status::ok_with_offset, left};
}

}  // namespace

Encoded encode(const Kernel& kernel, const quantize::Kernel& rounding, const quantize::Input& in, int levels,
               int random_bits, const philox::Stream& key, const quantize::Layout& layout, const float* low,
               const float* high, int threads, bool adaptive, const Groups& groups, std::uint8_t* out, float* step,
               std::int32_t* zero, float* offset) {
  struct Extremes;
  struct Ranges;
  const quantize::Recipe recipe{quantize::Axis::sample, quantize::Rule::affine, levels, random_bits};
  const std::int64_t rows = in.n;
  if (low == nullptr) {
    float* found = cpu::scratch<Extremes, float>(2 * rows);
    quantize::extremes(rounding, in, quantize::Axis::sample, threads, found, found + rows);
    low = found;
    high = found + rows;
  }
  double* ranges = cpu::scratch<Ranges, double>(rows);
  const quantize::Status status = find_ranges(low, high, rows, ranges);
  if (status != quantize::Status::ok) return {status, kNotTransformed};
  if (rows < 2 || *std::max_element(ranges, ranges + rows) == 0)
    return {quantize::encode(rounding, in, {}, recipe, key, layout, low, high, threads, out, step, zero, offset),
            kNotTransformed};
  const std::int64_t bytes =
      (layout.height + 2 * layout.pad_h) * (layout.width + 2 * layout.pad_w) * row_bytes(in.c, layout.bits);
  const Rounding law{levels, random_bits};
  return transform_parts(kernel, in, ranges, low, high, threads, adaptive ? &law : nullptr, groups,
                         [&](const quantize::Input& part, const float* lows, const float* highs) {
                           return quantize::encode(rounding, part, {}, recipe, key, layout, lows, highs, threads,
                                                   out + part.first * bytes, step + part.first, zero + part.first,
                                                   offset + part.first);
                         });
}

Encoded find_groups(const Kernel& kernel, const quantize::Input& in, int levels, int random_bits, const float* low,
                    const float* high, int threads, const Groups& groups) {
  struct Ranges;
  double* ranges = cpu::scratch<Ranges, double>(in.n);
  const quantize::Status status = find_ranges(low, high, in.n, ranges);
  if (status != quantize::Status::ok) return {status, kNotTransformed};
  if (in.n < 2 || *std::max_element(ranges, ranges + in.n) == 0) return {quantize::Status::ok, kNotTransformed};
  const Rounding law{levels, random_bits};
  return transform_parts(
      kernel, in, ranges, low, high, threads, &law, groups,
      [](const quantize::Input&, const float*, const float*) { return quantize::Status::ok_with_offset; });
}

}  // namespace fqtstats::householder
