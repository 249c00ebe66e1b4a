// Threads that wait asleep for work cut into independent tasks.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace dsv4 {

using Work = void (*)(void* context, int64_t task);

// Runs work(context, 0 .. tasks - 1) in `threads` threads (the caller is one) and returns when all
// are done. Which thread takes which task is not fixed, so a result must not depend on it. Callers
// take turns. Survives fork().
void parallel(int threads, int64_t tasks, Work work, void* context);

template <class F>
void parallel(int threads, int64_t tasks, F& each) {
  parallel(
      threads, tasks, [](void* f, int64_t task) { (*static_cast<F*>(f))(task); }, &each);
}

// So many more callers (fewer, if negative) are about to ask for work again and again: until then
// the threads wait awake.
void stay_awake(int callers);

struct Free {
  void operator()(void* data) const { std::free(data); }
};

[[noreturn]] void out_of_memory();  // throws std::bad_alloc

// An array for vectors, not set to anything.
template <class T>
using Array = std::unique_ptr<T[], Free>;

template <class T>
Array<T> make_array(int64_t count) {
  auto bytes = (count * (int64_t)sizeof(T) + 63) / 64 * 64;
  void* data = std::aligned_alloc(64, bytes > 0 ? bytes : 64);
  if (data == nullptr) out_of_memory();
  return Array<T>(static_cast<T*>(data));
}

}  // namespace dsv4
