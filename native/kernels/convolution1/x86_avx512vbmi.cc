// AVX-512 with VPOPCNTDQ, VBMI and VNNI.
//
// popcount: 6 rows x 32 columns, 24 accumulators of 8 64-bit sums; and, vpopcntq, vpaddq per 512 bits.
// lookup: 8 rows x 2 blocks of 16 columns. vpermb looks up 16 columns x 4 nibbles at once: a byte of a block is the
// nibble plus 16 times its place j, a table is the 4 x 16 subset sums. Four look-ups, at most 60 each, add up in a
// byte; vpdpbusd then adds the four nibbles of a column to its 32-bit sum.
#include "kernels/convolution1/element.h"
#include "kernels/convolution1/x86.h"

namespace fqtstats::convolution1 {

// sums[0..31] = or += two registers.
FQTSTATS_INLINE void put(std::int32_t* sums, bool add, __m512i low, __m512i high) {
  if (add) {
    low = _mm512_add_epi32(low, _mm512_loadu_si512(sums));
    high = _mm512_add_epi32(high, _mm512_loadu_si512(sums + 16));
  }
  _mm512_storeu_si512(sums, low);
  _mm512_storeu_si512(sums + 16, high);
}

// Two registers of 64-bit sums in one.
FQTSTATS_INLINE __m512i narrow(__m512i low, __m512i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi64_epi32(low)), _mm512_cvtepi64_epi32(high), 1);
}

FQTSTATS_INLINE __m512i add_bits(__m512i sum, __m512i a, __m512i b) {
  return _mm512_add_epi64(sum, _mm512_popcnt_epi64(_mm512_and_si512(a, b)));
}

static void popcount(const std::uint8_t* const* source, const Runs& runs, const std::uint8_t* panel, bool add,
                     std::int32_t* sums, std::int64_t ld) {
  constexpr int kRows = kPopcountRows;
  __m512i c0[kRows], c1[kRows], c2[kRows], c3[kRows];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) c0[i] = c1[i] = c2[i] = c3[i] = _mm512_setzero_si512();
  for (std::int64_t r = 0; r < runs.count; ++r) {
    const std::uint8_t* a[kRows];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) a[i] = source[i] + runs.offset[r];
    for (std::int64_t k = 0; k < runs.length; ++k, panel += kPopcountPanel) {
      const __m512i b0 = _mm512_loadu_si512(panel), b1 = _mm512_loadu_si512(panel + 64);
      const __m512i b2 = _mm512_loadu_si512(panel + 128), b3 = _mm512_loadu_si512(panel + 192);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const __m512i x = _mm512_set1_epi64(static_cast<long long>(load64(a[i] + 8 * k)));
        c0[i] = add_bits(c0[i], x, b0);
        c1[i] = add_bits(c1[i], x, b1);
        c2[i] = add_bits(c2[i], x, b2);
        c3[i] = add_bits(c3[i], x, b3);
      }
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) put(sums + i * ld, add, narrow(c0[i], c1[i]), narrow(c2[i], c3[i]));
}

template <int kBits>
static std::int32_t unpack_bits(const std::uint8_t* packed, std::int64_t n, std::uint8_t* codes) {
  constexpr std::uint64_t kEvery = kBits == 4   ? 0x1C1814100C080400
                                   : kBits == 2 ? 0x0E0C0A0806040200
                                                : 0x0706050403020100;
  const __m512i shifts = _mm512_set1_epi64(static_cast<long long>(kEvery)), mask = _mm512_set1_epi8((1 << kBits) - 1);
  __m512i sum = _mm512_setzero_si512();
  for (std::int64_t i = 0; i < n; i += 64, packed += 8 * kBits, codes += 64) {
    const std::int64_t left = n - i, bytes = left >= 64 ? 8 * kBits : (left * kBits + 7) / 8;
    const __m256i word = _mm256_maskz_loadu_epi8(static_cast<__mmask32>((1ULL << bytes) - 1), packed);
    __m512i wide;  // the codes of each 64-bit slot, at its bottom
    if constexpr (kBits == 4)
      wide = _mm512_cvtepu32_epi64(word);
    else if constexpr (kBits == 2)
      wide = _mm512_cvtepu16_epi64(_mm256_castsi256_si128(word));
    else
      wide = _mm512_cvtepu8_epi64(_mm256_castsi256_si128(word));
    const __mmask64 valid = left >= 64 ? ~0ULL : (1ULL << left) - 1;
    const __m512i out =
        _mm512_maskz_mov_epi8(valid, _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, wide), mask));
    _mm512_storeu_si512(codes, out);
    sum = _mm512_add_epi64(sum, _mm512_sad_epu8(out, _mm512_setzero_si512()));
  }
  return static_cast<std::int32_t>(_mm512_reduce_add_epi64(sum));
}

static std::int32_t unpack(const std::uint8_t* packed, int bits, std::int64_t n, std::uint8_t* codes) {
  return bits == 4   ? unpack_bits<4>(packed, n, codes)
         : bits == 2 ? unpack_bits<2>(packed, n, codes)
                     : unpack_bits<1>(packed, n, codes);
}

static void tables(const std::uint8_t* codes, std::int64_t n, std::int64_t stride, std::uint8_t* out) {
  // Lane j of a table sums codes 4 j + b over the bits b of the byte's place in the lane.
  const __m512i b0 =
      _mm512_set_epi32(0x0C0C0C0C, 0x0C0C0C0C, 0x0C0C0C0C, 0x0C0C0C0C, 0x08080808, 0x08080808, 0x08080808, 0x08080808,
                       0x04040404, 0x04040404, 0x04040404, 0x04040404, 0, 0, 0, 0);
  const __m512i one = _mm512_set1_epi8(1);
  const __m512i b1 = _mm512_add_epi8(b0, one), b2 = _mm512_add_epi8(b1, one), b3 = _mm512_add_epi8(b2, one);
  for (std::int64_t i = 0; i < n; ++i, codes += 16, out += stride) {
    const __m512i x = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const __m512i low = _mm512_add_epi8(_mm512_maskz_shuffle_epi8(0xAAAAAAAAAAAAAAAA, x, b0),
                                        _mm512_maskz_shuffle_epi8(0xCCCCCCCCCCCCCCCC, x, b1));
    const __m512i high = _mm512_add_epi8(_mm512_maskz_shuffle_epi8(0xF0F0F0F0F0F0F0F0, x, b2),
                                         _mm512_maskz_shuffle_epi8(0xFF00FF00FF00FF00, x, b3));
    _mm512_storeu_si512(out, _mm512_add_epi8(low, high));
  }
}

static void blocks(const std::uint8_t* const* row, std::int64_t offset, std::uint8_t* low, std::uint8_t* high) {
  // Byte 16 l + 4 m + d of g[j] is nibble j of column 16 m + 4 l + d, so that interleaving the bytes of the four within
  // 128-bit lanes leaves columns 16 m ... 16 m + 15 in register m.
  const __m512i order =
      _mm512_set_epi32(0x3F3E3D3C, 0x2F2E2D2C, 0x1F1E1D1C, 0x0F0E0D0C, 0x3B3A3938, 0x2B2A2928, 0x1B1A1918, 0x0B0A0908,
                       0x37363534, 0x27262524, 0x17161514, 0x07060504, 0x33323130, 0x23222120, 0x13121110, 0x03020100);
  __m512i g[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    __m512i nibble = _mm512_set1_epi8(static_cast<char>(16 * j));
#pragma GCC unroll 4
    for (int b = 0; b < 4; ++b)
      nibble = _mm512_mask_add_epi8(nibble, _cvtu64_mask64(load64(row[4 * j + b] + offset)), nibble,
                                    _mm512_set1_epi8(static_cast<char>(1 << b)));
    g[j] = _mm512_permutexvar_epi8(order, nibble);
  }
  const __m512i low01 = _mm512_unpacklo_epi8(g[0], g[1]), high01 = _mm512_unpackhi_epi8(g[0], g[1]);
  const __m512i low23 = _mm512_unpacklo_epi8(g[2], g[3]), high23 = _mm512_unpackhi_epi8(g[2], g[3]);
  _mm512_storeu_si512(low, _mm512_unpacklo_epi16(low01, low23));
  _mm512_storeu_si512(low + 256, _mm512_unpackhi_epi16(low01, low23));
  _mm512_storeu_si512(high, _mm512_unpacklo_epi16(high01, high23));
  _mm512_storeu_si512(high + 256, _mm512_unpackhi_epi16(high01, high23));
}

// Into a register: as operands from memory, two look-ups in one table would load it twice.
FQTSTATS_INLINE __m512i load_once(const std::uint8_t* p) {
  __m512i x = _mm512_loadu_si512(p);
  asm("" : "+v"(x));
  return x;
}

// Keeps the compiler from adding in another order, which would need more registers than there are.
FQTSTATS_INLINE void keep(__m512i& x, __m512i& y) { asm("" : "+v"(x), "+v"(y)); }

template <int kRows>
static void lookup(const std::uint8_t* const* source, const Runs& runs, const std::uint8_t* panel, bool add,
                   std::int32_t* sums, std::int64_t ld) {
  const __m512i one = _mm512_set1_epi8(1);
  __m512i c0[kRows], c1[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) c0[i] = c1[i] = _mm512_setzero_si512();
  for (std::int64_t r = 0; r < runs.count; ++r) {
    asm volatile("" ::: "memory");  // the pointers are read anew: cheaper than keeping 8 more registers alive
    const std::uint8_t* a[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) a[i] = source[i] + runs.offset[r];
    for (std::int64_t k = 0; k < runs.length * kLookupStep; k += kLookupStep, panel += kLookupPanel) {
      const __m512i x0 = _mm512_loadu_si512(panel), x1 = _mm512_loadu_si512(panel + 64);
      const __m512i x2 = _mm512_loadu_si512(panel + 128), x3 = _mm512_loadu_si512(panel + 192);
      const __m512i y0 = _mm512_loadu_si512(panel + 256), y1 = _mm512_loadu_si512(panel + 320);
      const __m512i y2 = _mm512_loadu_si512(panel + 384), y3 = _mm512_loadu_si512(panel + 448);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        // In this order few registers live at a time: 16 sums, 8 blocks, a table, two partial sums.
        __m512i t = load_once(a[i] + k);
        __m512i x = _mm512_permutexvar_epi8(x0, t), y = _mm512_permutexvar_epi8(y0, t);
        t = load_once(a[i] + k + 64);
        x = _mm512_add_epi8(x, _mm512_permutexvar_epi8(x1, t));
        y = _mm512_add_epi8(y, _mm512_permutexvar_epi8(y1, t));
        keep(x, y);
        t = load_once(a[i] + k + 128);
        x = _mm512_add_epi8(x, _mm512_permutexvar_epi8(x2, t));
        y = _mm512_add_epi8(y, _mm512_permutexvar_epi8(y2, t));
        t = load_once(a[i] + k + 192);
        x = _mm512_add_epi8(x, _mm512_permutexvar_epi8(x3, t));
        y = _mm512_add_epi8(y, _mm512_permutexvar_epi8(y3, t));
        c0[i] = _mm512_dpbusd_epi32(c0[i], x, one);
        c1[i] = _mm512_dpbusd_epi32(c1[i], y, one);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) put(sums + i * ld, add, c0[i], c1[i]);
}

namespace {

struct Avx512 {
  using Int = __m512i;
  using Float = __m512;
  static constexpr int kLanes = 16;

  struct All {};  // without a mask, which is faster
  FQTSTATS_INLINE __mmask16 first(std::int64_t n) { return static_cast<__mmask16>((1 << n) - 1); }

  FQTSTATS_INLINE Int load(const std::int32_t* p, All) { return _mm512_loadu_si512(p); }
  FQTSTATS_INLINE Int load(const std::int32_t* p, __mmask16 mask) { return _mm512_maskz_loadu_epi32(mask, p); }
  FQTSTATS_INLINE Float load(const float* p, All) { return _mm512_loadu_ps(p); }
  FQTSTATS_INLINE Float load(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
  FQTSTATS_INLINE void store(float* p, Float x, All) { _mm512_storeu_ps(p, x); }
  FQTSTATS_INLINE void store(float* p, Float x, __mmask16 mask) { _mm512_mask_storeu_ps(p, mask, x); }
  FQTSTATS_INLINE Int fill(std::int32_t value) { return _mm512_set1_epi32(value); }
  FQTSTATS_INLINE Float fill(float value) { return _mm512_set1_ps(value); }
  FQTSTATS_INLINE Int add(Int x, Int y) { return _mm512_add_epi32(x, y); }
  FQTSTATS_INLINE Int sub(Int x, Int y) { return _mm512_sub_epi32(x, y); }
  FQTSTATS_INLINE Int mul(Int x, Int y) { return _mm512_mullo_epi32(x, y); }
  FQTSTATS_INLINE Float add(Float x, Float y) { return _mm512_add_ps(x, y); }
  FQTSTATS_INLINE Float mul(Float x, Float y) { return _mm512_mul_ps(x, y); }
  FQTSTATS_INLINE Float to_float(Int x) { return _mm512_cvtepi32_ps(x); }
};

}  // namespace

extern const Kernel avx512vbmi{
    "avx512vbmi", cpu::Isa::avx512vbmi, count, popcount, unpack, transpose, tables, blocks, lookup<8>,
    lookup<1>,    finish<Avx512>};

}  // namespace fqtstats::convolution1
