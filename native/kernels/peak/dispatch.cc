#include "kernels/peak/peak.h"

namespace fqtstats::peak {

#define FQTSTATS_KERNEL(variant) extern const Kernel variant;
#include "kernels/peak/kernels.inc"
#undef FQTSTATS_KERNEL

std::span<const Kernel> kernels() {
  static const Kernel rows[] = {
#define FQTSTATS_KERNEL(variant) variant,
#include "kernels/peak/kernels.inc"
#undef FQTSTATS_KERNEL
  };
  return rows;
}

}  // namespace fqtstats::peak
