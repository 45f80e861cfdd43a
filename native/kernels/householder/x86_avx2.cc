#include <immintrin.h>

#include "kernels/householder/reflect.h"
#include "kernels/householder/variance.h"

namespace fqtstats::householder {
namespace {

struct Avx2 {
  using Reg = __m256;
  static constexpr int kLanes = 8;

  struct All {};
  struct First {
    __m256i lanes;  // all bits of those that are used
  };
  FQTSTATS_INLINE First first(std::int64_t count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane)};
  }

  FQTSTATS_INLINE Reg fill(float v) { return _mm256_set1_ps(v); }
  FQTSTATS_INLINE Reg load(const float* p, All = {}) { return _mm256_loadu_ps(p); }
  FQTSTATS_INLINE Reg load(const float* p, First mask) { return _mm256_maskload_ps(p, mask.lanes); }
  FQTSTATS_INLINE void store(float* p, Reg v, All = {}) { _mm256_storeu_ps(p, v); }
  FQTSTATS_INLINE void store(float* p, Reg v, First mask) { _mm256_maskstore_ps(p, mask.lanes, v); }
  FQTSTATS_INLINE void stream(float* p, Reg v, All) { _mm256_stream_ps(p, v); }
  FQTSTATS_INLINE void stream(float* p, Reg v, First mask) { store(p, v, mask); }
  FQTSTATS_INLINE void prefetch(const float* p) { _mm_prefetch(p, _MM_HINT_T1); }
  FQTSTATS_INLINE Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  FQTSTATS_INLINE Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  FQTSTATS_INLINE Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  FQTSTATS_INLINE Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }

  // vminps and vmaxps drop a NaN in their first operand; it is remembered apart.
  struct Extremes {
    Reg low = _mm256_set1_ps(__builtin_inff()), high = _mm256_set1_ps(-__builtin_inff());
    Reg nan = _mm256_setzero_ps();

    __attribute__((always_inline)) inline void add(Reg v, All) {
      low = _mm256_min_ps(v, low);
      high = _mm256_max_ps(v, high);
      nan = _mm256_or_ps(nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    }
    __attribute__((always_inline)) inline void add(Reg v, First mask) {
      const Reg used = _mm256_castsi256_ps(mask.lanes);
      low = _mm256_blendv_ps(low, _mm256_min_ps(v, low), used);
      high = _mm256_blendv_ps(high, _mm256_max_ps(v, high), used);
      nan = _mm256_or_ps(nan, _mm256_and_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q), used));
    }
    __attribute__((always_inline)) inline void update(float& least, float& largest) const {
      __m128 l = _mm_min_ps(_mm256_castps256_ps128(low), _mm256_extractf128_ps(low, 1));
      __m128 h = _mm_max_ps(_mm256_castps256_ps128(high), _mm256_extractf128_ps(high, 1));
      l = _mm_min_ps(l, _mm_movehl_ps(l, l));
      h = _mm_max_ps(h, _mm_movehl_ps(h, h));
      const bool invalid = _mm256_movemask_ps(nan) != 0;
      const float a = invalid ? __builtin_nanf("") : _mm_cvtss_f32(_mm_min_ss(l, _mm_movehdup_ps(l)));
      const float b = invalid ? __builtin_nanf("") : _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
      if (a < least || a != a) least = a;
      if (b > largest || b != b) largest = b;
    }
  };
};

// A lane adds up 64 numbers at most, so that its error stays below 2^-18.
constexpr std::int64_t kSummed = 64 * 4 * Avx2::kLanes;

}  // namespace

static double fractions(const float* x, std::int64_t count, float offset, float scale, float most) {
  const __m256 o = _mm256_set1_ps(offset), s = _mm256_set1_ps(scale), m = _mm256_set1_ps(most);
  const auto term = [&](__m256 v) __attribute__((always_inline)) {
    const __m256 y = _mm256_min_ps(_mm256_mul_ps(_mm256_sub_ps(v, o), s), m), f = _mm256_sub_ps(y, _mm256_floor_ps(y));
    return _mm256_sub_ps(f, _mm256_mul_ps(f, f));
  };
  double total = 0;
  for (std::int64_t first = 0; first < count; first += kSummed) {
    const std::int64_t end = count - first < kSummed ? count : first + kSummed;
    __m256 sum0 = _mm256_setzero_ps(), sum1 = sum0, sum2 = sum0, sum3 = sum0;
    std::int64_t i = first;
    for (; i + 32 <= end; i += 32) {
      sum0 = _mm256_add_ps(sum0, term(_mm256_loadu_ps(x + i)));
      sum1 = _mm256_add_ps(sum1, term(_mm256_loadu_ps(x + i + 8)));
      sum2 = _mm256_add_ps(sum2, term(_mm256_loadu_ps(x + i + 16)));
      sum3 = _mm256_add_ps(sum3, term(_mm256_loadu_ps(x + i + 24)));
    }
    for (; i + 8 <= end; i += 8) sum0 = _mm256_add_ps(sum0, term(_mm256_loadu_ps(x + i)));
    if (i < end) {
      const Avx2::First mask = Avx2::first(end - i);
      sum1 = _mm256_add_ps(sum1, _mm256_and_ps(term(Avx2::load(x + i, mask)), _mm256_castsi256_ps(mask.lanes)));
    }
    const __m256 sum = _mm256_add_ps(_mm256_add_ps(sum0, sum1), _mm256_add_ps(sum2, sum3));
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    total += _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  return total;
}

extern const Kernel avx2{
    "avx2",  cpu::Isa::avx2, transform<Avx2, false>, transform<Avx2, true>, means<Avx2>, row<Avx2>, fractions,
    refined, variances};

}  // namespace fqtstats::householder
