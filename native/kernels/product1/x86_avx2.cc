// AVX2: vpshufb looks up 16 rows of `index` in two tables at a time, one per 128-bit lane. Look-ups are summed in bytes
// as long as these cannot overflow, then in 16 bits: `all` adds bytes 2 i and 2 i + 1 as one number, `high` the odd
// ones.
#include <immintrin.h>

#include "kernels/product1/table.h"

namespace fqtstats::product1 {
namespace {

struct Avx2 {
  static constexpr int kVectors = 8;   // per group
  static constexpr int kTogether = 4;  // rows of a tile

  static void spread(const std::uint64_t* w, std::uint8_t* out) {
    for (int at = 0; at < 16; ++at)
      for (int i = 0; i < kBlock; ++i) out[16 * at + i] = w[i] >> (4 * at) & 15;
  }

  static void build(const std::uint8_t* codes, std::uint8_t* out) {
    for (int v = 0; v < kVectors; v += 2) {
      const __m256i b = _mm256_broadcastsi128_si256(load128(codes + 8 * v));
      store(out + 32 * v, subsets(b, 0));
      store(out + 32 * v + 32, subsets(b, 8));
    }
  }

  template <int kBits>
  static void tile(const std::uint8_t* index, const std::uint8_t* tables, std::int64_t groups, std::int32_t* c,
                   std::int64_t ldc, bool first) {
    for (int block = 0; block < kPanel / kBlock; ++block)
      for (int i = 0; i < kTile; i += kTogether)
        tile4<kBits>(index + block * kTableBytes, tables + i * kTableBytes, groups, c + i * ldc + block * kBlock, ldc,
                     first);
  }

  static void transpose(const std::int32_t* c, std::int64_t ldc, std::int32_t (*t)[kPanel]) {
    for (int i = 0; i < kPanel; i += 8)
      for (int j = 0; j < kPanel; j += 8) transpose8(c + j * ldc + i, ldc, &t[i][j]);
  }

 private:
  static __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

  // Entry i of lane l: the sum of those codes 4 l + j from `start` on whose bit j is set in i.
  static __m256i subsets(__m256i codes, char start) {
    const __m256i entry = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7,
                                           8, 9, 10, 11, 12, 13, 14, 15);
    const __m256i lane = _mm256_set_m128i(_mm_set1_epi8(static_cast<char>(start + 4)), _mm_set1_epi8(start));
    __m256i sum = _mm256_setzero_si256();
    for (char j = 0; j < 4; ++j) {
      const __m256i bit = _mm256_set1_epi8(static_cast<char>(1 << j));
      const __m256i in = _mm256_cmpeq_epi8(_mm256_and_si256(entry, bit), bit);
      const __m256i code = _mm256_shuffle_epi8(codes, _mm256_add_epi8(lane, _mm256_set1_epi8(j)));
      sum = _mm256_add_epi8(sum, _mm256_and_si256(in, code));
    }
    return sum;
  }

  template <int kBits>
  static void tile4(const std::uint8_t* index, const std::uint8_t* tables, std::int64_t groups, std::int32_t* c,
                    std::int64_t ldc, bool first) {
    constexpr int kLookups = 255 / (4 * ((1 << kBits) - 1));  // that a byte can hold: 63, 21, 4
    constexpr std::int64_t kGroups = kLookups / kVectors;     // 7, 2, 0: half a group
    __m256i all[kTogether], high[kTogether], x[kTogether];
#pragma GCC unroll 4
    for (int j = 0; j < kTogether; ++j) all[j] = high[j] = x[j] = _mm256_setzero_si256();
    const auto widen = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int j = 0; j < kTogether; ++j) {
        all[j] = _mm256_add_epi16(all[j], x[j]);
        high[j] = _mm256_add_epi16(high[j], _mm256_srli_epi16(x[j], 8));
        x[j] = _mm256_setzero_si256();
      }
    };
    for (std::int64_t g = 0, left = kGroups; g < groups; ++g, index += kIndexBytes, tables += kTile * kTableBytes) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const __m256i at = load(index + 32 * v);
#pragma GCC unroll 4
        for (int j = 0; j < kTogether; ++j)
          x[j] = _mm256_add_epi8(x[j], _mm256_shuffle_epi8(load(tables + j * kTableBytes + 32 * v), at));
        if (kGroups == 0 && v % kLookups == kLookups - 1) widen();
      }
      if (kGroups != 0 && --left == 0) {
        widen();
        left = kGroups;
      }
    }
    widen();
#pragma GCC unroll 4
    for (int j = 0; j < kTogether; ++j) {
      const __m256i low = _mm256_sub_epi16(all[j], _mm256_slli_epi16(high[j], 8));
      const __m128i even = _mm_add_epi16(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
      const __m128i odd = _mm_add_epi16(_mm256_castsi256_si128(high[j]), _mm256_extracti128_si256(high[j], 1));
      __m256i s0 = _mm256_cvtepu16_epi32(_mm_unpacklo_epi16(even, odd));
      __m256i s1 = _mm256_cvtepu16_epi32(_mm_unpackhi_epi16(even, odd));
      std::int32_t* to = c + j * ldc;
      if (!first) {
        s0 = _mm256_add_epi32(s0, load(to));
        s1 = _mm256_add_epi32(s1, load(to + 8));
      }
      store(to, s0);
      store(to + 8, s1);
    }
  }

  static void transpose8(const std::int32_t* c, std::int64_t ldc, std::int32_t* t) {
    __m256i r[8], s[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = load(c + i * ldc);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      s[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
      s[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_unpacklo_epi64(s[i], s[i + 2]);
      r[i + 1] = _mm256_unpackhi_epi64(s[i], s[i + 2]);
      r[i + 2] = _mm256_unpacklo_epi64(s[i + 1], s[i + 3]);
      r[i + 3] = _mm256_unpackhi_epi64(s[i + 1], s[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      store(t + i * kPanel, _mm256_permute2x128_si256(r[i], r[i + 4], 0x20));
      store(t + (i + 4) * kPanel, _mm256_permute2x128_si256(r[i], r[i + 4], 0x31));
    }
  }
};

}  // namespace

extern const Kernel avx2{
    "avx2", cpu::Isa::avx2, table_path<Avx2, 1>(), table_path<Avx2, 2>(), table_path<Avx2, 4>(), transpose, sums};

}  // namespace fqtstats::product1
