#include "sharing.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <numeric>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace fastema {
namespace {

// Of what calls of the caller alone take: as much as regions may lose on top of it, in the mean. One that waits 12 ms
// for its threads, of work of 50 us, is followed by 480 calls alone.
constexpr double kMostLoss = 0.5;
constexpr double kDown = 0.8, kUp = 1.25;
constexpr double kMostCredit = 8.0;  // of what a region saved, in calls of the caller alone

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

// Runs work(0) .. work(threads - 1) at the same time, work(0) on the calling thread, and sums what they return.
template <class Work>
int64_t in_parallel(int threads, Work work) {
#if defined(_OPENMP)
  int64_t sum = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : sum)
  for (int thread = 0; thread < threads; ++thread) sum += work(thread);
  return sum;
#else  // a compiler without OpenMP; and ThreadSanitizer, which cannot see how gcc's OpenMP synchronises
  std::vector<int64_t> results(threads);
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) {
    others.emplace_back([&, thread] { results[thread] = work(thread); });
  }
  results[0] = work(0);
  for (std::thread& other : others) other.join();
  return std::accumulate(results.begin(), results.end(), int64_t{0});
#endif
}

// Whether this process was forked after the module was loaded. gcc's OpenMP waits forever in a forked child if the
// parent had a parallel region, ours or torch's: the threads of its pool were not forked.
bool forked = false;
#if !defined(_WIN32)
[[maybe_unused]] const int watches_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

}  // namespace

int64_t Sharing::sum(int64_t count, int threads, const std::function<int64_t(int64_t)>& work) {
  if (threads <= 1 || forked || alone_calls_ > 0) {
    alone_calls_ = std::max(alone_calls_ - 1, 0);
    int64_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += work(i);
    return sum;
  }
  using Clock = std::chrono::steady_clock;
  std::vector<Share> shares(threads);
  for (int i = 0; i < threads; ++i) shares[i].set(count * i / threads, count * (i + 1) / threads);
  int64_t taken_by_caller = 0;
  Clock::time_point nothing_left;
  const Clock::time_point begin = Clock::now();
  // Every thread begins with its own share, so that from one update to the next a core finds the same tensors in its
  // cache; then it takes from the ends of the others', so that a late thread does not hold up the work.
  const int64_t sum = in_parallel(threads, [&](int thread) {
    int64_t sum = 0, taken = 0;
    for (int i = 0; i < threads; ++i) {
      Share& share = shares[(thread + i) % threads];
      for (int64_t index; (index = share.take(i == 0)) >= 0; ++taken) sum += work(index);
    }
    if (thread == 0) {
      taken_by_caller = taken;
      nothing_left = Clock::now();
    }
    return sum;
  });
  const double elapsed = std::chrono::duration<double>(Clock::now() - begin).count();
  const double worked = std::chrono::duration<double>(nothing_left - begin).count();
  if (taken_by_caller > 0) judge(elapsed, worked * count / taken_by_caller);
  return sum;
}

void Sharing::judge(double elapsed, double alone) {
  // Towards the median: where the caller was put aside itself, `alone` is many times too long.
  alone_seconds_ = alone_seconds_ == 0.0 ? alone : std::clamp(alone, kDown * alone_seconds_, kUp * alone_seconds_);
  // A large update gains from its second thread although a time slice is lost now and then, so savings count as well.
  credit_ = std::min(credit_ + alone_seconds_ - elapsed, kMostCredit * alone_seconds_);
  if (credit_ < -alone_seconds_) {
    alone_calls_ = static_cast<int>(std::min(-credit_ / (kMostLoss * alone_seconds_), 1e6));
    credit_ = 0.0;
  }
}

}  // namespace fastema
