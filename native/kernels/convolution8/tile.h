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

#define FQTSTATS_ROWS(ROW) ROW(0) ROW(1) ROW(2) ROW(3) ROW(4) ROW(5) ROW(6) ROW(7) ROW(8) ROW(9) ROW(10) ROW(11)

// Columns from byte `offset` of a panel's word on.
template <typename V, int kRows, int kColumns>
__attribute__((always_inline)) inline void tile(const Tile& t, std::int64_t offset) {
  constexpr int kWidth = V::kBytes / 4;  // columns of a vector
  const std::int64_t panel_step = t.vectors * (kLanes * 4), step = t.step;
  std::int32_t* const out = t.out + offset / 4;
  // Rows from `count` on go where the last one goes, before it.
#define FQTSTATS_ROW(i)                                                                                   \
  [[maybe_unused]] const std::uint8_t* const a##i = t.rows[i < kRows ? i : 0];                            \
  [[maybe_unused]] std::int32_t* const p##i = out + (i < t.count ? i : t.count - 1) * t.stride;           \
  typename V::Sum c##i##_0 = V::zero(), c##i##_1 = V::zero(), c##i##_2 = V::zero(), c##i##_3 = V::zero(); \
  if constexpr (i < kRows) {                                                                              \
    if (t.add) {                                                                                          \
      c##i##_0 = V::load(p##i);                                                                           \
      if constexpr (kColumns > 1) c##i##_1 = V::load(p##i + kWidth);                                      \
      if constexpr (kColumns > 2) c##i##_2 = V::load(p##i + 2 * kWidth);                                  \
      if constexpr (kColumns > 3) c##i##_3 = V::load(p##i + 3 * kWidth);                                  \
    }                                                                                                     \
  }
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
#define FQTSTATS_ROW(i)                                             \
  if constexpr (i < kRows) {                                        \
    const typename V::Word x = V::word(a##i + o);                   \
    c##i##_0 = V::dot(c##i##_0, x, b0);                             \
    if constexpr (kColumns > 1) c##i##_1 = V::dot(c##i##_1, x, b1); \
    if constexpr (kColumns > 2) c##i##_2 = V::dot(c##i##_2, x, b2); \
    if constexpr (kColumns > 3) c##i##_3 = V::dot(c##i##_3, x, b3); \
  }
      FQTSTATS_ROWS(FQTSTATS_ROW)
#undef FQTSTATS_ROW
      b += panel_step;
      o += step;
    }
  }
#define FQTSTATS_ROW(i)                                                \
  if constexpr (i < kRows) {                                           \
    V::store(p##i, c##i##_0);                                          \
    if constexpr (kColumns > 1) V::store(p##i + kWidth, c##i##_1);     \
    if constexpr (kColumns > 2) V::store(p##i + 2 * kWidth, c##i##_2); \
    if constexpr (kColumns > 3) V::store(p##i + 3 * kWidth, c##i##_3); \
  }
  FQTSTATS_ROW(11)
  FQTSTATS_ROW(10)
  FQTSTATS_ROW(9)
  FQTSTATS_ROW(8)
  FQTSTATS_ROW(7)
  FQTSTATS_ROW(6)
  FQTSTATS_ROW(5)
  FQTSTATS_ROW(4)
  FQTSTATS_ROW(3)
  FQTSTATS_ROW(2)
  FQTSTATS_ROW(1)
  FQTSTATS_ROW(0)
#undef FQTSTATS_ROW
}

#undef FQTSTATS_ROWS

}  // namespace
}  // namespace fqtstats::convolution8
