// A small pool of threads that run one loop together, and the scratch memory of that loop.
// Knows nothing of kernels. The caller is thread 0; the others spin briefly (loops follow each other closely within a
// layer) and then sleep. One loop at a time: whoever calls holds the lock.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "kernels.h"

namespace coldstream {

constexpr int kSpins = 2000;  // some 30 microseconds

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// Grows, never shrinks: after the first calls nothing is allocated any more. 64-byte aligned, contents undefined.
class Scratch {
 public:
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
    if (bytes > size_) {
      data_.reset(std::aligned_alloc(64, bytes));
      size_ = data_ ? bytes : 0;
      if (!data_) throw std::bad_alloc();
    }
    return static_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  size_t size_ = 0;
};

class ThreadPool {
 public:
  // Fewer than asked for where the system gives no more: work is handed out to those that there are.
  explicit ThreadPool(int num_threads) {
    threads_.reserve(static_cast<size_t>(std::max(0, num_threads - 1)));
    try {
      for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this, i] { serve(i); });
    } catch (const std::system_error&) {
    }
  }

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  ~ThreadPool() {
    publish(nullptr, nullptr);
    for (std::thread& thread : threads_) thread.join();
  }

  int num_threads() const { return static_cast<int>(threads_.size()) + 1; }
  Team team() { return Team{this, num_threads(), &ThreadPool::run_on}; }

 private:
  using Work = void (*)(void*, int);

  static void run_on(void* self, Work work, void* context) { static_cast<ThreadPool*>(self)->run(work, context); }

  void run(Work work, void* context) {
    if (threads_.empty()) return work(context, 0);
    publish(work, context);
    work(context, 0);
    for (int i = 0; i < kSpins && busy_.load(std::memory_order_acquire) != 0; ++i) relax();
    if (busy_.load(std::memory_order_acquire) == 0) return;
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [this] { return busy_.load(std::memory_order_acquire) == 0; });
  }

  void publish(Work work, void* context) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      work_ = work;
      context_ = context;
      busy_.store(static_cast<int>(threads_.size()), std::memory_order_relaxed);
      round_.fetch_add(1, std::memory_order_release);
    }
    started_.notify_all();
  }

  void await_round(unsigned seen) {
    for (int i = 0; i < kSpins && round_.load(std::memory_order_acquire) == seen; ++i) relax();
    if (round_.load(std::memory_order_acquire) != seen) return;
    std::unique_lock<std::mutex> lock(mutex_);
    started_.wait(lock, [this, seen] { return round_.load(std::memory_order_acquire) != seen; });
  }

  void serve(int thread) {
    for (unsigned seen = 0;; ++seen) {
      await_round(seen);
      if (work_ == nullptr) return;
      work_(context_, thread);
      if (busy_.fetch_sub(1, std::memory_order_acq_rel) != 1) continue;
      const std::lock_guard<std::mutex> lock(mutex_);  // the caller is either before its check or asleep
      finished_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable started_, finished_;
  std::atomic<unsigned> round_{0};
  std::atomic<int> busy_{0};
  Work work_ = nullptr;
  void* context_ = nullptr;
  std::vector<std::thread> threads_;  // last: they use everything above
};

}  // namespace coldstream
