#include "kernels/convolution8/convolution8.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "bind/arrays.h"
#include "bind/bind.h"
#include "bind/variants.h"
#include "kernels/codes.h"
#include "kernels/log_codes.h"

namespace fqtstats::bind {
namespace {

namespace nb = nanobind;
using namespace nb::literals;

using Floats = std::optional<Array>;
using Values = std::array<std::uint8_t, 16>;

// Windows of more terms would overflow the sums of codes alone.
constexpr std::int64_t kMaxTerms = 1 << 23;

convolution8::Codes codes(const char* name, const Array& data_, int bits, std::int64_t channels, const Pair& pad) {
  const std::string pad_name = std::string(name) + "_pad";
  if (bits != 1 && bits != 2 && bits != 4 && bits != 8)
    bad_value((std::string(name) + "_bits").c_str(), "1, 2, 4 or 8", bits);
  const auto* data = bind::data<std::uint8_t>(name, data_, {kAny, kAny, kAny, row_bytes(channels, bits)});
  for (const std::int64_t p : pad) check_range(pad_name.c_str(), p, 0, kMaxSize);
  const std::int64_t height = static_cast<std::int64_t>(data_.shape(1)) - 2 * pad[0];
  const std::int64_t width = static_cast<std::int64_t>(data_.shape(2)) - 2 * pad[1];
  if (height < 1 || width < 1) bad_value(name, "larger than its padding", data_);
  return {
      data,    bits,   static_cast<std::int64_t>(data_.shape(0)), channels, height, width, pad[0], pad[1], 1, nullptr,
      nullptr, nullptr};
}

// Adds what the codes mean: one entry, or one for each of `groups`.
void affine(convolution8::Codes& c, const std::string& name, std::int64_t groups, const Array& step, const Floats& zero,
            const Floats& offset) {
  const auto entries = static_cast<std::int64_t>(step.ndim() == 1 ? step.shape(0) : 0);
  if (entries != 1 && entries != groups)
    bad_value((name + "_step").c_str(), "1-D with 1 or " + std::to_string(groups) + " entries", step);
  c.groups = entries;
  c.step = data<float>((name + "_step").c_str(), step, {entries});
  c.zero = data<std::int32_t>((name + "_zero").c_str(), zero, {entries});
  c.offset = data<float>((name + "_offset").c_str(), offset, {entries});
  for (std::int64_t i = 0; c.zero != nullptr && i < entries; ++i)
    check_range((name + "_zero").c_str(), c.zero[i], 0, 255);
}

// Makes the codes logarithmic, unless magnitudes is 0.
void logarithmic(convolution8::Codes& c, const std::string& name, int magnitudes, Values& values) {
  check_range((name + "_magnitudes").c_str(), magnitudes, 0, 7);
  if (magnitudes == 0) return;
  if (c.bits != 4) bad_value((name + "_magnitudes").c_str(), "0, unless codes have 4 bits", magnitudes);
  values = log_bytes(magnitudes);
  c.values = values.data();
}

convolution8::Geometry geometry(const Pair& stride, const Pair& padding, const Pair& dilation, std::int64_t groups) {
  for (int i = 0; i < 2; ++i) {
    check_range("stride", stride[i], 1, kMaxSize);
    check_range("padding", padding[i], 0, kMaxSize);
    check_range("dilation", dilation[i], 1, kMaxSize);
  }
  check_range("groups", groups, 1, kMaxSize);
  return {{stride[0], stride[1]}, {padding[0], padding[1]}, {dilation[0], dilation[1]}, groups};
}

// Checks that a kernel of that size gives `out` positions on `in`, axis 0 (height) or 1.
void check_size(const convolution8::Geometry& g, int axis, std::int64_t in, std::int64_t kernel, std::int64_t out) {
  const std::int64_t expected = g.positions(axis, in, kernel);
  if (out != expected || expected == 0)
    bad_value(axis == 0 ? "height of the output" : "width of the output", std::to_string(expected), out);
}

void check_groups(const char* name, std::int64_t channels, std::int64_t groups) {
  check_range(name, channels, 1, kMaxSize);
  if (channels % groups != 0) bad_value(name, "a multiple of groups = " + std::to_string(groups), channels);
}

void check_terms(std::int64_t terms) { check_range("terms of a sum", terms, 0, kMaxTerms); }

void convolution8_forward(Array x, int x_bits, int x_magnitudes, Pair x_pad, Array x_step, Floats x_zero,
                          Floats x_offset, Array w, int w_bits, int w_magnitudes, Array w_step, Floats w_zero,
                          Floats w_offset, Floats bias, std::int64_t channels, Pair stride, Pair padding, Pair dilation,
                          std::int64_t groups, Array out, int threads, const std::optional<std::string>& variant) {
  const convolution8::Geometry g = geometry(stride, padding, dilation, groups);
  check_groups("channels", channels, groups);
  convolution8::Codes a = codes("x", x, x_bits, channels, x_pad);
  convolution8::Codes b = codes("w", w, w_bits, channels / groups, {0, 0});
  check_groups("output channels", b.n, groups);
  affine(a, "x", a.n, x_step, x_zero, x_offset);
  affine(b, "w", b.n, w_step, w_zero, w_offset);
  Values x_values, w_values;
  logarithmic(a, "x", x_magnitudes, x_values);
  logarithmic(b, "w", w_magnitudes, w_values);
  auto* y = data<float>("out", out, {a.n, kAny, kAny, b.n});
  const auto height = static_cast<std::int64_t>(out.shape(1)), width = static_cast<std::int64_t>(out.shape(2));
  check_size(g, 0, a.height, b.height, height);
  check_size(g, 1, a.width, b.width, width);
  check_terms(b.channels * b.height * b.width);
  const auto* bias_data = data<float>("bias", bias, {b.n});
  check_range("threads", threads, 1, kMaxThreads);
  const convolution8::Kernel& kernel = find_variant(convolution8::kernels(), variant);
  nb::gil_scoped_release release;
  convolution8::forward(kernel, a, b, g, bias_data, height, width, threads, y);
}

void convolution8_grad_input(Array g, int g_bits, int g_magnitudes, Pair g_pad, Array g_step, Floats g_zero,
                             Floats g_offset, Array w, int w_bits, int w_magnitudes, Array w_step, Floats w_zero,
                             Floats w_offset, std::int64_t channels, Pair stride, Pair padding, Pair dilation,
                             std::int64_t groups, Array out, int threads, const std::optional<std::string>& variant) {
  const convolution8::Geometry geo = geometry(stride, padding, dilation, groups);
  check_groups("channels", channels, groups);
  convolution8::Codes b = codes("w", w, w_bits, channels / groups, {0, 0});
  check_groups("output channels", b.n, groups);
  convolution8::Codes a = codes("g", g, g_bits, b.n, g_pad);
  affine(a, "g", a.n, g_step, g_zero, g_offset);
  affine(b, "w", 1, w_step, w_zero, w_offset);
  Values g_values, w_values;
  logarithmic(a, "g", g_magnitudes, g_values);
  logarithmic(b, "w", w_magnitudes, w_values);
  auto* dx = data<float>("out", out, {a.n, kAny, kAny, channels});
  const auto height = static_cast<std::int64_t>(out.shape(1)), width = static_cast<std::int64_t>(out.shape(2));
  check_size(geo, 0, height, b.height, a.height);
  check_size(geo, 1, width, b.width, a.width);
  check_terms(b.n / groups * b.height * b.width);
  check_range("threads", threads, 1, kMaxThreads);
  const convolution8::Kernel& kernel = find_variant(convolution8::kernels(), variant);
  nb::gil_scoped_release release;
  convolution8::grad_input(kernel, a, b, geo, height, width, threads, dx);
}

void convolution8_grad_weight(Array g, int g_bits, int g_magnitudes, Pair g_pad, Array g_step, Floats g_zero,
                              Floats g_offset, Array x, int x_bits, int x_magnitudes, Pair x_pad, Array x_step,
                              Floats x_zero, Floats x_offset, std::int64_t channels, Pair stride, Pair padding,
                              Pair dilation, std::int64_t groups, Array out, int threads,
                              const std::optional<std::string>& variant) {
  const convolution8::Geometry geo = geometry(stride, padding, dilation, groups);
  check_groups("channels", channels, groups);
  auto* dw = data<float>("out", out, {kAny, channels / groups, kAny, kAny});
  const auto outputs = static_cast<std::int64_t>(out.shape(0));
  const auto kh = static_cast<std::int64_t>(out.shape(2)), kw = static_cast<std::int64_t>(out.shape(3));
  check_range("kernel height", kh, 1, kMaxSize);
  check_range("kernel width", kw, 1, kMaxSize);
  check_groups("output channels", outputs, groups);
  convolution8::Codes a = codes("g", g, g_bits, outputs, g_pad);
  convolution8::Codes b = codes("x", x, x_bits, channels, x_pad);
  if (a.n != b.n) bad_value("x", "of as many images as g: " + std::to_string(a.n), x);
  affine(a, "g", outputs, g_step, g_zero, g_offset);
  affine(b, "x", channels, x_step, x_zero, x_offset);
  Values g_values, x_values;
  logarithmic(a, "g", g_magnitudes, g_values);
  logarithmic(b, "x", x_magnitudes, x_values);
  check_size(geo, 0, b.height, kh, a.height);
  check_size(geo, 1, b.width, kw, a.width);
  check_terms(a.n * a.height * a.width);
  check_range("threads", threads, 1, kMaxThreads);
  const convolution8::Kernel& kernel = find_variant(convolution8::kernels(), variant);
  nb::gil_scoped_release release;
  convolution8::grad_weight(kernel, a, b, geo, kh, kw, threads, dw);
}

}  // namespace

void convolution8(nb::module_& m) {
  m.def("convolution8", convolution8_forward, "x"_a.noconvert(), "x_bits"_a.noconvert(), "x_magnitudes"_a.noconvert(),
        "x_pad"_a.noconvert(), "x_step"_a.noconvert(), "x_zero"_a.noconvert().none(), "x_offset"_a.noconvert().none(),
        "w"_a.noconvert(), "w_bits"_a.noconvert(), "w_magnitudes"_a.noconvert(), "w_step"_a.noconvert(),
        "w_zero"_a.noconvert().none(), "w_offset"_a.noconvert().none(), "bias"_a.noconvert().none(),
        "channels"_a.noconvert(), "stride"_a.noconvert(), "padding"_a.noconvert(), "dilation"_a.noconvert(),
        "groups"_a.noconvert(), "out"_a.noconvert(), "threads"_a.noconvert(), "variant"_a = nb::none(),
        "out [N, OH, OW, O] float32 = convolution of codes x of `channels` channels with codes w; magnitudes: of "
        "logarithmic codes, whose zero is given as that of bytes, 2^(magnitudes - 1); 0: others.");
  m.def("convolution8_grad_input", convolution8_grad_input, "g"_a.noconvert(), "g_bits"_a.noconvert(),
        "g_magnitudes"_a.noconvert(), "g_pad"_a.noconvert(), "g_step"_a.noconvert(), "g_zero"_a.noconvert().none(),
        "g_offset"_a.noconvert().none(), "w"_a.noconvert(), "w_bits"_a.noconvert(), "w_magnitudes"_a.noconvert(),
        "w_step"_a.noconvert(), "w_zero"_a.noconvert().none(), "w_offset"_a.noconvert().none(),
        "channels"_a.noconvert(), "stride"_a.noconvert(), "padding"_a.noconvert(), "dilation"_a.noconvert(),
        "groups"_a.noconvert(), "out"_a.noconvert(), "threads"_a.noconvert(), "variant"_a = nb::none(),
        "out [N, H, W, `channels`] float32 = gradient of the convolution with respect to its input.");
  m.def("convolution8_grad_weight", convolution8_grad_weight, "g"_a.noconvert(), "g_bits"_a.noconvert(),
        "g_magnitudes"_a.noconvert(), "g_pad"_a.noconvert(), "g_step"_a.noconvert(), "g_zero"_a.noconvert().none(),
        "g_offset"_a.noconvert().none(), "x"_a.noconvert(), "x_bits"_a.noconvert(), "x_magnitudes"_a.noconvert(),
        "x_pad"_a.noconvert(), "x_step"_a.noconvert(), "x_zero"_a.noconvert().none(), "x_offset"_a.noconvert().none(),
        "channels"_a.noconvert(), "stride"_a.noconvert(), "padding"_a.noconvert(), "dilation"_a.noconvert(),
        "groups"_a.noconvert(), "out"_a.noconvert(), "threads"_a.noconvert(), "variant"_a = nb::none(),
        "out [O, I / groups, kh, kw] float32 = gradient of the convolution with respect to its weights.");
}

std::vector<Variant> convolution8_variants() { return list_variants("convolution8", convolution8::kernels()); }

}  // namespace fqtstats::bind
