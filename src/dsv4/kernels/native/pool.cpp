#include "pool.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace dsv4 {
namespace {

class Pool {
 public:
  void run(int threads, int64_t tasks, Work work, void* context) {
    std::lock_guard<std::mutex> turn(turn_);
    while ((int)workers_.size() < threads - 1) {
      workers_.emplace_back([this, seat = (int)workers_.size() + 1] { serve(seat); });
      workers_.back().detach();
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = work, context_ = context, tasks_ = tasks;
      next_.store(0);
      seats_ = threads;
      busy_ = threads - 1;
      round_++;
    }
    wake_.notify_all();
    take();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void serve(int seat) {
    uint64_t seen = 0;
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_ != seen; });
        seen = round_;
        if (seat >= seats_) continue;
      }
      take();
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  void take() {
    for (int64_t task; (task = next_.fetch_add(1)) < tasks_;) work_(context_, task);
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  std::atomic<int64_t> next_{0};
  Work work_ = nullptr;
  void* context_ = nullptr;
  int64_t tasks_ = 0;
  int seats_ = 0, busy_ = 0;
  uint64_t round_ = 0;
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

struct Kept {
  void* data = nullptr;
  int64_t bytes = 0;
  ~Kept() { std::free(data); }
};

}  // namespace

void parallel(int threads, int64_t tasks, Work work, void* context) {
  if (threads > tasks) threads = (int)tasks;
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; task++) work(context, task);
  } else {
    pool().run(threads, tasks, work, context);
  }
}

void* workspace(int slot, int64_t bytes) {
  static thread_local Kept kept[8];
  Kept& mine = kept[slot];
  if (mine.bytes < bytes) {
    std::free(mine.data);
    mine.bytes = (bytes + 4095) / 4096 * 4096;
    mine.data = std::aligned_alloc(64, mine.bytes);
    if (mine.data == nullptr) {
      mine.bytes = 0;
      throw std::bad_alloc();
    }
  }
  return mine.data;
}

}  // namespace dsv4
