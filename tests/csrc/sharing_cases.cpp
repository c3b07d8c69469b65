// Cases of csrc/sharing.cpp; prints what went wrong. Built and run by test_sharing.py.
#include <atomic>
#include <chrono>
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
    const int64_t sum = sharing.sum(count, threads, [&](int64_t i) {
      calls[i].fetch_add(1);
      return i;
    });
    check(sum == count * (count - 1) / 2, "the sum is that of all indices");
    for (const std::atomic<int>& of : calls) check(of == 1, "every index exactly once");
  }
}

size_t threads_of_a_call(Sharing& sharing) {
  std::mutex mutex;
  std::set<std::thread::id> ids;
  sharing.sum(8, 2, [&](int64_t) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
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
  sharing.sum(kCount, 2, [&](int64_t) {
    if (std::this_thread::get_id() != caller) {
      others.fetch_add(1);
      while (done + others < kCount) std::this_thread::yield();
      const Clock::time_point until = Clock::now() + 10 * (Clock::now() - begin);
      while (Clock::now() < until) std::this_thread::yield();
    } else {
      while (others == 0) std::this_thread::yield();
      done.fetch_add(1);
    }
    return 0;
  });
}

void after_a_late_thread_the_caller_works_alone_for_a_while() {
  Sharing sharing;
  bool alone = false;
  for (int attempt = 0; attempt < 20 && !alone; ++attempt) {  // the caller itself may have been put aside
    call_with_a_late_thread(sharing);
    alone = threads_of_a_call(sharing) == 1;
  }
  check(alone, "alone after a late thread");
  bool again = false;
  for (int call = 0; call < 2000 && !again; ++call) again = threads_of_a_call(sharing) == 2;
  check(again, "not alone for ever");
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
  a_forked_child_works_alone();
  several_callers_at_once();
  return failures == 0 ? 0 : 1;
}
