#include "kernels/product1/product1.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
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
using product1::Affine;
using product1::Operand;

Operand operand(const char* name, const Array& a, std::int64_t channels, int bits, bool contract_rows) {
  const std::string of = std::string(" of ") + name;
  if (bits != 1 && bits != 2 && bits != 4) bad_value(("bits" + of).c_str(), "1, 2 or 4", bits);
  check_range(("channels" + of).c_str(), channels, 0, product1::kMaxTerms);
  Operand x{nullptr, kAny, channels, bits, contract_rows};
  x.data = data<std::uint8_t>(name, a, {kAny, x.row_bytes()});
  x.rows = static_cast<std::int64_t>(a.shape(0));
  return x;
}

void check_pair(const Operand& a, const Operand& b) {
  if (a.bits != 1 && b.bits != 1)
    throw nb::value_error(
        ("one of a and b must have 1 bit, got " + std::to_string(a.bits) + " and " + std::to_string(b.bits) + " bits")
            .c_str());
  if (a.terms() != b.terms())
    throw nb::value_error(("the contracted axes of a and b must agree, got " + std::to_string(a.terms()) + " and " +
                           std::to_string(b.terms()))
                              .c_str());
  check_range("the contracted axis", a.terms(), 0, product1::kMaxTerms);
}

Affine affine(const std::string& name, std::int64_t extent, const Array& step, const std::optional<Array>& zero,
              const std::optional<Array>& offset) {
  const bool grouped = step.ndim() == 1 && step.shape(0) != 1;
  const std::int64_t count = grouped ? extent : 1;
  const Affine of{data<float>((name + "_step").c_str(), step, {count}),
                  data<std::int32_t>((name + "_zero").c_str(), zero, {count}),
                  data<float>((name + "_offset").c_str(), offset, {count}), grouped};
  for (std::int64_t i = 0; of.zero != nullptr && i < count; ++i)
    check_range((name + "_zero").c_str(), of.zero[i], -product1::kMaxZero, product1::kMaxZero);
  return of;
}

void product1_multiply(const Array& a, std::int64_t a_channels, int a_bits, bool a_contract_rows, const Array& a_step,
                       const std::optional<Array>& a_zero, const std::optional<Array>& a_offset, const Array& b,
                       std::int64_t b_channels, int b_bits, bool b_contract_rows, const Array& b_step,
                       const std::optional<Array>& b_zero, const std::optional<Array>& b_offset,
                       const std::optional<Array>& bias, int threads, const Array& out,
                       const std::optional<std::string>& variant) {
  const Operand x = operand("a", a, a_channels, a_bits, a_contract_rows);
  const Operand w = operand("b", b, b_channels, b_bits, b_contract_rows);
  check_pair(x, w);
  const Affine of_x = affine("a", x.extent(), a_step, a_zero, a_offset);
  const Affine of_w = affine("b", w.extent(), b_step, b_zero, b_offset);
  const float* add = data<float>("bias", bias, {w.extent()});
  float* y = data<float>("out", out, {x.extent(), w.extent()});
  check_range("threads", threads, 1, kMaxThreads);
  const product1::Kernel& kernel = find_variant(product1::kernels(), variant);
  nb::gil_scoped_release release;
  product1::multiply(kernel, x, of_x, w, of_w, add, threads, y);
}

void product1_integers(const Array& a, std::int64_t a_channels, int a_bits, bool a_contract_rows, const Array& b,
                       std::int64_t b_channels, int b_bits, bool b_contract_rows, bool signs, int threads,
                       const Array& out, const std::optional<std::string>& variant) {
  const Operand x = operand("a", a, a_channels, a_bits, a_contract_rows);
  const Operand w = operand("b", b, b_channels, b_bits, b_contract_rows);
  check_pair(x, w);
  if (signs && std::max(x.bits, w.bits) != 1)
    bad_value("bits of a and b", "1 for the product of signs", std::max(x.bits, w.bits));
  std::int32_t* y = data<std::int32_t>("out", out, {x.extent(), w.extent()});
  check_range("threads", threads, 1, kMaxThreads);
  const product1::Kernel& kernel = find_variant(product1::kernels(), variant);
  nb::gil_scoped_release release;
  product1::multiply_integers(kernel, x, w, signs, threads, y);
}

}  // namespace

void product1(nb::module_& m) {
  m.def("product1_multiply", product1_multiply, "a"_a.noconvert(), "a_channels"_a.noconvert(), "a_bits"_a.noconvert(),
        "a_contract_rows"_a.noconvert(), "a_step"_a.noconvert(), "a_zero"_a.noconvert().none(),
        "a_offset"_a.noconvert().none(), "b"_a.noconvert(), "b_channels"_a.noconvert(), "b_bits"_a.noconvert(),
        "b_contract_rows"_a.noconvert(), "b_step"_a.noconvert(), "b_zero"_a.noconvert().none(),
        "b_offset"_a.noconvert().none(), "bias"_a.noconvert().none(), "threads"_a.noconvert(), "out"_a.noconvert(),
        "variant"_a = nb::none(),
        "out [M, N] = the float32 product of two matrices of packed codes, one of them of 1 bit.");
  m.def("product1_integers", product1_integers, "a"_a.noconvert(), "a_channels"_a.noconvert(), "a_bits"_a.noconvert(),
        "a_contract_rows"_a.noconvert(), "b"_a.noconvert(), "b_channels"_a.noconvert(), "b_bits"_a.noconvert(),
        "b_contract_rows"_a.noconvert(), "signs"_a.noconvert(), "threads"_a.noconvert(), "out"_a.noconvert(),
        "variant"_a = nb::none(),
        "out [M, N] int32 = the product of the codes, or of the signs 2 code - 1 of 1-bit codes.");
}

std::vector<Variant> product1_variants() { return list_variants("product1", product1::kernels()); }

}  // namespace fqtstats::bind
