#include "sharing.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <numeric>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <unistd.h>
#endif

namespace fastema {
namespace {

using Clock = std::chrono::steady_clock;

double seconds(Clock::duration time) { return std::chrono::duration<double>(time).count(); }

// The largest mean loss of regions, as a fraction of a serial call: one that waits 12 ms for its threads, where a
// serial call takes 50 us, is followed by 960 serial calls.
constexpr double kMaxLoss = 0.25;
constexpr double kMaxSerialCalls = 1e4;  // then the machine is tried again, whatever was lost
// A region that loses is followed by so many times its loss in which every computation of the process works alone.
constexpr double kPausePerLoss = 10.0;
// A call of more than a time slice shares its work out whatever the machine does: a late thread costs it little.
constexpr double kTimeSlice = 4e-3;
constexpr double kMinChange = 0.8, kMaxChange = 1.25;  // by which one region may change the estimate of a serial call
constexpr double kMaxSavedCalls = 8.0;                 // the cap of saved_seconds_, in serial calls

// The remaining indices [begin, end) of one thread's share: begin in the low half of a word, end in the high half.
class alignas(64) Share {
 public:
  void set(uint64_t begin, uint64_t end) { range_.store(end << 32 | begin, std::memory_order_relaxed); }

  // Takes one index from the front or the back; returns -1 if none is left.
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

ParallelFor* torch_parallel_for = nullptr;

// Runs work(0) .. work(threads - 1) at the same time, as far as there are threads, and sums what they return.
template <class Work>
int64_t in_parallel(int threads, Work work) {
  std::vector<int64_t> results(threads);
  const auto run = [&](int64_t thread) { results[thread] = work(static_cast<int>(thread)); };
  if (torch_parallel_for != nullptr) {
    const auto run_range = [](int64_t begin, int64_t end, void* context) {
      for (int64_t thread = begin; thread < end; ++thread) (*static_cast<decltype(run)*>(context))(thread);
    };
    torch_parallel_for(0, threads, 1, run_range, const_cast<void*>(static_cast<const void*>(&run)));
  } else {  // under ThreadSanitizer, which cannot see how gcc's OpenMP synchronises
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
    run(0);
    for (std::thread& other : others) other.join();
  }
  return std::accumulate(results.begin(), results.end(), int64_t{0});
}

// Whether this process was forked after the library was loaded. gcc's OpenMP waits forever in a forked child if the
// parent had a parallel region, ours or torch's: the threads of its pool were not forked.
bool forked = false;
#if !defined(_WIN32)
[[maybe_unused]] const int watches_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

#if defined(__linux__)
double clock_seconds(clockid_t clock) {
  timespec time{};
  clock_gettime(clock, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

double thread_seconds() { return clock_seconds(CLOCK_THREAD_CPUTIME_ID); }

// What the machine and this process have worked since they started, at one moment.
struct Sample {
  Clock::time_point time = Clock::now();
  double idle = -1.0;  // seconds, of all cores together; negative: unknown
  double own = clock_seconds(CLOCK_PROCESS_CPUTIME_ID);
};

Sample sample() {
  Sample now;
  if (std::FILE* file = std::fopen("/proc/stat", "re")) {
    unsigned long long user, nice, system, idle, waiting;
    if (std::fscanf(file, "cpu %llu %llu %llu %llu %llu", &user, &nice, &system, &idle, &waiting) == 5) {
      now.idle = static_cast<double>(idle + waiting) / static_cast<double>(sysconf(_SC_CLK_TCK));
    }
    std::fclose(file);
  }
  return now;
}

// The last look at the machine. The first is at the import, so that the first update knows how busy it has been since.
struct Machine {
  std::atomic<bool> looking{false};  // no mutex: its functions are of glibc 2.34, and wheels run with older ones
  Sample last = sample();
  int cores = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  std::atomic<int> free{cores};
  std::atomic<int64_t> next_look{(last.time + kBetweenLooks).time_since_epoch().count()};

  static constexpr Clock::duration kBetweenLooks = std::chrono::milliseconds(100);  // ten ticks of /proc/stat

  void look() {
    if (looking.exchange(true)) return;
    const Sample now = sample();
    if (now.idle >= 0.0 && last.idle >= 0.0) {
      const double elapsed = seconds(now.time - last.time);
      // Half a core that others use does not count: no machine is quite idle.
      const double left = (now.idle - last.idle + now.own - last.own) / elapsed;
      free = std::clamp(static_cast<int>(std::lround(left)), 1, std::max(cores, 1));
    }
    last = now;
    next_look = (now.time + kBetweenLooks).time_since_epoch().count();
    looking = false;
  }
};

Machine machine;
#else
double thread_seconds() { return seconds(Clock::now().time_since_epoch()); }
#endif

// Until then every computation works alone: a region has just waited for its threads.
std::atomic<int64_t> alone_until{0};

}  // namespace

void use_parallel_for(ParallelFor* parallel_for) { torch_parallel_for = parallel_for; }

int free_cores() {
#if defined(__linux__)
  if (Clock::now().time_since_epoch().count() >= machine.next_look) machine.look();
  return machine.free;
#else
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
#endif
}

int64_t Sharing::alone(int64_t count, const std::function<int64_t(int64_t)>& work) {
  const double begin = serial_seconds_ == 0.0 ? thread_seconds() : 0.0;
  int64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += work(i);
  if (serial_seconds_ == 0.0) serial_seconds_ = thread_seconds() - begin;
  return sum;
}

int64_t Sharing::sum(int64_t count, int threads, int free, const std::function<int64_t(int64_t)>& work) {
  if (serial_seconds_ < kTimeSlice) threads = std::min(threads, free);
  if (threads <= 1 || forked || serial_calls_left_ > 0 || Clock::now().time_since_epoch().count() < alone_until) {
    serial_calls_left_ = std::max(serial_calls_left_ - 1, 0);
    return alone(count, work);
  }
  std::vector<Share> shares(threads);
  for (int i = 0; i < threads; ++i) shares[i].set(count * i / threads, count * (i + 1) / threads);
  int64_t taken_by_caller = 0;
  double worked = 0.0;
  const Clock::time_point begin = Clock::now();
  // Every thread begins with its own share, so that from one update to the next a core finds the same tensors in its
  // cache; then it takes from the ends of the others', so that a late thread does not hold up the work.
  const int64_t sum = in_parallel(threads, [&](int thread) {
    int64_t sum = 0, taken = 0;
    const double started = thread == 0 ? thread_seconds() : 0.0;
    for (int i = 0; i < threads; ++i) {
      Share& share = shares[(thread + i) % threads];
      for (int64_t index; (index = share.take(i == 0)) >= 0; ++taken) sum += work(index);
    }
    if (thread == 0) {
      taken_by_caller = taken;
      worked = seconds(Clock::now() - begin);
      // The processor's time is asked, which takes half a microsecond, where the caller may have waited.
      if (worked * count > kMaxChange * serial_seconds_ * taken) worked = std::min(worked, thread_seconds() - started);
    }
    return sum;
  });
  const double elapsed = seconds(Clock::now() - begin);
  if (taken_by_caller > 0) record(elapsed, worked * count / taken_by_caller);
  return sum;
}

void Sharing::record(double elapsed, double serial) {
  // A bounded change tracks the median: what is cold in the caches once is not slow for ever.
  serial_seconds_ =
      serial_seconds_ == 0.0 ? serial : std::clamp(serial, kMinChange * serial_seconds_, kMaxChange * serial_seconds_);
  // Savings count too: a large update gains from its second thread even if a time slice is lost now and then.
  saved_seconds_ = std::min(saved_seconds_ + serial_seconds_ - elapsed, kMaxSavedCalls * serial_seconds_);
  if (saved_seconds_ < -serial_seconds_) {
    serial_calls_left_ = static_cast<int>(std::min(-saved_seconds_ / (kMaxLoss * serial_seconds_), kMaxSerialCalls));
    const auto pause = std::chrono::duration_cast<Clock::duration>(
        std::chrono::duration<double>(std::min(-saved_seconds_ * kPausePerLoss, 1.0)));
    alone_until = (Clock::now() + pause).time_since_epoch().count();
    saved_seconds_ = 0.0;
  }
}

}  // namespace fastema
