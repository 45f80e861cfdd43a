// AVX-512: as AVX2, on four tables at a time.
#include "kernels/product1/zmm.h"

namespace fqtstats::product1 {
namespace {

struct Avx512 {
  static constexpr int kVectors = 4;  // per group

  static void spread(const std::uint64_t* w, std::uint8_t* out) {
    for (int at = 0; at < 16; ++at)
      for (int i = 0; i < kBlock; ++i) out[16 * at + i] = w[i] >> (4 * at) & 15;
  }

  static void build(const std::uint8_t* codes, std::uint8_t* out) { build_tables(codes, out); }

  template <int kBits>
  static void tile(const std::uint8_t* index, const std::uint8_t* tables, std::int64_t groups, std::int32_t* c,
                   std::int64_t ldc, bool first) {
    for (int block = 0; block < kPanel / kBlock; ++block)
      tile16<kBits>(index + block * kTableBytes, tables, groups, c + block * kBlock, ldc, first);
  }

  static void transpose(const std::int32_t* c, std::int64_t ldc, std::int32_t (*t)[kPanel]) {
    transpose_square(c, ldc, t);
  }

 private:
  template <int kBits>
  static void tile16(const std::uint8_t* index, const std::uint8_t* tables, std::int64_t groups, std::int32_t* c,
                     std::int64_t ldc, bool first) {
    constexpr std::int64_t kGroups = 255 / (4 * ((1 << kBits) - 1)) / kVectors;  // that bytes can hold: 15, 5, 1
    __m512i all[kTile], high[kTile], x[kTile];
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j) all[j] = high[j] = _mm512_setzero_si512();
    for (std::int64_t g = 0; g < groups;) {
      const std::int64_t stop = least(groups, g + kGroups);
#pragma GCC unroll 8
      for (int j = 0; j < kTile; ++j) x[j] = _mm512_setzero_si512();
      for (; g < stop; ++g, index += kIndexBytes, tables += kTile * kTableBytes) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const __m512i at = load512(index + 64 * v);
#pragma GCC unroll 8
          for (int j = 0; j < kTile; ++j)
            x[j] = _mm512_add_epi8(x[j], _mm512_shuffle_epi8(load512(tables + j * kTableBytes + 64 * v), at));
        }
      }
#pragma GCC unroll 8
      for (int j = 0; j < kTile; ++j) {
        all[j] = _mm512_add_epi16(all[j], x[j]);
        high[j] = _mm512_add_epi16(high[j], _mm512_srli_epi16(x[j], 8));
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j) {
      const __m128i even = sum_lanes(_mm512_sub_epi16(all[j], _mm512_slli_epi16(high[j], 8)));
      const __m128i odd = sum_lanes(high[j]);
      __m512i sums =
          _mm512_cvtepu16_epi32(_mm256_set_m128i(_mm_unpackhi_epi16(even, odd), _mm_unpacklo_epi16(even, odd)));
      if (!first) sums = _mm512_add_epi32(sums, load512(c + j * ldc));
      _mm512_storeu_si512(c + j * ldc, sums);
    }
  }

  static __m128i sum_lanes(__m512i v) {
    const __m256i half = _mm256_add_epi16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
    return _mm_add_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  }
};

}  // namespace

extern const Kernel avx512{
    "avx512", cpu::Isa::avx512, table_path<Avx512, 1>(), table_path<Avx512, 2>(), table_path<Avx512, 4>(), transpose,
    sums};

}  // namespace fqtstats::product1
