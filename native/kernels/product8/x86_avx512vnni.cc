// AVX-512 VNNI: vpdpbusd adds four products of an unsigned and a signed byte, without saturation. A tile is 6 rows
// times 64 columns: 24 accumulators, 4 registers of the panel, one broadcast word of the rows.
#include "kernels/product8/avx512.h"

namespace fqtstats::product8 {
namespace {

// sum += products of word (u8) and b (s8). An instruction, because gcc 12 copies what its intrinsic returns, and
// spills.
FQTSTATS_INLINE void add_products(__m512i& sum, __m512i word, __m512i b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(word), "v"(b));
}

template <bool kNibbles>
struct Tile {
  template <int kRows, int kVectors>
  FQTSTATS_INLINE void step(__m512i (&sums)[kRows][kVectors], const std::uint8_t* const (&a)[2], std::int64_t lda,
                            const __m512i (&b)[kVectors]) {
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const __m512i word = broadcast_word(a[i / 3] + i % 3 * lda);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) add_products(sums[i][j], word, b[j]);
    }
  }

  template <int kRows, int kVectors>
  __attribute__((noinline)) static void run(const Block& block, const std::uint8_t* rows, const RowConstants* row,
                                            std::int32_t* c, __mmask16 last) {
    __m512i sums[kRows][kVectors];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[i][j] = _mm512_setzero_si512();
    // The results' cache lines, which are written (and read, where there are sums in them) only after the loop.
    if (!block.stream)
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) __builtin_prefetch(c + i * block.ldc + kLanes * j, 1);
    const std::int64_t lda = block.lda;
    const std::uint8_t* a[2] = {rows, rows + 3 * lda};
    const std::uint8_t* panel = block.panel;
    const __m512i low = _mm512_set1_epi8(15);
    for (std::int64_t g = 0; g < block.groups; g += kNibbles ? 2 : 1, panel += 64 * kVectors) {
      __m512i b[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        b[j] = _mm512_loadu_si512(panel + 64 * j);
        if constexpr (kNibbles) b[j] = _mm512_and_si512(b[j], low);
      }
      step(sums, a, lda, b);
      a[0] += 4, a[1] += 4;
      if constexpr (kNibbles) {
        if (g + 1 == block.groups) break;
        asm("" : "+r"(panel));  // load again: there are no registers to keep both halves
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j)
          b[j] = _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(panel + 64 * j), 4), low);
        step(sums, a, lda, b);
        a[0] += 4, a[1] += 4;
      }
    }
    store_tile(block, row, sums, 0, c, last);
  }
};

}  // namespace

static void multiply(const Block& b) { b.nibbles ? multiply_tiles<Tile<true>>(b) : multiply_tiles<Tile<false>>(b); }

extern const Kernel avx512vnni{"avx512vnni", cpu::Isa::avx512vnni, pack_rows, row_sums, pack_panel, multiply};

}  // namespace fqtstats::product8
