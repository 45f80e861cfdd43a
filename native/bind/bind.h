// What an operation's binding file gives to module.cc.
#pragma once

#include <nanobind/nanobind.h>

#include <vector>

#include "bind/variants.h"

namespace fqtstats::bind {

// Per operation: add its functions to the module; list its variants.
void philox(nanobind::module_& m);
std::vector<Variant> philox_variants();

}  // namespace fqtstats::bind
