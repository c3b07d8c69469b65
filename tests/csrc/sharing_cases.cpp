// Cases of csrc/sharing.cpp; prints what went wrong. Built and run by test_sharing.py.
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "sharing.h"

#if !defined(_WIN32)
#include <sys/wait.h>
#include <unistd.h>
#endif

using fastema::Sharing;

namespace {

int failures = 0;

void check(bool holds, const char* what) {
  if (!holds) {
    std::printf("failed: %s\n", what);
    ++failures;
  }
}

void every_index_is_worked_on_once(int64_t count, int threads) {
  Sharing sharing;
  for (int repeat = 0; repeat < 20; ++repeat) {
    std::vector<std::atomic<int>> calls(count);
    const int64_t sum = sharing.sum(count, threads, threads, [&](int64_t i) {
      calls[i].fetch_add(1);
      return i;
    });
    check(sum == count * (count - 1) / 2, "the sum is that of all indices");
    for (const std::atomic<int>& of : calls) check(of == 1, "every index exactly once");
  }
}

size_t threads_of_a_call(Sharing& sharing, int free = 2, int microseconds = 200) {
  std::mutex mutex;
  std::set<std::thread::id> ids;
  sharing.sum(8, 2, free, [&](int64_t) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(microseconds);
    while (std::chrono::steady_clock::now() < until) {  // processor time counts, not sleep
    }
    std::lock_guard<std::mutex> lock(mutex);
    ids.insert(std::this_thread::get_id());
    return 0;
  });
  return ids.size();
}

// A call in which the second thread, with one index in its hands, comes back long after the caller has done the rest.
void call_with_a_late_thread(Sharing& sharing) {
  constexpr int64_t kCount = 16;
  using Clock = std::chrono::steady_clock;
  const auto caller = std::this_thread::get_id();
  const Clock::time_point begin = Clock::now();
  std::atomic<int> others{0}, done{0};
  sharing.sum(kCount, 2, 2, [&](int64_t) {
    if (std::this_thread::get_id() != caller) {
      others.fetch_add(1);
      while (done + others < kCount) std::this_thread::yield();
      const Clock::time_point until = Clock::now() + 10 * (Clock::now() - begin);
      while (Clock::now() < until) std::this_thread::yield();
    } else {
      // A call that is served alone, after a loss of the one before, has no other thread to wait for.
      while (others == 0 && Clock::now() < begin + std::chrono::milliseconds(200)) {  // processor time counts
      }
      done.fetch_add(1);
    }
    return 0;
  });
}

void after_a_late_thread_the_caller_works_alone_for_a_while() {
  Sharing sharing;
  bool alone = false;
  for (int attempt = 0; attempt < 20 && !alone; ++attempt) {       // the caller itself may have been put aside
    std::this_thread::sleep_for(std::chrono::milliseconds(1100));  // what others lost is over: at most a second
    sharing = Sharing();
    call_with_a_late_thread(sharing);
    alone = threads_of_a_call(sharing) == 1;
  }
  check(alone, "alone after a late thread");
  bool again = false;
  for (int call = 0; call < 20000 && !again; ++call) again = threads_of_a_call(sharing, 2, 50) == 2;
  check(again, "not alone for ever");
}

void a_short_call_takes_no_more_threads_than_cores_are_free() {
  Sharing sharing;
  sharing.sum(1, 1, 1, [](int64_t) { return 0; });  // it is short
  check(threads_of_a_call(sharing, 1) == 1, "alone where no other core is free");
  Sharing longer;
  bool shared = false;  // eight times 2 ms: four time slices
  for (int call = 0; call < 200 && !shared; ++call) shared = threads_of_a_call(longer, 1, 2000) == 2;
  check(shared, "a long call shares its work out all the same");
}

void cores_that_are_worked_on_by_others_are_not_free() {
#if defined(__linux__)
  const int cores = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  std::vector<pid_t> spinning;
  for (int i = 0; i < 2 * cores; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(10);
      while (std::chrono::steady_clock::now() < until) {
      }
      _exit(0);
    }
    spinning.push_back(child);
  }
  bool taken = false;
  for (int look = 0; look < 30 && !taken; ++look) {
    std::this_thread::sleep_for(std::chrono::milliseconds(110));
    taken = fastema::free_cores() == 1;
  }
  check(taken, "one core at least, and no other beside twice as many processes");
  for (pid_t child : spinning) {
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
  }
#endif
}

void several_callers_at_once() {
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) callers.emplace_back([] { every_index_is_worked_on_once(50, 3); });
  for (std::thread& caller : callers) caller.join();
}

void a_forked_child_works_alone() {
#if !defined(_WIN32)
  const pid_t child = fork();
  if (child == 0) {
    Sharing sharing;
    _exit(threads_of_a_call(sharing) == 1 ? 0 : 1);
  }
  int status = 1;
  waitpid(child, &status, 0);
  check(status == 0, "a forked child works alone");
#endif
}

#if defined(_OPENMP)
// As torch_parallel_for.
int32_t on_openmp(int64_t begin, int64_t end, int64_t, void (*run)(int64_t, int64_t, void*), void* context) {
  const int threads = static_cast<int>(end - begin);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t i = begin; i < end; ++i) run(i, i + 1, context);
  return 0;
}
#endif

}  // namespace

int main() {
#if defined(_OPENMP)
  fastema::use_parallel_for(on_openmp);
#endif
  for (int64_t count : {0, 1, 2, 3, 7, 64, 1000}) {
    for (int threads : {1, 2, 3, 8}) every_index_is_worked_on_once(count, threads);
  }
  after_a_late_thread_the_caller_works_alone_for_a_while();
  a_short_call_takes_no_more_threads_than_cores_are_free();
  cores_that_are_worked_on_by_others_are_not_free();
  a_forked_child_works_alone();
  several_callers_at_once();
  return failures == 0 ? 0 : 1;
}
