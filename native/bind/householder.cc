#include "kernels/householder/householder.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "bind/arrays.h"
#include "bind/bind.h"
#include "bind/variants.h"
#include "cpu/scratch.h"

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

}  // namespace

void householder(nb::module_& m) {
  m.def("householder_forward", householder_forward, "x"_a.noconvert(), "order"_a.noconvert(), "heads"_a.noconvert(),
        "sizes"_a.noconvert(), "scale"_a.noconvert(), "threads"_a.noconvert(), "out"_a.noconvert(), "low"_a.noconvert(),
        "high"_a.noconvert(), "variant"_a = nb::none(),
        "Transform the rows of `x` (float32 [N, D]) into `out`; the extremes of its rows into `low` and `high`.");
  m.def("householder_inverse", householder_inverse, "x"_a.noconvert(), "order"_a.noconvert(), "heads"_a.noconvert(),
        "sizes"_a.noconvert(), "scale"_a.noconvert(), "threads"_a.noconvert(), "out"_a.noconvert(),
        "variant"_a = nb::none(), "Undo householder_forward.");
}

std::vector<Variant> householder_variants() { return list_variants("householder", householder::kernels()); }

}  // namespace fqtstats::bind
