// AVX2.
//
// popcount: a word at a time; vpshufb looks up the bits of nibbles, vpsadbw adds the bytes.
// lookup: vpshufb holds one 16-entry table per 128-bit lane, so a block is [4 nibbles][16 columns] and a table's halves
// serve two nibbles each. Four look-ups, at most 60 each, add up in a byte; even and odd columns are kept as 16-bit
// sums, moved to 32 bits before they can overflow.
#include <immintrin.h>

#include "kernels/convolution1/convolution1.h"
#include "kernels/convolution1/element.h"

namespace fqtstats::convolution1 {

#define FQTSTATS_INLINE __attribute__((always_inline)) static inline

FQTSTATS_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
FQTSTATS_INLINE void store(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

static void count(const std::uint8_t* pixels, std::int64_t n, std::int64_t words, std::int32_t* counts) {
  for (std::int64_t i = 0; i < n; ++i) {
    std::int64_t bits = 0;
    for (std::int64_t k = 0; k < words; ++k, pixels += 8) bits += __builtin_popcountll(load64(pixels));
    counts[i] = static_cast<std::int32_t>(bits);
  }
}

// Number of set bits of each byte.
FQTSTATS_INLINE __m256i byte_counts(__m256i x) {
  const __m256i counts =
      _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i nibble = _mm256_set1_epi8(15);
  return _mm256_add_epi8(_mm256_shuffle_epi8(counts, _mm256_and_si256(x, nibble)),
                         _mm256_shuffle_epi8(counts, _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble)));
}

// 16 of the columns of one row.
FQTSTATS_INLINE void popcount_strip(const std::uint8_t* source, const Runs& runs, const std::uint8_t* panel,
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
    _mm_storeu_si128(to, _mm_add_epi32(_mm_loadu_si128(to), sum));
  }
}

static void popcount(const std::uint8_t* const* source, const Runs& runs, const std::uint8_t* panel, std::int32_t* sums,
                     std::int64_t ld) {
  for (int i = 0; i < kPopcountRows; ++i)
    for (int c = 0; c < kColumns; c += 16) popcount_strip(source[i], runs, panel + 8 * c, sums + i * ld + c);
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

// Four rounds of interleaving the first half with the second transpose 16 x 16 bytes.
static void transpose(const std::uint8_t* codes, std::int64_t ld, std::int64_t n, std::uint8_t* out) {
  for (std::int64_t c = 0; c < n; c += 16, codes += 16, out += 256) {
    __m128i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i * ld));
    for (int round = 0; round < 2; ++round) {
      for (int i = 0; i < 8; ++i) {
        b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
        b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
      }
      for (int i = 0; i < 8; ++i) {
        a[2 * i] = _mm_unpacklo_epi8(b[i], b[i + 8]);
        a[2 * i + 1] = _mm_unpackhi_epi8(b[i], b[i + 8]);
      }
    }
    for (int i = 0; i < 16; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * i), a[i]);
  }
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

// sums[0..15] += the 16-bit sums of the even and the odd columns, over both lanes.
FQTSTATS_INLINE void flush(std::int32_t* sums, __m256i even, __m256i odd) {
  const auto lanes = [](__m256i x) {
    return _mm256_add_epi32(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)),
                            _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1)));
  };
  const __m256i e = lanes(even), o = lanes(odd);
  const __m256i low = _mm256_unpacklo_epi32(e, o), high = _mm256_unpackhi_epi32(e, o);
  store(sums, _mm256_add_epi32(load(sums), _mm256_permute2x128_si256(low, high, 0x20)));
  store(sums + 8, _mm256_add_epi32(load(sums + 8), _mm256_permute2x128_si256(low, high, 0x31)));
}

template <int kRows>
FQTSTATS_INLINE void lookup_strip(const std::uint8_t* const* source, const Runs& runs, const std::uint8_t* panel,
                                  std::int32_t* sums, std::int64_t ld) {
  constexpr std::int64_t kFlush = 128;  // steps; each adds at most 2 x 240 to a 16-bit sum
  const __m256i byte = _mm256_set1_epi16(255);
  __m256i even[2 * kRows], odd[2 * kRows];
#pragma GCC unroll 4
  for (int i = 0; i < 2 * kRows; ++i) even[i] = odd[i] = _mm256_setzero_si256();
  std::int64_t steps = 0;
  const auto empty = [&] {
#pragma GCC unroll 4
    for (int i = 0; i < 2 * kRows; ++i) {
      flush(sums + i / 2 * ld + i % 2 * 16, even[i], odd[i]);
      even[i] = odd[i] = _mm256_setzero_si256();
    }
    steps = 0;
  };
  for (std::int64_t r = 0; r < runs.count; ++r)
    for (std::int64_t k = 0; k < runs.length; ++k, panel += kLookupPanel) {
#pragma GCC unroll 2
      for (int i = 0; i < kRows; ++i) {
        const std::uint8_t* table = source[i] + runs.offset[r] + k * kLookupStep;
#pragma GCC unroll 2
        for (int q = 0; q < 4; q += 2, table += 128) {
          const __m256i t0 = load(table), t1 = load(table + 32), t2 = load(table + 64), t3 = load(table + 96);
#pragma GCC unroll 2
          for (int b = 0; b < 2; ++b) {
            const std::uint8_t* x = panel + 256 * b + 64 * q;
            const __m256i s01 =
                _mm256_add_epi8(_mm256_shuffle_epi8(t0, load(x)), _mm256_shuffle_epi8(t1, load(x + 32)));
            const __m256i s23 =
                _mm256_add_epi8(_mm256_shuffle_epi8(t2, load(x + 64)), _mm256_shuffle_epi8(t3, load(x + 96)));
            const __m256i s = _mm256_add_epi8(s01, s23);
            even[2 * i + b] = _mm256_add_epi16(even[2 * i + b], _mm256_and_si256(s, byte));
            odd[2 * i + b] = _mm256_add_epi16(odd[2 * i + b], _mm256_srli_epi16(s, 8));
          }
        }
      }
      if (++steps == kFlush) empty();
    }
  empty();
}

template <int kRows>
static void lookup(const std::uint8_t* const* source, const Runs& runs, const std::uint8_t* panel, std::int32_t* sums,
                   std::int64_t ld) {
  constexpr int kStrip = kRows == 1 ? 1 : 2;
  for (int i = 0; i < kRows; i += kStrip) lookup_strip<kStrip>(source + i, runs, panel, sums + i * ld, ld);
}

static void finish(const std::int32_t* sums, std::int64_t ld, const Row* row, int rows, const Columns& columns,
                   std::int64_t first, std::int64_t n) {
  for (int r = 0; r < rows; ++r) {
    std::int64_t c = 0;
    for (; c + 8 <= n; c += 8) {
      const std::int64_t at = first + c;
      __m256i sum = load(sums + r * ld + c);
      if (columns.zero)
        sum = _mm256_sub_epi32(sum, _mm256_mullo_epi32(load(columns.zero + at), _mm256_set1_epi32(row[r].sum)));
      if (columns.rest)
        sum = _mm256_add_epi32(sum, _mm256_mullo_epi32(load(columns.rest + at), _mm256_set1_epi32(row[r].zero)));
      const __m256 step = _mm256_mul_ps(_mm256_set1_ps(row[r].step), _mm256_loadu_ps(columns.step + at));
      __m256 y = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), step);
      if (columns.offset)
        y = _mm256_add_ps(y, _mm256_mul_ps(_mm256_set1_ps(row[r].u), _mm256_loadu_ps(columns.offset + at)));
      if (row[r].v) y = _mm256_add_ps(y, _mm256_mul_ps(_mm256_set1_ps(row[r].offset), _mm256_loadu_ps(row[r].v + at)));
      if (columns.bias) y = _mm256_add_ps(y, _mm256_loadu_ps(columns.bias + at));
      _mm256_storeu_ps(row[r].out + at, y);
    }
    for (; c < n; ++c) row[r].out[first + c] = result(sums[r * ld + c], row[r], columns, first + c);
  }
}

extern const Kernel avx2{"avx2", cpu::Isa::avx2, count,     popcount,  unpack, transpose,
                         tables, blocks,         lookup<8>, lookup<1>, finish};

}  // namespace fqtstats::convolution1
