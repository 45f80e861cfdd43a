// AVX2: eight elements per register, 32 codes at a time; the rest by way of a buffer.
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/quantize/quantize.h"

namespace fqtstats::quantize {
namespace {

using Bfloat = std::uint16_t;

}  // namespace

static inline __m256 load(const float* x) { return _mm256_loadu_ps(x); }

static inline __m256 load(const Bfloat* x) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}

static inline __m256i load(const std::int32_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }

// The first `count` < 8 numbers, and `fill` in the other lanes.
template <typename T>
static inline auto load(const T* x, std::int64_t count, T fill = T{}) {
  T part[8] = {fill, fill, fill, fill, fill, fill, fill, fill};
  std::memcpy(part, x, static_cast<std::size_t>(count) * sizeof(T));
  return load(part);
}

namespace {

// Minimum and maximum of each lane, and whether there was a NaN.
struct Range {
  __m256 low = _mm256_set1_ps(std::numeric_limits<float>::infinity());
  __m256 high = _mm256_set1_ps(-std::numeric_limits<float>::infinity());
  __m256 bad = _mm256_setzero_ps();
};

}  // namespace

static inline void widen(Range& r, __m256 x) {
  r.low = _mm256_min_ps(r.low, x);
  r.high = _mm256_max_ps(r.high, x);
  r.bad = _mm256_or_ps(r.bad, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

static inline void store(const Range& r, float* low, float* high) {
  const __m256 nan = _mm256_set1_ps(std::numeric_limits<float>::quiet_NaN());
  _mm256_storeu_ps(low, _mm256_blendv_ps(r.low, nan, r.bad));
  _mm256_storeu_ps(high, _mm256_blendv_ps(r.high, nan, r.bad));
}

template <typename T>
static void extremes(const void* data, std::int64_t count, float* low, float* high) {
  const T* x = static_cast<const T*>(data);
  Range a, b, c, d;
  std::int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    widen(a, load(x + i));
    widen(b, load(x + i + 8));
    widen(c, load(x + i + 16));
    widen(d, load(x + i + 24));
  }
  for (; i + 8 <= count; i += 8) widen(a, load(x + i));
  if (i < count) widen(b, load(x + i, count - i, x[0]));
  a.low = _mm256_min_ps(_mm256_min_ps(a.low, b.low), _mm256_min_ps(c.low, d.low));
  a.high = _mm256_max_ps(_mm256_max_ps(a.high, b.high), _mm256_max_ps(c.high, d.high));
  a.bad = _mm256_or_ps(_mm256_or_ps(a.bad, b.bad), _mm256_or_ps(c.bad, d.bad));
  float lows[8], highs[8];
  store(a, lows, highs);
  *low = lows[0];
  *high = highs[0];
  for (int j = 1; j < 8; ++j) {
    *low = lows[j] < *low ? lows[j] : *low;
    *high = highs[j] > *high ? highs[j] : *high;
  }
  if (_mm256_movemask_ps(a.bad) != 0) *low = *high = std::numeric_limits<float>::quiet_NaN();
}

template <typename T>
static void column_extremes(const void* data, std::int64_t rows, std::int64_t stride, std::int64_t columns, float* low,
                            float* high) {
  std::int64_t i = 0;
  for (; i + 32 <= columns; i += 32) {
    const T* x = static_cast<const T*>(data) + i;
    Range a, b, c, d;
    for (std::int64_t r = 0; r < rows; ++r, x += stride) {
      widen(a, load(x));
      widen(b, load(x + 8));
      widen(c, load(x + 16));
      widen(d, load(x + 24));
    }
    store(a, low + i, high + i);
    store(b, low + i + 8, high + i + 8);
    store(c, low + i + 16, high + i + 16);
    store(d, low + i + 24, high + i + 24);
  }
  for (; i < columns; i += 8) {
    const T* x = static_cast<const T*>(data) + i;
    const std::int64_t left = columns - i < 8 ? columns - i : 8;
    Range a;
    for (std::int64_t r = 0; r < rows; ++r, x += stride) widen(a, left == 8 ? load(x) : load(x, left));
    float lows[8], highs[8];
    store(a, lows, highs);
    std::memcpy(low + i, lows, static_cast<std::size_t>(left) * sizeof(float));
    std::memcpy(high + i, highs, static_cast<std::size_t>(left) * sizeof(float));
  }
}

namespace {

struct Constants {
  __m256 two_to_n, one;
};

struct Line {
  __m256 offset, prescale, scale, zero;
};

}  // namespace

static inline Line line(const Grids& g, std::int64_t i) {
  return {load(g.offset + i), load(g.prescale + i), load(g.scale + i), load(g.zero + i)};
}

static inline Line line(const Grids& g, std::int64_t i, std::int64_t count) {
  return {load(g.offset + i, count), load(g.prescale + i, count), load(g.scale + i, count), load(g.zero + i, count)};
}

// The coordinate of rule `log`. For numbers z from 1 on, n is the exponent, and z / 2^n has the exponent 0.
static inline __m256 bend(__m256 y) {
  const __m256i z = _mm256_and_si256(_mm256_castps_si256(y), _mm256_set1_epi32(0x7FFFFFFF));
  const __m256i n = _mm256_sub_epi32(_mm256_srli_epi32(z, 23), _mm256_set1_epi32(127));
  const __m256i quotient = _mm256_sub_epi32(z, _mm256_slli_epi32(n, 23));
  const __m256 bent = _mm256_add_ps(_mm256_cvtepi32_ps(n), _mm256_castsi256_ps(quotient));
  const __m256 sign = _mm256_xor_ps(y, _mm256_castsi256_ps(z));
  // n < 0 has its sign bit set, by which the blend decides.
  return _mm256_blendv_ps(_mm256_or_ps(bent, sign), y, _mm256_castsi256_ps(n));
}

// And back: |k| - 1 is the exponent.
static inline __m256 unbend(__m256 k) {
  const __m256 sign = _mm256_and_ps(k, _mm256_set1_ps(-0.0f));
  const __m256i magnitude = _mm256_cvttps_epi32(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), k));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(magnitude, _mm256_set1_epi32(126)), 23);
  const __m256i some = _mm256_cmpgt_epi32(magnitude, _mm256_setzero_si256());
  return _mm256_or_ps(_mm256_castsi256_ps(_mm256_and_si256(power, some)), sign);
}

// Codes of eight elements, one per 32-bit lane, not yet clamped.
template <bool kStochastic, bool kLog>
static inline __m256i code(__m256 x, __m256i bits, const Line& g, const Constants& k) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  __m256 y = _mm256_mul_ps(_mm256_mul_ps(_mm256_sub_ps(x, g.offset), g.prescale), g.scale);
  if constexpr (kLog) y = bend(y);
  __m256 rounded;
  if constexpr (kStochastic) {
    const __m256 floor = _mm256_floor_ps(y);
    const __m256i threshold = _mm256_cvttps_epi32(_mm256_mul_ps(_mm256_sub_ps(y, floor), k.two_to_n));
    const __m256 up = _mm256_castsi256_ps(_mm256_cmpgt_epi32(threshold, bits));
    rounded = _mm256_add_ps(floor, _mm256_and_ps(up, k.one));
  } else {
    rounded = _mm256_round_ps(y, kNearest);
  }
  return _mm256_cvttps_epi32(_mm256_add_ps(rounded, g.zero));
}

// 32 codes from one per dword, clamped.
static inline __m256i narrow(__m256i a, __m256i b, __m256i c, __m256i d, __m256i largest) {
  const __m256i order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
  const __m256i codes = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  return _mm256_min_epu8(_mm256_permutevar8x32_epi32(codes, order), largest);
}

template <typename T, bool kStochastic, bool kColumns, bool kLog>
static void encode_rows(const Rectangle& r) {
  const Constants k{_mm256_set1_ps(static_cast<float>(1 << r.random_bits)), _mm256_set1_ps(1)};
  const __m256i none = _mm256_setzero_si256(), largest = _mm256_set1_epi8(static_cast<char>(r.levels));
  for (std::int64_t row = 0; row < r.rows; ++row) {
    const T* x = static_cast<const T*>(r.x) + row * r.x_stride;
    const std::int32_t* bits = kStochastic ? r.bits + row * r.bits_stride : nullptr;
    std::uint8_t* codes = r.codes + row * r.codes_stride;
    const std::int64_t g = row * r.grid_step;
    const Line same{_mm256_set1_ps(r.grids.offset[g]), _mm256_set1_ps(r.grids.prescale[g]),
                    _mm256_set1_ps(r.grids.scale[g]), _mm256_set1_ps(r.grids.zero[g])};
    const auto part = [&](std::int64_t i) __attribute__((always_inline)) {
      const __m256i b = kStochastic ? load(bits + i) : none;
      return code<kStochastic, kLog>(load(x + i), b, kColumns ? line(r.grids, i) : same, k);
    };
    std::int64_t i = 0;
    for (; i + 32 <= r.count; i += 32)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i),
                          narrow(part(i), part(i + 8), part(i + 16), part(i + 24), largest));
    for (; i + 8 <= r.count; i += 8)
      _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i),
                       _mm256_castsi256_si128(narrow(part(i), none, none, none, largest)));
    if (i < r.count) {
      const std::int64_t left = r.count - i;
      const __m256i b = kStochastic ? load(bits + i, left) : none;
      const __m256i c = code<kStochastic, kLog>(load(x + i, left), b, kColumns ? line(r.grids, i, left) : same, k);
      std::uint8_t rest[32];
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(rest), narrow(c, none, none, none, largest));
      std::memcpy(codes + i, rest, static_cast<std::size_t>(left));
    }
  }
}

template <typename T, bool kStochastic, bool kColumns>
static void encode_as(const Rectangle& r) {
  r.log ? encode_rows<T, kStochastic, kColumns, true>(r) : encode_rows<T, kStochastic, kColumns, false>(r);
}

template <typename T>
static void encode(const Rectangle& r) {
  if (r.bits != nullptr)
    r.columns ? encode_as<T, true, true>(r) : encode_as<T, true, false>(r);
  else
    r.columns ? encode_as<T, false, true>(r) : encode_as<T, false, false>(r);
}

template <bool kLog>
static inline __m256 decoded(__m128i codes, __m256 zero, __m256 step, __m256 offset) {
  __m256 centered = _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes)), zero);
  if constexpr (kLog) centered = unbend(centered);
  return _mm256_add_ps(_mm256_mul_ps(centered, step), offset);
}

template <bool kColumns, bool kLog>
static void decode_rows(const Decoded& d) {
  for (std::int64_t row = 0; row < d.rows; ++row) {
    const std::uint8_t* codes = d.codes + row * d.codes_stride;
    float* x = d.x + row * d.x_stride;
    const std::int64_t g = row * d.grid_step;
    const __m256 step = _mm256_set1_ps(d.step[g]), zero = _mm256_set1_ps(d.zero[g]);
    const __m256 offset = _mm256_set1_ps(d.offset[g]);
    std::int64_t i = 0;
    for (; i + 8 <= d.count; i += 8)
      _mm256_storeu_ps(x + i, decoded<kLog>(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)),
                                            kColumns ? load(d.zero + i) : zero, kColumns ? load(d.step + i) : step,
                                            kColumns ? load(d.offset + i) : offset));
    if (i < d.count) {
      const std::int64_t left = d.count - i;
      std::uint8_t part[16] = {};
      std::memcpy(part, codes + i, static_cast<std::size_t>(left));
      float rest[8];
      _mm256_storeu_ps(rest,
                       decoded<kLog>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(part)),
                                     kColumns ? load(d.zero + i, left) : zero, kColumns ? load(d.step + i, left) : step,
                                     kColumns ? load(d.offset + i, left) : offset));
      std::memcpy(x + i, rest, static_cast<std::size_t>(left) * sizeof(float));
    }
  }
}

static void decode(const Decoded& d) {
  if (d.log)
    d.columns ? decode_rows<true, true>(d) : decode_rows<false, true>(d);
  else
    d.columns ? decode_rows<true, false>(d) : decode_rows<false, false>(d);
}

// 32 codes to 4 * kBits bytes, in the lowest ones.
template <int kBits>
static inline __m256i packed(__m256i codes) {
  const __m256i gather = _mm256_setr_epi32(0, 4, 1, 5, 2, 3, 6, 7);
  if constexpr (kBits == 4) {
    const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x1001));
    return _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
  } else if constexpr (kBits == 2) {
    const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0401));
    const __m256i quads = _mm256_packs_epi32(_mm256_madd_epi16(pairs, _mm256_set1_epi32(0x00100001)), pairs);
    return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(quads, quads), gather);
  } else if constexpr (kBits == 1) {
    return _mm256_setr_epi32(_mm256_movemask_epi8(_mm256_slli_epi16(codes, 7)), 0, 0, 0, 0, 0, 0, 0);
  } else {
    return codes;
  }
}

template <int kBits>
static void pack_rows(const std::uint8_t* codes, std::int64_t stride, std::int64_t rows, std::int64_t count,
                      std::uint8_t* out, std::int64_t out_stride) {
  const std::int64_t total = row_bytes(count, kBits);
  for (std::int64_t r = 0; r < rows; ++r, codes += stride, out += out_stride) {
    std::int64_t i = 0, to = 0;
    for (; i + 32 <= count && to + 32 <= total; i += 32, to += 4 * kBits)
      // What is written beyond 4 * kBits bytes is overwritten by the next codes of this row.
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + to),
                          packed<kBits>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i))));
    for (; to < total; i += 32, to += 4 * kBits) {
      alignas(32) std::uint8_t rest[32] = {};
      if (i < count) std::memcpy(rest, codes + i, static_cast<std::size_t>(count - i < 32 ? count - i : 32));
      auto* v = reinterpret_cast<__m256i*>(rest);
      _mm256_store_si256(v, packed<kBits>(_mm256_load_si256(v)));
      std::memcpy(out + to, rest, static_cast<std::size_t>(total - to < 4 * kBits ? total - to : 4 * kBits));
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

// And back; `in` has 4 * kBits bytes in the lowest ones.
template <int kBits>
static inline __m256i unpacked(__m256i in) {
  if constexpr (kBits == 4) {
    const __m256i v = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(in));
    return _mm256_and_si256(_mm256_or_si256(v, _mm256_slli_epi16(v, 4)), _mm256_set1_epi8(15));
  } else if constexpr (kBits == 2) {
    const __m256i v = _mm256_cvtepu8_epi32(_mm256_castsi256_si128(in));
    const __m256i odd = _mm256_or_si256(v, _mm256_slli_epi32(v, 6));
    return _mm256_and_si256(_mm256_or_si256(odd, _mm256_slli_epi32(odd, 12)), _mm256_set1_epi8(3));
  } else if constexpr (kBits == 1) {
    // Every byte gets the one that has its bit.
    const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ULL));
    const __m256i v = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm256_castsi256_si128(in)), spread);
    return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(v, bit), bit), _mm256_set1_epi8(1));
  } else {
    return in;
  }
}

template <int kBits>
static void unpack_rows(const std::uint8_t* packed, std::int64_t stride, std::int64_t rows, std::int64_t count,
                        std::uint8_t* codes, std::int64_t codes_stride) {
  const std::int64_t total = row_bytes(count, kBits);
  for (std::int64_t r = 0; r < rows; ++r, packed += stride, codes += codes_stride)
    for (std::int64_t i = 0; i < count; i += 32) {
      const std::int64_t from = i * kBits / 8, left = total - from, codes_left = count - i;
      alignas(32) std::uint8_t part[32] = {};
      std::memcpy(part, packed + from, static_cast<std::size_t>(left < 4 * kBits ? left : 4 * kBits));
      auto* v = reinterpret_cast<__m256i*>(part);
      const __m256i c = unpacked<kBits>(_mm256_load_si256(v));
      if (codes_left >= 32) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), c);
      } else {
        _mm256_store_si256(v, c);
        std::memcpy(codes + i, part, static_cast<std::size_t>(codes_left));
      }
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

// One level of a transpose of a 16 x 16 matrix of bytes: v[i] and v[i + 8] interleaved. Four such levels transpose.
static inline void interleave(__m128i (&v)[16]) {
  __m128i w[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    w[2 * i] = _mm_unpacklo_epi8(v[i], v[i + 8]);
    w[2 * i + 1] = _mm_unpackhi_epi8(v[i], v[i + 8]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = w[i];
}

static void transpose_codes(const std::uint8_t* in, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                            std::uint8_t* out, std::int64_t out_stride) {
  for (std::int64_t c = 0; c < columns; c += 16)
    for (std::int64_t r = 0; r < rows; r += 16) {
      __m128i v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) v[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + (r + i) * stride + c));
      interleave(v);
      interleave(v);
      interleave(v);
      interleave(v);
      std::uint8_t* to = out + c * out_stride + r;
      if (r + 16 <= rows && c + 16 <= columns) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * out_stride), v[i]);
      } else {
        const std::int64_t rows_left = rows - r < 16 ? rows - r : 16,
                           columns_left = columns - c < 16 ? columns - c : 16;
        for (int i = 0; i < columns_left; ++i)
          std::memcpy(to + i * out_stride, &v[i], static_cast<std::size_t>(rows_left));
      }
    }
}

static void transpose_bits(const std::int32_t* in, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                           std::int32_t* out, std::int64_t out_stride) {
  for (std::int64_t c = 0; c < columns; c += 8)
    for (std::int64_t r = 0; r < rows; r += 8) {
      __m256i v[8], w[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) v[i] = load(in + (r + i) * stride + c);
    // Within 128-bit lanes: four rows by four columns.
#pragma GCC unroll 2
      for (int i = 0; i < 8; i += 4) {
        const __m256i a = _mm256_unpacklo_epi32(v[i], v[i + 1]), b = _mm256_unpackhi_epi32(v[i], v[i + 1]);
        const __m256i d = _mm256_unpacklo_epi32(v[i + 2], v[i + 3]), e = _mm256_unpackhi_epi32(v[i + 2], v[i + 3]);
        w[i] = _mm256_unpacklo_epi64(a, d);
        w[i + 1] = _mm256_unpackhi_epi64(a, d);
        w[i + 2] = _mm256_unpacklo_epi64(b, e);
        w[i + 3] = _mm256_unpackhi_epi64(b, e);
      }
      std::int32_t* to = out + c * out_stride + r;
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j * out_stride),
                            _mm256_permute2x128_si256(w[j], w[j + 4], 0x20));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (j + 4) * out_stride),
                            _mm256_permute2x128_si256(w[j], w[j + 4], 0x31));
      }
    }
}

extern const Kernel avx2{"avx2",
                         cpu::Isa::avx2,
                         {extremes<float>, extremes<Bfloat>},
                         {column_extremes<float>, column_extremes<Bfloat>},
                         {encode<float>, encode<Bfloat>},
                         decode,
                         pack,
                         unpack,
                         transpose_codes,
                         transpose_bits};

}  // namespace fqtstats::quantize
