// The weight gradient: a matrix product whose rows are the channels of x at one tap, whose columns are the channels of
// g and whose contracted index runs over images, four to a word, and output pixels.
#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "kernels/convolution8/convolution8.h"
#include "kernels/convolution8/images.h"
#include "kernels/convolution8/plan.h"
#include "kernels/integers.h"

namespace fqtstats::convolution8 {

using std::int32_t, std::int64_t, std::uint8_t;

namespace {

class WeightGradient {
 public:
  WeightGradient(const Kernel& kernel, const Codes& g, const Codes& x, const Geometry& geometry, int64_t kh, int64_t kw,
                 int threads, float* out)
      : kernel_(kernel),
        g_(g),
        x_(x),
        kernel_width_(kw),
        taps_(kh * kw),
        rows_(x.channels / geometry.groups),
        pixels_(g.height * g.width),
        // Images of a block: enough for kDepth terms of small images.
        block_(std::min(round_up(g.n, 4), std::clamp<int64_t>(round_up(kDepth / pixels_, 4), 32, 256))),
        row_vectors_(ceil_div(rows_, kLanes)),
        threads_(threads),
        out_(out),
        dy_(unpacked(g, 1, threads, cpu::scratch<struct Gradients, uint8_t>)),
        image_(unpacked(x, 1, threads, cpu::scratch<struct Activations, uint8_t>)),
        columns_(scales_of(g, g.channels)) {
    plan_.set_axes(geometry, false, {g.height, g.width}, {x.height, x.width}, {kh, kw});
    list_panels(plan_.panels, geometry.groups, g.channels / geometry.groups, 0);
  }

  void run() {
    struct Panels;
    struct Rows;
    struct PixelsX;
    struct PixelsG;
    struct TapsX;
    struct TapsG;
    struct U;
    const int64_t images = round_up(g_.n, 4);
    panel_data_ = cpu::scratch<Panels, uint8_t>(pixels_ * images * kPanel);
    row_data_ = cpu::scratch<Rows, uint8_t>(x_.height * x_.width * row_vectors_ * kLanes * images);
    const int64_t stride = round_up(rows_, kPanel);
    sums_x_ = {cpu::scratch<PixelsX, int32_t>(x_.height * x_.width * stride),
               cpu::scratch<TapsX, int32_t>(taps_ * stride), stride};
    sums_g_ = {cpu::scratch<PixelsG, int32_t>(pixels_ * kPanel), cpu::scratch<TapsG, int32_t>(taps_ * kPanel), kPanel};
    if (x_.offset != nullptr) u_ = cpu::scratch<U, float>(taps_ * kPanel);
    int64_t packed = -1;
    for (const Panel& panel : plan_.panels) {
      if (panel.group != packed) {
        packed = panel.group;
        cpu::split(x_.height, ceil_div(kGrain, images * x_.width * rows_), threads_, [&](int64_t begin, int64_t end) {
          for (int64_t y = begin; y < end; ++y) pack_rows(packed, y);
        });
        sum_taps(sums_x_, false, x_.height, x_.width);
      }
      cpu::split(g_.height, ceil_div(kGrain, images * g_.width * panel.count), threads_,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t y = begin; y < end; ++y) pack_panel(panel, y);
                 });
      sum_columns(panel);
      cpu::split(ceil_div(rows_, height_of(panel)), 1, threads_,
                 [&](int64_t begin, int64_t end) { multiply(panel, begin, end); });
    }
  }

 private:
  static constexpr int64_t kGrain = 1 << 18;  // bytes, for a thread to pack
  static constexpr int64_t kDepth = 1024;     // terms that one call of the tile adds up
  static constexpr int64_t kTileRows = 768;   // rows of sums, of up to kPanel columns each, that a thread keeps

  // Most layers have a multiple of 16 channels: tiles of more than 8 rows would not divide them.
  int height_of(const Panel& panel) const { return std::min(8, kernel_.height[panel.vectors - 1]); }

  int64_t words_of(int64_t block) const { return std::min(block_, round_up(g_.n - block * block_, 4)) / 4; }

  // Bytes of a word of one pixel and block, for `lanes` channels, up to the block.
  int64_t before(int64_t block, int64_t pixels, int64_t lanes) const { return block * block_ * pixels * lanes; }

  // Sums of codes: of all images per pixel, and over the output pixels whose tap is inside the image per tap.
  struct TapSums {
    int32_t* pixels;  // [pixel][stride]
    int32_t* taps;    // [tap][stride]
    int64_t stride;
  };

  // Where the words of a line of pixels go, strides in bytes, and to what the sums of their codes are added.
  struct Line {
    uint8_t* words;
    int64_t pixel, word, vector;
    int32_t* sums;
    int64_t sums_stride;
  };

  // Packs row y of a block of images, four images to a word.
  void interleave(const Image& from, int64_t channel, int64_t channels, int64_t block, int64_t y, int64_t width,
                  uint8_t flip, const Line& to) const {
    const int64_t images = g_.n - block * block_;
    const uint8_t* in = from.data + block * block_ * from.image + y * from.row + channel;
    for (int64_t q = 0; q < words_of(block); ++q)
      for (int64_t x = 0; x < width; ++x)
        for (int64_t c = 0; c < channels; c += kPanel) {
          const uint8_t* rows[4];
          for (int64_t k = 0; k < 4; ++k)
            rows[k] = 4 * q + k < images ? in + (4 * q + k) * from.image + x * from.pixel + c : nullptr;
          kernel_.interleave(rows, static_cast<int>(std::min<int64_t>(kPanel, channels - c)), flip,
                             to.words + x * to.pixel + q * to.word + c / kLanes * to.vector, to.vector,
                             to.sums + x * to.sums_stride + c);
        }
  }

  // Row y of x, channels of a group, to [block][pixel][vector of channels][word][kLanes][4].
  void pack_rows(int64_t group, int64_t y) const {
    int32_t* sums = sums_x_.pixels + y * x_.width * sums_x_.stride;
    std::fill_n(sums, x_.width * sums_x_.stride, 0);
    for (int64_t block = 0; block < ceil_div(g_.n, block_); ++block) {
      const int64_t vector = words_of(block) * kLanes * 4, pixel = row_vectors_ * vector;
      uint8_t* words = row_data_ + before(block, x_.height * x_.width, row_vectors_ * kLanes) + y * x_.width * pixel;
      interleave(image_, group * rows_, rows_, block, y, x_.width, 0,
                 {words, pixel, kLanes * 4, vector, sums, sums_x_.stride});
    }
  }

  // Row y of the panel's channels of g to [block][pixel][word][columns][4].
  void pack_panel(const Panel& panel, int64_t y) const {
    int32_t* sums = sums_g_.pixels + y * g_.width * sums_g_.stride;
    std::fill_n(sums, g_.width * sums_g_.stride, 0);
    for (int64_t block = 0; block < ceil_div(g_.n, block_); ++block) {
      const int64_t word = panel.vectors * kLanes * 4, pixel = words_of(block) * word;
      uint8_t* words = panel_data_ + before(block, pixels_, panel.vectors * kLanes) + y * g_.width * pixel;
      interleave(dy_, panel.column, panel.count, block, y, g_.width, kFlip,
                 {words, pixel, word, kLanes * 4, sums, sums_g_.stride});
    }
  }

  // s.taps from s.pixels; `gradient`: the pixels are those of g.
  void sum_taps(const TapSums& s, bool gradient, int64_t height, int64_t width) const {
    struct Lines;
    const int64_t kernel_height = taps_ / kernel_width_;
    int32_t* lines = cpu::scratch<Lines, int32_t>(height * s.stride);
    std::fill_n(s.taps, taps_ * s.stride, 0);
    const auto add = [&](const int32_t* in, int32_t* to) {
      for (int64_t j = 0; j < s.stride; ++j) to[j] += in[j];
    };
    for (int64_t kx = 0; kx < kernel_width_; ++kx) {
      const Axis::Span& h = plan_.horizontal.spans[kx];
      std::fill_n(lines, height * s.stride, 0);
      for (int64_t y = 0; y < height; ++y)
        for (int64_t j = 0; j < h.count; ++j)
          add(s.pixels + (y * width + (gradient ? h.first + j * h.step : h.from + j * h.by)) * s.stride,
              lines + y * s.stride);
      for (int64_t ky = 0; ky < kernel_height; ++ky) {
        const Axis::Span& v = plan_.vertical.spans[ky];
        for (int64_t j = 0; j < v.count; ++j)
          add(lines + (gradient ? v.first + j * v.step : v.from + j * v.by) * s.stride,
              s.taps + (ky * kernel_width_ + kx) * s.stride);
      }
    }
  }

  // sums_g_.taps = -sum (g - 128), and u of fqtstats/ops/products.py.
  void sum_columns(const Panel& panel) const {
    sum_taps(sums_g_, true, g_.height, g_.width);
    for (int64_t tap = 0; tap < taps_; ++tap)
      for (int64_t j = 0; j < kPanel; ++j) {
        int32_t& sum = sums_g_.taps[tap * kPanel + j];
        sum = 128 * terms_of(tap) - sum;
        if (u_ == nullptr) continue;
        // shift = 128 - zero, so that sum (g - zero) = sum (g - 128) + n shift.
        const int64_t exact = int64_t{terms_of(tap)} * columns_.shift[panel.column + j] - sum;
        u_[tap * kPanel + j] = convolution::scaled_sum(columns_.step[panel.column + j], exact);
      }
  }

  int32_t terms_of(int64_t tap) const {
    return static_cast<int32_t>(g_.n * plan_.vertical.spans[tap / kernel_width_].count *
                                plan_.horizontal.spans[tap % kernel_width_].count);
  }

  // The panel's columns of the tiles begin..end of rows, for every tap.
  void multiply(const Panel& panel, int64_t begin, int64_t end) const {
    struct Sums;
    struct Totals;
    const int height = height_of(panel);
    const int64_t width = panel.vectors * kLanes;
    const int64_t chunk = std::max<int64_t>(1, kTileRows / (height * taps_)), size = chunk * height * taps_ * width;
    const bool wide = g_.n * pixels_ > kExactTerms;
    int32_t* acc = cpu::scratch<Sums, int32_t>(size);
    int64_t* total = wide ? cpu::scratch<Totals, int64_t>(size) : nullptr;
    for (int64_t first = begin; first < end; first += chunk) {
      const int64_t last = std::min(end, first + chunk), channel = first * height;
      const int64_t channels = std::min(last * height, rows_) - channel;
      if (wide) std::fill_n(total, size, int64_t{0});
      int64_t terms = 0;  // in acc
      for (int64_t block = 0; block < ceil_div(g_.n, block_); ++block) {
        const int64_t words = words_of(block), depth = std::max<int64_t>(1, kDepth / (4 * words));
        for (int64_t pixel = 0; pixel < pixels_; pixel += depth) {
          const int64_t stop = std::min(pixels_, pixel + depth), more = (stop - pixel) * words * 4;
          if (terms + more > kPartTerms && wide) {
            for (int64_t i = 0; i < size; ++i) total[i] += acc[i];
            terms = 0;
          }
          for (int64_t tap = 0; tap < taps_; ++tap)
            add(panel, block, pixel, stop, tap, first, last, terms > 0, acc + tap * width);
          terms += more;
        }
      }
      if (wide)
        for (int64_t i = 0; i < size; ++i) total[i] += acc[i];
      finish(panel, channel, channels, acc, total);
    }
  }

  // Tiles begin..end of one tap, over the output pixels first..last of a block of images.
  void add(const Panel& panel, int64_t block, int64_t first, int64_t last, int64_t tap, int64_t begin, int64_t end,
           bool add, int32_t* acc) const {
    Run runs[kDepth / 4];
    int64_t count = 0;
    const int64_t words = words_of(block), vector = words * kLanes * 4, width = panel.vectors * kLanes;
    const Axis::Span &v = plan_.vertical.spans[tap / kernel_width_], &h = plan_.horizontal.spans[tap % kernel_width_];
    for (int64_t pixel = first; pixel < last; ++pixel) {
      const int64_t y = pixel / g_.width - v.first, x = pixel % g_.width - h.first;
      if (y < 0 || y >= v.count || x < 0 || x >= h.count) continue;
      const int64_t at = (v.from + y * v.by) * x_.width + h.from + x * h.by;
      runs[count++] = {at * row_vectors_ * vector, pixel * words, words};
    }
    if (add && count == 0) return;
    const int height = height_of(panel);
    const uint8_t* data = row_data_ + before(block, x_.height * x_.width, row_vectors_ * kLanes);
    const auto* panel_data = reinterpret_cast<const std::int8_t*>(panel_data_ + before(block, pixels_, width));
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t channel = tile * height;
      const int tile_rows = static_cast<int>(std::min<int64_t>(height, rows_ - channel));
      const uint8_t* rows[kMaxHeight];
      for (int64_t i = 0; i < height; ++i) {
        const int64_t c = channel + (i < tile_rows ? i : 0);
        rows[i] = data + c / kLanes * vector + c % kLanes * 4;
      }
      kernel_.tile({rows, tile_rows, runs, count, kLanes * 4, panel_data, panel.vectors,
                    acc + (tile - begin) * height * taps_ * width, taps_ * width, add});
    }
  }

  // Sums [channel][tap][column] to the result [column][channel][tap].
  void finish(const Panel& panel, int64_t channel, int64_t channels, const int32_t* acc, const int64_t* total) const {
    struct Floats;
    constexpr int64_t kRows = 256;
    const int64_t width = panel.vectors * kLanes, stride = taps_ * width, by = x_.groups > 1 ? 1 : 0;
    const int64_t piece = std::max<int64_t>(1, kRows / taps_);
    float* y = cpu::scratch<Floats, float>(piece * stride);
    Row rows[kRows];
    for (int64_t first = 0; first < channels; first += piece) {
      const int64_t count = std::min(piece, channels - first);
      for (int64_t tap = 0; tap < taps_; ++tap) {
        const int32_t n = terms_of(tap);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t c = panel.group * rows_ + channel + first + i;
          Row& row = rows[i];
          row.out = y + (i * taps_ + tap) * width;
          row.zero = x_.zero == nullptr ? 0 : x_.zero[c * by];
          row.sum = sums_x_.taps[tap * sums_x_.stride + channel + first + i] - n * row.zero;
          row.step = x_.step[c * by];
          row.first = x_.offset == nullptr ? 0 : x_.offset[c * by];
          if (columns_.offset != nullptr)  // v of fqtstats/ops/products.py
            row.second = convolution::scaled_sum(row.step, row.sum, n, x_.offset == nullptr ? nullptr : &row.first);
        }
        const Columns columns{columns_.shift + panel.column,
                              sums_g_.taps + tap * kPanel,
                              columns_.step + panel.column,
                              u_ == nullptr ? nullptr : u_ + tap * kPanel,
                              columns_.offset == nullptr ? nullptr : columns_.offset + panel.column,
                              nullptr};
        const int64_t from = first * stride + tap * width;
        if (total != nullptr)
          finish_wide(total + from, stride, rows, static_cast<int>(count), columns, panel.count);
        else
          kernel_.finish({acc + from, stride, rows, static_cast<int>(count), columns, panel.count});
      }
      kernel_.transpose(y, width * 4, count * taps_, panel.count, 0,
                        out_ + (panel.column * rows_ + channel + first) * taps_, rows_ * taps_ * 4);
    }
  }

  const Kernel& kernel_;
  const Codes &g_, &x_;
  const int64_t kernel_width_, taps_;
  const int64_t rows_, pixels_, block_;  // channels of x in a group; output pixels; images of a block
  const int64_t row_vectors_;
  const int threads_;
  float* const out_;
  const Image dy_, image_;
  const Scales columns_;
  TapSums sums_x_{}, sums_g_{};
  float* u_ = nullptr;
  uint8_t *row_data_ = nullptr, *panel_data_ = nullptr;
  Plan& plan_ = Plan::of_thread();  // of the calling thread
};

}  // namespace

void grad_weight(const Kernel& kernel, const Codes& g, const Codes& x, const Geometry& geometry, int64_t kh, int64_t kw,
                 int threads, float* out) {
  if (g.n == 0)
    std::fill_n(out, g.channels * (x.channels / geometry.groups) * kh * kw, 0.0F);
  else
    WeightGradient(kernel, g, x, geometry, kh, kw, threads, out).run();
}

}  // namespace fqtstats::convolution8
