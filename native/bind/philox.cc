#include "kernels/philox/philox.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <array>
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

void philox_bits(std::uint32_t k0, std::uint32_t k1, std::uint32_t c2, std::uint32_t c3, int n, int threads, Array out,
                 std::uint64_t first_tile, const std::optional<std::string>& variant) {
  const bool is32 = out.dtype() == nb::dtype<std::int32_t>(), is64 = out.dtype() == nb::dtype<std::int64_t>();
  if (out.device_type() != nb::device::cpu::value || !(is32 || is64))
    bad_type("out", "an int32 or int64 tensor on the CPU", out);
  if (out.ndim() != 1 || (out.shape(0) > 1 && out.stride(0) != 1)) bad_value("out", "1-D and contiguous", out);
  if (n < 1 || n > (is32 ? 31 : 32))
    throw nb::value_error(("n must be 1 to 32 for int64 and 1 to 31 for int32 output, got " + std::to_string(n) +
                           " with out " + describe(out))
                              .c_str());
  check_range("threads", threads, 1, kMaxThreads);
  const philox::Kernel& kernel = find_variant(philox::kernels(), variant);
  const philox::Stream key{k0, k1, c2, c3};
  const auto count = static_cast<std::int64_t>(out.shape(0));
  void* data = out.data();
  nb::gil_scoped_release release;
  if (is32)
    philox::bits(kernel, key, n, first_tile, count, threads, static_cast<std::int32_t*>(data));
  else
    philox::bits(kernel, key, n, first_tile, count, threads, static_cast<std::int64_t*>(data));
}

nb::tuple philox_block(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3, std::uint32_t k0,
                       std::uint32_t k1, const std::optional<std::string>& variant) {
  const auto w = philox::block(find_variant(philox::kernels(), variant), {c0, c1, c2, c3}, k0, k1);
  return nb::make_tuple(w[0], w[1], w[2], w[3]);
}

}  // namespace

void philox(nb::module_& m) {
  m.def("philox_bits", philox_bits, "k0"_a.noconvert(), "k1"_a.noconvert(), "c2"_a.noconvert(), "c3"_a.noconvert(),
        "n"_a.noconvert(), "threads"_a.noconvert(), "out"_a.noconvert(), "first_tile"_a.noconvert() = 0,
        "variant"_a = nb::none(),
        "Fill `out` (contiguous 1-D int32 or int64 on the CPU) with n-bit integers, from tile `first_tile` on.");
  m.def("philox_block", philox_block, "c0"_a.noconvert(), "c1"_a.noconvert(), "c2"_a.noconvert(), "c3"_a.noconvert(),
        "k0"_a.noconvert(), "k1"_a.noconvert(), "variant"_a = nb::none(), "The four words of one block.");
}

std::vector<Variant> philox_variants() { return list_variants("philox_bits", philox::kernels()); }

}  // namespace fqtstats::bind
