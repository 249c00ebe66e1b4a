// The instruction sets that are compiled in.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace dsv4 {

// Names of those that this machine has, best first.
std::vector<std::string> usable();

// Take one of them, for all threads of the process; std::invalid_argument for another name.
void use(const std::string& name);

}  // namespace dsv4
