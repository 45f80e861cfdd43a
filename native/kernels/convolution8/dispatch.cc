#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "kernels/codes.h"
#include "kernels/convolution8/convolution8.h"

namespace fqtstats::convolution8 {

#define FQTSTATS_KERNEL(variant) extern const Kernel variant;
#include "kernels/convolution8/kernels.inc"
#undef FQTSTATS_KERNEL

std::span<const Kernel> kernels() {
  static const Kernel rows[] = {
#define FQTSTATS_KERNEL(variant) variant,
#include "kernels/convolution8/kernels.inc"
#undef FQTSTATS_KERNEL
  };
  return rows;
}

namespace {

using std::int32_t, std::int64_t, std::uint8_t;

constexpr int64_t kCacheBytes = 256 << 10;  // what is kept in the second-level cache, beside the panels
constexpr uint8_t kFlip = 0x80;             // u8 - 128 as s8

// 8-bit codes of images, without their padding; strides in bytes. The channels of a group start `group` bytes after
// those of the one before, and whole words of them may be read.
struct Image {
  const uint8_t* data;
  int64_t image, row, pixel, group;
};

template <int bits>
void unpack_row(const uint8_t* in, int64_t bytes, uint8_t* out) {
  constexpr int kPerByte = 8 / bits;
  for (int64_t i = 0; i < bytes; ++i)
    for (int k = 0; k < kPerByte; ++k) out[i * kPerByte + k] = (in[i] >> (k * bits)) & ((1 << bits) - 1);
}

// The codes as they are where a product can read them; otherwise a copy, one byte per code, each of `groups` groups of
// channels from a multiple of 4 bytes on.
template <typename Tag>
Image unpacked(const Codes& c, int64_t groups, int threads) {
  struct Rows;
  const int64_t from = row_bytes(c.channels, c.bits), per_group = c.channels / groups;
  const int64_t in_row = (c.width + 2 * c.pad_width) * from, in_image = (c.height + 2 * c.pad_height) * in_row;
  const uint8_t* data = c.data + c.pad_height * in_row + c.pad_width * from;
  if (c.bits == 8 && (groups == 1 || per_group % 4 == 0)) return {data, in_image, in_row, from, per_group};
  const int64_t group = round_up(per_group, 4), pixel = groups * group, row = c.width * pixel, image = c.height * row;
  const int64_t codes = from * 8 / c.bits;
  uint8_t* out = cpu::scratch<Tag, uint8_t>(c.n * image);
  uint8_t* wide = cpu::scratch<Rows, uint8_t>(c.n * codes);
  cpu::split(c.n, std::max<int64_t>(1, (64 << 10) / image), threads, [&](int64_t begin, int64_t end) {
    uint8_t* codes_of_pixel = wide + begin * codes;
    for (int64_t i = begin * c.height * c.width; i < end * c.height * c.width; ++i) {
      const int64_t n = i / (c.height * c.width), h = i / c.width % c.height, w = i % c.width;
      const uint8_t* in = data + n * in_image + h * in_row + w * from;
      switch (c.bits) {
        case 1:
          unpack_row<1>(in, from, codes_of_pixel);
          break;
        case 2:
          unpack_row<2>(in, from, codes_of_pixel);
          break;
        case 4:
          unpack_row<4>(in, from, codes_of_pixel);
          break;
        default:
          std::copy_n(in, from, codes_of_pixel);
      }
      for (int64_t g = 0; g < groups; ++g) {
        uint8_t* to = out + i * pixel + g * group;
        std::copy_n(codes_of_pixel + g * per_group, per_group, to);
        std::fill_n(to + per_group, group - per_group, uint8_t{0});
      }
    }
  });
  return {out, image, row, pixel, group};
}

// One spatial axis: which taps of the kernel a position of the result has inside the image that it reads.
struct Axis {
  struct Tap {
    int64_t coordinate;  // relative to the position's first tap
    int64_t index;       // in the kernel
  };
  // The positions first + j * step, j < count, read the coordinates from + j * by with one tap.
  struct Span {
    int64_t first, step, from, by, count;
  };
  std::vector<int64_t> base;              // [position] coordinate of the first tap
  std::vector<int64_t> class_of;          // [position]
  std::vector<std::vector<Tap>> classes;  // the first class_count; the others keep their memory
  std::size_t class_count;
  std::vector<int64_t> place;  // [tap] in the panel: taps that read neighbours, in the order of their coordinates
  std::vector<Span> spans;     // [tap]
};

struct Slide {
  int64_t positions, extent, taps, stride, padding, dilation;
  bool gradient;  // positions are those of the input, coordinates those of the output
};

void fill(Axis& axis, const Slide& s) {
  axis.base.assign(s.positions, 0);
  axis.class_of.assign(s.positions, 0);
  axis.place.assign(s.taps, 0);
  axis.spans.assign(s.taps, {0, 1, 0, 1, 0});
  axis.class_count = 0;
  thread_local std::vector<Axis::Tap> taps;
  for (int64_t t = 0; t < s.positions; ++t) {
    taps.clear();
    for (int64_t j = 0; j < s.taps; ++j) {
      const int64_t k = s.gradient ? s.taps - 1 - j : j;  // coordinates ascend
      int64_t coordinate = s.gradient ? t + s.padding - k * s.dilation : t * s.stride - s.padding + k * s.dilation;
      if (s.gradient) {
        if (coordinate < 0 || coordinate % s.stride != 0) continue;
        coordinate /= s.stride;
      }
      if (coordinate < 0 || coordinate >= s.extent) continue;
      if (taps.empty()) axis.base[t] = coordinate;
      taps.push_back({coordinate - axis.base[t], k});
      Axis::Span& span = axis.spans[k];
      if (span.count == 0) {
        span.first = t;
        span.from = coordinate;
      } else if (span.count == 1) {
        span.step = t - span.first;
        span.by = coordinate - span.from;
      }
      ++span.count;
    }
    const auto same = [&](const std::vector<Axis::Tap>& other) {
      return std::equal(other.begin(), other.end(), taps.begin(), taps.end(),
                        [](const Axis::Tap& a, const Axis::Tap& b) { return a.index == b.index; });
    };
    const auto begin = axis.classes.begin(), end = begin + static_cast<std::ptrdiff_t>(axis.class_count);
    const auto found = std::find_if(begin, end, same);
    axis.class_of[t] = found - begin;
    if (found != end) continue;
    if (axis.class_count == axis.classes.size()) axis.classes.emplace_back();
    axis.classes[axis.class_count++].assign(taps.begin(), taps.end());
  }
  int64_t place = 0;
  // Of the input gradient, the taps of one phase of the stride read neighbours.
  const int64_t phases = s.gradient ? s.stride / std::gcd(s.stride, s.dilation) : 1;
  for (int64_t phase = 0; phase < phases; ++phase)
    for (int64_t j = 0; j < s.taps; ++j) {
      const int64_t k = s.gradient ? s.taps - 1 - j : j;
      if (k % phases == phase) axis.place[k] = place++;
    }
}

struct Panel {
  int64_t group, column;  // of channels; first column of the result
  int count, vectors;
  int64_t offset;  // bytes
};

// Panels of up to kPanel columns that cover `groups` times `columns`; returns their bytes.
int64_t fill(std::vector<Panel>& panels, int64_t groups, int64_t columns, int64_t words) {
  panels.clear();
  int64_t offset = 0;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t j = 0; j < columns; j += kPanel) {
      const int count = static_cast<int>(std::min<int64_t>(kPanel, columns - j));
      const int vectors = (count + kLanes - 1) / kLanes;
      panels.push_back({g, g * columns + j, count, vectors, offset});
      offset += words * vectors * kLanes * 4;
    }
  return offset;
}

// Per column, readable up to a multiple of kLanes.
struct Weights {
  const int32_t* shift;  // 128 - zero
  const float* step;
  const float* offset;  // or nullptr
};

template <typename Tag>
Weights columns_of(const Codes& c, int64_t count) {
  struct Shift;
  struct Step;
  struct Offset;
  const int64_t padded = count + kPanel, by = c.groups > 1 ? 1 : 0;
  int32_t* shift = cpu::scratch<Shift, int32_t>(padded);
  float* step = cpu::scratch<Step, float>(padded);
  float* offset = c.offset == nullptr ? nullptr : cpu::scratch<Offset, float>(padded);
  for (int64_t j = 0; j < padded; ++j) {
    const bool real = j < count;
    shift[j] = !real ? 0 : 128 - (c.zero == nullptr ? 0 : c.zero[j * by]);
    step[j] = real ? c.step[j * by] : 0;
    if (offset != nullptr) offset[j] = real ? c.offset[j * by] : 0;
  }
  return {shift, step, offset};
}

// finish() for sums that int32 may not hold.
void finish_wide(const int64_t* acc, int64_t stride, const Row* rows, int row_count, const Columns& c,
                 int column_count) {
  for (int i = 0; i < row_count; ++i) {
    const Row& row = rows[i];
    for (int j = 0; j < column_count; ++j) {
      const int64_t total = acc[i * stride + j] + int64_t{row.sum} * c.shift[j] + int64_t{row.zero} * c.sum[j];
      float y = static_cast<float>(total) * (row.step * c.step[j]);
      if (c.first != nullptr) y += row.first * c.first[j];
      if (c.second != nullptr) y += row.second * c.second[j];
      if (c.bias != nullptr) y += c.bias[j];
      row.out[j] = y;
    }
  }
}

// What a product derives from the geometry; kept between calls, as scratch is.
struct Plan {
  // Positions of the result with the same taps inside the image.
  struct Class {
    int64_t vertical, horizontal;
    int64_t taps;
    int64_t run_begin, run_end;      // in runs
    int64_t pixel_begin, pixel_end;  // in pixels
  };
  struct Pixel {
    int64_t in, out;  // bytes from the start of an image; position in the result
  };

  Axis vertical, horizontal;
  std::vector<Class> classes;
  std::vector<Run> runs;
  std::vector<Pixel> pixels;
  std::vector<Panel> panels;

  static Plan& of_thread() {
    thread_local Plan plan;
    return plan;
  }
};

// The forward product and the input gradient.
class Product {
 public:
  Product(const Kernel& kernel, const Codes& a, const Codes& w, const Geometry& g, bool gradient, const float* bias,
          int64_t out_height, int64_t out_width, int threads, float* out)
      : kernel_(kernel),
        a_(a),
        w_(w),
        groups_(g.groups),
        gradient_(gradient),
        taps_(w.height * w.width),
        terms_((gradient ? w.n : w.channels * g.groups) / g.groups),
        words_(ceil_div(terms_, 4)),
        columns_(gradient ? w.channels * g.groups : w.n),
        positions_(out_height * out_width),
        threads_(threads),
        out_(out) {
    struct Activations;
    struct Filters;
    struct Bias;
    image_ = unpacked<Activations>(a, groups_, threads);
    filters_ = unpacked<Filters>(w, 1, threads);
    weights_ = columns_of<Filters>(w, columns_);
    if (bias != nullptr) {
      float* padded = cpu::scratch<Bias, float>(columns_ + kPanel);
      std::fill_n(std::copy_n(bias, columns_, padded), kPanel, 0.0F);
      bias_ = padded;
    }
    fill(plan_.vertical, {out_height, a.height, w.height, g.stride[0], g.padding[0], g.dilation[0], gradient});
    fill(plan_.horizontal, {out_width, a.width, w.width, g.stride[1], g.padding[1], g.dilation[1], gradient});
  }

  void run() {
    struct Sums;
    if (a_.n * positions_ * columns_ == 0) return;
    list_classes();
    pack();
    sum_classes();
    const bool shifts = std::any_of(weights_.shift, weights_.shift + columns_, [](int32_t s) { return s != 0; });
    if (shifts || weights_.offset != nullptr) {
      struct Pixels;
      struct Rows;
      sums_ = cpu::scratch<Sums, int32_t>(a_.n * groups_ * positions_);
      pixel_sums_ = cpu::scratch<Pixels, int32_t>(a_.n * a_.height * a_.width);
      row_sums_ = cpu::scratch<Rows, int32_t>(a_.n * a_.width);
    }
    const auto panels = static_cast<int64_t>(plan_.panels.size());
    if (a_.n >= threads_ || panels == 1) {
      const int64_t block = std::max<int64_t>(1, kCacheBytes / (a_.height * image_.row));
      const int64_t grain = ceil_div(1 << 20, positions_ * columns_ * terms_ * taps_);
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
  void list_classes() {
    const auto width = static_cast<int64_t>(plan_.horizontal.class_count);
    plan_.classes.clear();
    plan_.runs.clear();
    plan_.pixels.clear();
    for (int64_t v = 0; v < static_cast<int64_t>(plan_.vertical.class_count); ++v)
      for (int64_t h = 0; h < width; ++h) {
        Plan::Class c{v, h, 0, static_cast<int64_t>(plan_.runs.size()), 0, static_cast<int64_t>(plan_.pixels.size()),
                      0};
        c.taps = static_cast<int64_t>(plan_.vertical.classes[v].size() * plan_.horizontal.classes[h].size());
        for (const Axis::Tap& y : plan_.vertical.classes[v])
          for (const Axis::Tap& x : plan_.horizontal.classes[h]) {
            const Run run{y.coordinate * image_.row + x.coordinate * image_.pixel,
                          (plan_.vertical.place[y.index] * w_.width + plan_.horizontal.place[x.index]) * words_,
                          words_};
            Run* last = static_cast<int64_t>(plan_.runs.size()) > c.run_begin ? &plan_.runs.back() : nullptr;
            if (last != nullptr && last->row + 4 * last->words == run.row && last->panel + last->words == run.panel)
              last->words += words_;
            else
              plan_.runs.push_back(run);
          }
        c.run_end = static_cast<int64_t>(plan_.runs.size());
        const auto out_width = static_cast<int64_t>(plan_.horizontal.base.size());
        for (int64_t y = 0; y < static_cast<int64_t>(plan_.vertical.base.size()); ++y) {
          if (plan_.vertical.class_of[y] != v) continue;
          for (int64_t x = 0; x < out_width; ++x)
            if (plan_.horizontal.class_of[x] == h)
              plan_.pixels.push_back(
                  {plan_.vertical.base[y] * image_.row + plan_.horizontal.base[x] * image_.pixel, y * out_width + x});
        }
        c.pixel_end = static_cast<int64_t>(plan_.pixels.size());
        plan_.classes.push_back(c);
      }
  }

  // The weights to panels, and to tap_sums_[tap][column] = sum b'.
  void pack() {
    struct Panels;
    struct TapSums;
    struct Raw;
    const int64_t bytes = fill(plan_.panels, groups_, columns_ / groups_, taps_ * words_);
    panel_data_ = cpu::scratch<Panels, uint8_t>(bytes);
    tap_stride_ = round_up(columns_, kLanes);
    tap_sums_ = cpu::scratch<TapSums, int32_t>(taps_ * tap_stride_);
    int32_t* raw = cpu::scratch<Raw, int32_t>(gradient_ ? 0 : columns_ * taps_);
    const auto count = static_cast<int64_t>(plan_.panels.size());
    cpu::split(count, ceil_div((128 << 10) * count, bytes), threads_, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        if (gradient_)
          pack_gradient(plan_.panels[j]);
        else
          pack_forward(plan_.panels[j], raw + plan_.panels[j].column * taps_);
        for (int64_t tap = 0; tap < taps_; ++tap)
          for (int i = 0; i < plan_.panels[j].count; ++i)
            tap_sums_[tap * tap_stride_ + plan_.panels[j].column + i] -= static_cast<int32_t>(128 * terms_);
      }
    });
  }

  void pack_forward(const Panel& p, int32_t* raw) {
    const uint8_t* in = filters_.data + p.column * filters_.image;
    uint8_t* out = panel_data_ + p.offset;
    const int64_t word = p.vectors * kLanes * 4;
    kernel_.transpose(in, filters_.image, p.count, taps_ * words_, 0x01010101U * kFlip, out, word);
    if (terms_ % 4 != 0)  // beyond the last channel: 0, whatever the activations hold there
      for (int64_t tap = 1; tap <= taps_; ++tap)
        for (int64_t i = 0; i < word; ++i)
          if (i % 4 >= terms_ % 4) out[(tap * words_ - 1) * word + i] = 0;
    kernel_.row_sums(in, filters_.pixel, p.count * taps_, terms_, raw);
    kernel_.transpose(raw, 4 * taps_, p.count, taps_, 0, tap_sums_ + p.column, 4 * tap_stride_);
  }

  void pack_gradient(const Panel& p) {
    struct Sums;
    const int64_t word = p.vectors * kLanes * 4, first = p.column % w_.channels;
    int32_t* sums = cpu::scratch<Sums, int32_t>(taps_ * kPanel);
    std::fill_n(sums, taps_ * kPanel, 0);
    for (int64_t q = 0; q < words_; ++q)
      for (int64_t tap = 0; tap < taps_; ++tap) {
        const uint8_t* in = filters_.data + (p.group * terms_ + 4 * q) * filters_.image + tap * filters_.pixel + first;
        const uint8_t* rows[4];
        for (int64_t k = 0; k < 4; ++k) rows[k] = 4 * q + k < terms_ ? in + k * filters_.image : nullptr;
        const int64_t place = plan_.vertical.place[tap / w_.width] * w_.width + plan_.horizontal.place[tap % w_.width];
        kernel_.interleave(rows, p.count, kFlip, panel_data_ + p.offset + (place * words_ + q) * word, kLanes * 4,
                           sums + tap * kPanel);
      }
    for (int64_t tap = 0; tap < taps_; ++tap)
      std::copy_n(sums + tap * kPanel, p.count, tap_sums_ + tap * tap_stride_ + p.column);
  }

  // Per class and column: class_sums_ = -sum b', and v of fqtstats/ops/products.py.
  void sum_classes() {
    struct ClassSums;
    struct V;
    const auto count = static_cast<int64_t>(plan_.classes.size());
    class_stride_ = columns_ + kPanel;
    class_sums_ = cpu::scratch<ClassSums, int32_t>(count * class_stride_);
    v_ = a_.offset == nullptr ? nullptr : cpu::scratch<V, float>(count * class_stride_);
    for (int64_t k = 0; k < count; ++k) {
      const Plan::Class& c = plan_.classes[k];
      int32_t* sums = class_sums_ + k * class_stride_;
      std::fill_n(sums, class_stride_, 0);
      for (const Axis::Tap& y : plan_.vertical.classes[c.vertical])
        for (const Axis::Tap& x : plan_.horizontal.classes[c.horizontal]) {
          const int32_t* of_tap = tap_sums_ + (y.index * w_.width + x.index) * tap_stride_;
          for (int64_t j = 0; j < columns_; ++j) sums[j] -= of_tap[j];
        }
      if (v_ == nullptr) continue;
      float* v = v_ + k * class_stride_;
      const int64_t n = c.taps * terms_;
      std::fill_n(v, class_stride_, 0.0F);
      for (int64_t j = 0; j < columns_; ++j) {
        // shift = 128 - zb, so that sum (b - zb) = sum b' + n shift.
        double exact = static_cast<double>(weights_.step[j]) * static_cast<double>(n * weights_.shift[j] - sums[j]);
        if (weights_.offset != nullptr) exact += static_cast<double>(n) * static_cast<double>(weights_.offset[j]);
        v[j] = static_cast<float>(exact);
      }
    }
  }

  // Sums of the activations' codes over the taps of every position, for images begin..end.
  void sum_windows(int64_t begin, int64_t end) {
    if (sums_ == nullptr) return;
    const auto height = static_cast<int64_t>(plan_.vertical.base.size());
    const auto width = static_cast<int64_t>(plan_.horizontal.base.size());
    for (int64_t n = begin; n < end; ++n) {
      int32_t* pixels = pixel_sums_ + n * a_.height * a_.width;
      int32_t* row = row_sums_ + n * a_.width;
      for (int64_t g = 0; g < groups_; ++g) {
        for (int64_t y = 0; y < a_.height; ++y)
          kernel_.row_sums(image_.data + n * image_.image + y * image_.row + g * image_.group, image_.pixel, a_.width,
                           terms_, pixels + y * a_.width);
        int32_t* out = sums_ + (n * groups_ + g) * positions_;
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
      const auto of_class = static_cast<int64_t>(k) * class_stride_ + panel.column;
      const Columns columns{weights_.shift + panel.column,
                            class_sums_ + of_class,
                            weights_.step + panel.column,
                            weights_.offset == nullptr ? nullptr : weights_.offset + panel.column,
                            v_ == nullptr ? nullptr : v_ + of_class,
                            bias_ == nullptr ? nullptr : bias_ + panel.column};
      const auto terms = static_cast<int32_t>(c.taps * terms_);
      const bool wide = c.taps * words_ * 4 > kExactTerms;
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
            sums = sums_ == nullptr ? nullptr : sums_ + (n * groups_ + panel.group) * positions_;
            out = out_ + n * positions_ * columns_ + panel.column;
            of_image.zero = a_.zero == nullptr ? 0 : a_.zero[n * by];
            of_image.step = a_.step[n * by];
            of_image.second = a_.offset == nullptr ? 0 : a_.offset[n * by];
          }
          const Plan::Pixel at = plan_.pixels[pixel];
          rows[i] = image + at.in;
          Row& row = scales[i] = of_image;
          row.out = out + at.out * columns_;
          for (int j = 0; j < panel.count; j += kLanes) __builtin_prefetch(row.out + j, 1);
          if (sums != nullptr) row.sum = sums[at.out] - terms * row.zero;
          if (columns.first != nullptr)
            row.first = static_cast<float>(static_cast<double>(row.step) * static_cast<double>(row.sum));
          if (++pixel == c.pixel_end) {
            pixel = c.pixel_begin;
            ++n;
          }
        }
        for (int i = count; i < height; ++i) rows[i] = rows[0];
        Tile tile{rows,
                  count,
                  plan_.runs.data() + c.run_begin,
                  c.run_end - c.run_begin,
                  4,
                  reinterpret_cast<const std::int8_t*>(panel_data_ + panel.offset),
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
  const Codes &a_, &w_;
  const int64_t groups_;
  const bool gradient_;
  const int64_t taps_, terms_, words_;  // of the kernel; contracted channels of a group, and words of them
  const int64_t columns_, positions_;   // of the result
  const int threads_;
  float* const out_;
  Image image_, filters_;
  Weights weights_;
  const float* bias_ = nullptr;
  uint8_t* panel_data_ = nullptr;
  int32_t* tap_sums_ = nullptr;
  int32_t* class_sums_ = nullptr;
  float* v_ = nullptr;
  int64_t tap_stride_ = 0, class_stride_ = 0;
  int32_t *sums_ = nullptr, *pixel_sums_ = nullptr, *row_sums_ = nullptr;
  Plan& plan_ = Plan::of_thread();  // of the calling thread
};

// The weight gradient: a matrix product whose rows are the channels of x at one tap, whose columns are the channels of
// g and whose contracted index runs over images, four to a word, and output pixels.
class WeightGradient {
 public:
  WeightGradient(const Kernel& kernel, const Codes& g, const Codes& x, const Geometry& geometry, int64_t kh, int64_t kw,
                 int threads, float* out)
      : kernel_(kernel),
        g_(g),
        x_(x),
        groups_(geometry.groups),
        kernel_width_(kw),
        taps_(kh * kw),
        rows_(x.channels / geometry.groups),
        pixels_(g.height * g.width),
        // Images of a block: enough for kDepth terms of small images.
        block_(std::min(round_up(g.n, 4), std::clamp<int64_t>(round_up(kDepth / pixels_, 4), 32, 256))),
        threads_(threads),
        out_(out) {
    struct Gradients;
    struct Activations;
    dy_ = unpacked<Gradients>(g, 1, threads);
    image_ = unpacked<Activations>(x, 1, threads);
    columns_ = columns_of<Gradients>(g, g.channels);
    fill(plan_.vertical,
         {g.height, x.height, kh, geometry.stride[0], geometry.padding[0], geometry.dilation[0], false});
    fill(plan_.horizontal,
         {g.width, x.width, kw, geometry.stride[1], geometry.padding[1], geometry.dilation[1], false});
  }

  void run() {
    struct Panels;
    struct Rows;
    struct PixelsX;
    struct PixelsG;
    if (g_.n == 0) {
      std::fill_n(out_, g_.channels * rows_ * taps_, 0.0F);
      return;
    }
    const int64_t images = round_up(g_.n, 4);
    fill(plan_.panels, groups_, g_.channels / groups_, 0);
    panel_data_ = cpu::scratch<Panels, uint8_t>(pixels_ * images * kPanel);
    row_vectors_ = ceil_div(rows_, kLanes);
    row_data_ = cpu::scratch<Rows, uint8_t>(x_.height * x_.width * row_vectors_ * kLanes * images);
    sums_x_.stride = round_up(rows_, kPanel);
    sums_g_.stride = kPanel;
    sums_x_.pixels = cpu::scratch<PixelsX, int32_t>(x_.height * x_.width * sums_x_.stride);
    sums_g_.pixels = cpu::scratch<PixelsG, int32_t>(pixels_ * sums_g_.stride);
    int64_t packed = -1;
    for (const Panel& panel : plan_.panels) {
      if (panel.group != packed) {
        packed = panel.group;
        cpu::split(x_.height, ceil_div(kGrain, images * x_.width * rows_), threads_, [&](int64_t begin, int64_t end) {
          for (int64_t y = begin; y < end; ++y) pack_rows(packed, y);
        });
        sum_rows();
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
    int32_t* pixels = nullptr;  // [pixel][stride]
    int32_t* taps = nullptr;    // [tap][stride]
    int64_t stride = 0;
  };

  // Packs four images to a word: in[image][line of pixels] to out[pixel][vector][word][kLanes][4].
  void interleave(const Image& from, int64_t channel, int64_t channels, int64_t block, int64_t y, int64_t width,
                  uint8_t flip, uint8_t* out, int64_t pixel, int64_t word, int64_t vector, int32_t* sums,
                  int64_t sums_stride) const {
    const int64_t images = g_.n - block * block_;
    const uint8_t* in = from.data + block * block_ * from.image + y * from.row + channel;
    for (int64_t q = 0; q < words_of(block); ++q)
      for (int64_t x = 0; x < width; ++x)
        for (int64_t c = 0; c < channels; c += kPanel) {
          const uint8_t* rows[4];
          for (int64_t k = 0; k < 4; ++k)
            rows[k] = 4 * q + k < images ? in + (4 * q + k) * from.image + x * from.pixel + c : nullptr;
          kernel_.interleave(rows, static_cast<int>(std::min<int64_t>(kPanel, channels - c)), flip,
                             out + x * pixel + q * word + c / kLanes * vector, vector, sums + x * sums_stride + c);
        }
  }

  // Row y of x, channels of a group, to [block][pixel][vector of channels][word][kLanes][4].
  void pack_rows(int64_t group, int64_t y) const {
    int32_t* sums = sums_x_.pixels + y * x_.width * sums_x_.stride;
    std::fill_n(sums, x_.width * sums_x_.stride, 0);
    for (int64_t block = 0; block < ceil_div(g_.n, block_); ++block) {
      const int64_t vector = words_of(block) * kLanes * 4, pixel = row_vectors_ * vector;
      interleave(image_, group * rows_, rows_, block, y, x_.width, 0,
                 row_data_ + before(block, x_.height * x_.width, row_vectors_ * kLanes) + y * x_.width * pixel, pixel,
                 kLanes * 4, vector, sums, sums_x_.stride);
    }
  }

  // Row y of the panel's channels of g to [block][pixel][word][columns][4].
  void pack_panel(const Panel& panel, int64_t y) const {
    int32_t* sums = sums_g_.pixels + y * g_.width * sums_g_.stride;
    std::fill_n(sums, g_.width * sums_g_.stride, 0);
    for (int64_t block = 0; block < ceil_div(g_.n, block_); ++block) {
      const int64_t word = panel.vectors * kLanes * 4, pixel = words_of(block) * word;
      interleave(dy_, panel.column, panel.count, block, y, g_.width, kFlip,
                 panel_data_ + before(block, pixels_, panel.vectors * kLanes) + y * g_.width * pixel, pixel, word,
                 kLanes * 4, sums, sums_g_.stride);
    }
  }

  // s.taps from s.pixels; `gradient`: the pixels are those of g.
  template <typename Tag>
  void sum_taps(TapSums& s, bool gradient, int64_t height, int64_t width) {
    struct Lines;
    const int64_t kernel_height = taps_ / kernel_width_;
    int32_t* lines = cpu::scratch<Lines, int32_t>(height * s.stride);
    s.taps = cpu::scratch<Tag, int32_t>(taps_ * s.stride);
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

  void sum_rows() {
    struct Tag;
    sum_taps<Tag>(sums_x_, false, x_.height, x_.width);
  }

  // sums_g_.taps = -sum (g - 128), and u of fqtstats/ops/products.py.
  void sum_columns(const Panel& panel) {
    struct Tag;
    struct U;
    sum_taps<Tag>(sums_g_, true, g_.height, g_.width);
    u_ = x_.offset == nullptr ? nullptr : cpu::scratch<U, float>(taps_ * kPanel);
    for (int64_t tap = 0; tap < taps_; ++tap)
      for (int64_t j = 0; j < kPanel; ++j) {
        int32_t& sum = sums_g_.taps[tap * kPanel + j];
        sum = 128 * terms_of(tap) - sum;
        if (u_ == nullptr) continue;
        // shift = 128 - zero, so that sum (g - zero) = sum (g - 128) + n shift.
        const int64_t exact = int64_t{terms_of(tap)} * columns_.shift[panel.column + j] - sum;
        u_[tap * kPanel + j] =
            static_cast<float>(static_cast<double>(columns_.step[panel.column + j]) * static_cast<double>(exact));
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
          if (columns_.offset != nullptr) {  // v of fqtstats/ops/products.py
            double exact = static_cast<double>(row.step) * static_cast<double>(row.sum);
            if (x_.offset != nullptr) exact += static_cast<double>(n) * static_cast<double>(row.first);
            row.second = static_cast<float>(exact);
          }
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
  const int64_t groups_, kernel_width_, taps_;
  const int64_t rows_, pixels_, block_;  // channels of x in a group; output pixels; images of a block
  const int threads_;
  float* const out_;
  Image dy_, image_;
  Weights columns_;
  TapSums sums_x_, sums_g_;
  float* u_ = nullptr;
  int64_t row_vectors_ = 0;
  uint8_t *row_data_ = nullptr, *panel_data_ = nullptr;
  Plan& plan_ = Plan::of_thread();  // of the calling thread
};

}  // namespace

void forward(const Kernel& kernel, const Codes& x, const Codes& w, const Geometry& geometry, const float* bias,
             std::int64_t out_height, std::int64_t out_width, int threads, float* out) {
  Product(kernel, x, w, geometry, false, bias, out_height, out_width, threads, out).run();
}

void grad_input(const Kernel& kernel, const Codes& g, const Codes& w, const Geometry& geometry, std::int64_t height,
                std::int64_t width, int threads, float* out) {
  Product(kernel, g, w, geometry, true, nullptr, height, width, threads, out).run();
}

void grad_weight(const Kernel& kernel, const Codes& g, const Codes& x, const Geometry& geometry, std::int64_t kh,
                 std::int64_t kw, int threads, float* out) {
  WeightGradient(kernel, g, x, geometry, kh, kw, threads, out).run();
}

}  // namespace fqtstats::convolution8
