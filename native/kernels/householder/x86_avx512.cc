#include <immintrin.h>

#include "kernels/householder/reflect.h"
#include "kernels/householder/variance.h"

namespace fqtstats::householder {
namespace {

struct Avx512 {
  using Reg = __m512;
  static constexpr int kLanes = 16;

  struct All {};
  struct First {
    __mmask16 lanes;
  };
  FQTSTATS_INLINE First first(std::int64_t count) { return {static_cast<__mmask16>((1u << count) - 1)}; }

  FQTSTATS_INLINE Reg fill(float v) { return _mm512_set1_ps(v); }
  FQTSTATS_INLINE Reg load(const float* p, All = {}) { return _mm512_loadu_ps(p); }
  FQTSTATS_INLINE Reg load(const float* p, First mask) { return _mm512_maskz_loadu_ps(mask.lanes, p); }
  FQTSTATS_INLINE void store(float* p, Reg v, All = {}) { _mm512_storeu_ps(p, v); }
  FQTSTATS_INLINE void store(float* p, Reg v, First mask) { _mm512_mask_storeu_ps(p, mask.lanes, v); }
  FQTSTATS_INLINE void stream(float* p, Reg v, All) { _mm512_stream_ps(p, v); }
  FQTSTATS_INLINE void stream(float* p, Reg v, First mask) { store(p, v, mask); }
  FQTSTATS_INLINE void prefetch(const float* p) { _mm_prefetch(p, _MM_HINT_T1); }
  FQTSTATS_INLINE Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  FQTSTATS_INLINE Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  FQTSTATS_INLINE Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  FQTSTATS_INLINE Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }

  // vminps and vmaxps drop a NaN in their first operand; it is remembered apart.
  struct Extremes {
    Reg low = _mm512_set1_ps(__builtin_inff()), high = _mm512_set1_ps(-__builtin_inff());
    __mmask16 nan = 0;

    __attribute__((always_inline)) inline void add(Reg v, All) {
      low = _mm512_min_ps(v, low);
      high = _mm512_max_ps(v, high);
      nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    }
    __attribute__((always_inline)) inline void add(Reg v, First mask) {
      low = _mm512_mask_min_ps(low, mask.lanes, v, low);
      high = _mm512_mask_max_ps(high, mask.lanes, v, high);
      nan |= _mm512_mask_cmp_ps_mask(mask.lanes, v, v, _CMP_UNORD_Q);
    }
    __attribute__((always_inline)) inline void update(float& least, float& largest) const {
      const float a = nan ? __builtin_nanf("") : _mm512_reduce_min_ps(low);
      const float b = nan ? __builtin_nanf("") : _mm512_reduce_max_ps(high);
      if (a < least || a != a) least = a;
      if (b > largest || b != b) largest = b;
    }
  };
};

// A lane adds up 32 numbers at most, so that the error of a sum stays below 2^-20 for every element.
constexpr std::int64_t kSummed = 32 * 4 * Avx512::kLanes;

// Sum of (y - round(y))^2 with y = coordinate(x).
template <typename Coordinate>
FQTSTATS_INLINE double add_squares(const float* x, std::int64_t count, const Coordinate& coordinate) {
  const auto add = [&](__m512 sum, __m512 v) __attribute__((always_inline)) {
    const __m512 c = _mm512_reduce_ps(coordinate(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_fmadd_ps(c, c, sum);
  };
  double total = 0;
  for (std::int64_t first = 0; first < count; first += kSummed) {
    const std::int64_t end = count - first < kSummed ? count : first + kSummed;
    __m512 sum0 = _mm512_setzero_ps(), sum1 = sum0, sum2 = sum0, sum3 = sum0;
    std::int64_t i = first;
    for (; i + 64 <= end; i += 64) {
      sum0 = add(sum0, _mm512_loadu_ps(x + i));
      sum1 = add(sum1, _mm512_loadu_ps(x + i + 16));
      sum2 = add(sum2, _mm512_loadu_ps(x + i + 32));
      sum3 = add(sum3, _mm512_loadu_ps(x + i + 48));
    }
    for (; i + 16 <= end; i += 16) sum0 = add(sum0, _mm512_loadu_ps(x + i));
    if (i < end) {
      const Avx512::First mask = Avx512::first(end - i);
      sum1 = _mm512_mask_mov_ps(sum1, mask.lanes, add(sum1, Avx512::load(x + i, mask)));
    }
    total += _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum0, sum1), _mm512_add_ps(sum2, sum3)));
  }
  return total;
}

}  // namespace

// f (1 - f) = 1/4 - (f - 1/2)^2, and f - 1/2 is what rounding y - 1/2 leaves. It is continuous in y, with a slope of at
// most 1. So y may come from one multiplication and addition, and exceed `most` by its rounding: with u = 2^-24, it
// differs from that of the definition by 5.5 u most at most. Of that are 3 u most the definition's, and u most that of
// rounding y - 1/2; the rest is that of x - offset, or, if |offset| scale <= most, that of the constant.
static double fractions(const float* x, std::int64_t count, float offset, float scale, float most) {
  const __m512 s = _mm512_set1_ps(scale);
  const double start = -0.5 - static_cast<double>(offset) * scale;
  double squares;
  if (start <= most && start >= -0.5 - most) {
    const __m512 c = _mm512_set1_ps(static_cast<float>(start));
    squares = add_squares(x, count, [&](__m512 v) __attribute__((always_inline)) { return _mm512_fmadd_ps(v, s, c); });
  } else {
    const __m512 o = _mm512_set1_ps(offset), half = _mm512_set1_ps(-0.5f);
    squares = add_squares(x, count, [&](__m512 v) __attribute__((always_inline)) {
      return _mm512_fmadd_ps(_mm512_sub_ps(v, o), s, half);
    });
  }
  return 0.25 * static_cast<double>(count) - squares;
}

extern const Kernel avx512{"avx512",
                           cpu::Isa::avx512,
                           transform<Avx512, false>,
                           transform<Avx512, true>,
                           means<Avx512>,
                           row<Avx512>,
                           fractions,
                           refined,
                           variances};

}  // namespace fqtstats::householder
