// The forward product and the input gradient: tiles of positions of the result that read the same taps.
#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "kernels/convolution8/convolution8.h"
#include "kernels/convolution8/images.h"
#include "kernels/convolution8/plan.h"
#include "kernels/convolution8/weights.h"
#include "kernels/integers.h"

namespace fqtstats::convolution8 {

using std::int32_t, std::int64_t, std::uint8_t;

namespace {

constexpr int64_t kCacheBytes = 256 << 10;  // of images, in the second-level cache beside the panels

class Product {
 public:
  // The plan has its classes.
  Product(const Kernel& kernel, const Codes& a, const Image& image, const Weights& weights, const Shape& shape,
          const Plan& plan, const float* bias, int threads, float* out)
      : kernel_(kernel),
        a_(a),
        image_(image),
        weights_(weights),
        shape_(shape),
        plan_(plan),
        bias_(bias),
        threads_(threads),
        out_(out) {
    struct Sums;
    struct Pixels;
    struct Rows;
    if (!weights.need_sums()) return;
    sums_ = cpu::scratch<Sums, int32_t>(a.n * shape.groups * shape.positions);
    pixel_sums_ = cpu::scratch<Pixels, int32_t>(a.n * a.height * a.width);
    row_sums_ = cpu::scratch<Rows, int32_t>(a.n * a.width);
  }

  void run() {
    const auto panels = static_cast<int64_t>(plan_.panels.size());
    if (a_.n >= threads_ || panels == 1) {
      const int64_t block = std::max<int64_t>(1, kCacheBytes / (a_.height * image_.row));
      const int64_t grain = ceil_div(1 << 20, shape_.positions * shape_.columns * shape_.terms * shape_.taps);
      cpu::split(a_.n, grain, threads_, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; n += block) {
          const int64_t stop = std::min(end, n + block);
          sum_windows(n, stop);
          for (int64_t j = 0; j < panels; ++j) multiply(plan_.panels[j], n, stop);
        }
      });
    } else {
      cpu::split(a_.n, 1, threads_, [&](int64_t begin, int64_t end) { sum_windows(begin, end); });
      cpu::split(panels, 1, threads_, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) multiply(plan_.panels[j], 0, a_.n);
      });
    }
  }

 private:
  // Sums of the activations' codes over the taps of every position, for images begin..end.
  void sum_windows(int64_t begin, int64_t end) {
    if (sums_ == nullptr) return;
    const auto height = static_cast<int64_t>(plan_.vertical.base.size());
    const auto width = static_cast<int64_t>(plan_.horizontal.base.size());
    for (int64_t n = begin; n < end; ++n) {
      int32_t* pixels = pixel_sums_ + n * a_.height * a_.width;
      int32_t* row = row_sums_ + n * a_.width;
      for (int64_t g = 0; g < shape_.groups; ++g) {
        for (int64_t y = 0; y < a_.height; ++y)
          kernel_.row_sums(image_.data + n * image_.image + y * image_.row + g * image_.group, image_.pixel, a_.width,
                           shape_.terms, pixels + y * a_.width);
        int32_t* out = sums_ + (n * shape_.groups + g) * shape_.positions;
        for (int64_t t = 0; t < height; ++t, out += width) {
          std::fill_n(row, a_.width, 0);
          for (const Axis::Tap& tap : plan_.vertical.classes[plan_.vertical.class_of[t]]) {
            const int32_t* in = pixels + (plan_.vertical.base[t] + tap.coordinate) * a_.width;
            for (int64_t x = 0; x < a_.width; ++x) row[x] += in[x];
          }
          std::fill_n(out, width, 0);
          for (const Axis::Span& s : plan_.horizontal.spans) {
            if (s.step == 1 && s.by == 1)
              for (int64_t j = 0; j < s.count; ++j) out[s.first + j] += row[s.from + j];
            else
              for (int64_t j = 0; j < s.count; ++j) out[s.first + j * s.step] += row[s.from + j * s.by];
          }
        }
      }
    }
  }

  // The panel's columns of images begin..end.
  void multiply(const Panel& panel, int64_t begin, int64_t end) const {
    alignas(64) int32_t acc[kMaxHeight * kPanel];
    const uint8_t* rows[kMaxHeight];
    Row scales[kMaxHeight];
    const int height = kernel_.height[panel.vectors - 1];
    const int width = panel.vectors * kLanes;
    const int64_t by = a_.groups > 1 ? 1 : 0;
    const uint8_t* data = image_.data + panel.group * image_.group;
    for (std::size_t k = 0; k < plan_.classes.size(); ++k) {
      const Plan::Class& c = plan_.classes[k];
      Columns columns = weights_.columns(panel, static_cast<int64_t>(k));
      if (bias_ != nullptr) columns.bias = bias_ + panel.column;
      const auto terms = static_cast<int32_t>(c.taps * shape_.terms);
      const bool wide = c.taps * shape_.words * 4 > kExactTerms;
      const int64_t per_image = c.pixel_end - c.pixel_begin, total = per_image * (end - begin);
      int64_t n = begin, pixel = c.pixel_begin;
      const uint8_t* image = nullptr;  // of image n
      const int32_t* sums = nullptr;
      float* out = nullptr;
      Row of_image{};
      for (int64_t q = 0; q < total; q += height) {
        const int count = static_cast<int>(std::min<int64_t>(height, total - q));
        for (int i = 0; i < count; ++i) {
          if (pixel == c.pixel_begin) {
            image = data + n * image_.image;
            sums = sums_ == nullptr ? nullptr : sums_ + (n * shape_.groups + panel.group) * shape_.positions;
            out = out_ + n * shape_.positions * shape_.columns + panel.column;
            of_image.zero = a_.zero == nullptr ? 0 : a_.zero[n * by];
            of_image.step = a_.step[n * by];
            of_image.second = a_.offset == nullptr ? 0 : a_.offset[n * by];
          }
          const Plan::Pixel at = plan_.pixels[pixel];
          rows[i] = image + at.in;
          Row& row = scales[i] = of_image;
          row.out = out + at.out * shape_.columns;
          for (int j = 0; j < panel.count; j += kLanes) __builtin_prefetch(row.out + j, 1);
          if (sums != nullptr) row.sum = sums[at.out] - terms * row.zero;
          if (columns.first != nullptr) row.first = convolution::scaled_sum(row.step, row.sum);
          if (++pixel == c.pixel_end) {
            pixel = c.pixel_begin;
            ++n;
          }
        }
        for (int i = count; i < height; ++i) rows[i] = rows[0];
        const Tile tile{rows,
                        count,
                        plan_.runs.data() + c.run_begin,
                        c.run_end - c.run_begin,
                        4,
                        weights_.data(panel),
                        panel.vectors,
                        acc,
                        width,
                        false};
        if (wide) {
          multiply_wide(tile, scales, columns, panel.count);
        } else {
          kernel_.tile(tile);
          kernel_.finish({acc, width, scales, count, columns, panel.count});
        }
      }
    }
  }

  // In parts, each of which int32 holds.
  void multiply_wide(Tile tile, const Row* scales, const Columns& columns, int column_count) const {
    int64_t total[kMaxHeight * kPanel] = {};
    const Run *begin = tile.runs, *end = begin + tile.run_count;
    for (const Run* run = begin; run != end; ++run)
      for (int64_t first = 0; first < run->words; first += kPartTerms / 4) {
        const Run part{run->row + 4 * first, run->panel + first, std::min(run->words - first, kPartTerms / 4)};
        tile.runs = &part;
        tile.run_count = 1;
        kernel_.tile(tile);
        for (int64_t i = 0; i < tile.count * tile.stride; ++i) total[i] += tile.out[i];
      }
    finish_wide(total, tile.stride, scales, tile.count, columns, column_count);
  }

  const Kernel& kernel_;
  const Codes& a_;
  const Image image_;
  const Weights& weights_;
  const Shape shape_;
  const Plan& plan_;
  const float* const bias_;  // readable as the columns are, or nullptr
  const int threads_;
  float* const out_;
  int32_t *sums_ = nullptr, *pixel_sums_ = nullptr, *row_sums_ = nullptr;
};

// The bias, readable for kPanel more.
const float* padded(const float* bias, int64_t columns) {
  struct Bias;
  if (bias == nullptr) return nullptr;
  float* out = cpu::scratch<Bias, float>(columns + kPanel);
  std::fill_n(std::copy_n(bias, columns, out), kPanel, 0.0F);
  return out;
}

void product(const Kernel& kernel, const Codes& a, const Codes& w, const Geometry& geometry, bool gradient,
             const float* bias, int64_t height, int64_t width, int threads, float* out) {
  struct Activations;
  const int64_t terms = gradient ? w.n / geometry.groups : w.channels;
  const Shape shape{gradient,
                    geometry.groups,
                    w.height * w.width,
                    w.width,
                    terms,
                    ceil_div(terms, 4),
                    gradient ? w.channels * geometry.groups : w.n,
                    height * width};
  if (a.n * shape.positions * shape.columns == 0) return;
  Plan& plan = Plan::of_thread();
  const Image image = unpacked(a, shape.groups, threads, cpu::scratch<Activations, uint8_t>);
  plan.set_axes(geometry, gradient, {height, width}, {a.height, a.width}, {w.height, w.width});
  plan.list_classes(image, shape.words);
  const Weights weights(kernel, w, shape, a.offset != nullptr, threads, plan);
  Product(kernel, a, image, weights, shape, plan, padded(bias, shape.columns), threads, out).run();
}

}  // namespace

void forward(const Kernel& kernel, const Codes& x, const Codes& w, const Geometry& geometry, const float* bias,
             int64_t out_height, int64_t out_width, int threads, float* out) {
  product(kernel, x, w, geometry, false, bias, out_height, out_width, threads, out);
}

void grad_input(const Kernel& kernel, const Codes& g, const Codes& w, const Geometry& geometry, int64_t height,
                int64_t width, int threads, float* out) {
  product(kernel, g, w, geometry, true, nullptr, height, width, threads, out);
}

}  // namespace fqtstats::convolution8
