#include "kernels/convolution8/convolution8.h"

namespace fqtstats::convolution8 {

#define FQTSTATS_KERNEL(variant) extern const Kernel variant;
#include "kernels/convolution8/kernels.inc"
#undef FQTSTATS_KERNEL

std::span<const Kernel> kernels() {
  static const Kernel rows[] = {
#define FQTSTATS_KERNEL(variant) variant,
#include "kernels/convolution8/kernels.inc"
#undef FQTSTATS_KERNEL
  };
  return rows;
}

}  // namespace fqtstats::convolution8
