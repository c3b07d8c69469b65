// A small thread pool in place of OpenMP, whose regions end with a barrier: beside other busy processes that barrier
// waits a time slice of several ms for a thread that is not scheduled.
#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace fastema {
namespace {

constexpr int kSpins = 1000;  // of the caller, for calls that are about to end: sleeping and waking takes 5 us

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// The indices that are left of one contiguous share, begin in the low half and end in the high half.
class alignas(64) Share {
 public:
  void set(uint64_t begin, uint64_t end) { range_.store(end << 32 | begin, std::memory_order_relaxed); }

  // Takes one index, from the front or from the back; -1: none is left.
  int64_t take(bool from_front) {
    uint64_t range = range_.load(std::memory_order_relaxed);
    while (true) {
      const uint64_t begin = range & 0xffffffff, end = range >> 32;
      if (begin >= end) return -1;
      const uint64_t rest = from_front ? end << 32 | (begin + 1) : (end - 1) << 32 | begin;
      if (range_.compare_exchange_weak(range, rest, std::memory_order_relaxed)) {
        return static_cast<int64_t>(from_front ? begin : end - 1);
      }
    }
  }

 private:
  std::atomic<uint64_t> range_{0};
};

// One call of sum_in_parallel. Late helpers hold it after the caller has gone; `work` is read only by those who have
// taken an index, for whom the caller waits.
class Job {
 public:
  Job(int64_t count, int threads, const std::function<int64_t(int64_t)>& work)
      : shares_(threads), work_(&work), unfinished_(count) {
    for (int i = 0; i < threads; ++i) shares_[i].set(count * i / threads, count * (i + 1) / threads);
  }

  // Works until no index is left. Every thread begins with the share of its number, so that from one update to the next
  // a core finds the same tensors in its own cache; then it takes from the ends of the others'.
  void work(int thread) {
    const int shares = static_cast<int>(shares_.size());
    for (int i = 0; i < shares; ++i) {
      Share& share = shares_[(thread + i) % shares];
      for (int64_t index; (index = share.take(i == 0)) >= 0;) {
        const int64_t result = (*work_)(index);
        if (result != 0) sum_.fetch_add(result, std::memory_order_relaxed);
        if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
          { std::lock_guard<std::mutex> lock(mutex_); }  // the caller is either before its check or asleep
          finished_.notify_one();
        }
      }
    }
  }

  // Waits for calls that others have begun.
  int64_t wait() {
    for (int spin = 0; spin < kSpins && !is_finished(); ++spin) pause();
    if (!is_finished()) {
      std::unique_lock<std::mutex> lock(mutex_);
      finished_.wait(lock, [this] { return is_finished(); });
    }
    return sum_.load(std::memory_order_relaxed);
  }

  int seats = 0;  // helpers that may still join; guarded by the pool's mutex

 private:
  bool is_finished() const { return unfinished_.load(std::memory_order_acquire) == 0; }

  std::vector<Share> shares_;
  const std::function<int64_t(int64_t)>* work_;
  std::atomic<int64_t> unfinished_;
  std::atomic<int64_t> sum_{0};
  std::mutex mutex_;
  std::condition_variable finished_;
};

class Pool {
 public:
  // Offers the job to `helpers` threads.
  void offer(const std::shared_ptr<Job>& job, int helpers) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      start(helpers);
      job->seats = std::min(helpers, helpers_);
      if (job->seats == 0) return;
      jobs_.push_back(job);
    }
    offered_.notify_one();  // waking takes 2 us each: the helpers wake each other
  }

  void withdraw(const std::shared_ptr<Job>& job) {
    std::lock_guard<std::mutex> lock(mutex_);
    jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), job), jobs_.end());
  }

 private:
  void start(int helpers) {
    try {
      for (; helpers_ < helpers; ++helpers_) std::thread(&Pool::help, this, helpers_ + 1).detach();
    } catch (const std::system_error&) {  // no more threads for this process: those that there are will do
    }
  }

  void help(int thread) {
    while (true) {
      std::shared_ptr<Job> job;
      int others;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        offered_.wait(lock, [this] { return !jobs_.empty(); });
        job = jobs_.front();
        others = --job->seats;
        if (others == 0) jobs_.pop_front();
      }
      for (int i = 0; i < std::min(others, 2); ++i) offered_.notify_one();
      job->work(thread);
    }
  }

  std::mutex mutex_;
  std::condition_variable offered_;
  std::deque<std::shared_ptr<Job>> jobs_;
  int helpers_ = 0;
};

// Never destroyed: the helpers wait on it until the process ends.
Pool& pool() {
  static Pool* const only = new Pool;
  return *only;
}

// Whether this process was forked after the module was loaded: it has no helpers, and may have a locked mutex.
bool forked = false;
#if !defined(_WIN32)
[[maybe_unused]] const int watches_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

}  // namespace

int64_t sum_in_parallel(int64_t count, int threads, const std::function<int64_t(int64_t)>& work) {
  if (threads <= 1 || count <= 1 || forked) {
    int64_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += work(i);
    return sum;
  }
  const auto job = std::make_shared<Job>(count, threads, work);
  pool().offer(job, threads - 1);
  job->work(0);
  pool().withdraw(job);
  return job->wait();
}

}  // namespace fastema
