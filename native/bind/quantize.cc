#include "bind/quantize.h"

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

namespace fqtstats::bind {

namespace nb = nanobind;
using namespace nb::literals;

quantize::Input input_of(const Array& x, bool channels_last) {
  constexpr nb::dlpack::dtype kBfloat{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};
  const bool bfloat = x.dtype() == kBfloat;
  if (!bfloat && x.dtype() != nb::dtype<float>()) bad_type("x", "float32 or bfloat16", x);
  check("x", x, x.dtype(), {kAny, kAny, kAny});
  if (x.size() == 0) bad_value("x", "not empty", x);
  const auto n = static_cast<std::int64_t>(x.shape(0)), second = static_cast<std::int64_t>(x.shape(1)),
             third = static_cast<std::int64_t>(x.shape(2));
  return {x.data(),
          bfloat ? quantize::Type::bf16 : quantize::Type::f32,
          channels_last,
          n,
          channels_last ? third : second,
          channels_last ? second : third};
}

quantize::Layout layout_of(int bits, const Pair& size, const Pair& pad) {
  if (bits != 1 && bits != 2 && bits != 4 && bits != 8) bad_value("storage_bits", "1, 2, 4 or 8", bits);
  for (int i : {0, 1}) {
    check_range("size", size[i], 1, kMaxSize);
    check_range("pad", pad[i], 0, kMaxSize);
  }
  return {bits, size[0], size[1], pad[0], pad[1]};
}

std::uint8_t* codes_of(const char* name, const Array& a, const quantize::Layout& l, std::int64_t n, std::int64_t c) {
  return data<std::uint8_t>(name, a, {n, l.height + 2 * l.pad_h, l.width + 2 * l.pad_w, row_bytes(c, l.bits)});
}

namespace {

quantize::Axis axis_of(int axis) {
  check_range("axis", axis, -1, 1);
  return static_cast<quantize::Axis>(axis);
}

std::int64_t groups(int axis, std::int64_t n, std::int64_t c) { return axis < 0 ? 1 : axis == 0 ? n : c; }

// Indices of samples or channels, ascending, each at most once.
quantize::Kept kept_of(int axis, const std::optional<Array>& indices, std::int64_t extent) {
  if (!indices) return {};
  const auto* data = bind::data<std::int64_t>("kept", *indices, {kAny});
  const auto count = static_cast<std::int64_t>(indices->size());
  if (axis < 0) throw nb::value_error("kept needs an axis with a grid per index, 0 or 1, got axis -1");
  if (count == 0) bad_value("kept", "not empty", *indices);
  for (std::int64_t i = 0; i < count; ++i) check_range("kept", data[i], i == 0 ? 0 : data[i - 1] + 1, extent - 1);
  return {static_cast<quantize::Axis>(axis), data, count};
}

void quantize_extremes(Array x, bool channels_last, int axis, Array low, Array high, int threads,
                       const std::optional<std::string>& variant) {
  const quantize::Input in = input_of(x, channels_last);
  const quantize::Axis along = axis_of(axis);
  const std::int64_t count = groups(axis, in.n, in.c);
  float* lows = data<float>("low", low, {count});
  float* highs = data<float>("high", high, {count});
  check_range("threads", threads, 1, kMaxThreads);
  const quantize::Kernel& kernel = find_variant(quantize::kernels(), variant);
  nb::gil_scoped_release release;
  quantize::extremes(kernel, in, along, threads, lows, highs);
}

int quantize_encode(Array x, bool channels_last, int axis, int rule, int levels, int random_bits,
                    const std::array<std::uint32_t, 4>& words, int storage_bits, const Pair& size, const Pair& pad,
                    Array out, Array step, Array zero, Array offset, const std::optional<Array>& low,
                    const std::optional<Array>& high, const std::optional<Array>& kept, int threads,
                    const std::optional<std::string>& variant) {
  const quantize::Input in = input_of(x, channels_last);
  const quantize::Axis along = axis_of(axis);
  const quantize::Kept part = kept_of(axis, kept, axis == 0 ? in.n : in.c);
  const std::int64_t n = kept && axis == 0 ? part.count : in.n, c = kept && axis == 1 ? part.count : in.c;
  const std::int64_t count = groups(axis, n, c);
  check_range("rule", rule, 0, 4);
  const auto how = static_cast<quantize::Rule>(rule);
  check_range("levels", levels, how == quantize::Rule::symmetric ? 3 : how == quantize::Rule::log ? 2 : 1, 255);
  check_range("random_bits", random_bits, 0, 24);
  const quantize::Layout layout = layout_of(storage_bits, size, pad);
  if (levels >> storage_bits != 0) bad_value("storage_bits", "as many as levels have", storage_bits);
  if (size[0] * size[1] != in.s) bad_value("x", "as many positions as size has", x);
  std::uint8_t* codes = codes_of("out", out, layout, n, c);
  float* steps = data<float>("step", step, {count});
  auto* zeros = data<std::int32_t>("zero", zero, {count});
  float* offsets = data<float>("offset", offset, {count});
  if (low.has_value() != high.has_value())
    throw nb::value_error("low and high must be given together, got only one of them");
  if (kept && !low) throw nb::value_error("low and high must be given with kept, got none");
  const float* lows = data<float>("low", low, {count});
  const float* highs = data<float>("high", high, {count});
  check_range("threads", threads, 1, kMaxThreads);
  const quantize::Kernel& kernel = find_variant(quantize::kernels(), variant);
  const quantize::Recipe recipe{along, how, levels, random_bits};
  const philox::Stream key{words[0], words[1], words[2], words[3]};
  nb::gil_scoped_release release;
  return static_cast<int>(
      quantize::encode(kernel, in, part, recipe, key, layout, lows, highs, threads, codes, steps, zeros, offsets));
}

void quantize_decode(Array codes, int storage_bits, std::int64_t channels, const Pair& size, const Pair& pad, int axis,
                     bool log, Array step, const std::optional<Array>& zero, const std::optional<Array>& offset,
                     bool channels_last, Array out, int threads, const std::optional<std::string>& variant) {
  const quantize::Layout layout = layout_of(storage_bits, size, pad);
  const quantize::Axis along = axis_of(axis);
  check_range("channels", channels, 1, kMaxSize);
  const std::int64_t n = codes.ndim() == 4 ? static_cast<std::int64_t>(codes.shape(0)) : kAny;
  const std::uint8_t* from = codes_of("codes", codes, layout, n, channels);
  const std::int64_t count = groups(axis, n, channels), s = size[0] * size[1];
  const float* steps = data<float>("step", step, {count});
  const auto* zeros = data<std::int32_t>("zero", zero, {count});
  const float* offsets = data<float>("offset", offset, {count});
  float* to = channels_last ? data<float>("out", out, {n, s, channels}) : data<float>("out", out, {n, channels, s});
  check_range("threads", threads, 1, kMaxThreads);
  const quantize::Kernel& kernel = find_variant(quantize::kernels(), variant);
  const quantize::Meaning meaning{along, log, steps, zeros, offsets};
  nb::gil_scoped_release release;
  quantize::decode(kernel, from, layout, n, channels, meaning, channels_last, threads, to);
}

}  // namespace

void quantize(nb::module_& m) {
  m.def("quantize_extremes", quantize_extremes, "x"_a.noconvert(), "channels_last"_a.noconvert(), "axis"_a.noconvert(),
        "low"_a.noconvert(), "high"_a.noconvert(), "threads"_a.noconvert(), "variant"_a = nb::none(),
        "Minimum and maximum of every group (axis -1: all, 0: a sample, 1: a channel) of x, float32 or bfloat16 "
        "[N, C, S], or [N, S, C] where channels_last; NaN where the group holds one.");
  m.def("quantize_encode", quantize_encode, "x"_a.noconvert(), "channels_last"_a.noconvert(), "axis"_a.noconvert(),
        "rule"_a.noconvert(), "levels"_a.noconvert(), "random_bits"_a.noconvert(), "words"_a,
        "storage_bits"_a.noconvert(), "size"_a, "pad"_a, "out"_a.noconvert(), "step"_a.noconvert(),
        "zero"_a.noconvert(), "offset"_a.noconvert(), "low"_a.noconvert().none(), "high"_a.noconvert().none(),
        "kept"_a.noconvert().none(), "threads"_a.noconvert(), "variant"_a = nb::none(),
        "Codes of x in their storage layout, with the grids (rule 0: affine, 1: zero_on_grid, 2: symmetric, 3: log, "
        "4: mirrored); levels: the largest code. kept: indices along `axis`, int64, of what is quantized; all others "
        "are left out, and low and high are those of the kept groups. random_bits 0: to nearest. Returns 0, 1 where "
        "offsets are not all 0, 2 where x is not finite, 3 where a range overflows.");
  m.def("quantize_decode", quantize_decode, "codes"_a.noconvert(), "storage_bits"_a.noconvert(),
        "channels"_a.noconvert(), "size"_a, "pad"_a, "axis"_a.noconvert(), "log"_a.noconvert(), "step"_a.noconvert(),
        "zero"_a.noconvert().none(), "offset"_a.noconvert().none(), "channels_last"_a.noconvert(), "out"_a.noconvert(),
        "threads"_a.noconvert(), "variant"_a = nb::none(),
        "k * step + offset of codes in their storage layout, k = code - zero; log: for k, sign(k) 2^(|k| - 1).");
}

std::vector<Variant> quantize_variants() { return list_variants("quantize", quantize::kernels()); }

}  // namespace fqtstats::bind
