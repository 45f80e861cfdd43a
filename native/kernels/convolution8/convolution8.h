// Direct 2-D convolutions of 8-bit codes in NHWC, and both of their gradients, without im2col.
//
// With u8 codes a and weights b' = b - 128 as s8, the integer of fqtstats/ops/products.py is
//
//   sum (a - za) (b - zb) = sum a b' - (zb - 128) sum (a - za) - za sum b'
//
// Sums run over the taps inside the image only: padding contributes 0, and is never read or multiplied. Positions that
// have the same taps form a class, and a class has one list of runs: contiguous pieces of a tap row that lie inside the
// image. Kernel sizes, strides, dilation and channel groups differ in their runs and in nothing else.
//
// - forward: rows of a tile are output pixels, columns output channels, runs are taps;
// - input gradient: the same on the gradient; a stride splits the input pixels into phases with classes of their own;
// - weight gradient: rows are input channels of one tap, columns output channels, runs are the output pixels whose tap
//   is inside the image; four images are interleaved into the words that the tile multiplies.
//
// Exactness: int32 arithmetic modulo 2^32 while a sum has at most kExactTerms terms (255^2 n < 2^31); longer ones are
// added in int64 from parts of at most kPartTerms terms (255 * 128 n < 2^31). float32(I) is rounded once, from the
// exact integer. All variants give the same result, bit for bit, for every thread count.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/isa.h"
#include "kernels/convolution.h"

namespace fqtstats::convolution8 {

using convolution::Geometry;

inline constexpr int kLanes = 16, kPanel = 64;  // columns: of a vector, of the widest panel
inline constexpr int kMaxHeight = 12;           // rows of the highest tile
inline constexpr std::int64_t kExactTerms = 33025, kPartTerms = 65536;

// `words` words of 4 codes: of a row, from `row` bytes beyond its pointer on; of a panel, from word `panel` on.
struct Run {
  std::int64_t row, panel, words;
};

// out[i][j] (+)= sum over the words w of all runs and k < 4 of rows[i][w][k] panel[w][j][k]
struct Tile {
  const std::uint8_t* const* rows;  // Kernel::height pointers; those from `count` on may repeat others
  int count;
  const Run* runs;
  std::int64_t run_count;
  std::int64_t step;         // bytes from a row's word to the next
  const std::int8_t* panel;  // [word][vectors * kLanes][4]
  int vectors;               // 1..4
  std::int32_t* out;         // [count][stride]
  std::int64_t stride;
  bool add;
};

// What the integer and the result of one row and one column are made of: see Finish.
struct Row {
  float* out;
  std::int32_t sum, zero;
  float step, first, second;
};
struct Columns {  // readable up to a multiple of kLanes
  const std::int32_t* shift;
  const std::int32_t* sum;
  const float* step;
  const float* first;   // or nullptr
  const float* second;  // or nullptr
  const float* bias;    // or nullptr
};

// I = acc + row.sum * shift + row.zero * sum
// out = float32(I) * (row.step * step) + row.first * first + row.second * second + bias
// each operation rounded by itself, terms that are nullptr left out.
struct Finish {
  const std::int32_t* acc;  // [rows][stride]; may be the output itself
  std::int64_t stride;
  const Row* rows;
  int row_count;
  Columns columns;
  int column_count;
};

struct Kernel {
  const char* name;
  cpu::Isa isa;
  int height[4];  // rows of a tile of 1, 2, 3 and 4 vectors
  void (*tile)(const Tile& t);
  void (*finish)(const Finish& f);
  // out[j][i] = in[i][j] ^ flip, i < rows, j < columns, of 32-bit words; strides in bytes
  void (*transpose)(const void* in, std::int64_t in_stride, std::int64_t rows, std::int64_t columns, std::uint32_t flip,
                    void* out, std::int64_t out_stride);
  // out[j / 16 * stride + j % 16 * 4 + k] = in[k][j] ^ flip, or 0 where in[k] is nullptr, and sums[j] += the four
  // in[k][j]; j < count <= kPanel, and any value from `count` up to a multiple of kLanes
  void (*interleave)(const std::uint8_t* const* in, int count, std::uint8_t flip, std::uint8_t* out,
                     std::int64_t stride, std::int32_t* sums);
  // out[i] = sum of in[i * stride + j], j < bytes
  void (*row_sums)(const std::uint8_t* in, std::int64_t stride, std::int64_t count, std::int64_t bytes,
                   std::int32_t* out);
};

// Every variant that was built, fastest first.
std::span<const Kernel> kernels();

// Codes [n][height + 2 pad][width + 2 pad][row], as fqtstats/ops/codes.py stores them; weights are [n][kh][kw][row].
struct Codes {
  const std::uint8_t* data;
  int bits;  // 1, 2, 4 or 8
  std::int64_t n, channels, height, width;
  std::int64_t pad_height, pad_width;
  // What they mean: one entry, or `groups` of them along the axis that fqtstats/ops/products.py allows.
  std::int64_t groups;
  const float* step;
  const std::int32_t* zero;              // 0..255, or nullptr
  const float* offset;                   // or nullptr
  const std::uint8_t* values = nullptr;  // [16] bytes that 4-bit codes are multiplied as; nullptr: as themselves
};

// y [n][oh][ow][w.n] of x and w [w.n][x.channels / groups]; bias [w.n] or nullptr.
void forward(const Kernel& kernel, const Codes& x, const Codes& w, const Geometry& geometry, const float* bias,
             std::int64_t out_height, std::int64_t out_width, int threads, float* out);

// dx [n][height][width][w.channels * groups] of dy g and w.
void grad_input(const Kernel& kernel, const Codes& g, const Codes& w, const Geometry& geometry, std::int64_t height,
                std::int64_t width, int threads, float* out);

// dw [g.channels][x.channels / groups][kh][kw] of dy g and x.
void grad_weight(const Kernel& kernel, const Codes& g, const Codes& x, const Geometry& geometry, std::int64_t kh,
                 std::int64_t kw, int threads, float* out);

}  // namespace fqtstats::convolution8
