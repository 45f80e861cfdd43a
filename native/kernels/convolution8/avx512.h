// The operations around the tile with AVX-512 F, BW, DQ and VL, for the files compiled with at least those flags:
// everything here has internal linkage.
#pragma once

#include <immintrin.h>

#include "kernels/convolution8/portable.h"

namespace fqtstats::convolution8 {
namespace {
namespace avx512f {

void finish(const Finish& f) {
  const Columns c = f.columns;
  const int columns = f.column_count;
  for (int i = 0; i < f.row_count; ++i) {
    const Row row = f.rows[i];
    const std::int32_t* acc = f.acc + i * f.stride;
    const __m512i sum = _mm512_set1_epi32(row.sum), zero = _mm512_set1_epi32(row.zero);
    const __m512 step = _mm512_set1_ps(row.step);
    for (int j = 0; j < columns; j += kLanes) {
      const int left = columns - j;
      const __mmask16 mask = static_cast<__mmask16>(left < kLanes ? (1 << left) - 1 : 0xFFFF);
      const __m512i shifts = _mm512_mullo_epi32(sum, _mm512_loadu_si512(c.shift + j));
      const __m512i zeros = _mm512_mullo_epi32(zero, _mm512_loadu_si512(c.sum + j));
      const __m512i total = _mm512_add_epi32(_mm512_loadu_si512(acc + j), _mm512_add_epi32(shifts, zeros));
      __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(total), _mm512_mul_ps(step, _mm512_loadu_ps(c.step + j)));
      if (c.first != nullptr)
        y = _mm512_add_ps(y, _mm512_mul_ps(_mm512_set1_ps(row.first), _mm512_loadu_ps(c.first + j)));
      if (c.second != nullptr)
        y = _mm512_add_ps(y, _mm512_mul_ps(_mm512_set1_ps(row.second), _mm512_loadu_ps(c.second + j)));
      if (c.bias != nullptr) y = _mm512_add_ps(y, _mm512_loadu_ps(c.bias + j));
      _mm512_mask_storeu_ps(row.out + j, mask, y);
    }
  }
}

// Rows and columns of a 4 x 4 matrix of 128-bit lanes change places.
__attribute__((always_inline)) inline void transpose_lanes(__m512i& a, __m512i& b, __m512i& c, __m512i& d) {
  const __m512i ab0 = _mm512_shuffle_i64x2(a, b, 0x44), ab2 = _mm512_shuffle_i64x2(a, b, 0xEE);
  const __m512i cd0 = _mm512_shuffle_i64x2(c, d, 0x44), cd2 = _mm512_shuffle_i64x2(c, d, 0xEE);
  a = _mm512_shuffle_i64x2(ab0, cd0, 0x88);
  b = _mm512_shuffle_i64x2(ab0, cd0, 0xDD);
  c = _mm512_shuffle_i64x2(ab2, cd2, 0x88);
  d = _mm512_shuffle_i64x2(ab2, cd2, 0xDD);
}

void transpose(const void* in, std::int64_t in_stride, std::int64_t rows, std::int64_t columns, std::uint32_t flip,
               void* out, std::int64_t out_stride) {
  const char* from = static_cast<const char*>(in);
  char* to = static_cast<char*>(out);
  const __m512i flips = _mm512_set1_epi32(static_cast<int>(flip));
  for (std::int64_t i = 0; i < rows; i += 16)
    for (std::int64_t j = 0; j < columns; j += 16) {
      const std::int64_t height = rows - i < 16 ? rows - i : 16, width = columns - j < 16 ? columns - j : 16;
      const __mmask16 in_mask = static_cast<__mmask16>((1u << width) - 1);
      const __mmask16 out_mask = static_cast<__mmask16>((1u << height) - 1);
      __m512i r[16];
      for (int k = 0; k < 16; ++k)
        r[k] = k < height ? _mm512_maskz_loadu_epi32(in_mask, from + (i + k) * in_stride + 4 * j) : flips;
      // Lane l of q[k + n] holds column 4 l + n of rows k..k+3, k a multiple of 4.
      __m512i q[16];
      for (int k = 0; k < 16; k += 4) {
        const __m512i lo0 = _mm512_unpacklo_epi32(r[k], r[k + 1]), hi0 = _mm512_unpackhi_epi32(r[k], r[k + 1]);
        const __m512i lo1 = _mm512_unpacklo_epi32(r[k + 2], r[k + 3]), hi1 = _mm512_unpackhi_epi32(r[k + 2], r[k + 3]);
        q[k] = _mm512_unpacklo_epi64(lo0, lo1);
        q[k + 1] = _mm512_unpackhi_epi64(lo0, lo1);
        q[k + 2] = _mm512_unpacklo_epi64(hi0, hi1);
        q[k + 3] = _mm512_unpackhi_epi64(hi0, hi1);
      }
      for (int n = 0; n < 4; ++n) {
        transpose_lanes(q[n], q[n + 4], q[n + 8], q[n + 12]);
        for (int l = 0; l < 4; ++l)
          if (4 * l + n < width)
            _mm512_mask_storeu_epi32(to + (j + 4 * l + n) * out_stride + 4 * i, out_mask,
                                     _mm512_xor_si512(q[n + 4 * l], flips));
      }
    }
}

void interleave(const std::uint8_t* const* in, int count, std::uint8_t flip, std::uint8_t* out, std::int64_t stride,
                std::int32_t* sums) {
  const __mmask64 mask = count < kPanel ? (1ULL << count) - 1 : ~0ULL;
  const auto load = [mask](const std::uint8_t* p) {
    return p == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi8(mask, p);
  };
  const __m512i r0 = load(in[0]), r1 = load(in[1]), r2 = load(in[2]), r3 = load(in[3]);
  const __m512i lo0 = _mm512_unpacklo_epi8(r0, r1), hi0 = _mm512_unpackhi_epi8(r0, r1);
  const __m512i lo1 = _mm512_unpacklo_epi8(r2, r3), hi1 = _mm512_unpackhi_epi8(r2, r3);
  // Lane l of q[n] holds columns 16 l + 4 n .. 16 l + 4 n + 3.
  __m512i q0 = _mm512_unpacklo_epi16(lo0, lo1), q1 = _mm512_unpackhi_epi16(lo0, lo1);
  __m512i q2 = _mm512_unpacklo_epi16(hi0, hi1), q3 = _mm512_unpackhi_epi16(hi0, hi1);
  transpose_lanes(q0, q1, q2, q3);
  int flips = 0;
  for (int k = 0; k < 4; ++k) flips |= in[k] == nullptr ? 0 : flip << (8 * k);
  const __m512i flip4 = _mm512_set1_epi32(flips);
  const auto store = [&](int j, __m512i q) {
    // Two bytes, then two pairs: no sum saturates.
    const __m512i pairs = _mm512_maddubs_epi16(q, _mm512_set1_epi8(1));
    const __m512i four = _mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
    _mm512_storeu_si512(sums + j * kLanes, _mm512_add_epi32(_mm512_loadu_si512(sums + j * kLanes), four));
    _mm512_storeu_si512(out + j * stride, _mm512_xor_si512(q, flip4));
  };
  store(0, q0);
  if (count > 16) store(1, q1);
  if (count > 32) store(2, q2);
  if (count > 48) store(3, q3);
}

void row_sums(const std::uint8_t* in, std::int64_t stride, std::int64_t count, std::int64_t bytes, std::int32_t* out) {
  const std::int64_t whole = bytes / 64 * 64;
  const __mmask64 mask = (1ULL << (bytes - whole)) - 1;
  const __m512i none = _mm512_setzero_si512();
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint8_t* row = in + i * stride;
    __m512i sum = none;
    for (std::int64_t j = 0; j < whole; j += 64)
      sum = _mm512_add_epi64(sum, _mm512_sad_epu8(_mm512_loadu_si512(row + j), none));
    if (mask != 0) sum = _mm512_add_epi64(sum, _mm512_sad_epu8(_mm512_maskz_loadu_epi8(mask, row + whole), none));
    const __m256i half = _mm256_add_epi64(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
    const __m128i quarter = _mm_add_epi64(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    out[i] = _mm_cvtsi128_si32(_mm_add_epi64(quarter, _mm_unpackhi_epi64(quarter, quarter)));
  }
}

}  // namespace avx512f
}  // namespace
}  // namespace fqtstats::convolution8
