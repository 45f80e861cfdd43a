#include "kernels/product8/product8.h"

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
#include "kernels/codes.h"
#include "kernels/log_codes.h"

namespace fqtstats::bind {
namespace {

namespace nb = nanobind;
using namespace nb::literals;

constexpr std::uint8_t kFlip = 0x80, kNothing[8] = {};

void check_bits(const char* name, int bits) {
  if (bits != 1 && bits != 2 && bits != 4 && bits != 8) bad_value(name, "1, 2, 4 or 8", bits);
}

// Codes [rows, bytes of a row]; the contracted index is `inner` to a row or runs over the rows.
product8::Operand codes(const char* name, const Array& a, int bits, bool inner, std::int64_t extent, std::int64_t k) {
  const std::int64_t bytes = row_bytes(inner ? k : extent, bits);
  const auto* from = data<std::uint8_t>(name, a, {inner ? extent : k, bytes});
  return {from == nullptr ? kNothing : from, bytes, bits, inner, true, 0};
}

product8::Affine scales(const char* name, std::int64_t groups, std::int64_t extent, const char* step_name,
                        const Array& step, const char* zero_name, const std::optional<Array>& zero,
                        const char* offset_name, const std::optional<Array>& offset) {
  if (groups != 1 && groups != extent)
    throw nb::value_error((std::string(step_name) + " must be float32 [1] or [" + std::to_string(extent) +
                           "], as many as " + name + " has groups, got " + describe(step))
                              .c_str());
  return {data<float>(step_name, step, {groups}), data<std::int32_t>(zero_name, zero, {groups}),
          data<float>(offset_name, offset, {groups}), groups > 1};
}

std::int64_t length(const Array& a) { return a.ndim() == 1 ? static_cast<std::int64_t>(a.shape(0)) : -1; }

void check_magnitudes(const char* name, int magnitudes, int bits) {
  check_range(name, magnitudes, 0, 7);
  if (magnitudes > 0 && bits != 4) bad_value(name, "0, unless codes have 4 bits", magnitudes);
}

void product8_affine(Array a, Array b, std::int64_t k, int a_bits, int b_bits, int a_magnitudes, int b_magnitudes,
                     bool a_inner, bool b_inner, Array a_step, std::optional<Array> a_zero,
                     std::optional<Array> a_offset, Array b_step, std::optional<Array> b_zero,
                     std::optional<Array> b_offset, std::optional<Array> bias, Array out, int threads,
                     const std::optional<std::string>& variant) {
  check_bits("a_bits", a_bits);
  check_bits("b_bits", b_bits);
  check_magnitudes("a_magnitudes", a_magnitudes, a_bits);
  check_magnitudes("b_magnitudes", b_magnitudes, b_bits);
  check_range("k", k, 0, std::int64_t{1} << 40);
  check_range("threads", threads, 1, kMaxThreads);
  auto* result = data<float>("out", out, {kAny, kAny});
  const auto m = static_cast<std::int64_t>(out.shape(0)), n = static_cast<std::int64_t>(out.shape(1));
  product8::Problem p{codes("a", a, a_bits, a_inner, m, k),
                      codes("b", b, b_bits, b_inner, n, k),
                      m,
                      n,
                      k,
                      scales("a", length(a_step), m, "a_step", a_step, "a_zero", a_zero, "a_offset", a_offset),
                      scales("b", length(b_step), n, "b_step", b_step, "b_zero", b_zero, "b_offset", b_offset),
                      data<float>("bias", bias, {n})};
  std::array<std::uint8_t, 16> a_values, b_values;
  if (b_bits == 8 || b_magnitudes > 0) p.b.flip = kFlip;
  if (a_magnitudes > 0) p.a.values = (a_values = log_bytes(a_magnitudes)).data();
  if (b_magnitudes > 0) p.b.values = (b_values = log_bytes(b_magnitudes)).data();
  const product8::Kernel& kernel = find_variant(product8::kernels(), variant);
  nb::gil_scoped_release release;
  product8::affine(kernel, p, threads, result);
}

// Packed codes, or where `bits` is 0 a matrix [extent, k] of uint8 or int8 with either axis contiguous.
product8::Operand operand(const char* name, const Array& a, int bits, std::int64_t extent, std::int64_t k,
                          bool& is_signed) {
  is_signed = bits == 0 && a.dtype() == nb::dtype<std::int8_t>();
  if (bits != 0) {
    check_bits(name, bits);
    return codes(name, a, bits, true, extent, k);
  }
  const std::string shape = "[" + std::to_string(extent) + ", " + std::to_string(k) + "]";
  if (a.device_type() != nb::device::cpu::value || !(is_signed || a.dtype() == nb::dtype<std::uint8_t>()))
    bad_type(name, "uint8 or int8 " + shape + " on the CPU", a);
  if (a.ndim() != 2 || static_cast<std::int64_t>(a.shape(0)) != extent || static_cast<std::int64_t>(a.shape(1)) != k)
    bad_value(name, "uint8 or int8 " + shape, a);
  const std::int64_t row_stride = a.stride(0), k_stride = a.stride(1);
  const bool inner = (k_stride == 1 || k <= 1) && (row_stride >= k || extent <= 1);
  const bool outer = (row_stride == 1 || extent <= 1) && (k_stride >= extent || k <= 1);
  if (!inner && !outer && extent * k > 0) bad_value(name, "contiguous along one axis, without rows that overlap", a);
  const auto* from = static_cast<const std::uint8_t*>(a.data());
  return {from == nullptr ? kNothing : from, inner ? row_stride : k_stride, 8, inner, k % 4 == 0, 0};
}

void product8_integer(Array a, Array b, std::int64_t k, int a_bits, int b_bits, Array out, int threads,
                      const std::optional<std::string>& variant) {
  check_range("k", k, 0, std::int64_t{1} << 40);
  check_range("threads", threads, 1, kMaxThreads);
  auto* result = data<std::int32_t>("out", out, {kAny, kAny});
  product8::Problem p{};
  p.m = static_cast<std::int64_t>(out.shape(0));
  p.n = static_cast<std::int64_t>(out.shape(1));
  p.k = k;
  bool is_signed = false;
  p.a = operand("a", a, a_bits, p.m, k, is_signed);
  p.a.flip = is_signed ? kFlip : std::uint8_t{0};
  p.b = operand("b", b, b_bits, p.n, k, is_signed);
  p.b.flip = is_signed || p.b.bits < 8 ? std::uint8_t{0} : kFlip;
  const product8::Kernel& kernel = find_variant(product8::kernels(), variant);
  nb::gil_scoped_release release;
  product8::integer(kernel, p, threads, result);
}

}  // namespace

void product8(nb::module_& m) {
  m.def("product8_affine", product8_affine, "a"_a.noconvert(), "b"_a.noconvert(), "k"_a.noconvert(),
        "a_bits"_a.noconvert(), "b_bits"_a.noconvert(), "a_magnitudes"_a.noconvert(), "b_magnitudes"_a.noconvert(),
        "a_inner"_a.noconvert(), "b_inner"_a.noconvert(), "a_step"_a.noconvert(), "a_zero"_a.noconvert().none(),
        "a_offset"_a.noconvert().none(), "b_step"_a.noconvert(), "b_zero"_a.noconvert().none(),
        "b_offset"_a.noconvert().none(), "bias"_a.noconvert().none(), "out"_a.noconvert(), "threads"_a.noconvert(),
        "variant"_a = nb::none(),
        "Product of packed codes with their scales; `inner`: the contracted index runs along a row in memory; "
        "`magnitudes`: of logarithmic codes, whose zero is given as that of bytes, 2^(magnitudes - 1); 0: others.");
  m.def("product8_integer", product8_integer, "a"_a.noconvert(), "b"_a.noconvert(), "k"_a.noconvert(),
        "a_bits"_a.noconvert(), "b_bits"_a.noconvert(), "out"_a.noconvert(), "threads"_a.noconvert(),
        "variant"_a = nb::none(),
        "a @ b.T in int32, modulo 2^32; bits: of packed codes, or 0 for uint8 or int8 matrices, transposed or not.");
}

std::vector<Variant> product8_variants() { return list_variants("product8", product8::kernels()); }

}  // namespace fqtstats::bind
