// The operations around the tile as plain loops, compiled once per variant with the flags of its file: everything here
// has internal linkage.
#pragma once

#include <cstring>

#include "kernels/convolution8/convolution8.h"

namespace fqtstats::convolution8 {
namespace {
namespace portable {

[[maybe_unused]] void finish(const Finish& f) {
  const Columns& c = f.columns;
  for (int i = 0; i < f.row_count; ++i) {
    const Row row = f.rows[i];
    const std::int32_t* acc = f.acc + i * f.stride;
    for (int j = 0; j < f.column_count; ++j) {
      // Unsigned: modulo 2^32.
      const std::uint32_t total = static_cast<std::uint32_t>(acc[j]) +
                                  static_cast<std::uint32_t>(row.sum) * static_cast<std::uint32_t>(c.shift[j]) +
                                  static_cast<std::uint32_t>(row.zero) * static_cast<std::uint32_t>(c.sum[j]);
      float y = static_cast<float>(static_cast<std::int32_t>(total)) * (row.step * c.step[j]);
      if (c.first != nullptr) y += row.first * c.first[j];
      if (c.second != nullptr) y += row.second * c.second[j];
      if (c.bias != nullptr) y += c.bias[j];
      row.out[j] = y;
    }
  }
}

[[maybe_unused]] void transpose(const void* in, std::int64_t in_stride, std::int64_t rows, std::int64_t columns,
                                std::uint32_t flip, void* out, std::int64_t out_stride) {
  for (std::int64_t j = 0; j < columns; ++j)
    for (std::int64_t i = 0; i < rows; ++i) {
      std::uint32_t word;  // copied: `in` need not be aligned
      std::memcpy(&word, static_cast<const char*>(in) + i * in_stride + 4 * j, 4);
      word ^= flip;
      std::memcpy(static_cast<char*>(out) + j * out_stride + 4 * i, &word, 4);
    }
}

[[maybe_unused]] void interleave(const std::uint8_t* const* in, int count, std::uint8_t flip, std::uint8_t* out,
                                 std::int64_t stride, std::int32_t* sums) {
  for (int j = 0; j < (count + kLanes - 1) / kLanes * kLanes; ++j) {
    std::int32_t sum = sums[j];
    for (int k = 0; k < 4; ++k) {
      const bool real = j < count && in[k] != nullptr;
      out[j / kLanes * stride + j % kLanes * 4 + k] = real ? static_cast<std::uint8_t>(in[k][j] ^ flip) : 0;
      if (real) sum += in[k][j];
    }
    sums[j] = sum;
  }
}

[[maybe_unused]] void row_sums(const std::uint8_t* in, std::int64_t stride, std::int64_t count, std::int64_t bytes,
                               std::int32_t* out) {
  for (std::int64_t i = 0; i < count; ++i) {
    std::int32_t sum = 0;
    for (std::int64_t j = 0; j < bytes; ++j) sum += in[i * stride + j];
    out[i] = sum;
  }
}

}  // namespace portable
}  // namespace
}  // namespace fqtstats::convolution8
