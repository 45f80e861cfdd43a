// The reference: one code or word at a time. A block of a lookup panel is [16 columns][4 nibbles].
#include <algorithm>
#include <bit>

#include "kernels/convolution1/convolution1.h"
#include "kernels/convolution1/element.h"

namespace fqtstats::convolution1 {
namespace {

void clear(int rows, bool add, std::int32_t* sums, std::int64_t ld) {
  for (int i = 0; i < rows && !add; ++i) std::fill_n(sums + i * ld, kColumns, 0);
}

void popcount(const std::uint8_t* const* source, const Runs& runs, const std::uint8_t* panel, bool add,
              std::int32_t* sums, std::int64_t ld) {
  clear(kPopcountRows, add, sums, ld);
  for (std::int64_t r = 0; r < runs.count; ++r)
    for (std::int64_t k = 0; k < runs.length; ++k, panel += kPopcountPanel)
      for (int i = 0; i < kPopcountRows; ++i) {
        const std::uint64_t word = load64(source[i] + runs.offset[r] + k * kPopcountStep);
        for (int c = 0; c < kColumns; ++c) sums[i * ld + c] += std::popcount(word & load64(panel + 8 * c));
      }
}

std::int32_t unpack(const std::uint8_t* packed, int bits, std::int64_t n, std::uint8_t* codes) {
  std::int32_t sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += codes[i] = code_at(packed, bits, i);
  for (std::int64_t i = n; i % 64; ++i) codes[i] = 0;
  return sum;
}

void transpose(const std::uint8_t* codes, std::int64_t ld, std::int64_t n, std::uint8_t* out) {
  for (std::int64_t c = 0; c < n; ++c)
    for (int i = 0; i < 16; ++i) out[c * 16 + i] = codes[i * ld + c];
}

void tables(const std::uint8_t* codes, std::int64_t n, std::int64_t stride, std::uint8_t* out) {
  for (std::int64_t i = 0; i < n; ++i, codes += 16, out += stride)
    for (int j = 0; j < 4; ++j)
      for (int s = 0; s < 16; ++s) {
        int sum = 0;
        for (int b = 0; b < 4; ++b) sum += s >> b & 1 ? codes[4 * j + b] : 0;
        out[16 * j + s] = static_cast<std::uint8_t>(sum);
      }
}

void blocks(const std::uint8_t* const* row, std::int64_t offset, std::uint8_t* low, std::uint8_t* high) {
  for (int c = 0; c < 64; ++c) {
    std::uint8_t* column = (c < 32 ? low : high) + c % 32 / 16 * 256 + c % 16 * 4;
    for (int j = 0; j < 4; ++j) {
      int nibble = 0;
      for (int b = 0; b < 4; ++b) nibble |= static_cast<int>(load64(row[4 * j + b] + offset) >> c & 1) << b;
      column[j] = static_cast<std::uint8_t>(nibble);
    }
  }
}

template <int kRows>
void lookup(const std::uint8_t* const* source, const Runs& runs, const std::uint8_t* panel, bool add,
            std::int32_t* sums, std::int64_t ld) {
  clear(kRows, add, sums, ld);
  for (std::int64_t r = 0; r < runs.count; ++r)
    for (std::int64_t k = 0; k < runs.length; ++k, panel += kLookupPanel)
      for (int i = 0; i < kRows; ++i)
        for (int c = 0; c < kColumns; ++c)
          for (int q = 0; q < 4; ++q) {
            const std::uint8_t* table = source[i] + runs.offset[r] + k * kLookupStep + 64 * q;
            const std::uint8_t* nibbles = panel + c / 16 * 256 + q * 64 + c % 16 * 4;
            for (int j = 0; j < 4; ++j) sums[i * ld + c] += table[16 * j + nibbles[j]];
          }
}

// The epilogue of one result; `c` counts from the first column of all.
float result(std::int32_t sum, const Row& row, const Columns& columns, std::int64_t c) {
  if (columns.zero) sum -= columns.zero[c] * row.sum;
  if (columns.rest) sum += row.zero * columns.rest[c];
  float y = static_cast<float>(sum) * (row.step * columns.step[c]);
  if (columns.offset) y = y + row.u * columns.offset[c];
  if (row.v) y = y + row.offset * row.v[c];
  if (columns.bias) y = y + columns.bias[c];
  return y;
}

void finish(const std::int32_t* sums, std::int64_t ld, const Row* row, int rows, const Columns& columns,
            std::int64_t first, std::int64_t n) {
  for (int r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < n; ++c) row[r].out[first + c] = result(sums[r * ld + c], row[r], columns, first + c);
}

}  // namespace

extern const Kernel scalar{"scalar", cpu::Isa::scalar, count,     popcount,  unpack, transpose,
                           tables,   blocks,           lookup<8>, lookup<1>, finish};

}  // namespace fqtstats::convolution1
