// The reference: one number at a time.
#include <cmath>
#include <cstring>

#include "kernels/fused/fused.h"
#include "kernels/fused/signs.h"

namespace fqtstats::fused {
namespace {

void widen(float x, float* low, float* high) {
  if (x < *low || x != x) *low = x;  // and then no x is smaller
  if (x > *high) *high = x;
}

// Addresses of the pixels of window i, or of pixel i alone; their number.
int pixels(const Run& run, std::int64_t i, std::int64_t at[4]) {
  const std::int64_t c = run.channels;
  if (run.below == nullptr) return at[0] = i * c, 1;
  at[0] = at[2] = 2 * i * c;
  at[1] = at[3] = (2 * i + 1) * c;
  return 4;
}

// t at the maximum of window i in channel c, and which pixel that is.
float window_maximum(const Run& run, const Map& map, std::int64_t i, std::int64_t c, int* which, float* y) {
  std::int64_t at[4] = {};
  const int count = pixels(run, i, at);
  float best = 0;
  for (int k = 0; k < count; ++k) {
    const float pixel = (k < 2 ? run.y : run.below)[at[k] + c];
    const float t = map.a[c] * pixel + map.b[c];
    if (k == 0 || t > best || t != t) best = t, *which = k, *y = pixel;
  }
  return best;
}

void moments(const Run& run, const float* shift, double* sum, double* square, float* low, float* high) {
  for (std::int64_t i = 0; i < run.count; ++i)
    for (std::int64_t c = 0; c < run.channels; ++c) {
      const float y = run.y[i * run.channels + c];
      const double d = static_cast<double>(y) - static_cast<double>(shift[c]);
      sum[c] += d;
      square[c] += d * d;
      widen(y, low + c, high + c);
    }
}

void window_extremes(const Run& run, const std::uint32_t* flip, float* low, float* high) {
  for (std::int64_t i = 0; i < run.count; ++i)
    for (std::int64_t c = 0; c < run.channels; ++c) {
      const float sign = flip[c] == 0 ? 1.0f : -1.0f;
      std::int64_t at[4] = {};
      pixels(run, i, at);
      float best = sign * run.y[at[0] + c];
      for (int k = 1; k < 4; ++k) {
        const float y = sign * (k < 2 ? run.y : run.below)[at[k] + c];
        if (y > best) best = y;
      }
      widen(best, low + c, high + c);
    }
}

float value(const Run& run, const Map& map, std::int64_t i, std::int64_t c) {
  int which;
  float y;
  const float t = window_maximum(run, map, i, c, &which, &y);
  return map.floor > t ? map.floor : t;
}

void encode(const Run& run, const Map& map, const Grid& grid, std::int64_t row, std::uint8_t* out) {
  for (std::int64_t i = 0; i < run.count; ++i) {
    std::memset(out + i * row, 0, static_cast<std::size_t>(row));
    for (std::int64_t c = 0; c < run.channels; ++c) {
      const float coordinate = ((value(run, map, i, c) - grid.offset) * grid.prescale) * grid.scale;
      const auto code = static_cast<std::int32_t>(std::nearbyint(coordinate)) + grid.zero;
      out[i * row + c] = static_cast<std::uint8_t>(code < 0 ? 0 : code > grid.levels ? grid.levels : code);
    }
  }
}

void bits(const Run& run, const Map& map, float threshold, std::int64_t row, std::uint8_t* out) {
  for (std::int64_t i = 0; i < run.count; ++i, out += row) {
    std::memset(out, 0, static_cast<std::size_t>(row));
    for (std::int64_t c = 0; c < run.channels; ++c)
      out[c / 8] = static_cast<std::uint8_t>(out[c / 8] | (value(run, map, i, c) >= threshold) << c % 8);
  }
}

void apply(const Run& run, const Map& map, float* out) {
  for (std::int64_t i = 0; i < run.count; ++i)
    for (std::int64_t c = 0; c < run.channels; ++c) out[i * run.channels + c] = value(run, map, i, c);
}

void gradient_sums(const Run& run, const Map& map, const float* mean, const float* g, double* sum, double* dot) {
  for (std::int64_t i = 0; i < run.count; ++i)
    for (std::int64_t c = 0; c < run.channels; ++c) {
      int which;
      float y;
      const float t = window_maximum(run, map, i, c, &which, &y);
      const float h = t > map.floor && !(t > map.top) ? g[i * run.channels + c] : 0;
      sum[c] += static_cast<double>(h);
      dot[c] += static_cast<double>(h) * static_cast<double>(y - mean[c]);
    }
}

void gradient(const Run& run, const Map& map, const Adjoint& adjoint, const float* g, float* out, float* out_below,
              float* low, float* high) {
  for (std::int64_t i = 0; i < run.count; ++i)
    for (std::int64_t c = 0; c < run.channels; ++c) {
      int which;
      float y;
      const float t = window_maximum(run, map, i, c, &which, &y);
      const bool open = t > map.floor && !(t > map.top);
      std::int64_t at[4] = {};
      const int count = pixels(run, i, at);
      for (int k = 0; k < count; ++k) {
        const float h = g != nullptr && open && k == which ? g[i * run.channels + c] : 0;
        const float d = (k < 2 ? run.y : run.below)[at[k] + c] - adjoint.mean[c];
        const float dy = ((h - adjoint.p[c]) - d * adjoint.q[c]) * adjoint.r[c];
        (k < 2 ? out : out_below)[at[k] + c] = dy;
        widen(dy, low + c, high + c);
      }
    }
}

}  // namespace

extern const Kernel scalar{"scalar",      cpu::Isa::scalar, moments, window_extremes, encode, bits, apply,
                           gradient_sums, gradient,         signs};

}  // namespace fqtstats::fused
