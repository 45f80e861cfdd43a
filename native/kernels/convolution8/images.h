// The operands of a convolution as its loops read them: whole bytes of codes, and constants per column of the result.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/convolution8/convolution8.h"

namespace fqtstats::convolution8 {

inline constexpr std::uint8_t kFlip = 0x80;  // u8 - 128 as s8

// 8-bit codes of images, without their padding; strides in bytes. The channels of a group start `group` bytes after
// those of the one before, and whole words of them may be read.
struct Image {
  const std::uint8_t* data;
  std::int64_t image, row, pixel, group;
};

// The codes as they are where a product can read them; otherwise a copy in `memory(bytes)`, one byte per code, each of
// `groups` groups of channels from a multiple of 4 bytes on.
Image unpacked(const Codes& c, std::int64_t groups, int threads, std::uint8_t* (*memory)(std::int64_t bytes));

// What the codes of the columns of a result mean: [columns], readable for kPanel more.
struct Scales {
  const std::int32_t* shift;  // 128 - zero
  const float* step;
  const float* offset;  // or nullptr
};

// Valid until the next call on the same thread.
Scales scales_of(const Codes& c, std::int64_t columns);

// Columns of a result that a tile computes together.
struct Panel {
  std::int64_t group, column;  // of channels; first column of the result
  int count, vectors;
  std::int64_t offset;  // bytes
};

// Panels of up to kPanel columns that cover `groups` times `columns`, of `words` words each; returns their bytes.
std::int64_t list_panels(std::vector<Panel>& panels, std::int64_t groups, std::int64_t columns, std::int64_t words);

// Kernel::finish for sums that int32 may not hold.
void finish_wide(const std::int64_t* acc, std::int64_t stride, const Row* rows, int row_count, const Columns& c,
                 int column_count);

}  // namespace fqtstats::convolution8
