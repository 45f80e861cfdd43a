// Block Householder transform of rows and its inverse, as fqtstats/quantizers/bhq.py defines them.
//
// The rows, taken in the order `order`, form groups of consecutive positions; a group of n >= 2 rows is reflected:
//
//   z_i = x_i scale_i                          (forward)
//   m = sum(z) root,  root = f32(1 / sqrt n);  u = (m - z_0) spread,  spread = f32(1 / (sqrt n - 1))
//   y_0 = m,  y_i = z_i - u                    (0 < i < n)
//   x_i = y_i / scale_i                        (inverse, of the reflected rows)
//
// Rows outside of these groups are only scaled. Every operation is rounded to float32 on its own. sum(z) is a pairwise
// tree: sum of n = sum of the first p + sum of the other n - p, p the largest power of two below n. So all variants and
// any number of threads give the same bits.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/isa.h"

namespace fqtstats::householder {

// A strip of columns of one group, or of one row that is only scaled (n = 1).
struct Block {
  const float* in;  // first column of row 0
  float* out;
  std::int64_t stride;        // elements from row to row, of both
  const std::int64_t* order;  // [n] rows on the one side
  std::int64_t first;         // the n rows from here on, on the other
  const float* scale;         // [n]
  std::int64_t n, columns;
  float root, spread;
  float *low, *high;  // [n] extremes of every row so far; NaN once there was one
  float* memory;      // workspace(n) rows of `width` elements
  std::int64_t width;
  bool stream;  // write past the caches; then `out` and the stride are whole cache lines
};

// Rows of working memory: z, then u, then the partial sums of the tree.
static constexpr std::int64_t workspace(std::int64_t n) {
  std::int64_t levels = 1;
  while (n >> levels) ++levels;
  return n + 2 + levels;
}

// Codes of an affine grid, and how they are decoded: the coordinate of x is ((x - offset) prescale) scale, of which
// the fraction, cut off to a multiple of 1 / numbers, is the probability of the larger neighbour; code k stands for
// min(k, levels) step + offset. Each operation is rounded to float32.
struct Decoding {
  float offset, prescale, scale, step, levels, numbers;
};

struct Kernel {
  const char* name;
  cpu::Isa isa;
  // Rows order[i] of `in` to rows first + i of `out`, updating the extremes of the results.
  void (*forward)(const Block& block);
  // Rows first + i of `in` to rows order[i] of `out`.
  void (*inverse)(const Block& block);
  // m and u of the forward transform of a strip of a group, up to the next multiple of 16 elements. Reads `in` and
  // uses `memory`; neither `out` and `first` nor the extremes and `stream`.
  void (*means)(const Block& block, float* mean, float* u);
  // One row of a forward transform, x scale - u, or x scale without u, to y, updating its extremes as forward() does.
  void (*row)(const float* x, std::int64_t count, float scale, const float* u, float* y, float& low, float& high);
  // Sum of f (1 - f) over f = y - floor(y), y = min((x - offset) scale, most): each rounded to float32 up to f, and
  // then within 2^-17 of the sum and 2^-20 + 1.5 2^-22 most for every element; most >= 1, and no y exceeds it by more
  // than its rounding. May be negative.
  double (*fractions)(const float* x, std::int64_t count, float offset, float scale, float most);
  // Sum of what variances() gives, over step^2, within 2^-19 of it, where step and 1 / step are normal numbers; takes
  // longer than fractions(), and less than variances().
  double (*refined)(const float* x, std::int64_t count, const Decoding& by);
  // gap^2 (up (1 - up)) of every element in float64: gap from one decoded neighbour to the other, up the probability.
  void (*variances)(const float* x, std::int64_t count, const Decoding& by, double* out);
};

// Every variant that was built, fastest first.
std::span<const Kernel> kernels();

struct Transform {
  std::int64_t rows, groups;
  const std::int64_t* order;  // [rows] a permutation
  const std::int64_t* heads;  // [groups] position of the first row of every group, ascending
  const double* sizes;        // [groups] n >= 2; groups do not overlap
  const float* scale;         // [rows] by position
  bool read_next = false;     // the result is read at once: not written past the caches
};

// in and out: [rows, columns], row-major, not overlapping, or the same where every row keeps its place. low, high:
// [rows], of the rows of `out`; a row that holds NaN has NaN for both, zeros are positive, and without columns they are
// +inf and -inf.
void forward(const Kernel& kernel, const Transform& transform, const float* in, std::int64_t columns, int threads,
             float* out, float* low, float* high);
void inverse(const Kernel& kernel, const Transform& transform, const float* in, std::int64_t columns, int threads,
             float* out);

// Rows order[i] of a matrix, to be reflected together; n >= 2.
struct Group {
  const std::int64_t* order;  // [n]
  const float* scale;         // [n]
  std::int64_t n;
};

// Elements of memory that find_means() needs for a group of n rows; not monotonic.
std::int64_t memory_of(std::int64_t n);

// m to `mean` and u to `u`, at columns [begin, end), on the calling thread. begin is a multiple of 16, and up to the
// next such after the end there is written.
void find_means(const Kernel& kernel, const Group& group, const float* in, std::int64_t columns, std::int64_t begin,
                std::int64_t end, float* memory, float* mean, float* u);

}  // namespace fqtstats::householder
