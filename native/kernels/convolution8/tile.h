// The tile: kRows rows times kColumns vectors, whose sums stay in registers. V gives the vectors:
//
//   Sum, zero(), load(p), store(p, sum); Panel, panel(p): the next vector of a panel's word; Word, word(p): a row's
//   word, broadcast; dot(sum, word, panel): sum plus the four products of each lane; kBytes of a panel's vector.
//
// Sums are named one by one: as an array, gcc 12 moves them to memory in the loop.
#pragma once

#include "kernels/convolution8/convolution8.h"

namespace fqtstats::convolution8 {
namespace {

#define FQTSTATS_ROWS(ROW) ROW(0) ROW(1) ROW(2) ROW(3) ROW(4) ROW(5) ROW(6) ROW(7)

// Columns from byte `offset` of a panel's word on.
template <typename V, int kRows, int kColumns>
__attribute__((always_inline)) inline void tile(const Tile& t, std::int64_t offset) {
  constexpr int kWidth = V::kBytes / 4;  // columns of a vector
  const std::int64_t panel_step = t.vectors * (kLanes * 4), step = t.step;
  std::int32_t* const out = t.out + offset / 4;
#define FQTSTATS_ROW(i)                                         \
  const std::uint8_t* const a##i = t.rows[(i < kRows ? i : 0)]; \
  typename V::Sum c##i##0 = V::zero(), c##i##1 = V::zero(), c##i##2 = V::zero(), c##i##3 = V::zero();
  FQTSTATS_ROWS(FQTSTATS_ROW)
#undef FQTSTATS_ROW
  for (const Run *run = t.runs, *end = run + t.run_count; run != end; ++run) {
    const std::int8_t* b = t.panel + run->panel * panel_step + offset;
    std::int64_t o = run->row;
    for (std::int64_t words = run->words; words != 0; --words) {
      const typename V::Panel b0 = V::panel(b);
      const typename V::Panel b1 = kColumns > 1 ? V::panel(b + V::kBytes) : b0;
      const typename V::Panel b2 = kColumns > 2 ? V::panel(b + 2 * V::kBytes) : b0;
      const typename V::Panel b3 = kColumns > 3 ? V::panel(b + 3 * V::kBytes) : b0;
#define FQTSTATS_ROW(i)                                           \
  if constexpr (i < kRows) {                                      \
    const typename V::Word x = V::word(a##i + o);                 \
    c##i##0 = V::dot(c##i##0, x, b0);                             \
    if constexpr (kColumns > 1) c##i##1 = V::dot(c##i##1, x, b1); \
    if constexpr (kColumns > 2) c##i##2 = V::dot(c##i##2, x, b2); \
    if constexpr (kColumns > 3) c##i##3 = V::dot(c##i##3, x, b3); \
  }
      FQTSTATS_ROWS(FQTSTATS_ROW)
#undef FQTSTATS_ROW
      b += panel_step;
      o += step;
    }
  }
#define FQTSTATS_STORE(i, j)                                    \
  if constexpr (i < kRows && j < kColumns) {                    \
    std::int32_t* const p = out + i * t.stride + j * kWidth;    \
    V::store(p, t.add ? V::add(V::load(p), c##i##j) : c##i##j); \
  }
#define FQTSTATS_ROW(i)                                                                 \
  if (i < t.count) {                                                                    \
    FQTSTATS_STORE(i, 0) FQTSTATS_STORE(i, 1) FQTSTATS_STORE(i, 2) FQTSTATS_STORE(i, 3) \
  }
  FQTSTATS_ROWS(FQTSTATS_ROW)
#undef FQTSTATS_ROW
#undef FQTSTATS_STORE
}

#undef FQTSTATS_ROWS

}  // namespace
}  // namespace fqtstats::convolution8
