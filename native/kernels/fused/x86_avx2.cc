// AVX2: 8 channels; tails are masked.
#include <immintrin.h>

#include <cstring>

#include "kernels/fused/generic.h"

namespace fqtstats::fused {
namespace {

struct V {
  static constexpr std::int64_t kLanes = 8;
  using F = __m256;
  using M = __m256;
  using T = __m256i;
  struct D {
    __m256d lower, upper;

    FQTSTATS_OPERATOR D operator+(D x, D y) { return {x.lower + y.lower, x.upper + y.upper}; }
    FQTSTATS_OPERATOR D operator-(D x, D y) { return {x.lower - y.lower, x.upper - y.upper}; }
    FQTSTATS_OPERATOR D operator*(D x, D y) { return {x.lower * y.lower, x.upper * y.upper}; }
  };

  FQTSTATS_INLINE T first(std::int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
  }

  template <bool kTail>
  FQTSTATS_INLINE F load(const float* p, T tail) {
    return kTail ? _mm256_maskload_ps(p, tail) : _mm256_loadu_ps(p);
  }
  template <bool kTail>
  FQTSTATS_INLINE void store(float* p, F x, T tail) {
    kTail ? _mm256_maskstore_ps(p, tail, x) : _mm256_storeu_ps(p, x);
  }
  FQTSTATS_INLINE F set(float x) { return _mm256_set1_ps(x); }
  FQTSTATS_INLINE F flip(F x, F sign) { return _mm256_xor_ps(x, sign); }
  FQTSTATS_INLINE F max(F x, F y) { return _mm256_max_ps(x, y); }
  FQTSTATS_INLINE F min(F x, F y) { return _mm256_min_ps(x, y); }

  FQTSTATS_INLINE M greater(F x, F y) { return _mm256_cmp_ps(x, y, _CMP_GT_OQ); }
  FQTSTATS_INLINE M unordered(F x) { return _mm256_cmp_ps(x, x, _CMP_UNORD_Q); }
  FQTSTATS_INLINE M either(M m, M n) { return _mm256_or_ps(m, n); }
  FQTSTATS_INLINE M without(M m, M n) { return _mm256_andnot_ps(n, m); }
  FQTSTATS_INLINE F pick(M m, F x, F y) { return _mm256_blendv_ps(y, x, m); }
  FQTSTATS_INLINE F keep(M m, F x) { return _mm256_and_ps(m, x); }
  FQTSTATS_INLINE F drop(M m, F x) { return _mm256_andnot_ps(m, x); }

  FQTSTATS_INLINE D wide(F x) {
    return {_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))};
  }
  FQTSTATS_INLINE __m256i lower(T tail) { return _mm256_cvtepi32_epi64(_mm256_castsi256_si128(tail)); }
  FQTSTATS_INLINE __m256i upper(T tail) { return _mm256_cvtepi32_epi64(_mm256_extracti128_si256(tail, 1)); }
  template <bool kTail>
  FQTSTATS_INLINE D load_wide(const double* p, T tail) {
    if constexpr (!kTail) return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)};
    return {_mm256_maskload_pd(p, lower(tail)), _mm256_maskload_pd(p + 4, upper(tail))};
  }
  template <bool kTail>
  FQTSTATS_INLINE void store_wide(double* p, D x, T tail) {
    if constexpr (kTail) {
      _mm256_maskstore_pd(p, lower(tail), x.lower);
      _mm256_maskstore_pd(p + 4, upper(tail), x.upper);
    } else {
      _mm256_storeu_pd(p, x.lower);
      _mm256_storeu_pd(p + 4, x.upper);
    }
  }

  template <bool kTail>
  FQTSTATS_INLINE void encode(std::uint8_t* out, F x, std::int32_t zero, std::int32_t levels, std::int64_t channels,
                              std::int64_t row) {
    __m256i code = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(zero));
    code = _mm256_min_epi32(_mm256_max_epi32(code, _mm256_setzero_si256()), _mm256_set1_epi32(levels));
    if constexpr (kTail) code = _mm256_and_si256(code, first(channels));
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
    const std::int64_t bytes = _mm_cvtsi128_si64(_mm_packus_epi16(words, words));
    std::memcpy(out, &bytes, kTail ? static_cast<std::size_t>(row < kLanes ? row : kLanes) : kLanes);
  }
  template <bool kTail>
  FQTSTATS_INLINE void bits(std::uint8_t* out, M m, std::int64_t channels) {
    const int lanes = kTail ? (1 << channels) - 1 : 0xff;
    *out = static_cast<std::uint8_t>(~_mm256_movemask_ps(m) & lanes);
  }
};

}  // namespace

extern const Kernel avx2{"avx2",  cpu::Isa::avx2, moments<V>,       window_extremes<V>, encode<V>,
                         bits<V>, apply<V>,       gradient_sums<V>, gradient<V>,        signs};

}  // namespace fqtstats::fused
