// Checks of array arguments. Arrays come in unconstrained, so that an error can name the argument and say what was
// expected and what arrived; nothing is ever converted.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

namespace fqtstats::bind {

using Array = nanobind::ndarray<>;
using Pair = std::array<std::int64_t, 2>;  // height, width

// Of sizes, channels and pads, so that no product of two of them overflows.
inline constexpr std::int64_t kMaxSize = 1 << 30;

// "2-D float32 [3, 4] on the CPU", with its strides where it is not contiguous.
std::string describe(const Array& a);

// Throws nanobind::type_error / value_error: "<name> must be <expected>, got <description of a>".
[[noreturn]] void bad_type(const char* name, const std::string& expected, const Array& a);
[[noreturn]] void bad_value(const char* name, const std::string& expected, const Array& a);
// Throws nanobind::value_error: "<name> must be <expected>, got <value>".
[[noreturn]] void bad_value(const char* name, const std::string& expected, std::int64_t value);

// Any extent, in `shape` below.
inline constexpr std::int64_t kAny = -1;

// Throws unless `a` is on the CPU, has dtype T, the given shape, and is contiguous in row-major order (axes of extent 1
// may have any stride; an empty array is contiguous).
void check(const char* name, const Array& a, nanobind::dlpack::dtype dtype, std::initializer_list<std::int64_t> shape);

// check(), then the data.
template <typename T>
T* data(const char* name, const Array& a, std::initializer_list<std::int64_t> shape) {
  check(name, a, nanobind::dtype<T>(), shape);
  return static_cast<T*>(a.data());
}

// The data, or nullptr where there is no array.
template <typename T>
T* data(const char* name, const std::optional<Array>& a, std::initializer_list<std::int64_t> shape) {
  return a ? data<T>(name, *a, shape) : nullptr;
}

inline constexpr int kMaxThreads = 1 << 16;

// Throws nanobind::value_error unless low <= value <= high.
void check_range(const char* name, std::int64_t value, std::int64_t low, std::int64_t high);

}  // namespace fqtstats::bind
