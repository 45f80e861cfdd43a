// Convolutions with a 1-bit operand, exact: forward (1 x 1 bit) and both gradients (4, 2 or 1 x 1 bit).
//
// Each is a matrix of integer sums of code products, and an epilogue that turns a sum s into the float32 result as
// fqtstats/ops/products.py defines it, operation by operation. With zero points za, zb of the two operands, and over
// the n products that one result sums,
//
//   I = sum (ca - za) (cb - zb) = s - zb sum ca + za (n zb - sum cb)
//
// Three facts make the sums fast:
//   1 x 1 bit: sum ca cb = popcount(ca & cb) over 64-bit words, which channel-innermost images hold ready.
//   4 x 1 bit: four 1-bit codes are a nibble; the 16 subset sums of four 4-bit codes are a table that it indexes.
//   The taps of a kernel row are one contiguous run of a padded channel-innermost image, so nothing is gathered.
//
// Preconditions: the caller has checked the shapes; unused bits of a word are 0; pad pixels of an image hold the code
// `zero` of their group. Sums are int32: a call for which one could overflow returns false and writes nothing.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/isa.h"
#include "kernels/convolution.h"

namespace fqtstats::convolution1 {

using convolution::Geometry;  // without groups

// What codes mean: (code - zero) * step + offset, with one entry, or one per group.
struct Grid {
  const float* step;
  const std::int32_t* zero;  // or null: 0
  const float* offset;       // or null: 0
  bool groups;
};

// Codes of images [n, h + 2 pad_h, w + 2 pad_w, bytes per pixel]; weights [O, I, kh, kw] are O images without pad.
struct Image {
  const std::uint8_t* data;
  int bits;
  std::int64_t n, c, h, w, pad_h, pad_w;
  Grid grid;
};

// A product reads `length` consecutive steps of its source from each of `count` offsets (bytes) on. A step is 64
// channels: 8 bytes of bits, or 4 tables of 64 bytes.
struct Runs {
  const std::int64_t* offset;
  std::int64_t count, length;
};

// One row of results: an output pixel, or a pair (output channel, tap) of a weight gradient. Names as in products.py.
struct Row {
  const std::uint8_t* source;
  float* out;
  const float* v;          // [columns], or null where `a` has no offset
  float step, offset;      // sa, oa
  float u;                 // float32(sa Ra)
  std::int32_t zero, sum;  // za, sum ca
};

// The columns of results: channels. Null pointers stand for 0.
struct Columns {
  const float* step;         // sb
  const std::int32_t* zero;  // zb
  const std::int32_t* rest;  // n zb - sum cb
  const float* offset;       // ob
  const float* bias;
};

// Tiles. A panel holds the 1-bit operand of kColumns columns, step by step, in the order of the runs:
//   popcount: [step][32] words of 64 bits;
//   lookup: [step][2][4] blocks of 64 bytes, each the nibbles of 16 columns x 16 channels, in an order of the
//   variant's.
inline constexpr int kColumns = 32;
inline constexpr int kPopcountRows = 6, kLookupRows = 8;
inline constexpr std::int64_t kPopcountStep = 8, kLookupStep = 256;  // bytes of a source's step
inline constexpr std::int64_t kPopcountPanel = 8 * kColumns, kLookupPanel = 512;

struct Kernel {
  const char* name;
  cpu::Isa isa;
  // counts[i] = number of set bits of pixel i, 0 <= i < n.
  void (*count)(const std::uint8_t* pixels, std::int64_t n, std::int64_t words, std::int32_t* counts);
  // sums[r * ld + c] = or, with `add`, += the sum over the runs of popcount(source[r] & panel column c), for 6 rows and
  // 32 columns.
  void (*popcount)(const std::uint8_t* const* source, const Runs& runs, const std::uint8_t* panel, bool add,
                   std::int32_t* sums, std::int64_t ld);
  // The first n codes of a packed row, one per byte, then zeros up to a multiple of 64. Returns their sum.
  std::int32_t (*unpack)(const std::uint8_t* packed, int bits, std::int64_t n, std::uint8_t* codes);
  // out[c][i] = codes[i * ld + c], 0 <= i < 16, 0 <= c < n; n a multiple of 64.
  void (*transpose)(const std::uint8_t* codes, std::int64_t ld, std::int64_t n, std::uint8_t* out);
  // Table i, at out + i * stride: byte 16 j + s is the sum of those of the codes[16 i + 4 j + b], b < 4, that have bit
  // b set in s. Codes are at most 15.
  void (*tables)(const std::uint8_t* codes, std::int64_t n, std::int64_t stride, std::uint8_t* out);
  // Blocks of a lookup panel from the words at row[i] + offset, 0 <= i < 16: bit c of word i is code i of column c.
  // Columns 0-15 go to `low`, 16-31 to low + 256, 32-47 to `high`, 48-63 to high + 256.
  void (*blocks)(const std::uint8_t* const* row, std::int64_t offset, std::uint8_t* low, std::uint8_t* high);
  // As popcount, for tables as source: 8 rows, or one.
  void (*lookup)(const std::uint8_t* const* source, const Runs& runs, const std::uint8_t* panel, bool add,
                 std::int32_t* sums, std::int64_t ld);
  void (*lookup1)(const std::uint8_t* const* source, const Runs& runs, const std::uint8_t* panel, bool add,
                  std::int32_t* sums, std::int64_t ld);
  // The epilogue: results of `rows` rows and columns first ... first + n - 1 from sums[r * ld + c], 0 <= c < n.
  void (*finish)(const std::int32_t* sums, std::int64_t ld, const Row* row, int rows, const Columns& columns,
                 std::int64_t first, std::int64_t n);
};

// Every variant that was built, fastest first.
std::span<const Kernel> kernels();

// y [n, OH, OW, O] of x [n, I, H, W] and w [O, I, kh, kw], both 1 bit; bias [O] or null.
bool forward(const Kernel& kernel, const Image& x, const Image& w, const Geometry& geometry, const float* bias,
             std::int64_t out_h, std::int64_t out_w, int threads, float* y);

// dx [n, H, W, I] of g [n, O, OH, OW], 4, 2 or 1 bits, and w [O, I, kh, kw], 1 bit.
bool grad_input(const Kernel& kernel, const Image& g, const Image& w, const Geometry& geometry, std::int64_t in_h,
                std::int64_t in_w, int threads, float* dx);

// dw [O, I, kh, kw] of g [n, O, OH, OW], 4, 2 or 1 bits, and x [n, I, H, W], 1 bit.
bool grad_weight(const Kernel& kernel, const Image& g, const Image& x, const Geometry& geometry, std::int64_t kh,
                 std::int64_t kw, int threads, float* dw);

inline constexpr std::int64_t kMaxTaps = 16;   // of a kernel, per axis; 64 in all
inline constexpr std::int64_t kMaxStride = 4;  // of the input gradient, per axis

}  // namespace fqtstats::convolution1
