// The table of one instruction set.
#include "kernels.h"
#include "training.h"
#include "vector.h"

namespace DSV4_ISA {

dsv4::Arrange arrange;
dsv4::Multiply multiply;
dsv4::Swiglu swiglu;
dsv4::Add add;

extern const dsv4::Training training;
extern const dsv4::Isa isa;
const dsv4::Isa isa = {DSV4_ISA_NAME, DSV4_PAIRS != 0, arrange, multiply, swiglu, add,
                        &training};

}  // namespace DSV4_ISA
