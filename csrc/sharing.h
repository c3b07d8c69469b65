// Shares work out among threads, where that takes less time than the calling thread would alone. No torch.
#pragma once

#include <cstdint>
#include <functional>

namespace fastema {

// How a piece of work that is done again and again is shared out.
//
// An OpenMP region ends when its last thread has come. In a quiet process the threads spin and come at once; beside
// other busy processes they wait for a time slice of several ms, and the caller with them. So every region is compared
// with what the caller alone would have taken at its own pace. Where regions have lost more than they saved, the caller
// works alone for as long as that takes to be made up for.
class Sharing {
 public:
  // Calls work(i) exactly once for every i in [0, count), on up to `threads` threads, and returns the sum of the
  // results. `work` must not throw. In a forked child everything runs on the calling thread.
  int64_t sum(int64_t count, int threads, const std::function<int64_t(int64_t)>& work);

 private:
  // `elapsed`: seconds of the last region; `alone`: of the caller, had it done everything.
  void judge(double elapsed, double alone);

  int alone_calls_ = 0;         // to come
  double alone_seconds_ = 0.0;  // what a call of the caller alone takes, the median of the last regions; 0: not known
  double credit_ = 0.0;         // seconds that they have saved; negative: lost
};

}  // namespace fastema
