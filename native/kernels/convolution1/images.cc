#include "kernels/convolution1/images.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cpu/scratch.h"

namespace fqtstats::convolution1 {
namespace {

// One entry per column, where there may be one for all.
template <typename Tag, typename T>
const T* spread(const T* values, bool groups, std::int64_t columns) {
  if (!values || groups) return values;
  T* out = cpu::scratch<Tag, T>(columns);
  std::fill_n(out, columns, *values);
  return out;
}

}  // namespace

std::int64_t largest_zero(const Grid& grid, std::int64_t groups) {
  std::int64_t largest = 0;
  for (std::int64_t i = 0; grid.zero && i < (grid.groups ? groups : 1); ++i)
    largest = std::max(largest, std::abs(std::int64_t{grid.zero[i]}));
  return largest;
}

bool fits(std::int64_t terms, int bits, std::int64_t zero_a, std::int64_t zero_b) {
  const double a = static_cast<double>((std::int64_t{1} << bits) - 1 + zero_a), b = 1.0 + static_cast<double>(zero_b);
  return static_cast<double>(terms) * a * b < 2147483648.0;
}

std::int64_t slots_for(double products, int threads) {
  return static_cast<std::int64_t>(std::min<double>(threads, 1 + products / 4e6));
}

Columns columns_of(const Grid& grid, std::int64_t columns, const float* bias) {
  return {spread<struct StepTag>(grid.step, grid.groups, columns),
          spread<struct ZeroTag>(grid.zero, grid.groups, columns), nullptr,
          spread<struct OffsetTag>(grid.offset, grid.groups, columns), bias};
}

void fill_bits(std::int64_t channels, std::int32_t code, std::uint8_t* out) {
  for (std::int64_t c = 0; c < channels; c += 64) {
    const std::int64_t left = channels - c;
    const std::uint64_t word = !code ? 0 : left >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << left) - 1;
    std::memcpy(out + c / 8, &word, 8);
  }
}

void copy_padded(const Image& a, std::int64_t n0, std::int64_t n1, std::int64_t pad_h, std::int64_t pad_w, bool zeros,
                 std::uint8_t* out) {
  const std::int64_t bytes = pixel_bytes(a);
  for (std::int64_t n = n0; n < n1; ++n)
    for (std::int64_t y = -pad_h; y < a.h + pad_h; ++y)
      for (std::int64_t x = -pad_w; x < a.w + pad_w;) {
        const bool inside = y >= 0 && y < a.h && x >= 0 && x < a.w;
        if (inside)
          std::memcpy(out, pixel(a, n, y, x), static_cast<std::size_t>(a.w * bytes));
        else
          fill_bits(a.c, zeros ? 0 : zero_of(a.grid, n), out);
        x += inside ? a.w : 1;
        out += (inside ? a.w : 1) * bytes;
      }
}

void make_tables(const Kernel& kernel, const Image& a, std::int64_t n0, std::int64_t n1, const Source& to,
                 std::uint8_t* codes, std::uint8_t* pad_tables, std::uint8_t* out) {
  const std::int64_t blocks = words(a) * 4;
  std::int32_t* sum = to.sums;
  for (std::int64_t n = n0; n < n1; ++n) {
    const std::int32_t zero = zero_of(a.grid, n);
    if (to.pad_h + to.pad_w > 0) {
      std::memset(codes, 0, static_cast<std::size_t>(blocks * 16));
      std::memset(codes, zero, static_cast<std::size_t>(a.c));
      kernel.tables(codes, blocks, 64, pad_tables);
    }
    for (std::int64_t y = -to.pad_h; y < a.h + to.pad_h; ++y)
      for (std::int64_t x = -to.pad_w; x < a.w + to.pad_w; ++x, ++sum, out += to.pixel)
        if (y >= 0 && y < a.h && x >= 0 && x < a.w) {
          *sum = kernel.unpack(pixel(a, n, y, x), a.bits, a.c, codes);
          kernel.tables(codes, blocks, 64, out);
        } else {
          *sum = static_cast<std::int32_t>(a.c) * zero;
          std::memcpy(out, pad_tables, static_cast<std::size_t>(to.pixel));
        }
  }
}

}  // namespace fqtstats::convolution1
