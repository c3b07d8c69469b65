// Shares work out among threads, where that takes less time than the calling thread would alone. No torch.
#pragma once

#include <cstdint>
#include <functional>

namespace fastema {

// How a piece of work that is done again and again is shared out.
//
// An OpenMP region ends when its last thread has come. In a quiet process the threads spin and come at once; beside
// other busy processes they wait for a time slice of several ms, and the caller with them. So every region is compared
// with what the caller alone would have taken at its own pace, and after one that took longer the caller works alone
// for a while, longer each time that happens.
class Sharing {
 public:
  // Calls work(i) exactly once for every i in [0, count), on up to `threads` threads, and returns the sum of the
  // results. `work` must not throw. In a forked child everything runs on the calling thread.
  int64_t sum(int64_t count, int threads, const std::function<int64_t(int64_t)>& work);

 private:
  void judge(bool good);

  int alone_ = 0;    // calls to come that the caller does alone
  int penalty_ = 0;  // `alone_` after the last region that took too long
  int good_ = 0;     // regions since then that did not
};

}  // namespace fastema
