// The reference: one element at a time, nothing packed.
#include "kernels/product1/generic.h"

namespace fqtstats::product1 {
namespace {

void pack(const Matrix&, std::int64_t, std::int64_t, std::uint8_t*) {}

template <int kBits>
std::int32_t dot(const std::uint8_t* table, const std::uint8_t* index, std::int64_t bytes) {
  std::int32_t s = 0;
  for (std::int64_t i = 0; i < bytes; ++i)
    for (int j = 0; j < 8 / kBits; ++j) {
      const std::int64_t k = i * (8 / kBits) + j;
      s += (table[i] >> (j * kBits) & ((1 << kBits) - 1)) * (index[k / 8] >> (k % 8) & 1);
    }
  return s;
}

template <>
std::int32_t dot<1>(const std::uint8_t* a, const std::uint8_t* b, std::int64_t bytes) {
  std::int32_t s = 0;
  for (std::int64_t at = 0; at < bytes; at += 8)
    s += __builtin_popcountll(load<std::uint64_t>(a, bytes, at) & load<std::uint64_t>(b, bytes, at));
  return s;
}

template <int kBits>
void multiply_rows(const Job& job, std::int64_t begin, std::int64_t end) {
  // Where the rows of `table` end on a group, those of `index` may end earlier.
  const std::int64_t bytes = least(job.table.bytes, job.index.bytes * kBits);
  for (std::int64_t i = begin; i < end; ++i)
    for (std::int64_t j = 0; j < job.index.rows; ++j) {
      const std::int32_t s =
          dot<kBits>(job.table.data + i * job.table.stride, job.index.data + j * job.index.stride, bytes);
      finish_element(*job.epilogue, job.swapped ? j : i, job.swapped ? i : j, s);
    }
}

template <int kBits>
constexpr Path path() {
  return {0, pack, multiply_rows<kBits>};
}

}  // namespace

extern const Kernel scalar{"scalar", cpu::Isa::scalar, path<1>(), path<2>(), path<4>(), transpose, sums};

}  // namespace fqtstats::product1
