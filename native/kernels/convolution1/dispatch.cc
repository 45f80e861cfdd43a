#include "kernels/convolution1/convolution1.h"

namespace fqtstats::convolution1 {

#define FQTSTATS_KERNEL(variant) extern const Kernel variant;
#include "kernels/convolution1/kernels.inc"
#undef FQTSTATS_KERNEL

std::span<const Kernel> kernels() {
  static const Kernel rows[] = {
#define FQTSTATS_KERNEL(variant) variant,
#include "kernels/convolution1/kernels.inc"
#undef FQTSTATS_KERNEL
  };
  return rows;
}

}  // namespace fqtstats::convolution1
