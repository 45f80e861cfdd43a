#include "kernels/householder/householder.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <string>

#include "bind/arrays.h"
#include "bind/bind.h"
#include "bind/quantize.h"
#include "bind/variants.h"
#include "cpu/scratch.h"
#include "kernels/householder/encode.h"
#include "kernels/householder/groups.h"

namespace fqtstats::bind {
namespace {

namespace nb = nanobind;
using namespace nb::literals;

struct Seen {};

[[noreturn]] void bad_index(const char* name, const std::string& expected, std::int64_t i, const std::string& value) {
  throw nb::value_error(
      (std::string(name) + " must be " + expected + ", got " + value + " at " + std::to_string(i)).c_str());
}

householder::Transform transform_of(const Array& order, const Array& heads, const Array& sizes, const Array& scale,
                                    std::int64_t rows) {
  const auto groups = heads.ndim() == 1 ? static_cast<std::int64_t>(heads.shape(0)) : kAny;
  const householder::Transform t{.rows = rows,
                                 .groups = groups,
                                 .order = data<std::int64_t>("order", order, {rows}),
                                 .heads = data<std::int64_t>("heads", heads, {groups}),
                                 .sizes = data<double>("sizes", sizes, {groups}),
                                 .scale = data<float>("scale", scale, {rows})};
  std::uint8_t* seen = cpu::scratch<Seen, std::uint8_t>(rows);
  std::fill_n(seen, rows, std::uint8_t{0});
  for (std::int64_t i = 0; i < rows; ++i)
    if (t.order[i] < 0 || t.order[i] >= rows || seen[t.order[i]]++)
      bad_index("order", "a permutation of 0 to " + std::to_string(rows - 1), i, std::to_string(t.order[i]));
  std::int64_t end = 0;
  for (std::int64_t g = 0; g < groups; ++g) {
    if (t.heads[g] < end || t.heads[g] >= rows)
      bad_index("heads", std::to_string(end) + " to " + std::to_string(rows - 1), g, std::to_string(t.heads[g]));
    const std::int64_t most = rows - t.heads[g];
    if (!(t.sizes[g] >= 2 && t.sizes[g] <= static_cast<double>(most)))
      bad_index("sizes", "2 to " + std::to_string(most), g, std::to_string(t.sizes[g]));
    const auto n = static_cast<std::int64_t>(t.sizes[g]);
    if (static_cast<double>(n) != t.sizes[g]) bad_index("sizes", "whole numbers", g, std::to_string(t.sizes[g]));
    end = t.heads[g] + n;
  }
  return t;
}

void check_apart(const float* x, const Array& out) {
  const auto* y = static_cast<const float*>(out.data());
  const std::less<> before;
  if (before(x, y + out.size()) && before(y, x + out.size())) bad_value("out", "apart from x in memory", out);
}

void householder_forward(const Array& x, const Array& order, const Array& heads, const Array& sizes, const Array& scale,
                         int threads, const Array& out, const Array& low, const Array& high,
                         const std::optional<std::string>& variant) {
  const auto* from = data<float>("x", x, {kAny, kAny});
  const auto rows = static_cast<std::int64_t>(x.shape(0)), columns = static_cast<std::int64_t>(x.shape(1));
  const householder::Transform t = transform_of(order, heads, sizes, scale, rows);
  check_range("threads", threads, 1, kMaxThreads);
  auto* to = data<float>("out", out, {rows, columns});
  check_apart(from, out);
  auto* least = data<float>("low", low, {rows});
  auto* largest = data<float>("high", high, {rows});
  const householder::Kernel& kernel = find_variant(householder::kernels(), variant);
  nb::gil_scoped_release release;
  householder::forward(kernel, t, from, columns, threads, to, least, largest);
}

void householder_inverse(const Array& x, const Array& order, const Array& heads, const Array& sizes, const Array& scale,
                         int threads, const Array& out, const std::optional<std::string>& variant) {
  const auto* from = data<float>("x", x, {kAny, kAny});
  const auto rows = static_cast<std::int64_t>(x.shape(0)), columns = static_cast<std::int64_t>(x.shape(1));
  const householder::Transform t = transform_of(order, heads, sizes, scale, rows);
  check_range("threads", threads, 1, kMaxThreads);
  auto* to = data<float>("out", out, {rows, columns});
  check_apart(from, out);
  const householder::Kernel& kernel = find_variant(householder::kernels(), variant);
  nb::gil_scoped_release release;
  householder::inverse(kernel, t, from, columns, threads, to);
}

householder::Groups groups_of(const Array& order, const Array& heads, const Array& sizes, const Array& scale,
                              std::int64_t rows) {
  return {data<std::int64_t>("order", order, {rows}), data<std::int64_t>("heads", heads, {rows / 2}),
          data<double>("sizes", sizes, {rows / 2}), data<float>("scale", scale, {rows})};
}

std::int64_t householder_groups(const Array& ranges, const Array& order, const Array& heads, const Array& sizes,
                                const Array& scale) {
  const auto* from = data<double>("ranges", ranges, {kAny});
  const auto rows = static_cast<std::int64_t>(ranges.size());
  if (rows < 2) bad_value("ranges", "of 2 rows at least", ranges);
  constexpr double kWidest = 2.0 * std::numeric_limits<float>::max();
  bool positive = false;
  for (std::int64_t i = 0; i < rows; ++i) {
    if (!(from[i] >= 0 && from[i] <= kWidest))
      bad_index("ranges", "from 0 to twice the largest float", i, std::to_string(from[i]));
    positive = positive || from[i] > 0;
  }
  if (!positive) bad_value("ranges", "positive in one row at least", ranges);
  const householder::Groups groups = groups_of(order, heads, sizes, scale, rows);
  nb::gil_scoped_release release;
  return householder::group_rows(from, rows, groups);
}

nb::tuple householder_adapt(const Array& x, int bits, int random_bits, const Array& order, const Array& heads,
                            const Array& sizes, const Array& scale, const Array& low, const Array& high, int threads,
                            const std::optional<std::string>& variant) {
  const auto* from = data<float>("x", x, {kAny, kAny});
  const auto rows = static_cast<std::int64_t>(x.shape(0)), columns = static_cast<std::int64_t>(x.shape(1));
  if (rows == 0 || columns == 0) bad_value("x", "not empty", x);
  check_range("bits", bits, 1, 8);
  check_range("random_bits", random_bits, 1, 32);
  const householder::Groups groups = groups_of(order, heads, sizes, scale, rows);
  const float* lows = data<float>("low", low, {rows});
  const float* highs = data<float>("high", high, {rows});
  check_range("threads", threads, 1, kMaxThreads);
  const householder::Kernel& kernel = find_variant(householder::kernels(), variant);
  const quantize::Input in{from, quantize::Type::f32, false, rows, 1, columns};
  householder::Encoded found;
  {
    nb::gil_scoped_release release;
    found = householder::find_groups(kernel, in, (1 << bits) - 1, random_bits, lows, highs, threads, groups);
  }
  return nb::make_tuple(static_cast<int>(found.status), found.groups);
}

nb::tuple householder_encode(const Array& x, bool channels_last, int bits, int random_bits,
                             const std::array<std::uint32_t, 4>& words, int storage_bits, const Pair& size,
                             const Pair& pad, const Array& out, const Array& step, const Array& zero,
                             const Array& offset, const Array& order, const Array& heads, const Array& sizes,
                             const Array& scale, const std::optional<Array>& low, const std::optional<Array>& high,
                             bool adaptive, int threads, const std::optional<std::string>& variant) {
  const quantize::Input in = input_of(x, channels_last);
  check_range("bits", bits, 1, 8);
  check_range("random_bits", random_bits, 1, 24);
  const quantize::Layout layout = layout_of(storage_bits, size, pad);
  if (storage_bits < bits) bad_value("storage_bits", "at least bits", storage_bits);
  if (size[0] * size[1] != in.s) bad_value("x", "as many positions as size has", x);
  std::uint8_t* codes = codes_of("out", out, layout, in.n, in.c);
  float* steps = data<float>("step", step, {in.n});
  auto* zeros = data<std::int32_t>("zero", zero, {in.n});
  float* offsets = data<float>("offset", offset, {in.n});
  const householder::Groups groups = groups_of(order, heads, sizes, scale, in.n);
  if (low.has_value() != high.has_value())
    throw nb::value_error("low and high must be given together, got only one of them");
  const float* lows = data<float>("low", low, {in.n});
  const float* highs = data<float>("high", high, {in.n});
  check_range("threads", threads, 1, kMaxThreads);
  const householder::Kernel& kernel = find_variant(householder::kernels(), variant);
  const quantize::Kernel& rounding = find_variant(quantize::kernels(), variant);
  const philox::Stream key{words[0], words[1], words[2], words[3]};
  householder::Encoded encoded;
  {
    nb::gil_scoped_release release;
    encoded = householder::encode(kernel, rounding, in, (1 << bits) - 1, random_bits, key, layout, lows, highs, threads,
                                  adaptive, groups, codes, steps, zeros, offsets);
  }
  return nb::make_tuple(static_cast<int>(encoded.status), encoded.groups);
}

}  // namespace

void householder(nb::module_& m) {
  m.def("householder_forward", householder_forward, "x"_a.noconvert(), "order"_a.noconvert(), "heads"_a.noconvert(),
        "sizes"_a.noconvert(), "scale"_a.noconvert(), "threads"_a.noconvert(), "out"_a.noconvert(), "low"_a.noconvert(),
        "high"_a.noconvert(), "variant"_a = nb::none(),
        "Transform the rows of `x` (float32 [N, D]) into `out`; the extremes of its rows into `low` and `high`.");
  m.def("householder_inverse", householder_inverse, "x"_a.noconvert(), "order"_a.noconvert(), "heads"_a.noconvert(),
        "sizes"_a.noconvert(), "scale"_a.noconvert(), "threads"_a.noconvert(), "out"_a.noconvert(),
        "variant"_a = nb::none(), "Undo householder_forward.");
  m.def("householder_groups", householder_groups, "ranges"_a.noconvert(), "order"_a.noconvert(), "heads"_a.noconvert(),
        "sizes"_a.noconvert(), "scale"_a.noconvert(),
        "Groups and scales of rows of `ranges` (float64 [N]). Returns how many are reflected: so many of `heads` and "
        "`sizes` ([N / 2]) are written.");
  m.def(
      "householder_adapt", householder_adapt, "x"_a.noconvert(), "bits"_a.noconvert(), "random_bits"_a.noconvert(),
      "order"_a.noconvert(), "heads"_a.noconvert(), "sizes"_a.noconvert(), "scale"_a.noconvert(), "low"_a.noconvert(),
      "high"_a.noconvert(), "threads"_a.noconvert(), "variant"_a = nb::none(),
      "Like householder_groups, of the rows of `x` (float32 [N, D]) with extremes `low` and `high`: those groups that "
      "are reflected where each takes the map of least variance. Returns what householder_encode does.");
  m.def("householder_encode", householder_encode, "x"_a.noconvert(), "channels_last"_a.noconvert(),
        "bits"_a.noconvert(), "random_bits"_a.noconvert(), "words"_a, "storage_bits"_a.noconvert(), "size"_a, "pad"_a,
        "out"_a.noconvert(), "step"_a.noconvert(), "zero"_a.noconvert(), "offset"_a.noconvert(), "order"_a.noconvert(),
        "heads"_a.noconvert(), "sizes"_a.noconvert(), "scale"_a.noconvert(), "low"_a.noconvert().none(),
        "high"_a.noconvert().none(), "adaptive"_a.noconvert(), "threads"_a.noconvert(), "variant"_a = nb::none(),
        "Codes of the transformed samples of x, as quantize_encode gives them for axis 0 and rule 0, and what "
        "householder_groups gives, or householder_adapt where `adaptive`. Returns the status of quantize_encode, and "
        "how many groups are reflected; -1 where "
        "the samples are not transformed, and order, heads, sizes and scale are not written.");
}

std::vector<Variant> householder_variants() { return list_variants("householder", householder::kernels()); }

}  // namespace fqtstats::bind
