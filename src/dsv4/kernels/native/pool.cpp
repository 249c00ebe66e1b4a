#include "pool.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace dsv4 {
namespace {

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

std::atomic<int> busy_callers{0};

// Waits until ready() is true: looks for about ten microseconds, which is what lies between the
// steps of one kernel, or a millisecond while there are busy callers, and then sleeps until told.
template <class Ready>
void wait_for(const Ready& ready, std::mutex& mutex, std::condition_variable& changed) {
  for (int i = 0; i < (busy_callers > 0 ? 20000 : 500); i++) {
    if (ready()) return;
    pause();
  }
  std::unique_lock<std::mutex> lock(mutex);
  changed.wait(lock, ready);
}

class Pool {
 public:
  void run(int threads, int64_t tasks, Work work, void* context) {
    std::lock_guard<std::mutex> turn(turn_);
    while ((int)workers_.size() < threads - 1) {
      uint64_t seen = round_;
      workers_.emplace_back(&Pool::serve, this, (int)workers_.size() + 1, seen);
      workers_.back().detach();
    }
    work_ = work, context_ = context, seats_ = threads;
    while ((int)shares_.size() < threads) shares_.emplace_back();
    for (int seat = 0; seat < threads; seat++) {
      shares_[seat].next = tasks * seat / threads;
      shares_[seat].end = tasks * (seat + 1) / threads;
    }
    inside_ = 0;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      round_++;
    }
    wake_.notify_all();
    take(0);
    inside_ |= CLOSED;  // whoever comes now is too late, and not waited for
    wait_for([this] { return inside_ == CLOSED; }, mutex_, done_);
  }

 private:
  void serve(int seat, uint64_t seen) {
    for (;;) {
      wait_for([&] { return round_ != seen; }, mutex_, wake_);
      seen = round_;
      if (!enter()) continue;
      if (seat < seats_) take(seat);
      if (--inside_ != CLOSED) continue;
      std::lock_guard<std::mutex> lock(mutex_);
      done_.notify_one();
    }
  }

  // Whether there is still something to do, which stays as it is until all that entered have left.
  bool enter() {
    int inside = inside_;
    while (!(inside & CLOSED)) {
      if (inside_.compare_exchange_weak(inside, inside + 1)) return true;
    }
    return false;
  }

  // Neighbouring tasks read neighbouring memory, of which one asks for what comes next: so each
  // thread has a run of them, and then helps the others.
  void take(int seat) {
    for (int i = 0; i < seats_; i++) {
      Share& share = shares_[(seat + i) % seats_];
      for (int64_t task; (task = share.next++) < share.end;) work_(context_, task);
    }
  }

  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  std::deque<Share> shares_;  // of each seat
  std::atomic<uint64_t> round_{0};
  static constexpr int CLOSED = 1 << 30;
  std::atomic<int> inside_{CLOSED};  // workers that are at it, and whether it is too late to begin
  Work work_ = nullptr;
  void* context_ = nullptr;
  int seats_ = 0;
};

// A child of fork() has the memory of the pool but not its threads, so it gets a pool of its own.
Pool& pool() {
  static std::mutex guard;
  static Pool* mine = nullptr;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> lock(guard);
  if (owner != getpid()) {
    mine = new Pool;  // never destroyed: its threads may outlive static objects
    owner = getpid();
  }
  return *mine;
}

}  // namespace

void out_of_memory() { throw std::bad_alloc(); }

void stay_awake(int callers) { busy_callers += callers; }

void parallel(int threads, int64_t tasks, Work work, void* context) {
  if (threads > tasks) threads = (int)tasks;
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; task++) work(context, task);
  } else {
    pool().run(threads, tasks, work, context);
  }
}

}  // namespace dsv4
