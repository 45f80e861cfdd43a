// AVX-512 without VNNI: as the AVX2 variant, on vectors twice as wide.
#include "kernels/convolution8/avx512.h"
#include "kernels/convolution8/tile.h"

namespace fqtstats::convolution8 {
namespace {

struct Pairs {
  __m512i even, odd;
};

struct Vector {
  using Sum = __m512i;
  using Panel = Pairs;
  using Word = Pairs;
  static constexpr int kBytes = 64;
  static Sum zero() { return _mm512_setzero_si512(); }
  static Sum load(const std::int32_t* p) { return _mm512_loadu_si512(p); }
  static void store(std::int32_t* p, Sum v) { _mm512_storeu_si512(p, v); }
  static Panel panel(const std::int8_t* p) {
    const __m512i v = _mm512_loadu_si512(p);
    return {_mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8), _mm512_srai_epi16(v, 8)};
  }
  static Word word(const std::uint8_t* p) {
    const __m512i v = _mm512_broadcastd_epi32(_mm_loadu_si32(p));
    return {_mm512_and_si512(v, _mm512_set1_epi16(255)), _mm512_srli_epi16(v, 8)};
  }
  static Sum dot(Sum sum, const Word& w, const Panel& p) {
    return _mm512_add_epi32(sum, _mm512_add_epi32(_mm512_madd_epi16(w.even, p.even), _mm512_madd_epi16(w.odd, p.odd)));
  }
};

void multiply(const Tile& t) {
  switch (t.vectors) {
    case 1:
      return tile<Vector, 4, 1>(t, 0);
    case 2:
      return tile<Vector, 4, 2>(t, 0);
    case 3:
      return tile<Vector, 4, 3>(t, 0);
    default:
      return tile<Vector, 4, 4>(t, 0);
  }
}

}  // namespace

extern const Kernel avx512{"avx512",        cpu::Isa::avx512,   {4, 4, 4, 4},        multiply,
                           avx512f::finish, avx512f::transpose, avx512f::interleave, avx512f::row_sums};

}  // namespace fqtstats::convolution8
