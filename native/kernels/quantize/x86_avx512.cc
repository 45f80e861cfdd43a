// AVX-512: 16 elements per register, 64 codes at a time; masks for the rest.
#include <immintrin.h>

#include <cstdint>
#include <limits>

#include "kernels/quantize/quantize.h"

namespace fqtstats::quantize {
namespace {

using Bfloat = std::uint16_t;

}  // namespace

static inline __m512 load(const float* x) { return _mm512_loadu_ps(x); }
static inline __m512 load(const float* x, __mmask16 m) { return _mm512_maskz_loadu_ps(m, x); }

static inline __m512 widen(__m256i bfloats) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloats), 16));
}

static inline __m512 load(const Bfloat* x) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }
static inline __m512 load(const Bfloat* x, __mmask16 m) { return widen(_mm256_maskz_loadu_epi16(m, x)); }

// The first `count` of 16 lanes; all of them from 16 on.
static inline __mmask16 lanes(std::int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xFFFF : (1 << count) - 1);
}

// The first `count` of 64 bytes.
static inline __mmask64 bytes(std::int64_t count) { return count >= 64 ? ~0ULL : (1ULL << count) - 1; }

static inline __mmask16 unordered(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }

template <typename T>
static void extremes(const void* data, std::int64_t count, float* low, float* high) {
  const T* x = static_cast<const T*>(data);
  const __m512 infinity = _mm512_set1_ps(std::numeric_limits<float>::infinity());
  __m512 l0 = infinity, l1 = infinity, l2 = infinity, l3 = infinity;
  __m512 h0 = _mm512_set1_ps(-std::numeric_limits<float>::infinity()), h1 = h0, h2 = h0, h3 = h0;
  __mmask16 bad = 0;
  std::int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    const __m512 a = load(x + i), b = load(x + i + 16), c = load(x + i + 32), d = load(x + i + 48);
    l0 = _mm512_min_ps(l0, a);
    h0 = _mm512_max_ps(h0, a);
    l1 = _mm512_min_ps(l1, b);
    h1 = _mm512_max_ps(h1, b);
    l2 = _mm512_min_ps(l2, c);
    h2 = _mm512_max_ps(h2, c);
    l3 = _mm512_min_ps(l3, d);
    h3 = _mm512_max_ps(h3, d);
    bad = static_cast<__mmask16>(bad | unordered(a, b) | unordered(c, d));
  }
  for (; i < count; i += 16) {
    const __mmask16 m = lanes(count - i);
    const __m512 a = load(x + i, m);
    l0 = _mm512_mask_min_ps(l0, m, l0, a);
    h0 = _mm512_mask_max_ps(h0, m, h0, a);
    bad = static_cast<__mmask16>(bad | unordered(a, a));
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  *low = bad ? nan : _mm512_reduce_min_ps(_mm512_min_ps(_mm512_min_ps(l0, l1), _mm512_min_ps(l2, l3)));
  *high = bad ? nan : _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(h0, h1), _mm512_max_ps(h2, h3)));
}

// Four registers of columns at a time, down all rows.
template <typename T>
static void column_extremes(const void* data, std::int64_t rows, std::int64_t stride, std::int64_t columns, float* low,
                            float* high) {
  const __m512 infinity = _mm512_set1_ps(std::numeric_limits<float>::infinity());
  const __m512 nan = _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN());
  for (std::int64_t i = 0; i < columns; i += 64) {
    const T* x = static_cast<const T*>(data) + i;
    const std::int64_t left = columns - i;
    const __mmask16 k0 = lanes(left), k1 = lanes(left < 16 ? 0 : left - 16), k2 = lanes(left < 32 ? 0 : left - 32),
                    k3 = lanes(left < 48 ? 0 : left - 48);
    __m512 l0 = infinity, l1 = infinity, l2 = infinity, l3 = infinity;
    __m512 h0 = _mm512_set1_ps(-std::numeric_limits<float>::infinity()), h1 = h0, h2 = h0, h3 = h0;
    __mmask16 b0 = 0, b1 = 0, b2 = 0, b3 = 0;
    for (std::int64_t r = 0; r < rows; ++r, x += stride) {
      const __m512 a = load(x, k0), b = load(x + 16, k1), c = load(x + 32, k2), d = load(x + 48, k3);
      l0 = _mm512_min_ps(l0, a);
      h0 = _mm512_max_ps(h0, a);
      l1 = _mm512_min_ps(l1, b);
      h1 = _mm512_max_ps(h1, b);
      l2 = _mm512_min_ps(l2, c);
      h2 = _mm512_max_ps(h2, c);
      l3 = _mm512_min_ps(l3, d);
      h3 = _mm512_max_ps(h3, d);
      b0 = static_cast<__mmask16>(b0 | unordered(a, a));
      b1 = static_cast<__mmask16>(b1 | unordered(b, b));
      b2 = static_cast<__mmask16>(b2 | unordered(c, c));
      b3 = static_cast<__mmask16>(b3 | unordered(d, d));
    }
    _mm512_mask_storeu_ps(low + i, k0, _mm512_mask_mov_ps(l0, b0, nan));
    _mm512_mask_storeu_ps(low + i + 16, k1, _mm512_mask_mov_ps(l1, b1, nan));
    _mm512_mask_storeu_ps(low + i + 32, k2, _mm512_mask_mov_ps(l2, b2, nan));
    _mm512_mask_storeu_ps(low + i + 48, k3, _mm512_mask_mov_ps(l3, b3, nan));
    _mm512_mask_storeu_ps(high + i, k0, _mm512_mask_mov_ps(h0, b0, nan));
    _mm512_mask_storeu_ps(high + i + 16, k1, _mm512_mask_mov_ps(h1, b1, nan));
    _mm512_mask_storeu_ps(high + i + 32, k2, _mm512_mask_mov_ps(h2, b2, nan));
    _mm512_mask_storeu_ps(high + i + 48, k3, _mm512_mask_mov_ps(h3, b3, nan));
  }
}

namespace {

struct Constants {
  __m512 two_to_n, one;
  __m512i mask, top;  // 2^n - 1, and levels * 2^n
  __m128i shift;      // n
};

struct Line {
  __m512 offset, prescale, scale, zero;
};

}  // namespace

template <bool kFromLow>
static inline Line line(const Grids& g, std::int64_t i, __mmask16 m) {
  if constexpr (kFromLow)
    return {load(g.offset + i, m), _mm512_setzero_ps(), load(g.scale + i, m), _mm512_setzero_ps()};
  return {load(g.offset + i, m), load(g.prescale + i, m), load(g.scale + i, m), load(g.zero + i, m)};
}

namespace {

// Where coordinates begin and whether they are linear.
enum class Form : std::uint8_t { from_low, from_zero, log };

}  // namespace

// The coordinate of rule `log`. For numbers z from 1 on, n is the exponent, and z / 2^n has the exponent 0.
static inline __m512 bend(__m512 y) {
  const __m512i bits = _mm512_castps_si512(y);
  const __m512i z = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
  const __m512i n = _mm512_sub_epi32(_mm512_srli_epi32(z, 23), _mm512_set1_epi32(127));
  const __m512i quotient = _mm512_sub_epi32(z, _mm512_slli_epi32(n, 23));
  const __m512 bent = _mm512_add_ps(_mm512_cvtepi32_ps(n), _mm512_castsi512_ps(quotient));
  const __mmask16 large = _mm512_cmpge_epi32_mask(n, _mm512_setzero_si512());
  const __m512i sign = _mm512_xor_si512(bits, z);
  return _mm512_castsi512_ps(_mm512_mask_or_epi32(bits, large, _mm512_castps_si512(bent), sign));
}

// And back: |k| - 1 is the exponent.
static inline __m512 unbend(__m512 k) {
  const __m512i magnitude = _mm512_cvttps_epi32(_mm512_abs_ps(k));
  const __m512i power = _mm512_slli_epi32(_mm512_add_epi32(magnitude, _mm512_set1_epi32(126)), 23);
  const __m512i sign = _mm512_andnot_si512(_mm512_set1_epi32(0x7FFFFFFF), _mm512_castps_si512(k));
  return _mm512_castsi512_ps(_mm512_maskz_or_epi32(_mm512_test_epi32_mask(magnitude, magnitude), power, sign));
}

// Codes of 16 elements, one per 32-bit lane, not yet clamped.
template <bool kStochastic, Form kForm>
static inline __m512i code(__m512 x, __m512i bits, const Line& g, const Constants& k) {
  constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  x = _mm512_sub_ps(x, g.offset);
  if constexpr (kForm == Form::from_low && kStochastic) {
    // y >= 0, so that its fraction is exact and y 2^n in fixed point (scaled by an exact power of two) has the integers
    // to compare: up if and only if adding 2^n - 1 - bits carries.
    const __m512i fixed = _mm512_cvttps_epu32(_mm512_mul_ps(x, _mm512_mul_ps(g.scale, k.two_to_n)));
    const __m512i carry = _mm512_add_epi32(_mm512_min_epu32(fixed, k.top), _mm512_sub_epi32(k.mask, bits));
    return _mm512_srl_epi32(carry, k.shift);
  } else if constexpr (kForm == Form::from_low) {
    return _mm512_cvtps_epi32(_mm512_mul_ps(x, g.scale));
  } else {
    __m512 y = _mm512_mul_ps(_mm512_mul_ps(x, g.prescale), g.scale);
    if constexpr (kForm == Form::log) y = bend(y);
    if constexpr (!kStochastic) return _mm512_cvtps_epi32(_mm512_add_ps(_mm512_roundscale_ps(y, 0), g.zero));
    const __m512 floor = _mm512_roundscale_ps(y, kDown);
    const __m512i threshold = _mm512_cvttps_epi32(_mm512_mul_ps(_mm512_sub_ps(y, floor), k.two_to_n));
    const __m512 rounded = _mm512_mask_add_ps(floor, _mm512_cmplt_epi32_mask(bits, threshold), floor, k.one);
    return _mm512_cvttps_epi32(_mm512_add_ps(rounded, g.zero));
  }
}

template <typename T, bool kStochastic, Form kForm, bool kColumns>
static void encode_rows(const Rectangle& r) {
  constexpr bool kFromLow = kForm == Form::from_low;
  const int n = r.random_bits;
  const Constants k{_mm512_set1_ps(static_cast<float>(1 << n)), _mm512_set1_ps(1), _mm512_set1_epi32((1 << n) - 1),
                    _mm512_set1_epi32(static_cast<int>(static_cast<unsigned>(r.levels) << n)), _mm_cvtsi32_si128(n)};
  // Of the order in which two levels of packing leave the dwords.
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  const __m512i none = _mm512_setzero_si512(), largest = _mm512_set1_epi8(static_cast<char>(r.levels));
  const auto narrow = [&](__m512i a, __m512i b, __m512i c, __m512i d) __attribute__((always_inline)) {
    const __m512i codes = _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
    return _mm512_min_epu8(_mm512_permutexvar_epi32(order, codes), largest);
  };
  for (std::int64_t row = 0; row < r.rows; ++row) {
    const T* x = static_cast<const T*>(r.x) + row * r.x_stride;
    const std::int32_t* bits = kStochastic ? r.bits + row * r.bits_stride : nullptr;
    std::uint8_t* codes = r.codes + row * r.codes_stride;
    const std::int64_t g = row * r.grid_step;
    const Line same{_mm512_set1_ps(r.grids.offset[g]), _mm512_set1_ps(r.grids.prescale[g]),
                    _mm512_set1_ps(r.grids.scale[g]), _mm512_set1_ps(r.grids.zero[g])};
    const auto part = [&](std::int64_t i) __attribute__((always_inline)) {
      const __m512i b = kStochastic ? _mm512_loadu_si512(bits + i) : none;
      return code<kStochastic, kForm>(load(x + i), b, kColumns ? line<kFromLow>(r.grids, i, 0xFFFF) : same, k);
    };
    std::int64_t i = 0;
    for (; i + 64 <= r.count; i += 64)
      _mm512_storeu_si512(codes + i, narrow(part(i), part(i + 16), part(i + 32), part(i + 48)));
    for (; i < r.count; i += 16) {
      const __mmask16 m = lanes(r.count - i);
      const __m512i b = kStochastic ? _mm512_maskz_loadu_epi32(m, bits + i) : none;
      const Line own = kColumns ? line<kFromLow>(r.grids, i, m) : same;
      const __m512i c = code<kStochastic, kForm>(load(x + i, m), b, own, k);
      _mm_mask_storeu_epi8(codes + i, m, _mm512_castsi512_si128(narrow(c, none, none, none)));
    }
  }
}

template <typename T, bool kStochastic, Form kForm>
static void encode_form(const Rectangle& r) {
  r.columns ? encode_rows<T, kStochastic, kForm, true>(r) : encode_rows<T, kStochastic, kForm, false>(r);
}

template <typename T, bool kStochastic>
static void encode_as(const Rectangle& r) {
  if (r.log)
    encode_form<T, kStochastic, Form::log>(r);
  else if (r.from_low)
    encode_form<T, kStochastic, Form::from_low>(r);
  else
    encode_form<T, kStochastic, Form::from_zero>(r);
}

template <typename T>
static void encode(const Rectangle& r) {
  r.bits != nullptr ? encode_as<T, true>(r) : encode_as<T, false>(r);
}

template <bool kColumns, bool kLog>
static void decode_rows(const Decoded& d) {
  for (std::int64_t row = 0; row < d.rows; ++row) {
    const std::uint8_t* codes = d.codes + row * d.codes_stride;
    float* x = d.x + row * d.x_stride;
    const std::int64_t g = row * d.grid_step;
    const __m512 step = _mm512_set1_ps(d.step[g]), zero = _mm512_set1_ps(d.zero[g]);
    const __m512 offset = _mm512_set1_ps(d.offset[g]);
    for (std::int64_t i = 0; i < d.count; i += 16) {
      const __mmask16 m = lanes(d.count - i);
      const __m512 c = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(m, codes + i)));
      __m512 centered = _mm512_sub_ps(c, kColumns ? load(d.zero + i, m) : zero);
      if constexpr (kLog) centered = unbend(centered);
      const __m512 scaled = _mm512_mul_ps(centered, kColumns ? load(d.step + i, m) : step);
      _mm512_mask_storeu_ps(x + i, m, _mm512_add_ps(scaled, kColumns ? load(d.offset + i, m) : offset));
    }
  }
}

static void decode(const Decoded& d) {
  if (d.log)
    d.columns ? decode_rows<true, true>(d) : decode_rows<false, true>(d);
  else
    d.columns ? decode_rows<true, false>(d) : decode_rows<false, false>(d);
}

// 64 codes to 8 * kBits bytes, in the lowest ones.
template <int kBits>
static inline __m512i packed(__m512i codes) {
  if constexpr (kBits == 4) {
    return _mm512_castsi256_si512(_mm512_cvtepi16_epi8(_mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x1001))));
  } else if constexpr (kBits == 2) {
    const __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x0401));
    const __m512i quads = _mm512_madd_epi16(pairs, _mm512_set1_epi32(0x00100001));
    return _mm512_zextsi128_si512(_mm512_cvtepi32_epi8(quads));
  } else if constexpr (kBits == 1) {
    return _mm512_zextsi128_si512(_mm_cvtsi64_si128(static_cast<long long>(_mm512_test_epi8_mask(codes, codes))));
  } else {
    return codes;
  }
}

template <int kBits>
static void pack_rows(const std::uint8_t* codes, std::int64_t stride, std::int64_t rows, std::int64_t count,
                      std::uint8_t* out, std::int64_t out_stride) {
  const std::int64_t total = row_bytes(count, kBits);
  for (std::int64_t r = 0; r < rows; ++r, codes += stride, out += out_stride) {
    std::int64_t i = 0;
    if constexpr (kBits == 8)
      for (; i + 64 <= count; i += 64) _mm512_storeu_si512(out + i, _mm512_loadu_si512(codes + i));
    for (; i < count; i += 64) {
      const std::int64_t to = i * kBits / 8, left = total - to;
      const __m512i c = _mm512_maskz_loadu_epi8(bytes(count - i), codes + i);
      _mm512_mask_storeu_epi8(out + to, bytes(left < 8 * kBits ? left : 8 * kBits), packed<kBits>(c));
    }
  }
}

static void pack(const std::uint8_t* codes, std::int64_t stride, std::int64_t rows, std::int64_t count, int bits,
                 std::uint8_t* out, std::int64_t out_stride) {
  switch (bits) {
    case 1:
      return pack_rows<1>(codes, stride, rows, count, out, out_stride);
    case 2:
      return pack_rows<2>(codes, stride, rows, count, out, out_stride);
    case 4:
      return pack_rows<4>(codes, stride, rows, count, out, out_stride);
    default:
      return pack_rows<8>(codes, stride, rows, count, out, out_stride);
  }
}

// And back; `in` has 8 * kBits bytes in the lowest ones.
template <int kBits>
static inline __m512i unpacked(__m512i in) {
  if constexpr (kBits == 4) {
    const __m512i v = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(in));
    return _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi16(v, 4)), _mm512_set1_epi8(15));
  } else if constexpr (kBits == 2) {
    const __m512i v = _mm512_cvtepu8_epi32(_mm512_castsi512_si128(in));
    const __m512i odd = _mm512_or_si512(v, _mm512_slli_epi32(v, 6));
    return _mm512_and_si512(_mm512_or_si512(odd, _mm512_slli_epi32(odd, 12)), _mm512_set1_epi8(3));
  } else if constexpr (kBits == 1) {
    const auto mask = static_cast<__mmask64>(_mm_cvtsi128_si64(_mm512_castsi512_si128(in)));
    return _mm512_maskz_set1_epi8(mask, 1);
  } else {
    return in;
  }
}

template <int kBits>
static void unpack_rows(const std::uint8_t* packed, std::int64_t stride, std::int64_t rows, std::int64_t count,
                        std::uint8_t* codes, std::int64_t codes_stride) {
  const std::int64_t total = row_bytes(count, kBits);
  for (std::int64_t r = 0; r < rows; ++r, packed += stride, codes += codes_stride)
    for (std::int64_t i = 0; i < count; i += 64) {
      const std::int64_t from = i * kBits / 8, left = total - from;
      const __m512i v = _mm512_maskz_loadu_epi8(bytes(left < 8 * kBits ? left : 8 * kBits), packed + from);
      _mm512_mask_storeu_epi8(codes + i, bytes(count - i), unpacked<kBits>(v));
    }
}

static void unpack(const std::uint8_t* packed, std::int64_t stride, std::int64_t rows, std::int64_t count, int bits,
                   std::uint8_t* codes, std::int64_t codes_stride) {
  switch (bits) {
    case 1:
      return unpack_rows<1>(packed, stride, rows, count, codes, codes_stride);
    case 2:
      return unpack_rows<2>(packed, stride, rows, count, codes, codes_stride);
    case 4:
      return unpack_rows<4>(packed, stride, rows, count, codes, codes_stride);
    default:
      return unpack_rows<8>(packed, stride, rows, count, codes, codes_stride);
  }
}

// One level of a transpose of four 16 x 16 matrices of bytes, one per 128-bit lane: registers whose numbers differ in
// kBit are interleaved. Levels 8, 4, 2, 1 transpose.
template <int kBit>
static inline void interleave(__m512i (&v)[16]) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (i & kBit) continue;
    const __m512i low = _mm512_unpacklo_epi8(v[i], v[i | kBit]), high = _mm512_unpackhi_epi8(v[i], v[i | kBit]);
    v[i] = low;
    v[i | kBit] = high;
  }
}

// Lane kLane of the first `count` registers, to one row each.
template <int kLane>
static inline void store_lanes(const __m512i (&v)[16], __mmask16 m, std::int64_t count, std::uint8_t* out,
                               std::int64_t stride) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i, out += stride) {
    if (i >= count) return;
    _mm_mask_storeu_epi8(out, m, _mm512_extracti32x4_epi32(v[i], kLane));
  }
}

static void transpose_codes(const std::uint8_t* in, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                            std::uint8_t* out, std::int64_t out_stride) {
  for (std::int64_t c = 0; c < columns; c += 64)
    for (std::int64_t r = 0; r < rows; r += 16) {
      __m512i v[16];
      const std::uint8_t* from = in + r * stride + c;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i, from += stride) v[i] = _mm512_loadu_si512(from);
      interleave<8>(v);
      interleave<4>(v);
      interleave<2>(v);
      interleave<1>(v);
      const __mmask16 m = lanes(rows - r);
      std::uint8_t* to = out + c * out_stride + r;
      store_lanes<0>(v, m, columns - c, to, out_stride);
      store_lanes<1>(v, m, columns - c - 16, to + 16 * out_stride, out_stride);
      store_lanes<2>(v, m, columns - c - 32, to + 32 * out_stride, out_stride);
      store_lanes<3>(v, m, columns - c - 48, to + 48 * out_stride, out_stride);
    }
}

static void transpose_bits(const std::int32_t* in, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                           std::int32_t* out, std::int64_t out_stride) {
  for (std::int64_t c = 0; c < columns; c += 16)
    for (std::int64_t r = 0; r < rows; r += 16) {
      __m512i v[16], w[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) v[i] = _mm512_loadu_si512(in + (r + i) * stride + c);
    // Within 128-bit lanes: four rows by four columns.
#pragma GCC unroll 4
      for (int i = 0; i < 16; i += 4) {
        const __m512i a = _mm512_unpacklo_epi32(v[i], v[i + 1]), b = _mm512_unpackhi_epi32(v[i], v[i + 1]);
        const __m512i d = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]), e = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
        w[i] = _mm512_unpacklo_epi64(a, d);
        w[i + 1] = _mm512_unpackhi_epi64(a, d);
        w[i + 2] = _mm512_unpacklo_epi64(b, e);
        w[i + 3] = _mm512_unpackhi_epi64(b, e);
      }
    // Lane l of w[4 g + j] holds column 4 l + j of rows 4 g .. 4 g + 3: now the lanes are transposed.
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m512i a = _mm512_shuffle_i32x4(w[j], w[j + 4], 0x88), b = _mm512_shuffle_i32x4(w[j], w[j + 4], 0xDD);
        const __m512i d = _mm512_shuffle_i32x4(w[j + 8], w[j + 12], 0x88);
        const __m512i e = _mm512_shuffle_i32x4(w[j + 8], w[j + 12], 0xDD);
        std::int32_t* to = out + (c + j) * out_stride + r;
        _mm512_storeu_si512(to, _mm512_shuffle_i32x4(a, d, 0x88));
        _mm512_storeu_si512(to + 4 * out_stride, _mm512_shuffle_i32x4(b, e, 0x88));
        _mm512_storeu_si512(to + 8 * out_stride, _mm512_shuffle_i32x4(a, d, 0xDD));
        _mm512_storeu_si512(to + 12 * out_stride, _mm512_shuffle_i32x4(b, e, 0xDD));
      }
    }
}

extern const Kernel avx512{"avx512",
                           cpu::Isa::avx512,
                           {extremes<float>, extremes<Bfloat>},
                           {column_extremes<float>, column_extremes<Bfloat>},
                           {encode<float>, encode<Bfloat>},
                           decode,
                           pack,
                           unpack,
                           transpose_codes,
                           transpose_bits};

}  // namespace fqtstats::quantize
