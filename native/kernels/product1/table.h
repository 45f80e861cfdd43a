// The product by tables, blocked. Four bits of the 1-bit operand select one of the 16 sums that subsets of four codes
// of the other operand can have. A group of 64 terms has 16 tables of 16 bytes, for each row of `table`; a panel's
// group is 2 blocks of 16 rows of 16 indices, 256 bytes each, in the variant's order.
//
// Simd has:
//   spread(w, out): the 256 index bytes of 16 rows' words w
//   build(codes, out): the 16 tables of 64 codes, 16 to a vector
//   tile<kBits>(index, tables, groups, c, ldc, first): kTile rows of kPanel sums, added to c, or c where `first`
//   transpose(c, ldc, t): t[i][j] = c[j * ldc + i], kPanel x kPanel
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "cpu/scratch.h"
#include "kernels/integers.h"
#include "kernels/product1/generic.h"

namespace fqtstats::product1 {
namespace {

constexpr int kBlock = 16;           // rows of `index` in a vector
constexpr int kTableBytes = 256;     // 16 tables of 16 entries: one group of one row
constexpr int kIndexBytes = 512;     // one group of one panel
constexpr int kTile = 8;             // rows of `table` in a tile
constexpr int kDepth = 12;           // groups per pass: a tile's tables, 24 KiB, stay in the first-level cache
constexpr int kRows = 64;            // rows of `table`, and
constexpr int kPanels = 64;          // panels per pass: sums and indices, 896 KiB, stay in the second-level cache
static_assert(kRows % kPanel == 0);  // square blocks to transpose

struct Sums;  // tag of a scratch buffer

}  // namespace

#define FQTSTATS_INLINE __attribute__((always_inline))

// body(j) for j = 0 .. kCount - 1, each a compile-time constant: arrays of vectors indexed by j live in registers.
template <int kCount, int j = 0, typename Body>
FQTSTATS_INLINE static inline void repeat(const Body& body) {
  if constexpr (j < kCount) {
    body(std::integral_constant<int, j>{});
    repeat<kCount, j + 1>(body);
  }
}

// Ends an expression, so that the compiler does not regroup a long sum into one that needs more registers.
template <typename V>
FQTSTATS_INLINE static inline void settle(V& v) {
  asm volatile("" : "+v"(v));
}

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

// Bytes of two halves of kBits bits each to one byte per half.
template <int kBits>
FQTSTATS_INLINE static inline void halve(__m128i v, __m128i& first, __m128i& second) {
  const __m128i mask = _mm_set1_epi8((1 << kBits) - 1);
  const __m128i low = _mm_and_si128(v, mask), high = _mm_and_si128(_mm_srli_epi16(v, kBits), mask);
  first = _mm_unpacklo_epi8(low, high);
  second = _mm_unpackhi_epi8(low, high);
}

// Group g of a row, one byte per code.
template <int kBits>
FQTSTATS_INLINE static inline void unpack(const std::uint8_t* row, std::int64_t bytes, std::int64_t g,
                                          __m128i (&codes)[4]) {
  const std::int64_t at = 8 * kBits * g;
  if constexpr (kBits == 4) {
    halve<4>(load<__m128i>(row, bytes, at), codes[0], codes[1]);
    halve<4>(load<__m128i>(row, bytes, at + 16), codes[2], codes[3]);
  } else {
    __m128i nibbles[2], pairs[2];
    if constexpr (kBits == 2) {
      halve<4>(load<__m128i>(row, bytes, at), pairs[0], pairs[1]);
      halve<2>(pairs[0], codes[0], codes[1]);
      halve<2>(pairs[1], codes[2], codes[3]);
    } else {
      halve<4>(_mm_cvtsi64_si128(load<long long>(row, bytes, at)), nibbles[0], nibbles[1]);
      halve<2>(nibbles[0], pairs[0], pairs[1]);
      halve<1>(pairs[0], codes[0], codes[1]);
      halve<1>(pairs[1], codes[2], codes[3]);
    }
  }
}

template <class Simd, int kBits>
static void multiply_tables(const Job& job, std::int64_t begin, std::int64_t end) {
  const Matrix& table = job.table;
  const Epilogue epilogue = *job.epilogue;  // a copy: no store can alias it
  const std::int64_t panels = ceil_div(job.index.rows, kPanel), passes = ceil_div(job.groups, kDepth);
  const std::int64_t depth = passes == 0 ? 1 : ceil_div(job.groups, passes);
  std::int32_t* const c = cpu::scratch<Sums, std::int32_t>(kRows * kPanels * kPanel);
  alignas(64) std::uint8_t tables[kDepth * kTile * kTableBytes];
  __m128i codes[4];
  alignas(64) std::int32_t squares[kRows / kPanel][kPanel][kPanel];
  for (std::int64_t r = begin; r < end; r += kRows) {
    const std::int64_t rows = least(kRows, end - r);
    for (std::int64_t p = 0; p < panels; p += kPanels) {
      const std::int64_t count = least(kPanels, panels - p), ldc = count * kPanel;
      std::int64_t g = 0;
      do {
        const std::int64_t groups = least(depth, job.groups - g);
        for (std::int64_t t = 0; t < rows; t += kTile) {
          for (std::int64_t i = 0; i < kTile; ++i) {
            const std::uint8_t* row = table.data + least(r + t + i, end - 1) * table.stride;
            const std::int64_t bytes = t + i < rows ? table.bytes : 0;  // no row: codes of 0
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
          for (std::int64_t t = 0; t < rows; t += kPanel)
            Simd::transpose(c + t * ldc + j * kPanel, ldc, squares[t / kPanel]);
          for (std::int64_t i = m; i < least(m + kPanel, job.index.rows); ++i) {
            if (i + kPanel < job.index.rows) expect(epilogue, i + kPanel, r, rows);
            for (std::int64_t t = 0; t < rows; t += kPanel)
              finish(epilogue, i, r + t, least(kPanel, rows - t), squares[t / kPanel][i - m]);
          }
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
