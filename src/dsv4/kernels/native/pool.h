// Threads that wait asleep for work cut into independent tasks.
#pragma once

#include <cstdint>

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

// Memory of the calling thread, 64-byte aligned, at least `bytes` long and kept for the next call.
// Slots are independent of each other; what they held is lost when a larger size is asked for.
void* workspace(int slot, int64_t bytes);

}  // namespace dsv4
