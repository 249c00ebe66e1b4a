// The Python module: addresses and sizes in, nothing about tensors. kernels/native.py is its user.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <string>
#include <vector>

#include "linear.h"

namespace nb = nanobind;
using namespace dsv4;

namespace dsv4 {

#define DSV4_DECLARE(name) \
  namespace name {         \
  extern const Isa isa;    \
  }
#if defined(__x86_64__)
DSV4_DECLARE(avx512_bf16)
DSV4_DECLARE(avx512)
DSV4_DECLARE(avx2)
#elif defined(__aarch64__)
DSV4_DECLARE(neon)
#endif
DSV4_DECLARE(portable)

}  // namespace dsv4

namespace {

// Best first.
const Isa* const ISAS[] = {
#if defined(__x86_64__)
    &avx512_bf16::isa, &avx512::isa, &avx2::isa,
#elif defined(__aarch64__)
    &neon::isa,
#endif
    &portable::isa};

bool usable(const Isa* isa) {
  std::string name = isa->name;
#if defined(__x86_64__)
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (name == "avx512_bf16") {
    return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  }
  if (name == "avx512") return avx512;
  if (name == "avx2") return avx2;
#endif
  return true;
}

std::atomic<const Isa*> chosen{nullptr};

std::vector<std::string> usable_names() {
  std::vector<std::string> names;
  for (const Isa* isa : ISAS) {
    if (usable(isa)) names.push_back(isa->name);
  }
  return names;
}

void choose(const std::string& name) {
  for (const Isa* isa : ISAS) {
    if (isa->name == name && usable(isa)) {
      chosen = isa;
      return;
    }
  }
  throw nb::value_error(("not an instruction set of this machine: " + name).c_str());
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void linear_of(uintptr_t x, bool x_bf16, int64_t rows, uintptr_t weight, uintptr_t scale,
               int format, int scale_bytes, int64_t outputs, int64_t inputs, int groups,
               uintptr_t out, bool out_bf16, int threads) {
  Weight w{at<uint8_t>(weight), at<uint8_t>(scale), outputs, inputs, (Format)format, scale_bytes};
  linear({at<void>(x), rows, groups * inputs, x_bf16}, w, groups, at<void>(out), out_bf16, threads);
}

}  // namespace

const Isa* dsv4::current() { return chosen.load(std::memory_order_relaxed); }

NB_MODULE(_native, m) {
  choose(usable_names().front());
  m.def("isas", usable_names, "Instruction sets of this machine that are compiled in, best first.");
  m.def("isa", [] { return current()->name; }, "The one in use.");
  m.def("use", choose, "Use another, for all threads of the process.");
  m.def("linear", linear_of, nb::call_guard<nb::gil_scoped_release>());
}
