// What lies between two convolutions, on the output y [N, H, W, C] of the first (float32, channels last):
//
//   t = a_c y + b_c             a product and a sum, each rounded: batch normalization with its statistics folded in
//   x = max(t, floor)           floor = 0 for ReLU, -inf without
//   x = max over 2 x 2 windows  with pooling; an odd last row or column belongs to no window
//
// and its adjoint. With the gradient g = dL/dx taken to the pixel where a window has its maximum (the first of equals)
// and cut where t <= floor or t > top, called h below (top: where a quantizer of x stops to pass gradients, or inf),
// batch normalization over R = N H W pixels has
//
//   dL/dy = ((h - p_c) - (y - mean_c) q_c) r_c,   p = sum h / R,  q = sum h (y - mean) / (R (var + eps)),
//                                                 r = gamma / sqrt(var + eps)
//
// and with p = q = 0 that is the adjoint for constant statistics. Every step is rounded by itself to float32; sums are
// float64, over blocks of kBlock consecutive pixels (of the output, with pooling) one pixel after the other, then one
// block after the other: they do not depend on the variant or on the number of threads. All variants give the same
// bits, up to the sign of zero, where y is finite.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/isa.h"

namespace fqtstats::fused {

inline constexpr std::int64_t kBlock = 64;

// [C] each.
struct Map {
  const float* a;
  const float* b;
  float floor;
  float top;  // read by the adjoint alone
};

// code = clamp(round(((x - offset) prescale) scale) + zero, 0, levels), ties to even; |coordinate| < 2^23.
struct Grid {
  float offset, prescale, scale;
  std::int32_t zero, levels;
};

// [C] each.
struct Adjoint {
  const float *mean, *p, *q, *r;
};

// Pixels that are consecutive in memory, or windows that are consecutive in two image rows: `y` the upper and `below`
// the lower one (nullptr without pooling).
struct Run {
  const float* y;
  const float* below;
  std::int64_t count;     // of pixels, or of windows
  std::int64_t channels;  // C
};

struct Kernel {
  const char* name;
  cpu::Isa isa;
  // Adds sum (y - shift) and sum (y - shift)^2, the differences in float64, of a run without pooling, and widens the
  // extremes; a NaN stays in low. [C] each.
  void (*moments)(const Run& run, const float* shift, double* sum, double* square, float* low, float* high);
  // Widens by the extremes of the windows' maxima of (flip_c ? -y : y); flip_c is 0 or the sign bit. No NaN in y.
  void (*window_extremes)(const Run& run, const std::uint32_t* flip, float* low, float* high);
  // Codes of a run, `row` bytes per pixel (at least C, less than C + 4): what is left is 0.
  void (*encode)(const Run& run, const Map& map, const Grid& grid, std::int64_t row, std::uint8_t* out);
  // Bits of a run, `row` bytes per pixel (a multiple of 8, at least C / 8): whether x >= threshold; what is left is 0.
  void (*bits)(const Run& run, const Map& map, float threshold, std::int64_t row, std::uint8_t* out);
  // x of a run.
  void (*apply)(const Run& run, const Map& map, float* out);
  // Adds sum h and sum h (y - mean), the difference in float32, the product in float64. [C] each.
  void (*gradient_sums)(const Run& run, const Map& map, const float* mean, const float* g, double* sum, double* dot);
  // dL/dy of a run into `out` (and `out_below`), and widens its extremes; a NaN stays in low. g = nullptr stands for 0.
  void (*gradient)(const Run& run, const Map& map, const Adjoint& adjoint, const float* g, float* out, float* out_below,
                   float* low, float* high);
  // Whether each of x [channels, taps] is at least 0, as bits [taps, row]. Returns whether all of x is finite.
  bool (*signs)(const float* x, std::int64_t channels, std::int64_t taps, std::int64_t row, std::uint8_t* out);
};

// Every variant that was built, fastest first.
std::span<const Kernel> kernels();

struct Images {
  const float* y;
  std::int64_t n, height, width, channels;
  bool pooled;
};

// sum y - shift and its square, minimum and maximum (NaN both, where y holds NaN or Inf) of every channel; the shift is
// the first pixel.
void moments(const Kernel& kernel, const float* y, std::int64_t pixels, std::int64_t channels, int threads, double* sum,
             double* square, float* low, float* high);

void window_extremes(const Kernel& kernel, const Images& images, int threads, const std::uint32_t* flip, float* low,
                     float* high);

// out: [N, OH + 2 pad_h, OW + 2 pad_w, row], with the code `zero` at the padding.
void encode(const Kernel& kernel, const Images& images, const Map& map, const Grid& grid, std::int64_t pad_h,
            std::int64_t pad_w, std::int64_t row, int threads, std::uint8_t* out);

// out: [N, OH + 2 pad_h, OW + 2 pad_w, row], with zeros at the padding.
void bits(const Kernel& kernel, const Images& images, const Map& map, float threshold, std::int64_t pad_h,
          std::int64_t pad_w, std::int64_t row, int threads, std::uint8_t* out);

// out: [N, OH, OW, C].
void apply(const Kernel& kernel, const Images& images, const Map& map, int threads, float* out);

// g: [N, OH, OW, C].
void gradient_sums(const Kernel& kernel, const Images& images, const Map& map, const float* mean, const float* g,
                   int threads, double* sum, double* dot);

// out: [N, H, W, C]; low, high: [N, C], the extremes of every image and channel of `out` (NaN both, where it holds
// NaN).
void gradient(const Kernel& kernel, const Images& images, const Map& map, const Adjoint& adjoint, const float* g,
              int threads, float* out, float* low, float* high);

// Bits of w [O, channels, taps] as out [O, taps, row]; false where w is not finite.
bool signs(const Kernel& kernel, const float* w, std::int64_t outputs, std::int64_t channels, std::int64_t taps,
           std::int64_t row, int threads, std::uint8_t* out);

}  // namespace fqtstats::fused
