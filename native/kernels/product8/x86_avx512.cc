// AVX-512 without VNNI: even and odd bytes widened to 16 bits, and vpmaddwd, which cannot saturate here.
#include "kernels/product8/avx512.h"

namespace fqtstats::product8 {
namespace {

struct Wide {
  __m512i even, odd;
};

FQTSTATS_INLINE Wide widen_signed(__m512i x) {
  return {_mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), _mm512_srai_epi16(x, 8)};
}

FQTSTATS_INLINE Wide widen_unsigned(__m512i x) {
  return {_mm512_and_si512(x, _mm512_set1_epi16(255)), _mm512_srli_epi16(x, 8)};
}

template <bool kNibbles>
struct Tile {
  // Columns two vectors at a time, because widened panels take twice the registers.
  template <int kRows, int kVectors>
  static void run(const Block& block, const std::uint8_t* rows, const RowConstants* row, std::int32_t* c,
                  __mmask16 last) {
    constexpr __mmask16 kAll = 0xFFFF;
    if constexpr (kVectors > 2) {
      part<kRows, 2, kVectors>(block, rows, 0, row, c, kAll);
      part<kRows, kVectors - 2, kVectors>(block, rows, 2, row, c, last);
    } else {
      part<kRows, kVectors, kVectors>(block, rows, 0, row, c, last);
    }
  }

  template <int kRows, int kVectors, int kPanel>
  __attribute__((noinline)) static void part(const Block& block, const std::uint8_t* rows, int first,
                                             const RowConstants* row, std::int32_t* c, __mmask16 last) {
    __m512i sums[kRows][kVectors];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sums[i][j] = _mm512_setzero_si512();
    const std::int64_t lda = block.lda;
    for (std::int64_t g = 0; g < block.groups; ++g) {
      const std::uint8_t* panel = block.panel + ((kNibbles ? g / 2 : g) * kPanel + first) * 64;
      Wide b[kVectors];
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        __m512i x = _mm512_loadu_si512(panel + 64 * j);
        if constexpr (kNibbles)
          x = _mm512_and_si512(_mm512_srl_epi16(x, _mm_cvtsi32_si128(g % 2 * 4)), _mm512_set1_epi8(15));
        b[j] = widen_signed(x);
      }
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const Wide a = widen_unsigned(broadcast_word(rows + i * lda + 4 * g));
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) {
          sums[i][j] = _mm512_add_epi32(sums[i][j], _mm512_madd_epi16(a.even, b[j].even));
          sums[i][j] = _mm512_add_epi32(sums[i][j], _mm512_madd_epi16(a.odd, b[j].odd));
        }
      }
    }
    store_tile(block, row, sums, first, c + kLanes * first, last);
  }
};

}  // namespace

static void multiply(const Block& b) { b.nibbles ? multiply_tiles<Tile<true>>(b) : multiply_tiles<Tile<false>>(b); }

extern const Kernel avx512{"avx512", cpu::Isa::avx512, pack_rows, row_sums, pack_panel, multiply};

}  // namespace fqtstats::product8
