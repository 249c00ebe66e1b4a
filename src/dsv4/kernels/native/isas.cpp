#include "isas.h"

#include <atomic>
#include <stdexcept>

#include "linear.h"

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

using namespace dsv4;

// Best first.
const Isa* const ISAS[] = {
#if defined(__x86_64__)
    &avx512_bf16::isa, &avx512::isa, &avx2::isa,
#elif defined(__aarch64__)
    &neon::isa,
#endif
    &portable::isa};

bool has(const Isa* isa) {
  std::string name = isa->name;
#if defined(__x86_64__)
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (name == "avx512_bf16") {
    return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vnni");
  }
  if (name == "avx512") return avx512;
  if (name == "avx2") return avx2;
#endif
  return true;
}

std::atomic<const Isa*> chosen{nullptr};

}  // namespace

std::vector<std::string> dsv4::usable() {
  std::vector<std::string> names;
  for (const Isa* isa : ISAS) {
    if (has(isa)) names.push_back(isa->name);
  }
  return names;
}

void dsv4::use(const std::string& name) {
  for (const Isa* isa : ISAS) {
    if (isa->name == name && has(isa)) {
      chosen = isa;
      return;
    }
  }
  throw std::invalid_argument("not an instruction set of this machine: " + name);
}

const Isa* dsv4::current() { return chosen.load(std::memory_order_relaxed); }
