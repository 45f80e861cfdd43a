// The reference: one element at a time.
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/quantize/quantize.h"

namespace fqtstats::quantize {
namespace {

float value(float x) { return x; }
float value(std::uint16_t bfloat) { return std::bit_cast<float>(std::uint32_t{bfloat} << 16); }

template <typename T>
void column_extremes(const void* x, std::int64_t rows, std::int64_t stride, std::int64_t columns, float* low,
                     float* high) {
  for (std::int64_t c = 0; c < columns; ++c) {
    const T* column = static_cast<const T*>(x) + c;
    low[c] = high[c] = value(column[0]);
    for (std::int64_t r = 0; r < rows; ++r) {
      const float v = value(column[r * stride]);
      // A NaN fails both comparisons once it is in.
      if (!(v >= low[c])) low[c] = std::isnan(low[c]) ? low[c] : v;
      if (!(v <= high[c])) high[c] = std::isnan(high[c]) ? high[c] : v;
    }
  }
}

template <typename T>
void extremes(const void* x, std::int64_t count, float* low, float* high) {
  column_extremes<T>(x, count, 1, 1, low, high);
}

// The coordinate of rule `log`: piecewise linear, one step per power of two.
float bend(float y) {
  const float z = std::abs(y);
  if (z < 1) return y;
  const int n = std::ilogb(z);
  return std::copysign(static_cast<float>(n) + std::ldexp(z, -n), y);
}

// And back.
float unbend(float k) { return k == 0 ? 0 : std::copysign(std::ldexp(1.0f, static_cast<int>(std::abs(k)) - 1), k); }

template <typename T>
void encode(const Rectangle& t) {
  const float two_to_n = static_cast<float>(1 << t.random_bits), levels = static_cast<float>(t.levels);
  for (std::int64_t r = 0; r < t.rows; ++r)
    for (std::int64_t i = 0; i < t.count; ++i) {
      const std::int64_t g = t.columns ? i : r * t.grid_step;
      const float x = value(static_cast<const T*>(t.x)[r * t.x_stride + i]);
      float y = ((x - t.grids.offset[g]) * t.grids.prescale[g]) * t.grids.scale[g];
      if (t.log) y = bend(y);
      float rounded;
      if (t.bits != nullptr) {
        const float floor = std::floor(y), threshold = (y - floor) * two_to_n;  // integers below 2^25 are exact
        rounded = floor + (static_cast<float>(t.bits[r * t.bits_stride + i]) < std::floor(threshold) ? 1.0f : 0.0f);
      } else {
        rounded = std::nearbyint(y);
      }
      const float code = rounded + t.grids.zero[g];
      t.codes[r * t.codes_stride + i] = static_cast<std::uint8_t>(code > 0 ? (code < levels ? code : levels) : 0);
    }
}

void decode(const Decoded& d) {
  for (std::int64_t r = 0; r < d.rows; ++r)
    for (std::int64_t i = 0; i < d.count; ++i) {
      const std::int64_t g = d.columns ? i : r * d.grid_step;
      const float centered = static_cast<float>(d.codes[r * d.codes_stride + i]) - d.zero[g];
      d.x[r * d.x_stride + i] = (d.log ? unbend(centered) : centered) * d.step[g] + d.offset[g];
    }
}

void pack(const std::uint8_t* codes, std::int64_t stride, std::int64_t rows, std::int64_t count, int bits,
          std::uint8_t* out, std::int64_t out_stride) {
  for (std::int64_t r = 0; r < rows; ++r) {
    std::memset(out + r * out_stride, 0, static_cast<std::size_t>(row_bytes(count, bits)));
    for (std::int64_t i = 0; i < count; ++i)
      out[r * out_stride + i * bits / 8] |= static_cast<std::uint8_t>(codes[r * stride + i] << (i * bits % 8));
  }
}

void unpack(const std::uint8_t* packed, std::int64_t stride, std::int64_t rows, std::int64_t count, int bits,
            std::uint8_t* codes, std::int64_t codes_stride) {
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t i = 0; i < count; ++i)
      codes[r * codes_stride + i] = (packed[r * stride + i * bits / 8] >> (i * bits % 8)) & ((1 << bits) - 1);
}

template <typename T>
void transpose(const T* in, std::int64_t stride, std::int64_t rows, std::int64_t columns, T* out,
               std::int64_t out_stride) {
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < columns; ++c) out[c * out_stride + r] = in[r * stride + c];
}

}  // namespace

extern const Kernel scalar{"scalar",
                           cpu::Isa::scalar,
                           {extremes<float>, extremes<std::uint16_t>},
                           {column_extremes<float>, column_extremes<std::uint16_t>},
                           {encode<float>, encode<std::uint16_t>},
                           decode,
                           pack,
                           unpack,
                           transpose<std::uint8_t>,
                           transpose<std::int32_t>};

}  // namespace fqtstats::quantize
