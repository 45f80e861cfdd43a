// The weight gradient: a matrix product contracted over the output pixels. Its 1-bit operand has a row for each (tap,
// input channel), and one for each tap that says which pixels have it inside the image: that row's products are the
// sums of g that the corrections need. Its other operand has a column for each output channel, and one of ones: the
// sums of x.
#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "kernels/convolution1/convolution1.h"
#include "kernels/convolution1/images.h"

namespace fqtstats::convolution1 {
namespace {

class WeightGradient {
 public:
  WeightGradient(const Kernel& kernel, const Image& g, const Image& x, const Geometry& geometry, std::int64_t kh,
                 std::int64_t kw, int threads, float* dw)
      : kernel_(kernel),
        g_(g),
        x_(x),
        geometry_(geometry),
        kh_(kh),
        kw_(kw),
        taps_(kh * kw),
        pixels_(g.n * g.h * g.w),
        bytes_(pixel_bytes(x)),
        padded_(round_up(g.c, 64)),
        slots_(slots_for(static_cast<double>(pixels_) * static_cast<double>(taps_ * g.c * x.c), threads)),
        threads_(threads),
        dw_(dw) {}

  // False, and nothing written, where a sum could overflow or there are too many taps.
  bool run() {
    if (taps_ > 64) return false;
    if (!fits(pixels_, g_.bits, largest_zero(g_.grid, g_.c), largest_zero(x_.grid, x_.c))) return false;
    pad_source();
    list_inside();
    lay_out();
    auto* results = cpu::scratch<struct ResultTag, float>(slots_ * taps_ * x_.c);
    const std::int64_t part = steps_ * 64;
    for (std::int64_t first = 0; first < pixels_; first += part) {
      const bool last = first + part >= pixels_;
      split_slots(4 * steps_, slots_, threads_, [&](std::int64_t slot, std::int64_t begin, std::int64_t end) {
        for (std::int64_t block = begin; block < end; ++block) pack(first, block, codes_ + slot * kBlock * 2 * padded_);
      });
      // The column of ones first, which the corrections of all others need.
      multiply(g_.c, 1, first > 0);
      if (last) correct();
      split_slots(
          ceil_div(g_.c, kLookupRows), slots_, threads_, [&](std::int64_t slot, std::int64_t begin, std::int64_t end) {
            for (std::int64_t c = begin * kLookupRows; c < std::min(g_.c, end * kLookupRows); c += kLookupRows) {
              const int count = static_cast<int>(std::min<std::int64_t>(kLookupRows, g_.c - c));
              multiply(c, count, first > 0);
              for (int i = 0; last && i < count; ++i) finish(c + i, results + slot * taps_ * x_.c);
            }
          });
    }
    return true;
  }

 private:
  static constexpr std::int64_t kRowBytes = 1 << 19;  // of a part, which stay in the second-level cache
  static constexpr std::int64_t kSteps = 8;   // of 64 pixels: 8 columns of tables are 16 KB, and stay in the first one
  static constexpr std::int64_t kBlock = 16;  // pixels that are packed at a time

  // x with all the pixels that the taps read, and zeros outside the image: as it is if it has them, else a copy.
  void pad_source() {
    std::int64_t pad[2];
    const std::int64_t size[2] = {x_.h, x_.w}, outputs[2] = {g_.h, g_.w}, taps[2] = {kh_, kw_};
    for (int axis = 0; axis < 2; ++axis) {
      const std::int64_t last = geometry_.pixel(axis, outputs[axis] - 1, taps[axis] - 1);
      pad[axis] = std::max(geometry_.padding[axis], last - (size[axis] - 1));
    }
    source_ = x_.data;
    if (x_.pad_h >= pad[0] && x_.pad_w >= pad[1] && (pad[0] + pad[1] == 0 || largest_zero(x_.grid, x_.c) == 0)) {
      pad[0] = x_.pad_h;
      pad[1] = x_.pad_w;
    } else {
      const std::int64_t image = (x_.h + 2 * pad[0]) * (x_.w + 2 * pad[1]) * bytes_;
      auto* copied = cpu::scratch<struct CopyTag, std::uint8_t>(x_.n * image);
      split_slots(x_.n, slots_, threads_, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
        copy_padded(x_, begin, end, pad[0], pad[1], true, copied + begin * image);
      });
      source_ = copied;
    }
    height_ = x_.h + 2 * pad[0];
    width_ = x_.w + 2 * pad[1];
    top_ = pad[0] - geometry_.padding[0];
    left_ = pad[1] - geometry_.padding[1];
  }

  // Bit t = ky kw + kx of inside_y_[i] * inside_x_[j] says whether tap t of output pixel (i, j) lies inside the image.
  void list_inside() {
    inside_y_ = cpu::scratch<struct InsideYTag, std::uint64_t>(g_.h);
    inside_x_ = cpu::scratch<struct InsideXTag, std::uint64_t>(g_.w);
    const auto list = [&](int axis, std::int64_t outputs, std::int64_t size, std::int64_t taps, std::int64_t step,
                          std::uint64_t* inside) {
      for (std::int64_t i = 0; i < outputs; ++i) {
        inside[i] = 0;
        for (std::int64_t k = 0; k < taps; ++k) {
          const std::int64_t at = geometry_.pixel(axis, i, k);
          inside[i] |= std::uint64_t{at >= 0 && at < size} << (k * step);
        }
      }
    };
    list(0, g_.h, x_.h, kh_, kw_, inside_y_);
    list(1, g_.w, x_.w, kw_, 1, inside_x_);
  }

  // Sizes and working memory of the matrix product, in parts of equal numbers of pixels. Rows come in words of 64: the
  // input channels of each tap, then the taps.
  void lay_out() {
    const std::int64_t row_words = words(x_) * taps_ + 1;
    const std::int64_t most = std::clamp<std::int64_t>(kRowBytes / ((row_words - 1) * 1024), 4, 64) * 64;
    steps_ = ceil_div(ceil_div(pixels_, ceil_div(pixels_, most)), 64);
    row_words_ = row_words;
    ld_ = row_words * 64;
    panels_ = cpu::scratch<struct PanelTag, std::uint8_t>(2 * row_words * panel_bytes());
    tables_ = cpu::scratch<struct TableTag, std::uint8_t>((padded_ + 1) * table_bytes());
    sums_ = cpu::scratch<struct ProductTag, std::int32_t>((g_.c + 1) * ld_);
    codes_ = cpu::scratch<struct CodeTag, std::uint8_t>(slots_ * kBlock * 2 * padded_);
    const std::int64_t reach =
        ((kh_ - 1) * geometry_.dilation[0] * width_ + (kw_ - 1) * geometry_.dilation[1] + 1) * bytes_;
    nothing_ = cpu::scratch<struct NothingTag, std::uint8_t>(reach);
    std::memset(nothing_, 0, static_cast<std::size_t>(reach));
    std::uint8_t ones[kBlock];
    std::fill_n(ones, kBlock, std::uint8_t{1});
    for (std::int64_t k = 0; k < 4 * steps_; ++k)
      kernel_.tables(ones, 1, 64, tables_ + padded_ * table_bytes() + 64 * k);
    columns_ = columns_of(x_.grid, x_.c, nullptr);
    rest_ = cpu::scratch<struct RestTag, std::int32_t>(taps_ * x_.c);
    v_ = cpu::scratch<struct VTag, float>(taps_ * x_.c);
  }

  std::int64_t panel_bytes() const { return steps_ * kLookupPanel; }
  std::int64_t table_bytes() const { return steps_ * kLookupStep; }
  const std::int32_t* sums_of_x() const { return sums_ + g_.c * ld_; }  // the products of the column of ones
  std::int64_t mask_row() const { return ld_ - 64; }

  // A block of 16 pixels of the part from `first` on. Working memory: `codes` of twice that many pixels of g.
  void pack(std::int64_t first, std::int64_t block, std::uint8_t* codes) const {
    const std::uint8_t* row[kBlock];
    const std::uint8_t* mask[kBlock];
    std::uint64_t mask_word[kBlock];
    std::int64_t at = first + kBlock * block, n = at / (g_.h * g_.w), i = at / g_.w % g_.h, j = at % g_.w;
    for (int l = 0; l < kBlock; ++l, ++at) {
      mask[l] = reinterpret_cast<const std::uint8_t*>(mask_word + l);
      if (at < pixels_) {
        kernel_.unpack(pixel(g_, n, i, j), g_.bits, g_.c, codes + l * padded_);
        row[l] = source_ +
                 ((n * height_ + top_ + i * geometry_.stride[0]) * width_ + left_ + j * geometry_.stride[1]) * bytes_;
        mask_word[l] = inside_y_[i] * inside_x_[j];
      } else {
        std::memset(codes + l * padded_, 0, static_cast<std::size_t>(padded_));
        row[l] = nothing_;
        mask_word[l] = 0;
      }
      if (++j == g_.w) {
        j = 0;
        if (++i == g_.h) {
          i = 0;
          ++n;
        }
      }
    }
    std::uint8_t* turned = codes + kBlock * padded_;
    kernel_.transpose(codes, padded_, padded_, turned);
    kernel_.tables(turned, g_.c, table_bytes(), tables_ + block * 64);
    std::uint8_t* to = panels_ + block / 4 * kLookupPanel + block % 4 * 64;
    for (std::int64_t t = 0; t < taps_; ++t)
      for (std::int64_t k = 0; k < words(x_); ++k, to += 2 * panel_bytes())
        kernel_.blocks(row,
                       (t / kw_ * geometry_.dilation[0] * width_ + t % kw_ * geometry_.dilation[1]) * bytes_ + 8 * k,
                       to, to + panel_bytes());
    kernel_.blocks(mask, 0, to, to + panel_bytes());
  }

  // The products of `count` output channels from c on, or of the column of ones (c = g_.c), in one part.
  void multiply(std::int64_t c, int count, bool add) const {
    const std::int64_t first = c < g_.c ? c : padded_;  // of the tables
    const std::uint8_t* table[kLookupRows];
    for (std::int64_t k = 0; k < steps_; k += kSteps) {
      const std::int64_t offset = 0;
      const Runs run{&offset, 1, std::min(kSteps, steps_ - k)};
      for (int i = 0; i < count; ++i) table[i] = tables_ + (first + i) * table_bytes() + k * kLookupStep;
      for (std::int64_t w = 0; w < row_words_; ++w) {
        const std::int64_t used = w < row_words_ - 1 ? x_.c - w % words(x_) * 64 : taps_;
        for (int half = 0; half < (used > kColumns ? 2 : 1); ++half) {
          const std::uint8_t* panel = panels_ + (2 * w + half) * panel_bytes() + k * kLookupPanel;
          std::int32_t* to = sums_ + c * ld_ + w * 64 + half * kColumns;
          if (count == kLookupRows)
            kernel_.lookup(table, run, panel, add || k > 0, to, ld_);
          else
            for (int i = 0; i < count; ++i) kernel_.lookup1(table + i, run, panel, add || k > 0, to + i * ld_, ld_);
        }
      }
    }
  }

  // What the epilogue needs of x.
  void correct() const {
    for (std::int64_t t = 0; t < taps_; ++t)
      for (std::int64_t c = 0; c < x_.c; ++c) {
        const std::int64_t terms = sums_of_x()[mask_row() + t];
        const std::int64_t sum = sums_of_x()[t * words(x_) * 64 + c];
        const std::int64_t centered = sum - (columns_.zero ? terms * columns_.zero[c] : 0);
        rest_[t * x_.c + c] = static_cast<std::int32_t>(-centered);
        v_[t * x_.c + c] =
            convolution::scaled_sum(columns_.step[c], centered, terms, columns_.offset ? columns_.offset + c : nullptr);
      }
  }

  // The results of output channel o: first [tap][input channel] in `results`, then turned.
  void finish(std::int64_t o, float* results) const {
    const std::int64_t group = g_.grid.groups ? o : 0;
    const std::int32_t zero = zero_of(g_.grid, o);
    for (std::int64_t t = 0; t < taps_; ++t) {
      const std::int32_t sum = sums_[o * ld_ + mask_row() + t];
      const std::int64_t centered = sum - std::int64_t{sums_of_x()[mask_row() + t]} * zero;
      const Row row{nullptr,
                    results + t * x_.c,
                    g_.grid.offset ? v_ + t * x_.c : nullptr,
                    g_.grid.step[group],
                    g_.grid.offset ? g_.grid.offset[group] : 0.0F,
                    convolution::scaled_sum(g_.grid.step[group], centered),
                    zero,
                    sum};
      Columns columns = columns_;
      columns.rest = g_.grid.zero ? rest_ + t * x_.c : nullptr;
      kernel_.finish(sums_ + o * ld_ + t * words(x_) * 64, ld_, &row, 1, columns, 0, x_.c);
    }
    float* to = dw_ + o * x_.c * taps_;
    for (std::int64_t c0 = 0; c0 < x_.c; c0 += 64)
      for (std::int64_t t = 0; t < taps_; ++t)
        for (std::int64_t c = c0; c < std::min(c0 + 64, x_.c); ++c) to[c * taps_ + t] = results[t * x_.c + c];
  }

  const Kernel& kernel_;
  const Image &g_, &x_;
  const Geometry& geometry_;
  const std::int64_t kh_, kw_, taps_, pixels_;  // of the kernel; of the output, of all images
  const std::int64_t bytes_;                    // of a pixel of x
  const std::int64_t padded_;                   // output channels, in whole words
  const std::int64_t slots_;
  const int threads_;
  float* const dw_;
  const std::uint8_t* source_ = nullptr;  // x, padded
  std::int64_t height_ = 0, width_ = 0;   // of it
  std::int64_t top_ = 0, left_ = 0;       // its pixel under the first tap of the first output
  std::uint64_t *inside_y_ = nullptr, *inside_x_ = nullptr;
  std::int64_t steps_ = 0;               // of 64 pixels, in a part
  std::int64_t row_words_ = 0, ld_ = 0;  // of the 1-bit operand; sums per output channel
  std::uint8_t* panels_ = nullptr;       // [row word][2][step]: the 1-bit operand
  std::uint8_t* tables_ = nullptr;       // [padded_ + 1][step]: the other one, last the column of ones
  std::int32_t* sums_ = nullptr;         // [g_.c + 1][ld_], last the column of ones
  std::uint8_t* codes_ = nullptr;        // working memory of the threads
  std::uint8_t* nothing_ = nullptr;      // what pixels beyond the last one read
  Columns columns_{};
  std::int32_t* rest_ = nullptr;  // [tap][input channel]
  float* v_ = nullptr;            // [tap][input channel]
};

}  // namespace

bool grad_weight(const Kernel& kernel, const Image& g, const Image& x, const Geometry& geometry, std::int64_t kh,
                 std::int64_t kw, int threads, float* dw) {
  return WeightGradient(kernel, g, x, geometry, kh, kw, threads, dw).run();
}

}  // namespace fqtstats::convolution1
