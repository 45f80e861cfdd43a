// What the AVX-512 variants of the product by tables share.
#pragma once

#include <immintrin.h>

#include "kernels/product1/table.h"

namespace fqtstats::product1 {
namespace {

inline __attribute__((always_inline)) __m512i load512(const void* p) { return _mm512_loadu_si512(p); }

// The 16 tables of 64 codes. vpshufb gives 0 where the highest bit of its index is set: there, the code is left out.
inline void build_tables(const std::uint8_t* codes, std::uint8_t* out) {
  const __m512i entry = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  const __m512i lane =
      _mm512_setr_epi32(0, 0, 0, 0, 0x04040404, 0x04040404, 0x04040404, 0x04040404, 0x08080808, 0x08080808, 0x08080808,
                        0x08080808, 0x0c0c0c0c, 0x0c0c0c0c, 0x0c0c0c0c, 0x0c0c0c0c);
  for (int v = 0; v < 4; ++v) {
    const __m512i b = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * v)));
    __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __mmask64 in = _mm512_test_epi8_mask(entry, _mm512_set1_epi8(static_cast<char>(1 << j)));
      const __m512i from = _mm512_add_epi8(lane, _mm512_set1_epi8(static_cast<char>(j)));
      sum = _mm512_add_epi8(sum, _mm512_maskz_shuffle_epi8(in, b, from));
    }
    _mm512_storeu_si512(out + 64 * v, sum);
  }
}

inline void transpose16(const std::int32_t* c, std::int64_t ldc, std::int32_t* t) {
  __m512i r[16], s[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = load512(c + i * ldc);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // r[4 q + i]: row 4 lane + i of the result, columns 4 q to 4 q + 3
    const __m512i even01 = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88),
                  odd01 = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    _mm512_storeu_si512(t + i * kPanel, _mm512_shuffle_i32x4(even01, even23, 0x88));
    _mm512_storeu_si512(t + (i + 4) * kPanel, _mm512_shuffle_i32x4(odd01, odd23, 0x88));
    _mm512_storeu_si512(t + (i + 8) * kPanel, _mm512_shuffle_i32x4(even01, even23, 0xdd));
    _mm512_storeu_si512(t + (i + 12) * kPanel, _mm512_shuffle_i32x4(odd01, odd23, 0xdd));
  }
}

inline void transpose_square(const std::int32_t* c, std::int64_t ldc, std::int32_t (*t)[kPanel]) {
  for (int i = 0; i < kPanel; i += 16)
    for (int j = 0; j < kPanel; j += 16) transpose16(c + j * ldc + i, ldc, &t[i][j]);
}

}  // namespace
}  // namespace fqtstats::product1
