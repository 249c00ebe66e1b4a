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

// Memory for vectors, of at least so many bytes, and back. A thread keeps a few pieces of each size,
// since steps of microseconds ask for the same ones again and again. Throws std::bad_alloc.
void* take_memory(int64_t bytes);
void give_memory(void* data, int64_t bytes);

struct Free {
  int64_t bytes = 0;
  void operator()(void* data) const { give_memory(data, bytes); }
};

// An array for vectors, not set to anything.
template <class T>
using Array = std::unique_ptr<T[], Free>;

template <class T>
Array<T> make_array(int64_t count) {
  const int64_t bytes = count * (int64_t)sizeof(T);
  return Array<T>(static_cast<T*>(take_memory(bytes)), Free{bytes});
}

}  // namespace dsv4
