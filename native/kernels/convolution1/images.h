// Images as they are stored, and as tiles read them.
#pragma once

#include <cstdint>

#include "cpu/parallel.h"
#include "kernels/codes.h"
#include "kernels/convolution1/convolution1.h"

namespace fqtstats::convolution1 {

// Words of 64 channels of a pixel.
inline std::int64_t words(const Image& a) { return ceil_div(a.c, 64); }

inline std::int64_t pixel_bytes(const Image& a) { return row_bytes(a.c, a.bits); }

inline const std::uint8_t* pixel(const Image& a, std::int64_t n, std::int64_t y, std::int64_t x) {
  const std::int64_t height = a.h + 2 * a.pad_h, width = a.w + 2 * a.pad_w;
  return a.data + ((n * height + y + a.pad_h) * width + x + a.pad_w) * pixel_bytes(a);
}

inline std::int32_t zero_of(const Grid& grid, std::int64_t group) {
  return grid.zero ? grid.zero[grid.groups ? group : 0] : 0;
}

// The largest |zero| of `groups` groups.
std::int64_t largest_zero(const Grid& grid, std::int64_t groups);

// Do all integers that make up a result of `terms` products fit into 32 bits? `bits` of the wider operand's codes.
bool fits(std::int64_t terms, int bits, std::int64_t zero_a, std::int64_t zero_b);

// Slots for that many products of codes, one per thread at most: each gets some 10 us of work.
std::int64_t slots_for(double products, int threads);

// body(slot, begin, end) over [0, total), for slots 0 ... slots - 1; a slot has working memory of its own.
template <typename Body>
void split_slots(std::int64_t total, std::int64_t slots, int threads, const Body& body) {
  cpu::split(slots, 1, threads, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t s = first; s < last; ++s) body(s, total * s / slots, total * (s + 1) / slots);
  });
}

// What the codes of the 1-bit operand mean, per column. Valid until the next call on the same thread.
Columns columns_of(const Grid& grid, std::int64_t columns, const float* bias);

// Images ready for the tiles: pixels in steps, with the pad that the taps need, and the sum of each pixel's codes.
struct Source {
  const std::uint8_t* data;
  std::int32_t* sums;
  std::int64_t height, width, pad_h, pad_w, pixel;
};

// One pixel of 1-bit codes that are all `code`.
void fill_bits(std::int64_t channels, std::int32_t code, std::uint8_t* out);

// 1-bit images n0 ... n1 - 1 with a pad of (pad_h, pad_w) pixels of the code `zero` of their group, or with `zeros` of
// 0.
void copy_padded(const Image& a, std::int64_t n0, std::int64_t n1, std::int64_t pad_h, std::int64_t pad_w, bool zeros,
                 std::uint8_t* out);

// Tables of images n0 ... n1 - 1, with the pad of `to`; and their sums. Working memory: `codes` and `pad_tables` of a
// pixel.
void make_tables(const Kernel& kernel, const Image& a, std::int64_t n0, std::int64_t n1, const Source& to,
                 std::uint8_t* codes, std::uint8_t* pad_tables, std::uint8_t* out);

}  // namespace fqtstats::convolution1
