// AVX-512 VNNI: vpdpbusd adds the four products of unsigned and signed bytes to a 32-bit lane.
#include "kernels/convolution8/avx512.h"
#include "kernels/convolution8/tile.h"

namespace fqtstats::convolution8 {
namespace {

struct Vector {
  using Sum = __m512i;
  using Panel = __m512i;
  using Word = __m512i;
  static constexpr int kBytes = 64;
  static Sum zero() { return _mm512_setzero_si512(); }
  static Sum load(const std::int32_t* p) { return _mm512_loadu_si512(p); }
  static void store(std::int32_t* p, Sum v) { _mm512_storeu_si512(p, v); }
  static Panel panel(const std::int8_t* p) { return _mm512_loadu_si512(p); }
  static Word word(const std::uint8_t* p) { return _mm512_broadcastd_epi32(_mm_loadu_si32(p)); }
  static Sum dot(Sum sum, Word w, Panel p) { return _mm512_dpbusd_epi32(sum, w, p); }
};

void multiply(const Tile& t) {
  switch (t.vectors) {
    case 1:
      return tile<Vector, 8, 1>(t, 0);
    case 2:
      return t.count > 8 ? tile<Vector, 12, 2>(t, 0) : tile<Vector, 8, 2>(t, 0);
    case 3:
      return tile<Vector, 8, 3>(t, 0);
    default:
      return t.count > 4 ? tile<Vector, 6, 4>(t, 0) : tile<Vector, 4, 4>(t, 0);
  }
}

}  // namespace

extern const Kernel avx512vnni{"avx512vnni",    cpu::Isa::avx512vnni, {8, 12, 8, 6},       multiply,
                               avx512f::finish, avx512f::transpose,   avx512f::interleave, avx512f::row_sums};

}  // namespace fqtstats::convolution8
