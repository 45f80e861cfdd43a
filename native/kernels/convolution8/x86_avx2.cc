// AVX2: vpmaddubsw would saturate, so that even and odd bytes are widened to 16 bits and multiplied by vpmaddwd.
#include <immintrin.h>

#include "kernels/convolution8/portable.h"
#include "kernels/convolution8/tile.h"

namespace fqtstats::convolution8 {
namespace {

struct Pairs {
  __m256i even, odd;
};

struct Vector {
  using Sum = __m256i;
  using Panel = Pairs;
  using Word = Pairs;
  static constexpr int kBytes = 32;
  static Sum zero() { return _mm256_setzero_si256(); }
  static Sum load(const std::int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(std::int32_t* p, Sum v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static Panel panel(const std::int8_t* p) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), _mm256_srai_epi16(v, 8)};
  }
  static Word word(const std::uint8_t* p) {
    const __m256i v = _mm256_broadcastd_epi32(_mm_loadu_si32(p));
    // Two shifts: there is no register left for a mask.
    return {_mm256_srli_epi16(_mm256_slli_epi16(v, 8), 8), _mm256_srli_epi16(v, 8)};
  }
  static Sum dot(Sum sum, const Word& w, const Panel& p) {
    return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(w.even, p.even), _mm256_madd_epi16(w.odd, p.odd)));
  }
};

void multiply(const Tile& t) {
  for (int j = 0; j < t.vectors; ++j) tile<Vector, 4, 2>(t, j * (kLanes * 4));
}

}  // namespace

extern const Kernel avx2{"avx2",           cpu::Isa::avx2,      {4, 4, 4, 4},         multiply,
                         portable::finish, portable::transpose, portable::interleave, portable::row_sums};

}  // namespace fqtstats::convolution8
