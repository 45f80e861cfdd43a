// AVX2.
//
// popcount: a word at a time; vpshufb looks up the bits of nibbles, vpsadbw adds the bytes.
// lookup: vpshufb holds one 16-entry table per 128-bit lane, so a block is [4 nibbles][16 columns] and a table's halves
// serve two nibbles each. Four look-ups, at most 60 each, add up in a byte; even and odd columns are kept as 16-bit
// sums, moved to 32 bits before they can overflow.
#include "kernels/convolution1/element.h"
#include "kernels/convolution1/x86.h"

namespace fqtstats::convolution1 {

FQTSTATS_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
FQTSTATS_INLINE void store(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

// Number of set bits of each byte.
FQTSTATS_INLINE __m256i byte_counts(__m256i x) {
  const __m256i counts =
      _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i nibble = _mm256_set1_epi8(15);
  return _mm256_add_epi8(_mm256_shuffle_epi8(counts, _mm256_and_si256(x, nibble)),
                         _mm256_shuffle_epi8(counts, _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble)));
}

// 16 of the columns of one row.
FQTSTATS_INLINE void popcount_strip(const std::uint8_t* source, const Runs& runs, const std::uint8_t* panel, bool add,
                                    std::int32_t* sums) {
  __m256i c[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) c[j] = _mm256_setzero_si256();
  for (std::int64_t r = 0; r < runs.count; ++r)
    for (std::int64_t k = 0; k < runs.length; ++k, panel += kPopcountPanel) {
      const auto word = static_cast<long long>(load64(source + runs.offset[r] + 8 * k));
      const __m256i x = _mm256_set1_epi64x(word);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m256i bytes = byte_counts(_mm256_and_si256(x, load(panel + 32 * j)));
        c[j] = _mm256_add_epi64(c[j], _mm256_sad_epu8(bytes, _mm256_setzero_si256()));
      }
    }
  const __m256i even = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m128i sum = _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(c[j], even));
    auto* to = reinterpret_cast<__m128i*>(sums + 4 * j);
    _mm_storeu_si128(to, add ? _mm_add_epi32(_mm_loadu_si128(to), sum) : sum);
  }
}

static void popcount(const std::uint8_t* const* source, const Runs& runs, const std::uint8_t* panel, bool add,
                     std::int32_t* sums, std::int64_t ld) {
  for (int i = 0; i < kPopcountRows; ++i)
    for (int c = 0; c < kColumns; c += 16) popcount_strip(source[i], runs, panel + 8 * c, add, sums + i * ld + c);
}

static std::int32_t unpack(const std::uint8_t* packed, int bits, std::int64_t n, std::uint8_t* codes) {
  std::int64_t i = 0;
  __m256i sums = _mm256_setzero_si256();
  if (bits == 4)
    for (const __m128i nibble = _mm_set1_epi8(15); i + 32 <= n; i += 32) {
      const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2));
      const __m128i low = _mm_and_si128(x, nibble), high = _mm_and_si128(_mm_srli_epi16(x, 4), nibble);
      const __m256i out = _mm256_setr_m128i(_mm_unpacklo_epi8(low, high), _mm_unpackhi_epi8(low, high));
      store(codes + i, out);
      sums = _mm256_add_epi64(sums, _mm256_sad_epu8(out, _mm256_setzero_si256()));
    }
  alignas(32) std::int64_t part[4];
  store(part, sums);
  auto sum = static_cast<std::int32_t>(part[0] + part[1] + part[2] + part[3]);
  for (; i < n; ++i) sum += codes[i] = code_at(packed, bits, i);
  for (; i % 64; ++i) codes[i] = 0;
  return sum;
}

static void tables(const std::uint8_t* codes, std::int64_t n, std::int64_t stride, std::uint8_t* out) {
  // Lane j of a half sums codes 4 j + b over the bits b of the byte's place in the lane.
  const __m256i place = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7,
                                         8, 9, 10, 11, 12, 13, 14, 15);
  __m256i has[4];
  for (int b = 0; b < 4; ++b) {
    const __m256i bit = _mm256_set1_epi8(static_cast<char>(1 << b));
    has[b] = _mm256_cmpeq_epi8(_mm256_and_si256(place, bit), bit);
  }
  const __m256i four = _mm256_setr_m128i(_mm_setzero_si128(), _mm_set1_epi8(4));
  for (std::int64_t i = 0; i < n; ++i, codes += 16, out += stride) {
    const __m256i x = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    for (int half = 0; half < 2; ++half) {
      __m256i sum = _mm256_setzero_si256();
      for (int b = 0; b < 4; ++b) {
        const __m256i from = _mm256_add_epi8(four, _mm256_set1_epi8(static_cast<char>(8 * half + b)));
        sum = _mm256_add_epi8(sum, _mm256_and_si256(has[b], _mm256_shuffle_epi8(x, from)));
      }
      store(out + 32 * half, sum);
    }
  }
}

static void blocks(const std::uint8_t* const* row, std::int64_t offset, std::uint8_t* low, std::uint8_t* high) {
  const __m256i byte =
      _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
  const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201));
  for (int j = 0; j < 4; ++j)
    for (int half = 0; half < 2; ++half) {
      __m256i nibble = _mm256_setzero_si256();
      for (int b = 0; b < 4; ++b) {
        const auto word = static_cast<int>(load64(row[4 * j + b] + offset) >> (32 * half));
        const __m256i bits = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(word), byte), bit);
        const __m256i set = _mm256_cmpeq_epi8(bits, bit);
        nibble = _mm256_or_si256(nibble, _mm256_and_si256(set, _mm256_set1_epi8(static_cast<char>(1 << b))));
      }
      std::uint8_t* to = (half ? high : low) + 16 * j;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(nibble));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 256), _mm256_extracti128_si256(nibble, 1));
    }
}

// sums[0..15] = or += the 16-bit sums of the even and the odd columns, over both lanes.
FQTSTATS_INLINE void flush(std::int32_t* sums, bool add, __m256i even, __m256i odd) {
  const auto lanes = [](__m256i x) {
    return _mm256_add_epi32(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)),
                            _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1)));
  };
  const __m256i e = lanes(even), o = lanes(odd);
  const __m256i low = _mm256_unpacklo_epi32(e, o), high = _mm256_unpackhi_epi32(e, o);
  __m256i first = _mm256_permute2x128_si256(low, high, 0x20), second = _mm256_permute2x128_si256(low, high, 0x31);
  if (add) {
    first = _mm256_add_epi32(first, load(sums));
    second = _mm256_add_epi32(second, load(sums + 8));
  }
  store(sums, first);
  store(sums + 8, second);
}

// One row.
FQTSTATS_INLINE void lookup_strip(const std::uint8_t* source, const Runs& runs, const std::uint8_t* panel, bool add,
                                  std::int32_t* sums) {
  constexpr std::int64_t kFlush = 128;  // steps; each adds at most 2 x 240 to a 16-bit sum
  const __m256i byte = _mm256_set1_epi16(255);
  __m256i even0 = _mm256_setzero_si256(), odd0 = even0, even1 = even0, odd1 = even0;
  std::int64_t steps = 0;
  const auto empty = [&] {
    flush(sums, add, even0, odd0);
    flush(sums + 16, add, even1, odd1);
    even0 = odd0 = even1 = odd1 = _mm256_setzero_si256();
    steps = 0;
    add = true;
  };
  const auto look = [](__m256i table, const std::uint8_t* nibbles) {
    return _mm256_shuffle_epi8(table, load(nibbles));
  };
  for (std::int64_t r = 0; r < runs.count; ++r)
    for (std::int64_t k = 0; k < runs.length; ++k) {
      const std::uint8_t* table = source + runs.offset[r] + k * kLookupStep;
#pragma GCC unroll 2
      for (int q = 0; q < 2; ++q, table += 128, panel += 128) {
        const __m256i t0 = load(table), t1 = load(table + 32), t2 = load(table + 64), t3 = load(table + 96);
        const __m256i x = _mm256_add_epi8(_mm256_add_epi8(look(t0, panel), look(t1, panel + 32)),
                                          _mm256_add_epi8(look(t2, panel + 64), look(t3, panel + 96)));
        const __m256i y = _mm256_add_epi8(_mm256_add_epi8(look(t0, panel + 256), look(t1, panel + 288)),
                                          _mm256_add_epi8(look(t2, panel + 320), look(t3, panel + 352)));
        even0 = _mm256_add_epi16(even0, _mm256_and_si256(x, byte));
        odd0 = _mm256_add_epi16(odd0, _mm256_srli_epi16(x, 8));
        even1 = _mm256_add_epi16(even1, _mm256_and_si256(y, byte));
        odd1 = _mm256_add_epi16(odd1, _mm256_srli_epi16(y, 8));
      }
      panel += kLookupPanel - 256;
      if (++steps == kFlush) empty();
    }
  empty();
}

template <int kRows>
static void lookup(const std::uint8_t* const* source, const Runs& runs, const std::uint8_t* panel, bool add,
                   std::int32_t* sums, std::int64_t ld) {
  for (int i = 0; i < kRows; ++i) lookup_strip(source[i], runs, panel, add, sums + i * ld);
}

namespace {

struct Avx2 {
  using Int = __m256i;
  using Float = __m256;
  static constexpr int kLanes = 8;

  struct All {};
  struct First {
    __m256i lanes;  // all bits of those that are used
  };
  FQTSTATS_INLINE First first(std::int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane)};
  }

  FQTSTATS_INLINE Int load(const std::int32_t* p, All) { return convolution1::load(p); }
  FQTSTATS_INLINE Int load(const std::int32_t* p, First mask) { return _mm256_maskload_epi32(p, mask.lanes); }
  FQTSTATS_INLINE Float load(const float* p, All) { return _mm256_loadu_ps(p); }
  FQTSTATS_INLINE Float load(const float* p, First mask) { return _mm256_maskload_ps(p, mask.lanes); }
  FQTSTATS_INLINE void store(float* p, Float x, All) { _mm256_storeu_ps(p, x); }
  FQTSTATS_INLINE void store(float* p, Float x, First mask) { _mm256_maskstore_ps(p, mask.lanes, x); }
  FQTSTATS_INLINE Int fill(std::int32_t value) { return _mm256_set1_epi32(value); }
  FQTSTATS_INLINE Float fill(float value) { return _mm256_set1_ps(value); }
  FQTSTATS_INLINE Int add(Int x, Int y) { return _mm256_add_epi32(x, y); }
  FQTSTATS_INLINE Int sub(Int x, Int y) { return _mm256_sub_epi32(x, y); }
  FQTSTATS_INLINE Int mul(Int x, Int y) { return _mm256_mullo_epi32(x, y); }
  FQTSTATS_INLINE Float add(Float x, Float y) { return _mm256_add_ps(x, y); }
  FQTSTATS_INLINE Float mul(Float x, Float y) { return _mm256_mul_ps(x, y); }
  FQTSTATS_INLINE Float to_float(Int x) { return _mm256_cvtepi32_ps(x); }
};

}  // namespace

extern const Kernel avx2{"avx2", cpu::Isa::avx2, count,     popcount,  unpack,      transpose,
                         tables, blocks,         lookup<8>, lookup<1>, finish<Avx2>};

}  // namespace fqtstats::convolution1
