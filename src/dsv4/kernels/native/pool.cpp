#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

namespace dsv4 {
namespace {

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

std::atomic<int> busy_callers{0};

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
    round_++;
    tell(wake_);
    take(0);
    inside_ |= CLOSED;  // whoever comes now is too late, and not waited for
    wait_for([this] { return inside_ == CLOSED; }, done_);
  }

 private:
  void serve(int seat, uint64_t seen) {
    for (;;) {
      wait_for([&] { return round_ != seen; }, wake_);
      seen = round_;
      if (!enter()) continue;
      if (seat < seats_) take(seat);
      if (--inside_ == CLOSED) tell(done_);
    }
  }

  // Waits until ready() is true: looks for about ten microseconds, which is what lies between the
  // steps of one kernel, or a millisecond while there are busy callers, and then sleeps until told.
  template <class Ready>
  void wait_for(const Ready& ready, std::condition_variable& changed) {
    for (int i = 0; i < (busy_callers > 0 ? 20000 : 500); i++) {
      if (ready()) return;
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_++;  // before it looks again: see tell()
    changed.wait(lock, ready);
    asleep_--;
  }

  // Something has changed. Who is not counted as asleep by now will see it.
  void tell(std::condition_variable& changed) {
    if (asleep_ == 0) return;
    { std::lock_guard<std::mutex> lock(mutex_); }
    changed.notify_all();
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
  std::atomic<int> asleep_{0};
  static constexpr int CLOSED = 1 << 30;
  std::atomic<int> inside_{CLOSED};  // workers that are at it, and whether it is too late to begin
  Work work_ = nullptr;
  void* context_ = nullptr;
  int seats_ = 0;
};

// A child of fork() has the memory of the pool but not its threads, so it gets a pool of its own.
// (Never destroyed: its threads may outlive static objects.)
std::atomic<Pool*> mine{nullptr};

Pool& pool() {
  if (Pool* ready = mine) return *ready;
  static std::mutex guard;
  std::lock_guard<std::mutex> lock(guard);
  static const int told = pthread_atfork(nullptr, nullptr, [] { mine = nullptr; });
  (void)told;
  if (mine == nullptr) mine = new Pool;
  return *mine;
}

// Pieces of 256 bytes, 512, ... that a thread has given back.
class Pieces {
 public:
  static constexpr int LEAST = 8, SIZES = 11, EACH = 4;

  static int size_of(int64_t bytes) {
    int size = 0;
    while (size < SIZES && bytes > (int64_t)1 << (LEAST + size)) size++;
    return size;
  }

  ~Pieces() {
    for (auto& some : kept_) {
      for (void* data : some) std::free(data);
    }
  }

  void* take(int size) {
    for (void*& data : kept_[size]) {
      if (data != nullptr) return std::exchange(data, nullptr);
    }
    return nullptr;
  }

  bool give(int size, void* data) {
    for (void*& place : kept_[size]) {
      if (place == nullptr) return place = data, true;
    }
    return false;
  }

 private:
  void* kept_[SIZES][EACH] = {};
};

thread_local Pieces pieces;

}  // namespace

void* take_memory(int64_t bytes) {
  const int size = Pieces::size_of(bytes);
  const bool small = size < Pieces::SIZES;
  if (void* kept = small ? pieces.take(size) : nullptr) return kept;
  const int64_t whole = small ? (int64_t)1 << (Pieces::LEAST + size) : (bytes + 63) / 64 * 64;
  void* data = std::aligned_alloc(64, whole);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

void give_memory(void* data, int64_t bytes) {
  const int size = Pieces::size_of(bytes);
  if (data != nullptr && !(size < Pieces::SIZES && pieces.give(size, data))) std::free(data);
}

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
