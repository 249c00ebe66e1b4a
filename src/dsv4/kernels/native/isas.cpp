#include "isas.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "linear.h"

#if DSV4_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dsv4 {

#define DSV4_DECLARE(name) \
  namespace name {         \
  extern const Isa isa;    \
  }
#if defined(__x86_64__)
#if DSV4_HAS_AMX
DSV4_DECLARE(amx)
#endif
DSV4_DECLARE(avx512_bf16)
namespace avx512_bf16 {
extern const Isa isa_fma;
}
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
#if DSV4_HAS_AMX
    &amx::isa,
#endif
    &avx512_bf16::isa_fma, &avx512_bf16::isa, &avx512::isa, &avx2::isa,
#elif defined(__aarch64__)
    &neon::isa,
#endif
    &portable::isa};

#if DSV4_HAS_AMX
// Whether the processor has tiles of bfloat16, and the kernel lets this process use them:
// it keeps them for a thread only once it was asked.
bool has_tiles() {
  static const bool allowed = [] {
    unsigned a, b, c, d;
    constexpr unsigned ALL = 1u << 22 | 1u << 24;  // AMX-BF16, -TILE
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & ALL) != ALL) return false;
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  }();
  return allowed;
}
#endif

bool has(const Isa* isa) {
  std::string name = isa->name;
#if defined(__x86_64__)
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") &&
              __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
#if DSV4_HAS_AMX
  if (name == "amx") return bf16 && has_tiles();
#endif
  if (name == "avx512_bf16" || name == "avx512_fma") return bf16;
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
#if defined(__x86_64__)
  // Intel's cores take two cycles for a vector of pairs (VDPBF16PS) and half a one for float32.
  if (!__builtin_cpu_is("intel")) {
    std::stable_partition(names.begin(), names.end(), [](auto& x) { return x != "avx512_fma"; });
  }
#endif
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
