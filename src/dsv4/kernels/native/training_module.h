#pragma once

#include <nanobind/nanobind.h>

namespace dsv4 {

void add_training(nanobind::module_& m);

}  // namespace dsv4
