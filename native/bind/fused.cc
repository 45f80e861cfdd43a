#include "kernels/fused/fused.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "bind/arrays.h"
#include "bind/bind.h"
#include "bind/variants.h"

namespace fqtstats::bind {
namespace {

namespace nb = nanobind;
using namespace nb::literals;
using Name = std::optional<std::string>;

constexpr std::int64_t kMaxPad = 1 << 16;

std::int64_t extent(const Array& a, std::size_t axis) { return static_cast<std::int64_t>(a.shape(axis)); }

// [N, H, W, C].
fused::Images images(const Array& y, bool pooled) {
  const float* data = bind::data<float>("y", y, {kAny, kAny, kAny, kAny});
  return {data, extent(y, 0), extent(y, 1), extent(y, 2), extent(y, 3), pooled};
}

fused::Map map(const fused::Images& y, const Array& a, const Array& b, float floor,
               float top = std::numeric_limits<float>::infinity()) {
  return {data<float>("a", a, {y.channels}), data<float>("b", b, {y.channels}), floor, top};
}

std::int64_t pooled(const fused::Images& y, std::int64_t size) { return y.pooled ? size / 2 : size; }

const float* incoming(const fused::Images& y, const Array& g) {
  return data<float>("g", g, {y.n, pooled(y, y.height), pooled(y, y.width), y.channels});
}

const fused::Kernel& choose(int threads, const Name& variant) {
  check_range("threads", threads, 1, kMaxThreads);
  return find_variant(fused::kernels(), variant);
}

void moments(Array y, Array sum, Array square, Array low, Array high, int threads, const Name& variant) {
  const float* data = bind::data<float>("y", y, {kAny, kAny});
  const std::int64_t pixels = extent(y, 0), c = extent(y, 1);
  if (pixels == 0) bad_value("y", "at least one pixel", y);
  double *s = bind::data<double>("sum", sum, {c}), *q = bind::data<double>("square", square, {c});
  float *l = bind::data<float>("low", low, {c}), *h = bind::data<float>("high", high, {c});
  const fused::Kernel& kernel = choose(threads, variant);
  nb::gil_scoped_release release;
  fused::moments(kernel, data, pixels, c, threads, s, q, l, h);
}

void window_extremes(Array y, Array flip, Array low, Array high, int threads, const Name& variant) {
  const fused::Images in = images(y, true);
  const std::int64_t c = in.channels;
  const auto* signs = data<std::int32_t>("flip", flip, {c});
  float *l = data<float>("low", low, {c}), *h = data<float>("high", high, {c});
  const fused::Kernel& kernel = choose(threads, variant);
  nb::gil_scoped_release release;
  fused::window_extremes(kernel, in, threads, reinterpret_cast<const std::uint32_t*>(signs), l, h);
}

void encode(Array y, Array a, Array b, float floor, bool pool, float offset, float prescale, float scale, int zero,
            int levels, std::int64_t pad_h, std::int64_t pad_w, Array out, int threads, const Name& variant) {
  const fused::Images in = images(y, pool);
  const fused::Map m = map(in, a, b, floor);
  check_range("levels", levels, 1, 255);
  check_range("zero", zero, 0, levels);
  check_range("pad_h", pad_h, 0, kMaxPad);
  check_range("pad_w", pad_w, 0, kMaxPad);
  const std::int64_t row = (in.channels + 3) / 4 * 4;
  auto* to =
      data<std::uint8_t>("out", out, {in.n, pooled(in, in.height) + 2 * pad_h, pooled(in, in.width) + 2 * pad_w, row});
  const fused::Kernel& kernel = choose(threads, variant);
  nb::gil_scoped_release release;
  fused::encode(kernel, in, m, {offset, prescale, scale, zero, levels}, pad_h, pad_w, row, threads, to);
}

void bits(Array y, Array a, Array b, float floor, bool pool, float threshold, std::int64_t pad_h, std::int64_t pad_w,
          Array out, int threads, const Name& variant) {
  const fused::Images in = images(y, pool);
  const fused::Map m = map(in, a, b, floor);
  check_range("pad_h", pad_h, 0, kMaxPad);
  check_range("pad_w", pad_w, 0, kMaxPad);
  const std::int64_t row = (in.channels + 63) / 64 * 8;
  auto* to =
      data<std::uint8_t>("out", out, {in.n, pooled(in, in.height) + 2 * pad_h, pooled(in, in.width) + 2 * pad_w, row});
  const fused::Kernel& kernel = choose(threads, variant);
  nb::gil_scoped_release release;
  fused::bits(kernel, in, m, threshold, pad_h, pad_w, row, threads, to);
}

void apply(Array y, Array a, Array b, float floor, bool pool, Array out, int threads, const Name& variant) {
  const fused::Images in = images(y, pool);
  const fused::Map m = map(in, a, b, floor);
  auto* to = data<float>("out", out, {in.n, pooled(in, in.height), pooled(in, in.width), in.channels});
  const fused::Kernel& kernel = choose(threads, variant);
  nb::gil_scoped_release release;
  fused::apply(kernel, in, m, threads, to);
}

void gradient_sums(Array g, Array y, Array a, Array b, float floor, float top, bool pool, Array mean, Array sum,
                   Array dot, int threads, const Name& variant) {
  const fused::Images in = images(y, pool);
  const fused::Map m = map(in, a, b, floor, top);
  const float* from = incoming(in, g);
  const float* center = data<float>("mean", mean, {in.channels});
  double *s = data<double>("sum", sum, {in.channels}), *d = data<double>("dot", dot, {in.channels});
  const fused::Kernel& kernel = choose(threads, variant);
  nb::gil_scoped_release release;
  fused::gradient_sums(kernel, in, m, center, from, threads, s, d);
}

void gradient(Array g, Array y, Array a, Array b, float floor, float top, bool pool, Array mean, Array p, Array q,
              Array r, Array out, Array low, Array high, int threads, const Name& variant) {
  const fused::Images in = images(y, pool);
  const fused::Map m = map(in, a, b, floor, top);
  const float* from = incoming(in, g);
  const std::int64_t c = in.channels;
  const fused::Adjoint adjoint{data<float>("mean", mean, {c}), data<float>("p", p, {c}), data<float>("q", q, {c}),
                               data<float>("r", r, {c})};
  float* to = data<float>("out", out, {in.n, in.height, in.width, c});
  float *l = data<float>("low", low, {in.n, c}), *h = data<float>("high", high, {in.n, c});
  const fused::Kernel& kernel = choose(threads, variant);
  nb::gil_scoped_release release;
  fused::gradient(kernel, in, m, adjoint, from, threads, to, l, h);
}

bool signs(Array w, Array out, int threads, const Name& variant) {
  const float* from = data<float>("w", w, {kAny, kAny, kAny});
  const std::int64_t o = extent(w, 0), c = extent(w, 1), taps = extent(w, 2), row = (c + 63) / 64 * 8;
  auto* to = data<std::uint8_t>("out", out, {o, taps, row});
  const fused::Kernel& kernel = choose(threads, variant);
  nb::gil_scoped_release release;
  return fused::signs(kernel, from, o, c, taps, row, threads, to);
}

}  // namespace

void fused(nb::module_& m) {
  m.def("fused_moments", moments, "y"_a.noconvert(), "sum"_a.noconvert(), "square"_a.noconvert(), "low"_a.noconvert(),
        "high"_a.noconvert(), "threads"_a.noconvert(), "variant"_a = nb::none(),
        "Sums, squares about the first pixel, and extremes of the channels of y [R, C].");
  m.def("fused_window_extremes", window_extremes, "y"_a.noconvert(), "flip"_a.noconvert(), "low"_a.noconvert(),
        "high"_a.noconvert(), "threads"_a.noconvert(), "variant"_a = nb::none(),
        "Extremes of the maxima of 2 x 2 windows of y [N, H, W, C], its signs changed by flip (int32).");
  m.def("fused_encode", encode, "y"_a.noconvert(), "a"_a.noconvert(), "b"_a.noconvert(), "floor"_a.noconvert(),
        "pool"_a.noconvert(), "offset"_a.noconvert(), "prescale"_a.noconvert(), "scale"_a.noconvert(),
        "zero"_a.noconvert(), "levels"_a.noconvert(), "pad_h"_a.noconvert(), "pad_w"_a.noconvert(), "out"_a.noconvert(),
        "threads"_a.noconvert(), "variant"_a = nb::none(), "Codes of x = max(a y + b, floor), pooled or not.");
  m.def("fused_bits", bits, "y"_a.noconvert(), "a"_a.noconvert(), "b"_a.noconvert(), "floor"_a.noconvert(),
        "pool"_a.noconvert(), "threshold"_a.noconvert(), "pad_h"_a.noconvert(), "pad_w"_a.noconvert(),
        "out"_a.noconvert(), "threads"_a.noconvert(), "variant"_a = nb::none(),
        "Whether x = max(a y + b, floor), pooled or not, is at least the threshold, in one bit each.");
  m.def("fused_apply", apply, "y"_a.noconvert(), "a"_a.noconvert(), "b"_a.noconvert(), "floor"_a.noconvert(),
        "pool"_a.noconvert(), "out"_a.noconvert(), "threads"_a.noconvert(), "variant"_a = nb::none(),
        "x = max(a y + b, floor), pooled or not.");
  m.def("fused_gradient_sums", gradient_sums, "g"_a.noconvert(), "y"_a.noconvert(), "a"_a.noconvert(),
        "b"_a.noconvert(), "floor"_a.noconvert(), "top"_a.noconvert(), "pool"_a.noconvert(), "mean"_a.noconvert(),
        "sum"_a.noconvert(), "dot"_a.noconvert(), "threads"_a.noconvert(), "variant"_a = nb::none(),
        "Sums of h and h (y - mean).");
  m.def("fused_gradient", gradient, "g"_a.noconvert(), "y"_a.noconvert(), "a"_a.noconvert(), "b"_a.noconvert(),
        "floor"_a.noconvert(), "top"_a.noconvert(), "pool"_a.noconvert(), "mean"_a.noconvert(), "p"_a.noconvert(),
        "q"_a.noconvert(), "r"_a.noconvert(), "out"_a.noconvert(), "low"_a.noconvert(), "high"_a.noconvert(),
        "threads"_a.noconvert(), "variant"_a = nb::none(), "dL/dy and the extremes of its images and channels.");
  m.def("fused_signs", signs, "w"_a.noconvert(), "out"_a.noconvert(), "threads"_a.noconvert(), "variant"_a = nb::none(),
        "Whether each of w [O, C, T] is at least 0, as bits [O, T, row]; false: not finite.");
}

std::vector<Variant> fused_variants() { return list_variants("fused", fused::kernels()); }

}  // namespace fqtstats::bind
