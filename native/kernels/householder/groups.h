// Which rows the block Householder quantizer reflects together, and how it scales them: fqtstats/quantizers/bhq.py.
#pragma once

#include <cstdint>

namespace fqtstats::householder {

// What group_rows() writes; a Transform points to it.
struct Groups {
  std::int64_t* order;  // [rows]
  std::int64_t* heads;  // [rows / 2], of which those of the reflected groups are used
  double* sizes;        // likewise
  float* scale;         // [rows]
};

// The same groups and scales, bit for bit, as group_rows() and BlockHouseholder.of() of bhq.py make of the ranges of
// the rows. Returns the number of reflected groups. Precondition: rows >= 2; the ranges are finite and not negative,
// and one of them is positive.
std::int64_t group_rows(const double* ranges, std::int64_t rows, const Groups& groups);

}  // namespace fqtstats::householder
