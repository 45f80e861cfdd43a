// What the AVX-512 variants share: packing, sums and the step from sums to results. For ISA files only: all static.
#pragma once

#include <immintrin.h>

#include <cstring>
#include <optional>

#include "kernels/product8/product8.h"

namespace fqtstats::product8 {
namespace {

#define FQTSTATS_INLINE __attribute__((always_inline)) static inline

FQTSTATS_INLINE __mmask64 first_bytes(std::int64_t count) {
  return count >= 64 ? ~__mmask64{0} : count <= 0 ? 0 : ~__mmask64{0} >> (64 - count);
}

FQTSTATS_INLINE __mmask16 first_lanes(std::int64_t count) {
  return static_cast<__mmask16>(count >= kLanes ? 0xFFFF : count <= 0 ? 0 : 0xFFFF >> (kLanes - count));
}

// How codes become bytes: their flip, or for 4 bits the bytes that they stand for, in every lane of 16.
FQTSTATS_INLINE __m512i map_of(const Operand& op) {
  if (op.bits != 4) return _mm512_set1_epi8(static_cast<char>(op.flip));
  const __m128i themselves = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  if (op.values == nullptr) return _mm512_broadcast_i32x4(themselves);
  const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(op.values));
  return _mm512_broadcast_i32x4(_mm_xor_si128(values, _mm_set1_epi8(static_cast<char>(op.flip))));
}

// `count` codes (64 at most) from a byte boundary on, mapped, one per byte; 0 beyond.
template <int kBits>
FQTSTATS_INLINE __m512i load_codes(const std::uint8_t* from, std::int64_t count, __m512i map) {
  const __mmask64 valid = first_bytes(count), bytes = first_bytes((count * kBits + 7) / 8);
  if constexpr (kBits == 8) {
    return _mm512_maskz_mov_epi8(valid, _mm512_xor_si512(map, _mm512_maskz_loadu_epi8(valid, from)));
  } else if constexpr (kBits == 4) {
    const __m512i x = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(static_cast<__mmask32>(bytes), from));
    const __m512i codes = _mm512_and_si512(_mm512_or_si512(x, _mm512_slli_epi16(x, 4)), _mm512_set1_epi8(15));
    return _mm512_maskz_shuffle_epi8(valid, map, codes);
  } else if constexpr (kBits == 2) {
    __m512i x = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(static_cast<__mmask16>(bytes), from));
    x = _mm512_or_si512(x, _mm512_slli_epi32(x, 12));
    x = _mm512_or_si512(x, _mm512_slli_epi32(x, 6));
    return _mm512_maskz_mov_epi8(valid, _mm512_and_si512(x, _mm512_set1_epi8(3)));
  } else {
    const __m128i x = _mm_maskz_loadu_epi8(static_cast<__mmask16>(bytes), from);
    return _mm512_maskz_set1_epi8(valid & static_cast<__mmask64>(_mm_cvtsi128_si64(x)), 1);
  }
}

// A 16 x 16 transpose of 32-bit words.
FQTSTATS_INLINE void transpose(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xDD);
    t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xDD);
  }
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xDD);
  }
}

// Four rows of 64 codes to 64 words of four: out + 64 j gets words 16 j to 16 j + 15, for j < vectors.
FQTSTATS_INLINE void interleave(const __m512i r[4], int vectors, std::uint8_t* out) {
  const __m512i a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpackhi_epi8(r[0], r[1]);
  const __m512i c = _mm512_unpacklo_epi8(r[2], r[3]), d = _mm512_unpackhi_epi8(r[2], r[3]);
  // Lane l of t_i holds words 16 l + 4 i to 16 l + 4 i + 3.
  const __m512i t0 = _mm512_unpacklo_epi16(a, c), t1 = _mm512_unpackhi_epi16(a, c);
  const __m512i t2 = _mm512_unpacklo_epi16(b, d), t3 = _mm512_unpackhi_epi16(b, d);
  const __m512i u0 = _mm512_shuffle_i32x4(t0, t1, 0x44), u1 = _mm512_shuffle_i32x4(t2, t3, 0x44);
  _mm512_storeu_si512(out, _mm512_shuffle_i32x4(u0, u1, 0x88));
  if (vectors > 1) _mm512_storeu_si512(out + 64, _mm512_shuffle_i32x4(u0, u1, 0xDD));
  if (vectors <= 2) return;
  const __m512i v0 = _mm512_shuffle_i32x4(t0, t1, 0xEE), v1 = _mm512_shuffle_i32x4(t2, t3, 0xEE);
  _mm512_storeu_si512(out + 128, _mm512_shuffle_i32x4(v0, v1, 0x88));
  if (vectors > 3) _mm512_storeu_si512(out + 192, _mm512_shuffle_i32x4(v0, v1, 0xDD));
}

// Words of four k for `columns` columns, k0 <= k < k0 + kc: groups of `vectors` * 64 bytes.
template <int kBits>
static void words_of_columns(const Operand& op, std::int64_t first, int columns, int vectors, std::int64_t k0,
                             std::int64_t kc, std::uint8_t* out) {
  const __m512i map = map_of(op);
  const std::uint8_t* from = op.data + k0 * op.stride + first * kBits / 8;
  for (std::int64_t k = 0; k < kc; k += 4, out += 64 * vectors) {
    __m512i r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      r[i] = k + i < kc ? load_codes<kBits>(from + (k + i) * op.stride, columns, map) : _mm512_setzero_si512();
    interleave(r, vectors, out);
  }
}

// The same from codes that are contiguous along k; nibbles stay packed.
template <int kBits, bool kNibbles>
static void words_of_rows(const Operand& op, std::int64_t first, int columns, int vectors, std::int64_t k0,
                          std::int64_t kc, std::uint8_t* out) {
  static_assert(!kNibbles || kBits == 4);
  constexpr int kPerWord = kNibbles ? 8 : 4, kStep = 16 * kPerWord;
  const __m512i map = map_of(op);
  const std::int64_t groups = (kc + kPerWord - 1) / kPerWord;
  for (std::int64_t k = 0; k < kc; k += kStep)
    for (int j = 0; j < vectors; ++j) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const int column = 16 * j + i;
        const std::uint8_t* from = op.data + (first + column) * op.stride + (k0 + k) * kBits / 8;
        if (column >= columns) {
          r[i] = _mm512_setzero_si512();
        } else if constexpr (kNibbles) {
          // From (k, k+1), (k+2, k+3), ... to (k, k+4), (k+1, k+5), ... in every word.
          const __m512i low = load_codes<4>(from, kc - k, map);
          const __m512i high = load_codes<4>(from + 32, kc - k - 64, map);
          const __m512i even =
              _mm512_castps_si512(_mm512_shuffle_ps(_mm512_castsi512_ps(low), _mm512_castsi512_ps(high), 0x88));
          const __m512i odd =
              _mm512_castps_si512(_mm512_shuffle_ps(_mm512_castsi512_ps(low), _mm512_castsi512_ps(high), 0xDD));
          const __m512i words = _mm512_or_si512(even, _mm512_slli_epi16(odd, 4));
          // 64-bit parts: low 0, high 0, low 1, high 1, ...
          r[i] = _mm512_permutexvar_epi64(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), words);
        } else {
          r[i] = load_codes<kBits>(from, kc - k, map);
        }
      }
      transpose(r);
      const std::int64_t group = k / kPerWord, left = groups - group;
      std::uint8_t* to = out + (group * vectors + j) * 64;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (i < left) _mm512_storeu_si512(to + 64 * i * vectors, r[i]);
    }
}

template <int kBits>
static void words(const Operand& op, std::int64_t first, int columns, int vectors, std::int64_t k0, std::int64_t kc,
                  bool nibbles, std::uint8_t* out) {
  if (!op.inner) return words_of_columns<kBits>(op, first, columns, vectors, k0, kc, out);
  if constexpr (kBits == 4)
    if (nibbles) return words_of_rows<4, true>(op, first, columns, vectors, k0, kc, out);
  words_of_rows<kBits, false>(op, first, columns, vectors, k0, kc, out);
}

static void pack_words(const Operand& op, std::int64_t first, int columns, int vectors, std::int64_t k0,
                       std::int64_t kc, bool nibbles, std::uint8_t* out) {
  switch (op.bits) {
    case 8:
      return words<8>(op, first, columns, vectors, k0, kc, nibbles, out);
    case 4:
      return words<4>(op, first, columns, vectors, k0, kc, nibbles, out);
    case 2:
      return words<2>(op, first, columns, vectors, k0, kc, nibbles, out);
    default:
      return words<1>(op, first, columns, vectors, k0, kc, nibbles, out);
  }
}

static void pack_panel(const Operand& op, std::int64_t first, int columns, std::int64_t k0, std::int64_t kc,
                       bool nibbles, std::uint8_t* out, std::int32_t* sums) {
  const int vectors = (columns + kLanes - 1) / kLanes;
  pack_words(op, first, columns, vectors, k0, kc, nibbles, out);
  const std::int64_t groups = nibbles ? (kc + 7) / 8 : (kc + 3) / 4;
  const __m512i ones8 = _mm512_set1_epi8(1), ones16 = _mm512_set1_epi16(1), low = _mm512_set1_epi8(15);
  for (int j = 0; j < vectors; ++j) {
    __m512i sum = _mm512_setzero_si512();
    for (std::int64_t g = 0; g < groups; ++g) {
      __m512i x = _mm512_loadu_si512(out + (g * vectors + j) * 64);
      if (nibbles) x = _mm512_add_epi8(_mm512_and_si512(x, low), _mm512_and_si512(_mm512_srli_epi16(x, 4), low));
      sum = _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(ones8, x), ones16));
    }
    _mm512_storeu_si512(sums + kLanes * j, sum);
  }
}

template <int kBits>
static void copy_rows(const Operand& op, std::int64_t first, std::int64_t rows, std::int64_t k0, std::int64_t kc,
                      std::uint8_t* out, std::int64_t ldo) {
  const __m512i map = map_of(op);
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::uint8_t* from = op.data + (first + i) * op.stride + k0 * kBits / 8;
    std::uint8_t* to = out + i * ldo;
    for (std::int64_t k = 0; k < kc; k += 64)
      _mm512_mask_storeu_epi8(to + k, first_bytes((kc - k + 3) / 4 * 4),
                              load_codes<kBits>(from + k * kBits / 8, kc - k, map));
  }
}

static void pack_rows(const Operand& op, std::int64_t first, std::int64_t rows, std::int64_t k0, std::int64_t kc,
                      std::uint8_t* out, std::int64_t ldo) {
  if (op.inner) {
    switch (op.bits) {
      case 8:
        return copy_rows<8>(op, first, rows, k0, kc, out, ldo);
      case 4:
        return copy_rows<4>(op, first, rows, k0, kc, out, ldo);
      case 2:
        return copy_rows<2>(op, first, rows, k0, kc, out, ldo);
      default:
        return copy_rows<1>(op, first, rows, k0, kc, out, ldo);
    }
  }
  // A transpose by way of words of four k: 64 rows times 64 k stay in the first-level cache.
  alignas(64) std::uint8_t tile[64 * 64];
  for (std::int64_t i0 = 0; i0 < rows; i0 += 64) {
    const int count = static_cast<int>(rows - i0 < 64 ? rows - i0 : 64), vectors = (count + kLanes - 1) / kLanes;
    for (std::int64_t k = 0; k < kc; k += 64) {
      const std::int64_t depth = kc - k < 64 ? kc - k : 64, groups = (depth + 3) / 4;
      pack_words(op, first + i0, count, vectors, k0 + k, depth, false, tile);
      for (int j = 0; j < vectors; ++j) {
        __m512i r[16];
#pragma GCC unroll 16
        for (int g = 0; g < 16; ++g)
          r[g] = g < groups ? _mm512_load_si512(tile + (g * vectors + j) * 64) : _mm512_setzero_si512();
        transpose(r);
        std::uint8_t* to = out + (i0 + kLanes * j) * ldo + k;
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          if (kLanes * j + i < count) _mm512_mask_storeu_epi8(to + i * ldo, first_bytes(4 * groups), r[i]);
      }
    }
  }
}

static void row_sums(const std::uint8_t* a, std::int64_t lda, std::int64_t rows, std::int64_t kc, std::int64_t* sums) {
  const __m512i zero = _mm512_setzero_si512();
  for (std::int64_t i = 0; i < rows; ++i) {
    __m512i sum = zero;
    std::int64_t k = 0;
    for (; k + 64 <= kc; k += 64)
      sum = _mm512_add_epi64(sum, _mm512_sad_epu8(_mm512_loadu_si512(a + i * lda + k), zero));
    if (k < kc)
      sum = _mm512_add_epi64(sum, _mm512_sad_epu8(_mm512_maskz_loadu_epi8(first_bytes(kc - k), a + i * lda + k), zero));
    sums[i] += _mm512_reduce_add_epi64(sum);
  }
}

struct RowConstants {
  std::int32_t zero[kTileRows], sum[kTileRows];
  std::int32_t correction[kTileRows];  // zb Sa, for one zb
  float step[kTileRows], u[kTileRows], offset[kTileRows];

  // `shared`: steps, zero points and offsets of the first row only, which has those of all.
  RowConstants(const Finish& f, std::int64_t first, int rows, bool shared) {
    for (int i = 0; i < rows; ++i) {
      const std::int64_t m = first + i, g = m * f.stride_a;
      sum[i] = static_cast<std::int32_t>(f.sum_a[m]);
      correction[i] =
          static_cast<std::int32_t>(static_cast<std::uint32_t>(sum[i]) * static_cast<std::uint32_t>(f.zero_b[0]));
      if (shared && i > 0) continue;
      zero[i] = (f.zero_a ? f.zero_a[g] : 0) + f.shift_a;
      step[i] = f.step_a ? f.step_a[g] : 0;
      offset[i] = f.offset_a ? f.offset_a[g] : 0;
      u[i] = static_cast<float>(static_cast<double>(step[i]) * static_cast<double>(f.sum_a[m] - f.k * zero[i]));
    }
  }
};

template <bool kStream>
FQTSTATS_INLINE void write(std::int32_t* to, __mmask16 valid, __m512i v) {
  if constexpr (kStream)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), v);
  else
    _mm512_mask_storeu_epi32(to, valid, v);
}

// c = sums, plus c itself where `keep` is all ones and they are not streamed.
template <int kVectors>
FQTSTATS_INLINE void store_row(std::int32_t* c, const __m512i* sums, __mmask16 keep, __mmask16 last, bool stream) {
  if (stream) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) write<true>(c + kLanes * j, last, sums[j]);
    return;
  }
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    const __mmask16 valid = j == kVectors - 1 ? last : static_cast<__mmask16>(0xFFFF);
    const __m512i before = _mm512_maskz_loadu_epi32(valid & keep, c + kLanes * j);
    _mm512_mask_storeu_epi32(c + kLanes * j, valid, _mm512_add_epi32(sums[j], before));
  }
}

// Results from sums in registers, for a uniform finish of sums that are complete; c is at `column`.
template <bool kStream, int kRows, int kVectors>
FQTSTATS_INLINE void finish_sums(const Finish& f, const RowConstants& row, std::int64_t column,
                                 const __m512i (&sums)[kRows][kVectors], std::int32_t* c, std::int64_t ldc,
                                 __mmask16 last) {
  const bool zero_a = f.zero_a || f.shift_a;
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    const __mmask16 valid = j == kVectors - 1 ? last : static_cast<__mmask16>(0xFFFF);
    const std::int64_t n = column + kLanes * j;
    const __m512 step = _mm512_mul_ps(_mm512_loadu_ps(f.step_b + n), _mm512_set1_ps(row.step[0]));
    __m512i zero = _mm512_setzero_si512();
    if (zero_a) zero = _mm512_mullo_epi32(_mm512_loadu_si512(f.sum_b + n), _mm512_set1_epi32(row.zero[0]));
    // Adding -0 changes no number.
    __m512 shift = _mm512_set1_ps(-0.0F), bias = shift;
    if (f.offset_a) shift = _mm512_mul_ps(_mm512_loadu_ps(f.v + n), _mm512_set1_ps(row.offset[0]));
    if (f.bias) bias = _mm512_maskz_loadu_ps(valid, f.bias + n);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const __m512i p = _mm512_sub_epi32(_mm512_sub_epi32(sums[i][j], zero), _mm512_set1_epi32(row.correction[i]));
      const __m512 y = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(p), step), shift);
      write<kStream>(c + i * ldc + kLanes * j, valid, _mm512_castps_si512(_mm512_add_ps(y, bias)));
    }
  }
}

// What becomes of a tile's sums: results where there are the rows' constants, else sums in c. c is `first` vectors
// into the block.
template <int kRows, int kVectors>
FQTSTATS_INLINE void store_tile(const Block& b, const RowConstants* row, const __m512i (&sums)[kRows][kVectors],
                                int first, std::int32_t* c, __mmask16 last) {
  if (row) {
    const std::int64_t column = b.column + kLanes * first;
    b.stream ? finish_sums<true>(*b.finish, *row, column, sums, c, b.ldc, last)
             : finish_sums<false>(*b.finish, *row, column, sums, c, b.ldc, last);
    return;
  }
  const __mmask16 keep = b.add ? 0xFFFF : 0;
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) store_row<kVectors>(c + i * b.ldc, sums[i], keep, last, b.stream);
}

// Sums to results c, for the rows of one tile: the columns' constants stay in registers.
template <bool kStream>
__attribute__((noinline)) static void finish_tile(const Finish& f, const RowConstants& row, std::int64_t column,
                                                  int rows, int columns, const std::int32_t* sums, std::int64_t lds,
                                                  std::int32_t* c, std::int64_t ldc) {
  const bool zero_a = f.zero_a || f.shift_a;
  for (int j = 0; j < columns; j += kLanes) {
    const __mmask16 valid = first_lanes(columns - j);
    const std::int64_t n = column + j;
    const __m512i sum_b = _mm512_loadu_si512(f.sum_b + n), zero_b = _mm512_loadu_si512(f.zero_b + n);
    const auto correct = [&](int i) {
      __m512i p = _mm512_maskz_loadu_epi32(valid, sums + i * lds + j);
      if (zero_a) p = _mm512_sub_epi32(p, _mm512_mullo_epi32(sum_b, _mm512_set1_epi32(row.zero[i])));
      return _mm512_sub_epi32(p, _mm512_mullo_epi32(zero_b, _mm512_set1_epi32(row.sum[i])));
    };
    if (!f.step_a) {
      for (int i = 0; i < rows; ++i) write<kStream>(c + i * ldc + j, valid, correct(i));
      continue;
    }
    const __m512 none = _mm512_setzero_ps(), sb = _mm512_loadu_ps(f.step_b + n);
    const __m512 ob = f.offset_b ? _mm512_loadu_ps(f.offset_b + n) : none;
    const __m512 v = f.offset_a ? _mm512_loadu_ps(f.v + n) : none;
    const __m512 bias = f.bias ? _mm512_maskz_loadu_ps(valid, f.bias + n) : none;
    for (int i = 0; i < rows; ++i) {
      __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(correct(i)), _mm512_mul_ps(sb, _mm512_set1_ps(row.step[i])));
      if (f.offset_b) y = _mm512_add_ps(y, _mm512_mul_ps(ob, _mm512_set1_ps(row.u[i])));
      if (f.offset_a) y = _mm512_add_ps(y, _mm512_mul_ps(v, _mm512_set1_ps(row.offset[i])));
      if (f.bias) y = _mm512_add_ps(y, bias);
      write<kStream>(c + i * ldc + j, valid, _mm512_castps_si512(y));
    }
  }
}

// Block by block of a tile's height: Tile::run<kRows, kVectors>(block, a, row, c, last) adds the panel's product to c
// or sets it, or with the constants of the rows sets c to the results; `last` masks the last vector's columns.
template <typename Tile, int kVectors>
static void tiles(const Block& block) {
  const __mmask16 last = first_lanes(block.columns - (kVectors - 1) * kLanes);
  alignas(64) std::int32_t tile[kTileRows * kTileColumns];  // sums whose results are streamed
  const bool whole = block.finish && block.finish->uniform && !block.add;
  const bool apart = block.stream && block.finish && !whole;
  Block b = block;
  if (apart) b.stream = false, b.ldc = kTileColumns;
  for (std::int64_t i = 0; i < b.rows; i += kTileRows) {
    const int rows = static_cast<int>(b.rows - i < kTileRows ? b.rows - i : kTileRows);
    const std::uint8_t* a = b.a + i * b.lda;
    std::int32_t* const out = static_cast<std::int32_t*>(block.c) + i * block.ldc;
    std::int32_t* const c = apart ? tile : out;
    std::optional<RowConstants> constants;
    if (b.finish) constants.emplace(*b.finish, b.row + i, rows, whole);
    const RowConstants* const row = whole ? &*constants : nullptr;
    switch (rows) {
      case 6:
        Tile::template run<6, kVectors>(b, a, row, c, last);
        break;
      case 5:
        Tile::template run<5, kVectors>(b, a, row, c, last);
        break;
      case 4:
        Tile::template run<4, kVectors>(b, a, row, c, last);
        break;
      case 3:
        Tile::template run<3, kVectors>(b, a, row, c, last);
        break;
      case 2:
        Tile::template run<2, kVectors>(b, a, row, c, last);
        break;
      default:
        Tile::template run<1, kVectors>(b, a, row, c, last);
    }
    if (!b.finish || whole) continue;
    const auto finish = apart ? finish_tile<true> : finish_tile<false>;
    finish(*b.finish, *constants, b.column, rows, b.columns, c, b.ldc, out, block.ldc);
  }
}

template <typename Tile>
static void multiply_tiles(const Block& b) {
  switch ((b.columns + kLanes - 1) / kLanes) {
    case 4:
      return tiles<Tile, 4>(b);
    case 3:
      return tiles<Tile, 3>(b);
    case 2:
      return tiles<Tile, 2>(b);
    default:
      return tiles<Tile, 1>(b);
  }
}

FQTSTATS_INLINE __m512i broadcast_word(const std::uint8_t* from) {
  std::int32_t word;
  std::memcpy(&word, from, 4);
  return _mm512_set1_epi32(word);
}

}  // namespace
}  // namespace fqtstats::product8
