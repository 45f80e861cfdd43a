#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "kernels/fused/fused.h"
#include "kernels/integers.h"

namespace fqtstats::fused {

#define FQTSTATS_KERNEL(variant) extern const Kernel variant;
#include "kernels/fused/kernels.inc"
#undef FQTSTATS_KERNEL

std::span<const Kernel> kernels() {
  static const Kernel rows[] = {
#define FQTSTATS_KERNEL(variant) variant,
#include "kernels/fused/kernels.inc"
#undef FQTSTATS_KERNEL
  };
  return rows;
}

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::int64_t kGrain = 1 << 16;  // elements: some 10 us, several times a thread's wake-up

// Items of `size` elements per share of a thread.
std::int64_t grain(std::int64_t size) { return std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(1, size)); }

std::int64_t blocks(std::int64_t count) { return ceil_div(count, kBlock); }

// Partial sums (two per channel) and extremes of every block.
struct Partials {
  double* sums;
  float* extremes;
};

Partials partials(std::int64_t count, std::int64_t channels) {
  struct Sums;
  struct Extremes;
  return {cpu::scratch<Sums, double>(2 * count * channels), cpu::scratch<Extremes, float>(2 * count * channels)};
}

// Adds block after block.
void total(const double* parts, std::int64_t count, std::int64_t channels, double* first, double* second) {
  std::fill_n(first, channels, 0.0);
  std::fill_n(second, channels, 0.0);
  for (std::int64_t i = 0; i < count; ++i, parts += 2 * channels)
    for (std::int64_t c = 0; c < channels; ++c) first[c] += parts[c], second[c] += parts[channels + c];
}

// The extremes of `count` pairs of rows [low; high] of C; NaN in a low one makes both NaN.
void combine(const float* parts, std::int64_t count, std::int64_t channels, float* low, float* high) {
  std::fill_n(low, channels, kInfinity);
  std::fill_n(high, channels, -kInfinity);
  for (std::int64_t i = 0; i < count; ++i, parts += 2 * channels)
    for (std::int64_t c = 0; c < channels; ++c) {
      const float l = parts[c], h = parts[channels + c];
      low[c] = l < low[c] || l != l ? l : low[c];
      high[c] = h > high[c] ? h : high[c];
    }
}

void nan_in_both(std::int64_t channels, float* low, float* high) {
  for (std::int64_t c = 0; c < channels; ++c)
    if (low[c] != low[c]) high[c] = low[c];
}

// An output row: `index` of N * OH.
struct Rows {
  explicit Rows(const Images& images)
      : images(images),
        height(images.pooled ? images.height / 2 : images.height),
        width(images.pooled ? images.width / 2 : images.width) {}

  // The run of `count` output pixels from (index, column) on.
  Run run(std::int64_t index, std::int64_t column, std::int64_t count) const {
    const std::int64_t c = images.channels, line = images.width * c;
    if (!images.pooled) return {images.y + index * line + column * c, nullptr, count, c};
    const std::int64_t image = index / height, row = index % height;
    const float* top = images.y + (image * images.height + 2 * row) * line + 2 * column * c;
    return {top, top + line, count, c};
  }

  std::int64_t count() const { return images.n * height; }

  const Images& images;
  std::int64_t height, width;
};

void clear(std::uint8_t* at, std::int64_t pixels, std::int64_t row) {
  std::memset(at, 0, static_cast<std::size_t>(pixels * row));
}

// Writes padded images of `row` bytes per pixel: border(at, pixels) around each, inside it write(run, at) row by row.
template <typename Border, typename Write>
void padded_rows(const Images& images, std::int64_t pad_h, std::int64_t pad_w, std::int64_t row, int threads,
                 std::uint8_t* out, const Border& border, const Write& write) {
  const Rows rows(images);
  const std::int64_t padded = rows.height + 2 * pad_h, line = (rows.width + 2 * pad_w) * row;
  cpu::split(images.n * padded, grain((images.pooled ? 4 : 1) * rows.width * images.channels), threads,
             [&](std::int64_t begin, std::int64_t end) {
               for (std::int64_t i = begin; i < end; ++i) {
                 const std::int64_t n = i / padded, h = i % padded - pad_h;
                 std::uint8_t* at = out + i * line;
                 if (h < 0 || h >= rows.height) {
                   border(at, rows.width + 2 * pad_w);
                   continue;
                 }
                 border(at, pad_w);
                 at += pad_w * row;
                 write(rows.run(n * rows.height + h, 0, rows.width), at);
                 border(at + rows.width * row, pad_w);
               }
             });
}

}  // namespace

void moments(const Kernel& kernel, const float* y, std::int64_t pixels, std::int64_t channels, int threads, double* sum,
             double* square, float* low, float* high) {
  const std::int64_t count = blocks(pixels), c = channels;
  const Partials parts = partials(count, c);
  cpu::split(count, grain(kBlock * c), threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      double* s = parts.sums + 2 * i * c;
      float* e = parts.extremes + 2 * i * c;
      std::fill_n(s, 2 * c, 0.0);
      std::fill_n(e, c, kInfinity);
      std::fill_n(e + c, c, -kInfinity);
      const Run run{y + i * kBlock * c, nullptr, std::min(kBlock, pixels - i * kBlock), c};
      kernel.moments(run, y, s, s + c, e, e + c);
    }
  });
  total(parts.sums, count, c, sum, square);
  combine(parts.extremes, count, c, low, high);
  for (std::int64_t i = 0; i < c; ++i)  // a finite y has a finite sum, an infinite one has not
    if (sum[i] - sum[i] != 0) low[i] = std::numeric_limits<float>::quiet_NaN();
  nan_in_both(c, low, high);
}

void window_extremes(const Kernel& kernel, const Images& images, int threads, const std::uint32_t* flip, float* low,
                     float* high) {
  const Rows rows(images);
  const std::int64_t c = images.channels;
  const Partials parts = partials(images.n, c);
  cpu::split(images.n, grain(4 * rows.height * rows.width * c), threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = begin; n < end; ++n) {
      float* e = parts.extremes + 2 * n * c;
      std::fill_n(e, c, kInfinity);
      std::fill_n(e + c, c, -kInfinity);
      for (std::int64_t h = 0; h < rows.height; ++h)
        kernel.window_extremes(rows.run(n * rows.height + h, 0, rows.width), flip, e, e + c);
    }
  });
  combine(parts.extremes, images.n, c, low, high);
}

void encode(const Kernel& kernel, const Images& images, const Map& map, const Grid& grid, std::int64_t pad_h,
            std::int64_t pad_w, std::int64_t row, int threads, std::uint8_t* out) {
  const std::int64_t c = images.channels;
  const auto border = [&](std::uint8_t* at, std::int64_t pixels) {
    clear(at, pixels, row);
    if (grid.zero != 0)
      for (std::int64_t i = 0; i < pixels; ++i) std::memset(at + i * row, grid.zero, static_cast<std::size_t>(c));
  };
  padded_rows(images, pad_h, pad_w, row, threads, out, border,
              [&](const Run& run, std::uint8_t* at) { kernel.encode(run, map, grid, row, at); });
}

void bits(const Kernel& kernel, const Images& images, const Map& map, float threshold, std::int64_t pad_h,
          std::int64_t pad_w, std::int64_t row, int threads, std::uint8_t* out) {
  const auto border = [&](std::uint8_t* at, std::int64_t pixels) { clear(at, pixels, row); };
  padded_rows(images, pad_h, pad_w, row, threads, out, border,
              [&](const Run& run, std::uint8_t* at) { kernel.bits(run, map, threshold, row, at); });
}

void apply(const Kernel& kernel, const Images& images, const Map& map, int threads, float* out) {
  const Rows rows(images);
  const std::int64_t line = rows.width * images.channels;
  cpu::split(rows.count(), grain((images.pooled ? 4 : 1) * line), threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) kernel.apply(rows.run(i, 0, rows.width), map, out + i * line);
  });
}

void gradient_sums(const Kernel& kernel, const Images& images, const Map& map, const float* mean, const float* g,
                   int threads, double* sum, double* dot) {
  const Rows rows(images);
  const std::int64_t c = images.channels, pixels = rows.count() * rows.width, count = blocks(pixels);
  const Partials parts = partials(count, c);
  cpu::split(count, grain((images.pooled ? 5 : 2) * kBlock * c), threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      double* s = parts.sums + 2 * i * c;
      std::fill_n(s, 2 * c, 0.0);
      const std::int64_t stop = std::min((i + 1) * kBlock, pixels);
      for (std::int64_t at = i * kBlock; at < stop;) {
        // Without pooling all pixels are consecutive, with it those of a row.
        const std::int64_t length = images.pooled ? std::min(stop - at, rows.width - at % rows.width) : stop - at;
        kernel.gradient_sums(rows.run(at / rows.width, at % rows.width, length), map, mean, g + at * c, s, s + c);
        at += length;
      }
    }
  });
  total(parts.sums, count, c, sum, dot);
}

void gradient(const Kernel& kernel, const Images& images, const Map& map, const Adjoint& adjoint, const float* g,
              int threads, float* out, float* low, float* high) {
  const Rows rows(images);
  const std::int64_t c = images.channels, width = images.width, line = width * c;
  cpu::split(images.n, grain(2 * images.height * line), threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = begin; n < end; ++n) {
      float *lo = low + n * c, *hi = high + n * c;
      std::fill_n(lo, c, kInfinity);
      std::fill_n(hi, c, -kInfinity);
      // Pixels in no window.
      const auto rest = [&](std::int64_t h, std::int64_t w, std::int64_t count) {
        const std::int64_t at = (n * images.height + h) * line + w * c;
        kernel.gradient({images.y + at, nullptr, count, c}, map, adjoint, nullptr, out + at, nullptr, lo, hi);
      };
      for (std::int64_t h = 0; h < rows.height; ++h) {
        const std::int64_t index = n * rows.height + h;
        const Run run = rows.run(index, 0, rows.width);
        float* to = out + (run.y - images.y);
        kernel.gradient(run, map, adjoint, g + index * rows.width * c, to, to + line, lo, hi);
        if (images.pooled && width % 2 == 1) {
          rest(2 * h, width - 1, 1);
          rest(2 * h + 1, width - 1, 1);
        }
      }
      if (images.pooled && images.height % 2 == 1) rest(images.height - 1, 0, width);
      nan_in_both(c, lo, hi);
    }
  });
}

bool signs(const Kernel& kernel, const float* w, std::int64_t outputs, std::int64_t channels, std::int64_t taps,
           std::int64_t row, int threads, std::uint8_t* out) {
  std::atomic<bool> finite = true;
  cpu::split(outputs, grain(channels * taps), threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t o = begin; o < end; ++o)
      if (!kernel.signs(w + o * channels * taps, channels, taps, row, out + o * taps * row)) finite = false;
  });
  return finite;
}

}  // namespace fqtstats::fused
