// The product by tables, blocked. Four bits of the 1-bit operand select one of the 16 sums that subsets of four codes
// of the other operand can have. A group of 64 terms has 16 tables of 16 bytes, for each row of `table`; a panel's
// group is 2 blocks of 16 rows of 16 indices, 256 bytes each, in the variant's order.
//
// Simd has:
//   spread(w, out): the 256 index bytes of 16 rows' words w
//   build(codes, out): the 16 tables of 64 codes
//   tile<kBits>(index, tables, groups, c, ldc, first): kTile rows of kPanel sums, added to c, or c where `first`
//   transpose(c, ldc, t): t[i][j] = c[j * ldc + i], kPanel x kPanel
#pragma once

#include "cpu/scratch.h"
#include "kernels/product1/generic.h"

namespace fqtstats::product1 {
namespace {

constexpr int kBlock = 16;        // rows of `index` in a vector
constexpr int kTableBytes = 256;  // 16 tables of 16 entries: one group of one row
constexpr int kIndexBytes = 512;  // one group of one panel
constexpr int kTile = 8;          // rows of `table` in a tile
constexpr int kDepth = 12;        // groups per pass: a tile's tables, 24 KiB, stay in the first-level cache
constexpr int kRows = 32;         // rows of `table`, and
constexpr int kPanels = 64;       // panels per pass: sums and indices, 640 KiB, stay in the second-level cache
static_assert(kRows == kPanel);   // square blocks to transpose

struct Sums;  // tag of a scratch buffer

}  // namespace

template <class Simd>
static void pack_indices(const Matrix& x, std::int64_t groups, std::int64_t panel, std::uint8_t* out) {
  for (std::int64_t g = 0; g < groups; ++g)
    for (int block = 0; block < kPanel / kBlock; ++block, out += kTableBytes) {
      const std::int64_t first = panel * kPanel + block * kBlock;
      std::uint64_t w[kBlock];
      for (int i = 0; i < kBlock; ++i)
        w[i] = first + i < x.rows ? load<std::uint64_t>(x.data + (first + i) * x.stride, x.bytes, 8 * g) : 0;
      Simd::spread(w, out);
    }
}

// Group g of a row, one byte per code.
template <int kBits>
static inline void unpack(const std::uint8_t* row, std::int64_t bytes, std::int64_t g, std::uint8_t* codes) {
  struct Packed {
    std::uint8_t byte[kGroup * kBits / 8];
  };
  const auto packed = load<Packed>(row, bytes, g * static_cast<std::int64_t>(sizeof(Packed)));
  for (std::size_t i = 0; i < sizeof(Packed); ++i)
    for (int j = 0; j < 8 / kBits; ++j) codes[i * (8 / kBits) + j] = packed.byte[i] >> (j * kBits) & ((1 << kBits) - 1);
}

template <class Simd, int kBits>
static void multiply_tables(const Job& job, std::int64_t begin, std::int64_t end) {
  const Matrix& table = job.table;
  const Epilogue& epilogue = *job.epilogue;
  const std::int64_t panels = (job.index.rows + kPanel - 1) / kPanel, passes = (job.groups + kDepth - 1) / kDepth;
  const std::int64_t depth = passes == 0 ? 1 : (job.groups + passes - 1) / passes;
  std::int32_t* const c = cpu::scratch<Sums, std::int32_t>(kRows * kPanels * kPanel);
  alignas(64) std::uint8_t tables[kDepth * kTile * kTableBytes];
  alignas(64) std::uint8_t codes[kGroup];
  alignas(64) std::int32_t square[kPanel][kPanel];
  for (std::int64_t r = begin; r < end; r += kRows) {
    const std::int64_t rows = least(kRows, end - r);
    for (std::int64_t p = 0; p < panels; p += kPanels) {
      const std::int64_t count = least(kPanels, panels - p), ldc = count * kPanel;
      std::int64_t g = 0;
      do {
        const std::int64_t groups = least(depth, job.groups - g);
        for (std::int64_t t = 0; t < rows; t += kTile) {
          for (std::int64_t i = 0; i < kTile; ++i) {
            const std::uint8_t* row = table.data + (r + t + i) * table.stride;
            const std::int64_t bytes = t + i < rows ? table.bytes : 0;
            for (std::int64_t k = 0; k < groups; ++k) {
              unpack<kBits>(row, bytes, g + k, codes);
              Simd::build(codes, tables + (k * kTile + i) * kTableBytes);
            }
          }
          for (std::int64_t j = 0; j < count; ++j)
            Simd::template tile<kBits>(job.panels + ((p + j) * job.groups + g) * kIndexBytes, tables, groups,
                                       c + t * ldc + j * kPanel, ldc, g == 0);
        }
        g += depth;
      } while (g < job.groups);
      if (!job.swapped) {
        for (std::int64_t i = 0; i < rows; ++i)
          for (std::int64_t j = 0; j < count; ++j) {
            const std::int64_t n = (p + j) * kPanel;
            finish(epilogue, r + i, n, least(kPanel, epilogue.columns - n), c + i * ldc + j * kPanel);
          }
      } else {
        for (std::int64_t j = 0; j < count; ++j) {
          const std::int64_t m = (p + j) * kPanel;
          Simd::transpose(c + j * kPanel, ldc, square);
          for (std::int64_t i = 0; i < least(kPanel, job.index.rows - m); ++i)
            finish(epilogue, m + i, r, rows, square[i]);
        }
      }
    }
  }
}

template <class Simd, int kBits>
static constexpr Path table_path() {
  return {kIndexBytes, pack_indices<Simd>, multiply_tables<Simd, kBits>};
}

}  // namespace fqtstats::product1
