#include "kernels/convolution8/images.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "kernels/codes.h"

namespace fqtstats::convolution8 {

using std::int32_t, std::int64_t, std::uint8_t;

namespace {

template <int bits>
void unpack_row(const uint8_t* in, int64_t bytes, uint8_t* out) {
  constexpr int kPerByte = 8 / bits;
  for (int64_t i = 0; i < bytes; ++i)
    for (int k = 0; k < kPerByte; ++k) out[i * kPerByte + k] = (in[i] >> (k * bits)) & ((1 << bits) - 1);
}

void unpack_row(const uint8_t* in, int64_t bytes, int bits, uint8_t* out) {
  switch (bits) {
    case 1:
      return unpack_row<1>(in, bytes, out);
    case 2:
      return unpack_row<2>(in, bytes, out);
    case 4:
      return unpack_row<4>(in, bytes, out);
    default:
      std::copy_n(in, bytes, out);
  }
}

// The two bytes that each byte of 4-bit codes stands for.
using Pairs = std::array<std::array<uint8_t, 2>, 256>;

Pairs pairs_of(const uint8_t* values) {
  Pairs pairs;
  for (int byte = 0; byte < 256; ++byte) pairs[byte] = {values[byte & 15], values[byte >> 4]};
  return pairs;
}

void unpack_row(const uint8_t* in, int64_t bytes, const Pairs& pairs, uint8_t* out) {
  for (int64_t i = 0; i < bytes; ++i) std::memcpy(out + 2 * i, pairs[in[i]].data(), 2);
}

}  // namespace

Image unpacked(const Codes& c, int64_t groups, int threads, uint8_t* (*memory)(int64_t bytes)) {
  struct Rows;
  const int64_t from = row_bytes(c.channels, c.bits), per_group = c.channels / groups;
  const int64_t in_row = (c.width + 2 * c.pad_width) * from, in_image = (c.height + 2 * c.pad_height) * in_row;
  const uint8_t* data = c.data + c.pad_height * in_row + c.pad_width * from;
  if (c.bits == 8 && (groups == 1 || per_group % 4 == 0)) return {data, in_image, in_row, from, per_group};
  const int64_t group = round_up(per_group, 4), pixel = groups * group, row = c.width * pixel, image = c.height * row;
  const int64_t codes = from * 8 / c.bits;
  uint8_t* out = memory(c.n * image);
  uint8_t* wide = cpu::scratch<Rows, uint8_t>(c.n * codes);
  Pairs pairs;
  if (c.values != nullptr) pairs = pairs_of(c.values);
  cpu::split(c.n, std::max<int64_t>(1, (64 << 10) / image), threads, [&](int64_t begin, int64_t end) {
    uint8_t* codes_of_pixel = wide + begin * codes;
    for (int64_t i = begin * c.height * c.width; i < end * c.height * c.width; ++i) {
      const int64_t n = i / (c.height * c.width), h = i / c.width % c.height, w = i % c.width;
      const uint8_t* packed = data + n * in_image + h * in_row + w * from;
      if (c.values != nullptr)
        unpack_row(packed, from, pairs, codes_of_pixel);
      else
        unpack_row(packed, from, c.bits, codes_of_pixel);
      for (int64_t g = 0; g < groups; ++g) {
        uint8_t* to = out + i * pixel + g * group;
        std::copy_n(codes_of_pixel + g * per_group, per_group, to);
        std::fill_n(to + per_group, group - per_group, uint8_t{0});
      }
    }
  });
  return {out, image, row, pixel, group};
}

Scales scales_of(const Codes& c, int64_t columns) {
  struct Shift;
  struct Step;
  struct Offset;
  const int64_t padded = columns + kPanel, by = c.groups > 1 ? 1 : 0;
  int32_t* shift = cpu::scratch<Shift, int32_t>(padded);
  float* step = cpu::scratch<Step, float>(padded);
  float* offset = c.offset == nullptr ? nullptr : cpu::scratch<Offset, float>(padded);
  for (int64_t j = 0; j < padded; ++j) {
    const bool real = j < columns;
    shift[j] = !real ? 0 : 128 - (c.zero == nullptr ? 0 : c.zero[j * by]);
    step[j] = real ? c.step[j * by] : 0;
    if (offset != nullptr) offset[j] = real ? c.offset[j * by] : 0;
  }
  return {shift, step, offset};
}

int64_t list_panels(std::vector<Panel>& panels, int64_t groups, int64_t columns, int64_t words) {
  panels.clear();
  int64_t offset = 0;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t j = 0; j < columns; j += kPanel) {
      const int count = static_cast<int>(std::min<int64_t>(kPanel, columns - j));
      const int vectors = (count + kLanes - 1) / kLanes;
      panels.push_back({g, g * columns + j, count, vectors, offset});
      offset += words * vectors * kLanes * 4;
    }
  return offset;
}

void finish_wide(const int64_t* acc, int64_t stride, const Row* rows, int row_count, const Columns& c,
                 int column_count) {
  for (int i = 0; i < row_count; ++i) {
    const Row& row = rows[i];
    for (int j = 0; j < column_count; ++j) {
      const int64_t total = acc[i * stride + j] + int64_t{row.sum} * c.shift[j] + int64_t{row.zero} * c.sum[j];
      float y = static_cast<float>(total) * (row.step * c.step[j]);
      if (c.first != nullptr) y += row.first * c.first[j];
      if (c.second != nullptr) y += row.second * c.second[j];
      if (c.bias != nullptr) y += c.bias[j];
      row.out[j] = y;
    }
  }
}

}  // namespace fqtstats::convolution8
