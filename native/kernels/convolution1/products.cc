// Forward (popcount) and input gradient (lookup): every output pixel is a product of the pixels under its taps.
#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "kernels/convolution1/convolution1.h"
#include "kernels/convolution1/images.h"
#include "kernels/convolution1/phase.h"
#include "kernels/convolution1/weights.h"

namespace fqtstats::convolution1 {
namespace {

constexpr int kMostRows = std::max(kPopcountRows, kLookupRows);

template <typename T>
T* take(T*& next, std::int64_t count) {
  T* taken = next;
  next += count;
  return taken;
}

// The sums over the taps of every output pixel of one image. `across` is [source.height][x.count] of working memory;
// they follow it, [y.count][x.count].
void window_sums(const Phase& phase, const Source& source, const std::int32_t* sums, std::int32_t* across) {
  const std::int64_t count = phase.x.count;
  for (std::int64_t y = 0; y < source.height; ++y) {
    std::int32_t* to = across + y * count;
    std::fill_n(to, count, 0);
    for (int t = 0; t < phase.x.taps; ++t) {
      const std::int32_t* from = sums + y * source.width + source.pad_w + phase.x.offset[t];
      if (phase.x.stride == 1)
        for (std::int64_t j = 0; j < count; ++j) to[j] += from[j];
      else
        for (std::int64_t j = 0; j < count; ++j) to[j] += from[j * phase.x.stride];
    }
  }
  for (std::int64_t i = 0; i < phase.y.count; ++i) {
    std::int32_t* to = across + (source.height + i) * count;
    std::fill_n(to, count, 0);
    for (int t = 0; t < phase.y.taps; ++t) {
      const std::int32_t* from = across + (i * phase.y.stride + phase.y.offset[t] + source.pad_h) * count;
      for (std::int64_t j = 0; j < count; ++j) to[j] += from[j];
    }
  }
}

// The taps' runs, from the source of the first tap on. Returns them in `offset`.
Runs runs_of(const Phase& phase, const Source& source, std::int64_t steps, std::int64_t* offset) {
  const Axis &y = phase.y, &x = phase.x;
  const bool whole = x.taps > 0 && x.offset[x.taps - 1] - x.offset[0] == x.taps - 1;
  std::int64_t count = 0;
  for (int ty = 0; ty < y.taps; ++ty)
    for (int tx = 0; tx < (whole ? 1 : x.taps); ++tx)
      offset[count++] = ((y.offset[ty] - y.offset[0]) * source.width + x.offset[tx] - x.offset[0]) * source.pixel;
  return {offset, count, whole ? x.taps * steps : steps};
}

class Product {
 public:
  Product(const Kernel& kernel, bool forward, const Image& a, const Image& w, const Geometry& geometry,
          std::int64_t out_h, std::int64_t out_w, int threads, float* out)
      : kernel_(kernel),
        forward_(forward),
        a_(a),
        w_(w),
        geometry_(geometry),
        out_h_(out_h),
        out_w_(out_w),
        out_(out),
        tile_(forward ? Tile{kernel.popcount, kPopcountRows, kPopcountStep, kPopcountPanel}
                      : Tile{kernel.lookup, kLookupRows, kLookupStep, kLookupPanel}),
        columns_(forward ? w.n : w.c),
        steps_(words(a)),
        taps_(w.h * w.w),
        panels_(forward ? ceil_div(columns_, kColumns) : 2 * words(w)),
        tap_bytes_(steps_ * tile_.panel_step),
        phases_x_(forward ? 1 : geometry.stride[1]),
        phase_count_(forward ? 1 : geometry.stride[0] * phases_x_),
        zero_a_(largest_zero(a.grid, a.n)),
        zero_b_(largest_zero(w.grid, columns_)),
        slots_(slots_for(static_cast<double>(a.n * out_h * out_w) * static_cast<double>(columns_ * a.c) *
                             static_cast<double>(taps_) / static_cast<double>(phase_count_),
                         threads)),
        threads_(threads) {}

  // False, and nothing written, where a sum could overflow or there are too many taps.
  bool run(const float* bias) {
    if (w_.h > kMaxTaps || w_.w > kMaxTaps || taps_ > kMaxTaps * 4) return false;
    if (!forward_ && (geometry_.stride[0] > kMaxStride || geometry_.stride[1] > kMaxStride)) return false;
    if (!fits(a_.c * taps_, a_.bits, zero_a_, zero_b_)) return false;
    list_phases();
    if (!has_code_for_pad()) return false;
    pack();
    correct(bias);
    multiply();
    return true;
  }

 private:
  // The phases, and the pad that they need.
  void list_phases() {
    phases_ = cpu::scratch<struct PhaseTag, Phase>(phase_count_);
    for (std::int64_t p = 0; p < phase_count_; ++p) {
      Phase& phase = phases_[p];
      if (forward_) {
        phase.y = forward_axis(w_.h, out_h_, geometry_, 0);
        phase.x = forward_axis(w_.w, out_w_, geometry_, 1);
      } else {
        phase.y = gradient_axis(w_.h, out_h_, geometry_, 0, p / phases_x_);
        phase.x = gradient_axis(w_.w, out_w_, geometry_, 1, p % phases_x_);
      }
      phase.taps = phase.y.taps * phase.x.taps;
      if (phase.taps == 0) phase.y.taps = phase.x.taps = 0;
      pad_h_ = std::max(pad_h_, pad_of(phase.y, a_.h));
      pad_w_ = std::max(pad_w_, pad_of(phase.x, a_.w));
    }
  }

  bool has_code_for_pad() const {
    for (std::int64_t i = 0; a_.grid.zero && pad_h_ + pad_w_ > 0 && i < (a_.grid.groups ? a_.n : 1); ++i)
      if (a_.grid.zero[i] < 0 || a_.grid.zero[i] >> a_.bits) return false;
    return true;
  }

  void pack() {
    auto* packed = cpu::scratch<struct PanelTag, std::uint8_t>(panels_ * taps_ * tap_bytes_);
    for (std::int64_t p = 0; p < phase_count_; ++p) {
      const std::int64_t bytes = phases_[p].taps * tap_bytes_;
      std::uint8_t* to = take(packed, panels_ * bytes);
      phases_[p].panels = to;
      split_slots(forward_ ? panels_ : panels_ / 2, slots_, threads_,
                  [&](std::int64_t, std::int64_t begin, std::int64_t end) {
                    for (std::int64_t i = begin; i < end; ++i)
                      if (forward_)
                        pack_words(w_, phases_[p], i, to + i * bytes);
                      else
                        pack_blocks(kernel_, w_, phases_[p], i, to + 2 * i * bytes, to + (2 * i + 1) * bytes);
                  });
    }
  }

  // A source whose codes are all 1, in steps of the tile.
  const std::uint8_t* ones() const {
    auto* out = cpu::scratch<struct OnesTag, std::uint8_t>(steps_ * tile_.step + 16 * 64);
    if (forward_) {
      fill_bits(a_.c, 1, out);
      return out;
    }
    std::uint8_t codes[16];
    for (std::int64_t k = 0; k < 4 * steps_; ++k) {
      for (int i = 0; i < 16; ++i) codes[i] = k * 16 + i < a_.c;
      kernel_.tables(codes, 1, 64, out + 64 * k);
    }
    return out;
  }

  // What the epilogue needs of the weights.
  void correct(const float* bias) {
    const std::int64_t padded = panels_ * kColumns;
    auto* tap_sums = cpu::scratch<struct TapTag, std::int32_t>(taps_ * padded);
    auto* rest = cpu::scratch<struct RestTag, std::int32_t>(phase_count_ * columns_);
    auto* class_ids = cpu::scratch<struct ClassTag, std::int32_t>(phase_count_ * (out_h_ + out_w_));
    auto* ranges = cpu::scratch<struct RangeTag, int>(2 * phase_count_ * (out_h_ + out_w_));
    std::int64_t classes = 0;
    for (std::int64_t p = 0; p < phase_count_; ++p) {
      Phase& phase = phases_[p];
      phase.class_y = {take(class_ids, out_h_), take(ranges, out_h_), take(ranges, out_h_), 0};
      phase.class_x = {take(class_ids, out_w_), take(ranges, out_w_), take(ranges, out_w_), 0};
      classify(phase.y, a_.h, phase.class_y);
      classify(phase.x, a_.w, phase.class_x);
      classes += phase.class_y.count * phase.class_x.count;
    }
    float* v = a_.grid.offset ? cpu::scratch<struct VTag, float>(classes * columns_) : nullptr;
    const Columns columns = columns_of(w_.grid, columns_, bias);
    const std::uint8_t* source = ones();
    for (std::int64_t p = 0; p < phase_count_; ++p) {
      Phase& phase = phases_[p];
      phase.columns = columns;
      phase.v = nullptr;
      if (!a_.grid.offset && zero_a_ == 0) continue;
      sum_taps(tile_, phase, source, steps_, panels_, tap_sums);
      if (zero_a_ != 0) {
        sum_rest(phase, a_.c, columns_, padded, tap_sums, rest);
        phase.columns.rest = take(rest, columns_);
      }
      if (a_.grid.offset) {
        sum_v(phase, a_.c, columns_, padded, tap_sums, v);
        phase.v = take(v, phase.class_y.count * phase.class_x.count * columns_);
      }
    }
  }

  // Groups of images whose working memory stays in the second-level cache.
  void multiply() const {
    constexpr std::int64_t kCache = 1 << 19, kRows = 1024;
    const bool direct = forward_ && a_.pad_h >= pad_h_ && a_.pad_w >= pad_w_;
    const std::int64_t pad_h = direct ? a_.pad_h : pad_h_, pad_w = direct ? a_.pad_w : pad_w_;
    const std::int64_t height = a_.h + 2 * pad_h, width = a_.w + 2 * pad_w, per_pixel = steps_ * tile_.step;
    const std::int64_t image_bytes = height * width * per_pixel, outputs = out_h_ * out_w_;
    const std::int64_t slots = std::min(slots_, a_.n);
    const std::int64_t group =
        std::clamp<std::int64_t>(std::min(kCache / image_bytes, kRows / outputs), 1, ceil_div(a_.n, slots));
    const bool need_sums = w_.grid.offset || zero_b_ != 0;
    const std::int64_t source_bytes = direct ? 0 : group * image_bytes;
    auto* all_sources = cpu::scratch<struct SourceTag, std::uint8_t>(slots * source_bytes);
    auto* all_codes = cpu::scratch<struct CodeTag, std::uint8_t>(slots * (steps_ * 64 + per_pixel));
    auto* all_sums = cpu::scratch<struct SumTag, std::int32_t>(slots * group * height * width);
    auto* all_across = cpu::scratch<struct AcrossTag, std::int32_t>(slots * (height * out_w_ + outputs));
    auto* all_rows = cpu::scratch<struct RowTag, Row>(slots * group * outputs);
    split_slots(a_.n, slots, threads_, [&](std::int64_t slot, std::int64_t begin, std::int64_t end) {
      std::uint8_t* copied = all_sources + slot * source_bytes;
      std::uint8_t* codes = all_codes + slot * (steps_ * 64 + per_pixel);
      std::int32_t* across = need_sums ? all_across + slot * (height * out_w_ + outputs) : nullptr;
      Row* rows = all_rows + slot * group * outputs;
      Source source{copied, all_sums + slot * group * height * width, height, width, pad_h, pad_w, per_pixel};
      for (std::int64_t n0 = begin; n0 < end; n0 += group) {
        const std::int64_t n1 = std::min(end, n0 + group);
        if (direct) source.data = a_.data + n0 * image_bytes;
        if (forward_ && !direct) copy_padded(a_, n0, n1, pad_h, pad_w, false, copied);
        if (forward_ && need_sums) kernel_.count(source.data, (n1 - n0) * height * width, steps_, source.sums);
        if (!forward_) make_tables(kernel_, a_, n0, n1, source, codes, codes + steps_ * 64, copied);
        for (std::int64_t p = 0; p < phase_count_; ++p) {
          const std::int64_t count = list_rows(phases_[p], n0, n1, source, across, rows);
          multiply_rows(phases_[p], source, rows, count);
        }
      }
    });
  }

  // The rows of images n0 ... n1 - 1 in one phase; returns how many. With `across`, [source.height + y.count][x.count]
  // of working memory, they have the sums that offsets and zero points of the weights need.
  std::int64_t list_rows(const Phase& phase, std::int64_t n0, std::int64_t n1, const Source& source,
                         std::int32_t* across, Row* rows) const {
    const Axis &y = phase.y, &x = phase.x;
    const std::int64_t top = source.pad_h + (y.taps ? y.offset[0] : 0);
    const std::int64_t left = source.pad_w + (x.taps ? x.offset[0] : 0);
    const auto terms = static_cast<std::int32_t>(phase.taps * a_.c);
    Row* row = rows;
    for (std::int64_t n = n0; n < n1; ++n) {
      const std::int32_t* total = across ? across + source.height * x.count : nullptr;
      if (across) window_sums(phase, source, source.sums + (n - n0) * source.height * source.width, across);
      const std::int64_t group = a_.grid.groups ? n : 0;
      Row next{};
      next.step = a_.grid.step[group];
      next.zero = zero_of(a_.grid, n);
      if (a_.grid.offset) next.offset = a_.grid.offset[group];
      for (std::int64_t i = 0; i < y.count; ++i) {
        const std::uint8_t* from =
            source.data + (((n - n0) * source.height + i * y.stride + top) * source.width + left) * source.pixel;
        float* to = out_ + ((n * out_h_ + y.first + i * y.step) * out_w_ + x.first) * columns_;
        const float* v = phase.v ? phase.v + phase.class_y.of[i] * phase.class_x.count * columns_ : nullptr;
        for (std::int64_t j = 0; j < x.count; ++j) {
          next.source = from + j * x.stride * source.pixel;
          next.out = to + j * x.step * columns_;
          if (v) next.v = v + phase.class_x.of[j] * columns_;
          if (across) {
            next.sum = *total++;
            next.u = convolution::scaled_sum(next.step, next.sum - terms * next.zero);
          }
          *row++ = next;
        }
      }
    }
    return row - rows;
  }

  void multiply_rows(const Phase& phase, const Source& source, const Row* rows, std::int64_t count) const {
    std::int64_t offsets[kMaxTaps * kMaxTaps];
    const Runs runs = runs_of(phase, source, steps_, offsets);
    for (std::int64_t c = 0; c < columns_; c += kColumns) {
      const std::int64_t end = std::min(c + kColumns, columns_);
      const std::uint8_t* panel = phase.panels + c / kColumns * phase.taps * tap_bytes_;
      for (std::int64_t r = 0; r < count; r += tile_.rows) {
        const std::int64_t here = std::min<std::int64_t>(tile_.rows, count - r);
        const std::uint8_t* sources[kMostRows];
        for (int i = 0; i < tile_.rows; ++i) sources[i] = rows[std::min(r + i, count - 1)].source;
        // What the epilogue will write comes into the cache while the tile is computed.
        for (std::int64_t i = r; i < r + here; ++i)
          for (std::int64_t k = c; k < end; k += 16) __builtin_prefetch(rows[i].out + k, 1);
        alignas(64) std::int32_t sums[kMostRows * kColumns];
        tile_.run(sources, runs, panel, false, sums, kColumns);
        kernel_.finish(sums, kColumns, rows + r, static_cast<int>(here), phase.columns, c, end - c);
      }
    }
  }

  const Kernel& kernel_;
  const bool forward_;
  const Image &a_, &w_;
  const Geometry& geometry_;
  const std::int64_t out_h_, out_w_;
  float* const out_;
  const Tile tile_;
  const std::int64_t columns_, steps_, taps_;  // of the result; of a pixel; of the kernel
  const std::int64_t panels_, tap_bytes_;      // bytes of one tap of a panel
  const std::int64_t phases_x_, phase_count_;
  const std::int64_t zero_a_, zero_b_;  // the largest ones
  const std::int64_t slots_;
  const int threads_;
  Phase* phases_ = nullptr;
  std::int64_t pad_h_ = 0, pad_w_ = 0;  // that the phases need
};

}  // namespace

bool forward(const Kernel& kernel, const Image& x, const Image& w, const Geometry& geometry, const float* bias,
             std::int64_t out_h, std::int64_t out_w, int threads, float* y) {
  return Product(kernel, true, x, w, geometry, out_h, out_w, threads, y).run(bias);
}

bool grad_input(const Kernel& kernel, const Image& g, const Image& w, const Geometry& geometry, std::int64_t in_h,
                std::int64_t in_w, int threads, float* dx) {
  return Product(kernel, false, g, w, geometry, in_h, in_w, threads, dx).run(nullptr);
}

}  // namespace fqtstats::convolution1
