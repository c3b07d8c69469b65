// Shares work out among threads without waiting for one that the system has not scheduled. No torch.
#pragma once

#include <cstdint>
#include <functional>

namespace fastema {

// Calls work(i) exactly once for every i in [0, count), on the calling thread and on up to `threads` - 1 helpers, and
// returns the sum of the results. `work` must not throw.
//
// The calling thread takes part. A helper that wakes up late finds nothing to do: the caller waits only for calls that
// have begun, so one call should take tens of microseconds. Helpers sleep between jobs, and are started when they are
// first needed. In a forked child everything runs on the calling thread.
int64_t sum_in_parallel(int64_t count, int threads, const std::function<int64_t(int64_t)>& work);

}  // namespace fastema
