#include "kernels/convolution8/weights.h"

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "kernels/integers.h"

namespace fqtstats::convolution8 {

using std::int32_t, std::int64_t, std::uint8_t;

Weights::Weights(const Kernel& kernel, const Codes& w, const Shape& shape, bool offset, int threads, Plan& plan)
    : kernel_(kernel),
      shape_(shape),
      image_(unpacked(w, 1, threads, cpu::scratch<Weights, uint8_t>)),
      scales_(scales_of(w, shape.columns)),
      tap_stride_(round_up(shape.columns, kLanes)),
      class_stride_(shape.columns + kPanel) {
  struct Panels;
  struct TapSums;
  struct Raw;
  const int64_t bytes = list_panels(plan.panels, shape.groups, shape.columns / shape.groups, shape.taps * shape.words);
  panels_ = cpu::scratch<Panels, uint8_t>(bytes);
  tap_sums_ = cpu::scratch<TapSums, int32_t>(shape.taps * tap_stride_);
  int32_t* raw = cpu::scratch<Raw, int32_t>(shape.gradient ? 0 : shape.columns * shape.taps);
  const auto count = static_cast<int64_t>(plan.panels.size());
  cpu::split(count, ceil_div((128 << 10) * count, bytes), threads, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const Panel& panel = plan.panels[j];
      if (shape.gradient)
        pack_gradient(panel, plan);
      else
        pack_forward(panel, raw + panel.column * shape.taps);
      for (int64_t tap = 0; tap < shape.taps; ++tap)
        for (int i = 0; i < panel.count; ++i)
          tap_sums_[tap * tap_stride_ + panel.column + i] -= static_cast<int32_t>(128 * shape.terms);
    }
  });
  sum_classes(plan, offset);
}

void Weights::pack_forward(const Panel& p, int32_t* raw) {
  const int64_t taps = shape_.taps, words = shape_.words, terms = shape_.terms;
  const uint8_t* in = image_.data + p.column * image_.image;
  uint8_t* out = panels_ + p.offset;
  const int64_t word = p.vectors * kLanes * 4;
  kernel_.transpose(in, image_.image, p.count, taps * words, 0x01010101U * kFlip, out, word);
  if (terms % 4 != 0)  // beyond the last channel: 0, whatever the activations hold there
    for (int64_t tap = 1; tap <= taps; ++tap)
      for (int64_t i = 0; i < word; ++i)
        if (i % 4 >= terms % 4) out[(tap * words - 1) * word + i] = 0;
  kernel_.row_sums(in, image_.pixel, p.count * taps, terms, raw);
  kernel_.transpose(raw, 4 * taps, p.count, taps, 0, tap_sums_ + p.column, 4 * tap_stride_);
}

void Weights::pack_gradient(const Panel& p, const Plan& plan) {
  struct Sums;
  const int64_t taps = shape_.taps, words = shape_.words, terms = shape_.terms;
  const int64_t word = p.vectors * kLanes * 4, first = p.column % (shape_.columns / shape_.groups);
  int32_t* sums = cpu::scratch<Sums, int32_t>(taps * kPanel);
  std::fill_n(sums, taps * kPanel, 0);
  for (int64_t q = 0; q < words; ++q)
    for (int64_t tap = 0; tap < taps; ++tap) {
      const uint8_t* in = image_.data + (p.group * terms + 4 * q) * image_.image + tap * image_.pixel + first;
      const uint8_t* rows[4];
      for (int64_t k = 0; k < 4; ++k) rows[k] = 4 * q + k < terms ? in + k * image_.image : nullptr;
      const int64_t place = plan.place(tap / shape_.kernel_width, tap % shape_.kernel_width);
      kernel_.interleave(rows, p.count, kFlip, panels_ + p.offset + (place * words + q) * word, kLanes * 4,
                         sums + tap * kPanel);
    }
  for (int64_t tap = 0; tap < taps; ++tap)
    std::copy_n(sums + tap * kPanel, p.count, tap_sums_ + tap * tap_stride_ + p.column);
}

void Weights::sum_classes(const Plan& plan, bool offset) {
  struct ClassSums;
  struct V;
  const auto count = static_cast<int64_t>(plan.classes.size());
  class_sums_ = cpu::scratch<ClassSums, int32_t>(count * class_stride_);
  if (offset) v_ = cpu::scratch<V, float>(count * class_stride_);
  for (int64_t k = 0; k < count; ++k) {
    const Plan::Class& c = plan.classes[k];
    int32_t* sums = class_sums_ + k * class_stride_;
    std::fill_n(sums, class_stride_, 0);
    for (const Axis::Tap& y : plan.vertical.classes[c.vertical])
      for (const Axis::Tap& x : plan.horizontal.classes[c.horizontal]) {
        const int32_t* of_tap = tap_sums_ + (y.index * shape_.kernel_width + x.index) * tap_stride_;
        for (int64_t j = 0; j < shape_.columns; ++j) sums[j] -= of_tap[j];
      }
    if (!offset) continue;
    float* v = v_ + k * class_stride_;
    const int64_t n = c.taps * shape_.terms;
    std::fill_n(v, class_stride_, 0.0F);
    for (int64_t j = 0; j < shape_.columns; ++j)
      // shift = 128 - zb, so that sum (b - zb) = sum b' + n shift.
      v[j] = convolution::scaled_sum(scales_.step[j], n * scales_.shift[j] - sums[j], n,
                                     scales_.offset == nullptr ? nullptr : scales_.offset + j);
  }
}

Columns Weights::columns(const Panel& panel, int64_t index) const {
  const int64_t at = index * class_stride_ + panel.column;
  return {scales_.shift + panel.column,      class_sums_ + at,
          scales_.step + panel.column,       scales_.offset == nullptr ? nullptr : scales_.offset + panel.column,
          v_ == nullptr ? nullptr : v_ + at, nullptr};
}

bool Weights::need_sums() const {
  return scales_.offset != nullptr ||
         std::any_of(scales_.shift, scales_.shift + shape_.columns, [](int32_t shift) { return shift != 0; });
}

}  // namespace fqtstats::convolution8
