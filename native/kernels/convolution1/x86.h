// What the x86 variants share, given the operations of a register. For ISA files only: all of it has internal linkage.
//
// V has Int and Float, registers of kLanes lanes: load(p, mask), store(p, x, mask), fill(value), add, sub, mul and
// to_float(x), where the mask is All{} or first(n), the first n lanes.
#pragma once

#include <immintrin.h>

#include "kernels/convolution1/convolution1.h"

#define FQTSTATS_INLINE __attribute__((always_inline)) static inline

namespace fqtstats::convolution1 {
namespace {

// Four rounds of interleaving the first half with the second transpose 16 x 16 bytes. In 128 bits: with wider
// registers, too few are left, and it is no faster.
void transpose(const std::uint8_t* codes, std::int64_t ld, std::int64_t n, std::uint8_t* out) {
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

// A register of columns from `at` on.
template <typename V, typename Mask>
FQTSTATS_INLINE void finish_columns(const std::int32_t* sums, std::int64_t ld, const Row* row, int rows,
                                    const Columns& columns, std::int64_t at, Mask mask) {
  using Float = typename V::Float;
  using Int = typename V::Int;
  const Float step = V::load(columns.step + at, mask);
  const Float offset = columns.offset ? V::load(columns.offset + at, mask) : V::fill(0.0F);
  const Float bias = columns.bias ? V::load(columns.bias + at, mask) : V::fill(0.0F);
  const Int zero = columns.zero ? V::load(columns.zero + at, mask) : V::fill(0);
  const Int rest = columns.rest ? V::load(columns.rest + at, mask) : V::fill(0);
  for (int r = 0; r < rows; ++r) {
    Int sum = V::load(sums + r * ld, mask);
    if (columns.zero) sum = V::sub(sum, V::mul(zero, V::fill(row[r].sum)));
    if (columns.rest) sum = V::add(sum, V::mul(rest, V::fill(row[r].zero)));
    Float y = V::mul(V::to_float(sum), V::mul(V::fill(row[r].step), step));
    if (columns.offset) y = V::add(y, V::mul(V::fill(row[r].u), offset));
    if (row[r].v) y = V::add(y, V::mul(V::fill(row[r].offset), V::load(row[r].v + at, mask)));
    if (columns.bias) y = V::add(y, bias);
    V::store(row[r].out + at, y, mask);
  }
}

template <typename V>
void finish(const std::int32_t* sums, std::int64_t ld, const Row* row, int rows, const Columns& columns,
            std::int64_t first, std::int64_t n) {
  std::int64_t c = 0;
  for (; c + V::kLanes <= n; c += V::kLanes)
    finish_columns<V>(sums + c, ld, row, rows, columns, first + c, typename V::All{});
  if (c < n) finish_columns<V>(sums + c, ld, row, rows, columns, first + c, V::first(n - c));
}

}  // namespace
}  // namespace fqtstats::convolution1
