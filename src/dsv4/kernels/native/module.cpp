// The Python module: addresses and sizes in, nothing about tensors. kernels/native.py is its user.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <string>
#include <tuple>
#include <vector>

#include "experts.h"
#include "linear.h"
#include "training_module.h"

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

// One expert's matrices: gate, up, down as (weight, scale, format, scale_bytes, outputs, inputs).
using Address = std::tuple<uintptr_t, uintptr_t, int, int, int64_t, int64_t>;

struct Experts {
  std::vector<Expert> all;

  void append(Address gate, Address up, Address down) {
    all.push_back({weight_of(gate), weight_of(up), weight_of(down)});
  }

  static Weight weight_of(const Address& a) {
    auto [weight, scale, format, scale_bytes, outputs, inputs] = a;
    return {at<uint8_t>(weight), at<uint8_t>(scale), outputs, inputs, (Format)format, scale_bytes};
  }

  void run(uintptr_t x, bool x_bf16, int64_t rows, uintptr_t ids, uintptr_t weights, int64_t k,
           float limit, bool fp8, uintptr_t out, int threads) const {
    routed_experts(all, {at<void>(x), rows, all[0].gate.inputs, x_bf16}, at<int64_t>(ids),
                   at<float>(weights), k, limit, fp8, at<float>(out), threads);
  }
};

}  // namespace

const Isa* dsv4::current() { return chosen.load(std::memory_order_relaxed); }

NB_MODULE(_native, m) {
  choose(usable_names().front());
  m.def("isas", usable_names, "Instruction sets of this machine that are compiled in, best first.");
  m.def("isa", [] { return current()->name; }, "The one in use.");
  m.def("use", choose, "Use another, for all threads of the process.");
  m.def("linear", linear_of, nb::call_guard<nb::gil_scoped_release>());
  add_training(m);
  nb::class_<Experts>(m, "Experts")
      .def(nb::init<>())
      .def("append", &Experts::append)
      .def("run", &Experts::run, nb::call_guard<nb::gil_scoped_release>());
}
