// Uniform quantization of a tensor [N, C, S] (sample, channel, space) to integer codes, and back.
//
// Groups of elements (the whole tensor, a sample, or a channel) share a grid, which is computed from the group's
// minimum and maximum; see make_grid. An element's coordinate and code, each operation rounded to float32 by itself:
//
//   y = ((x - offset) * prescale) * scale
//   y = sign(y) (n + |y| / 2^n) where |y| >= 1, n = floor(log2 |y|)      rule `log` alone
//   r = floor(y) + (bits < floor((y - floor(y)) * 2^n))     stochastic, n random bits
//   r = y rounded to nearest, ties to even                   otherwise
//   code = min(max(r + zero, 0), levels)
//
// and back: x' = k * step + offset with k = code - zero, in whose place rule `log` has sign(k) 2^(|k| - 1), or 0 for
// k = 0. The random bits of element (n, c, s) are number (n C + c) S + s of a Philox stream (kernels/philox), whatever
// the memory order.
//
// Codes are stored with the channel innermost and packed, the first one in the lowest bits of the first byte; a row
// (the channels of one sample and position) starts at a multiple of 4 bytes (8 for 1-bit codes), the rest of its last
// word is 0. Images may carry a border of positions, whose codes equal `zero`.
//
// Every element lies within the extremes of its group. All variants give the same results on any number of
// threads.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/isa.h"
#include "kernels/codes.h"
#include "kernels/philox/philox.h"

namespace fqtstats::quantize {

enum class Type : std::uint8_t { f32, bf16 };

// Parameters of the grids, one entry per group, or per channel of a row.
struct Grids {
  const float *offset, *prescale, *scale, *zero;
};

// A rectangle of elements that lie in rows: row r starts at x + r x_stride, and so on; strides in elements.
struct Rectangle {
  std::int64_t rows, count;
  const void* x;
  std::int64_t x_stride;
  const std::int32_t* bits;  // random bits, or nullptr: round to nearest
  std::int64_t bits_stride;
  std::uint8_t* codes;  // one byte each
  std::int64_t codes_stride;
  Grids grids;
  bool columns;   // element i has grid i; otherwise row r has grid r * grid_step
  int grid_step;  // 0 or 1
  bool from_low;  // every grid starts at its minimum, without prescale: y >= 0 and zero = 0
  bool log;       // of rule `log`
  int random_bits;
  int levels;
};

// The way back, likewise; contiguous in both.
struct Decoded {
  std::int64_t rows, count;
  const std::uint8_t* codes;
  std::int64_t codes_stride;
  const float *step, *zero, *offset;
  bool columns;
  int grid_step;
  bool log;
  float* x;
  std::int64_t x_stride;
};

struct Kernel {
  const char* name;
  cpu::Isa isa;
  // Minimum and maximum of `count` >= 1 numbers, by Type; both NaN where one of them is NaN.
  void (*extremes[2])(const void* x, std::int64_t count, float* low, float* high);
  // The same of every column of a matrix.
  void (*column_extremes[2])(const void* x, std::int64_t rows, std::int64_t stride, std::int64_t columns, float* low,
                             float* high);
  void (*encode[2])(const Rectangle& r);
  void (*decode)(const Decoded& d);
  // `rows` rows of `count` codes, one byte each, to and from row_bytes(count, bits) bytes.
  void (*pack)(const std::uint8_t* codes, std::int64_t stride, std::int64_t rows, std::int64_t count, int bits,
               std::uint8_t* out, std::int64_t out_stride);
  void (*unpack)(const std::uint8_t* packed, std::int64_t stride, std::int64_t rows, std::int64_t count, int bits,
                 std::uint8_t* codes, std::int64_t codes_stride);
  // out[c][r] = in[r][c] for r < rows, c < columns. Reads whole tiles of 16 rows and 64 columns.
  void (*transpose_codes)(const std::uint8_t* in, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                          std::uint8_t* out, std::int64_t out_stride);
  // out[c][r] = in[r][c]. Reads and writes whole tiles of 16 x 16.
  void (*transpose_bits)(const std::int32_t* in, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                         std::int32_t* out, std::int64_t out_stride);
};

inline constexpr std::int64_t kTile = 64;

// Every variant that was built, fastest first.
std::span<const Kernel> kernels();

enum class Rule : std::uint8_t { affine, zero_on_grid, symmetric, log, mirrored };
enum class Axis : std::int8_t { none = -1, sample = 0, channel = 1 };

// Grid points are (code - zero) * step + offset, but for rule `log`. A group of equal elements has step 0 and is its
// own offset.
struct Grid {
  float step, offset, prescale, scale, zero;
  bool from_low;  // starts at the minimum; otherwise zero is a grid point and the offset is 0
};

// The grid of a group. Computed in double and rounded once:
//   affine        step = (high - low) / levels, offset = low, zero = 0;
//   zero_on_grid  the smallest step with a point at 0 that covers [min(low, 0), max(high, 0)]; with one bin and both
//                 signs there is none, and the grid is the affine one;
//   symmetric     step = max(|low|, |high|) / h, zero = h = (levels - 1) / 2 rounded down; the last code is not used;
//   log           step = max(|low|, |high|) / 2^(m - 1), zero = m = levels / 2: the points are 0 and +-step 2^e, e < m;
//   mirrored      the affine grid from -max(|low|, |high|) to max(|low|, |high|).
// A subnormal step is rounded up. prescale (1 or 2^100) lifts tiny groups, scale = 1 / (step * prescale).
// Precondition: low and high are finite; high - low <= the largest float, but for rule `log`.
Grid make_grid(Rule rule, float low, float high, int levels);

struct Input {
  const void* x;  // [N][C][S], or [N][S][C] where channels_last; contiguous
  Type type;
  bool channels_last;
  std::int64_t n, c, s;
  std::int64_t first = 0;  // number of the first sample in the random stream, where x is a part of a tensor
};

// Samples or channels of a tensor that are quantized, in ascending order, as if there were no others; only the numbers
// of the random bits count those.
struct Kept {
  Axis axis = Axis::none;  // none: all of them
  const std::int64_t* indices = nullptr;
  std::int64_t count = 0;
};

// Minimum and maximum of every group; NaN where it holds one.
void extremes(const Kernel& kernel, const Input& in, Axis axis, int threads, float* low, float* high);

// Where codes lie: images of height x width positions, with a border of pad_h and pad_w positions.
struct Layout {
  int bits;  // 1, 2, 4 or 8
  std::int64_t height, width, pad_h, pad_w;
};

struct Recipe {
  Axis axis;
  Rule rule;
  int levels;       // the largest code: 2^b - 1; twice the number of magnitudes for rule `log`
  int random_bits;  // 1..24, or 0: to nearest
};

enum class Status : std::int8_t { ok, ok_with_offset, not_finite, range_overflows };

// Quantizes. low and high are the extremes of the groups (that are kept), or nullptr where all are kept. Writes all of
// out, and one step, zero and offset per group; unless Status is ok_with_offset, every offset is 0. After not_finite
// and range_overflows the output is undefined.
Status encode(const Kernel& kernel, const Input& in, const Kept& kept, const Recipe& recipe, const philox::Stream& key,
              const Layout& layout, const float* low, const float* high, int threads, std::uint8_t* out, float* step,
              std::int32_t* zero, float* offset);

// What codes are.
struct Meaning {
  Axis axis;
  bool log;  // of rule `log`
  const float* step;
  const std::int32_t* zero;  // or nullptr
  const float* offset;       // or nullptr
};

// The numbers that codes stand for, as [N][C][S], or [N][S][C] where channels_last.
void decode(const Kernel& kernel, const std::uint8_t* codes, const Layout& layout, std::int64_t n, std::int64_t c,
            const Meaning& meaning, bool channels_last, int threads, float* out);

}  // namespace fqtstats::quantize
