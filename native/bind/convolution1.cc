#include "kernels/convolution1/convolution1.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
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

namespace fqtstats::bind {
namespace {

namespace nb = nanobind;
using namespace nb::literals;

using Shape = std::array<std::int64_t, 4>;
using Maybe = std::optional<Array>;

// The numbers of a logical shape, pad and grid, checked against each other and the data. `axis` is the axis of the
// shape that groups run along.
convolution1::Image image(const char* name, const Array& data_, int bits, const Shape& shape, const Pair& pad,
                          const Array& step, const Maybe& zero, const Maybe& offset, int axis, int largest_bits) {
  const std::string label(name);
  if (bits != 1 && bits != 2 && bits != 4) bad_value((label + "_bits").c_str(), "1, 2 or 4", bits);
  check_range((label + "_bits").c_str(), bits, 1, largest_bits);
  constexpr std::int64_t kLimit = std::int64_t{1} << 31;
  for (const std::int64_t extent : shape) check_range((label + "_shape").c_str(), extent, 1, kLimit);
  for (const std::int64_t extent : pad) check_range((label + "_pad").c_str(), extent, 0, kLimit);
  const std::int64_t bytes = row_bytes(shape[1], bits);
  const auto* codes = data<std::uint8_t>(name, data_, {shape[0], shape[2] + 2 * pad[0], shape[3] + 2 * pad[1], bytes});
  const bool groups = step.ndim() == 1 && step.shape(0) != 1;
  const std::int64_t entries = groups ? shape[axis] : 1;
  const convolution1::Grid grid{data<float>((label + "_step").c_str(), step, {entries}),
                                data<std::int32_t>((label + "_zero").c_str(), zero, {entries}),
                                data<float>((label + "_offset").c_str(), offset, {entries}), groups};
  return {codes, bits, shape[0], shape[1], shape[2], shape[3], pad[0], pad[1], grid};
}

convolution1::Geometry geometry(const Pair& stride, const Pair& padding, const Pair& dilation) {
  constexpr std::int64_t kLimit = 1 << 20;
  convolution1::Geometry geometry{};
  for (int axis = 0; axis < 2; ++axis) {
    check_range("stride", geometry.stride[axis] = stride[axis], 1, kLimit);
    check_range("padding", geometry.padding[axis] = padding[axis], 0, kLimit);
    check_range("dilation", geometry.dilation[axis] = dilation[axis], 1, kLimit);
  }
  return geometry;
}

void check_extents(const char* name, const convolution1::Geometry& geometry, const Pair& size, const Pair& kernel,
                   const Pair& out) {
  for (int axis = 0; axis < 2; ++axis) {
    const std::int64_t expected = geometry.positions(axis, size[axis], kernel[axis]);
    if (out[axis] != expected || expected == 0)
      bad_value(name,
                "of extent " + std::to_string(expected) + " (at least 1) along image axis " + std::to_string(axis),
                out[axis]);
  }
}

bool forward(Array x, Shape x_shape, Pair x_pad, Array x_step, Maybe x_zero, Maybe x_offset, Array w, Shape w_shape,
             Array w_step, Maybe w_zero, Maybe w_offset, Pair stride, Pair padding, Pair dilation, Maybe bias,
             int threads, Array out, const std::optional<std::string>& variant) {
  const auto a = image("x", x, 1, x_shape, x_pad, x_step, x_zero, x_offset, 0, 1);
  const auto b = image("w", w, 1, w_shape, {0, 0}, w_step, w_zero, w_offset, 0, 1);
  if (b.c != a.c) bad_value("w_shape[1]", std::to_string(a.c), b.c);
  const auto g = geometry(stride, padding, dilation);
  if (out.ndim() != 4) bad_value("out", "4-D", out);
  const std::int64_t out_h = g.positions(0, a.h, b.h), out_w = g.positions(1, a.w, b.w);
  if (out_h < 1 || out_w < 1) bad_value("w_shape", "a kernel within the padded image", out_h < 1 ? b.h : b.w);
  auto* y = data<float>("out", out, {a.n, out_h, out_w, b.n});
  const auto* added = data<float>("bias", bias, {b.n});
  check_range("threads", threads, 1, kMaxThreads);
  const convolution1::Kernel& kernel = find_variant(convolution1::kernels(), variant);
  nb::gil_scoped_release release;
  return convolution1::forward(kernel, a, b, g, added, out_h, out_w, threads, y);
}

bool grad_input(Array g, int g_bits, Shape g_shape, Pair g_pad, Array g_step, Maybe g_zero, Maybe g_offset, Array w,
                Shape w_shape, Array w_step, Maybe w_zero, Maybe w_offset, Pair stride, Pair padding, Pair dilation,
                Pair size, int threads, Array out, const std::optional<std::string>& variant) {
  const auto a = image("g", g, g_bits, g_shape, g_pad, g_step, g_zero, g_offset, 0, 4);
  const auto b = image("w", w, 1, w_shape, {0, 0}, w_step, w_zero, w_offset, 1, 1);
  if (b.n != a.c) bad_value("w_shape[0]", std::to_string(a.c), b.n);
  const auto slide = geometry(stride, padding, dilation);
  check_extents("g_shape", slide, size, {b.h, b.w}, {a.h, a.w});
  auto* dx = data<float>("out", out, {a.n, size[0], size[1], b.c});
  check_range("threads", threads, 1, kMaxThreads);
  const convolution1::Kernel& kernel = find_variant(convolution1::kernels(), variant);
  nb::gil_scoped_release release;
  return convolution1::grad_input(kernel, a, b, slide, size[0], size[1], threads, dx);
}

bool grad_weight(Array g, int g_bits, Shape g_shape, Pair g_pad, Array g_step, Maybe g_zero, Maybe g_offset, Array x,
                 Shape x_shape, Pair x_pad, Array x_step, Maybe x_zero, Maybe x_offset, Pair stride, Pair padding,
                 Pair dilation, Pair kernel, int threads, Array out, const std::optional<std::string>& variant) {
  const auto a = image("g", g, g_bits, g_shape, g_pad, g_step, g_zero, g_offset, 1, 4);
  const auto b = image("x", x, 1, x_shape, x_pad, x_step, x_zero, x_offset, 1, 1);
  if (b.n != a.n) bad_value("x_shape[0]", std::to_string(a.n), b.n);
  const auto slide = geometry(stride, padding, dilation);
  for (const std::int64_t extent : kernel) check_range("kernel", extent, 1, std::int64_t{1} << 20);
  check_extents("g_shape", slide, {b.h, b.w}, kernel, {a.h, a.w});
  auto* dw = data<float>("out", out, {a.c, b.c, kernel[0], kernel[1]});
  check_range("threads", threads, 1, kMaxThreads);
  const convolution1::Kernel& chosen = find_variant(convolution1::kernels(), variant);
  nb::gil_scoped_release release;
  return convolution1::grad_weight(chosen, a, b, slide, kernel[0], kernel[1], threads, dw);
}

}  // namespace

void convolution1(nb::module_& m) {
  m.def("convolution1_forward", forward, "x"_a.noconvert(), "x_shape"_a.noconvert(), "x_pad"_a.noconvert(),
        "x_step"_a.noconvert(), "x_zero"_a.none().noconvert(), "x_offset"_a.none().noconvert(), "w"_a.noconvert(),
        "w_shape"_a.noconvert(), "w_step"_a.noconvert(), "w_zero"_a.none().noconvert(), "w_offset"_a.none().noconvert(),
        "stride"_a.noconvert(), "padding"_a.noconvert(), "dilation"_a.noconvert(), "bias"_a.none().noconvert(),
        "threads"_a.noconvert(), "out"_a.noconvert(), "variant"_a = nb::none(),
        "out [N, OH, OW, O] = convolution of 1-bit x and 1-bit w. False where a sum could exceed 32 bits or the shape "
        "of the kernel is out of reach; nothing is written then.");
  m.def("convolution1_grad_input", grad_input, "g"_a.noconvert(), "g_bits"_a.noconvert(), "g_shape"_a.noconvert(),
        "g_pad"_a.noconvert(), "g_step"_a.noconvert(), "g_zero"_a.none().noconvert(), "g_offset"_a.none().noconvert(),
        "w"_a.noconvert(), "w_shape"_a.noconvert(), "w_step"_a.noconvert(), "w_zero"_a.none().noconvert(),
        "w_offset"_a.none().noconvert(), "stride"_a.noconvert(), "padding"_a.noconvert(), "dilation"_a.noconvert(),
        "size"_a.noconvert(), "threads"_a.noconvert(), "out"_a.noconvert(), "variant"_a = nb::none(),
        "out [N, H, W, I] = input gradient of a convolution, for g of up to 4 bits and 1-bit w. False as above.");
  m.def("convolution1_grad_weight", grad_weight, "g"_a.noconvert(), "g_bits"_a.noconvert(), "g_shape"_a.noconvert(),
        "g_pad"_a.noconvert(), "g_step"_a.noconvert(), "g_zero"_a.none().noconvert(), "g_offset"_a.none().noconvert(),
        "x"_a.noconvert(), "x_shape"_a.noconvert(), "x_pad"_a.noconvert(), "x_step"_a.noconvert(),
        "x_zero"_a.none().noconvert(), "x_offset"_a.none().noconvert(), "stride"_a.noconvert(), "padding"_a.noconvert(),
        "dilation"_a.noconvert(), "kernel"_a.noconvert(), "threads"_a.noconvert(), "out"_a.noconvert(),
        "variant"_a = nb::none(),
        "out [O, I, kh, kw] = weight gradient of a convolution, for g of up to 4 bits and 1-bit x. False as above.");
}

std::vector<Variant> convolution1_variants() { return list_variants("convolution1", convolution1::kernels()); }

}  // namespace fqtstats::bind
