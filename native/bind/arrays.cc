#include "bind/arrays.h"

#include <algorithm>
#include <iterator>

namespace fqtstats::bind {
namespace {

namespace nb = nanobind;

std::string name_of(nb::dlpack::dtype type) {
  constexpr const char* kKinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
  const std::string kind = type.code < std::size(kKinds) ? kKinds[type.code] : "unknown";
  return kind + std::to_string(type.bits);
}

std::string list(const std::int64_t* begin, const std::int64_t* end) {
  std::string text = "[";
  for (const std::int64_t* i = begin; i != end; ++i)
    text += (i == begin ? "" : ", ") + (*i == kAny ? std::string("*") : std::to_string(*i));
  return text + "]";
}

bool contiguous(const Array& a) {
  std::int64_t stride = 1;
  bool dense = true;
  for (std::size_t i = a.ndim(); i-- > 0;) {
    if (a.shape(i) == 0) return true;
    dense = dense && (a.shape(i) == 1 || a.stride(i) == stride);
    stride *= static_cast<std::int64_t>(a.shape(i));
  }
  return dense;
}

}  // namespace

std::string describe(const Array& a) {
  std::int64_t shape[16], strides[16];
  const std::size_t ndim = std::min<std::size_t>(a.ndim(), std::size(shape));
  for (std::size_t i = 0; i < ndim; ++i) {
    shape[i] = static_cast<std::int64_t>(a.shape(i));
    strides[i] = a.stride(i);
  }
  return std::to_string(a.ndim()) + "-D " + name_of(a.dtype()) + " " + list(shape, shape + ndim) +
         (contiguous(a) ? "" : " with strides " + list(strides, strides + ndim)) +
         (a.device_type() == nb::device::cpu::value ? " on the CPU" : " on another device");
}

void bad_type(const char* name, const std::string& expected, const Array& a) {
  throw nb::type_error((std::string(name) + " must be " + expected + ", got " + describe(a)).c_str());
}

void bad_value(const char* name, const std::string& expected, const Array& a) {
  throw nb::value_error((std::string(name) + " must be " + expected + ", got " + describe(a)).c_str());
}

void bad_value(const char* name, const std::string& expected, std::int64_t value) {
  throw nb::value_error((std::string(name) + " must be " + expected + ", got " + std::to_string(value)).c_str());
}

void check(const char* name, const Array& a, nb::dlpack::dtype dtype, std::initializer_list<std::int64_t> shape) {
  const std::string expected = name_of(dtype) + " " + list(shape.begin(), shape.end()) + " on the CPU, contiguous";
  if (a.device_type() != nb::device::cpu::value || a.dtype() != dtype) bad_type(name, expected, a);
  bool fits = a.ndim() == shape.size();
  for (std::size_t i = 0; fits && i < shape.size(); ++i)
    fits = shape.begin()[i] == kAny || shape.begin()[i] == static_cast<std::int64_t>(a.shape(i));
  if (!fits) bad_value(name, expected, a);
  if (!contiguous(a)) bad_value(name, expected, a);
}

void check_range(const char* name, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value < low || value > high) bad_value(name, std::to_string(low) + " to " + std::to_string(high), value);
}

}  // namespace fqtstats::bind
