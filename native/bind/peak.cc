#include "kernels/peak/peak.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

#include "bind/arrays.h"
#include "bind/bind.h"
#include "bind/variants.h"

namespace fqtstats::bind {
namespace {

namespace nb = nanobind;
using namespace nb::literals;

std::optional<double> rate(const std::string& kind, std::int64_t iterations,
                           const std::optional<std::string>& variant) {
  check_range("iterations", iterations, 1, std::int64_t{1} << 40);
  const peak::Kernel& kernel = find_variant(peak::kernels(), variant);
  const auto loop =
      kind == "fp32"   ? kernel.fp32
      : kind == "int8" ? kernel.int8
      : kind == "bit"  ? kernel.bit
      : kind == "bit_table"
          ? kernel.bit_table
          : throw nb::value_error(("kind must be fp32, int8, bit or bit_table, got '" + kind + "'").c_str());
  if (loop == nullptr) return std::nullopt;
  nb::gil_scoped_release release;
  const auto start = std::chrono::steady_clock::now();
  const double operations = loop(iterations).operations;
  return operations / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

void peak(nb::module_& m) {
  m.def("peak", rate, "kind"_a.noconvert(), "iterations"_a.noconvert(), "variant"_a = nb::none(),
        "Operations per second of one core with operands in registers; None where the variant has no such loop.");
}

std::vector<Variant> peak_variants() { return list_variants("peak", peak::kernels()); }

}  // namespace fqtstats::bind
