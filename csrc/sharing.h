// Runs work on several threads, where that takes less time than on the calling thread alone. No torch.
#pragma once

#include <cstdint>
#include <functional>

namespace fastema {

// torch_parallel_for of torch/csrc/stable/c/shim.h: one pool of threads for torch and for us.
using ParallelFor = int32_t(int64_t begin, int64_t end, int64_t grain, void (*run)(int64_t, int64_t, void*),
                            void* context);

// Lets regions run on these threads from now on. Null, and before the first call: on threads made anew for each.
void use_parallel_for(ParallelFor* parallel_for);

// How many cores other processes have left free since the last look, which is at least 0.1 s ago: those of the machine,
// less what was neither idle nor worked by this process. All of them where the machine does not say (not Linux).
int free_cores();

// Decides, for a computation that is repeated, whether its next call runs on several threads or on the caller's alone.
//
// A parallel region ends with its last thread. In a quiet process the threads spin and start at once; beside other busy
// processes they wait several ms for a time slice, and the caller waits for them. So a short call takes no more threads
// than there are free cores. What that does not foresee is learned: every region is compared with the processor time
// that a serial call needs. If regions lost more than they saved, the next calls are serial until the loss is made up
// for; those of other computations too, for a while.
class Sharing {
 public:
  // Calls work(i) exactly once for every i in [0, count), on up to `threads` threads, and returns the sum of the
  // results. `free` is free_cores(). `work` must not throw. In a forked child everything runs on the calling thread.
  int64_t sum(int64_t count, int threads, int free, const std::function<int64_t(int64_t)>& work);

 private:
  int64_t alone(int64_t count, const std::function<int64_t(int64_t)>& work);
  // `elapsed`: seconds that the last region took; `serial`: processor time that the caller would have needed alone.
  void record(double elapsed, double serial);

  int serial_calls_left_ = 0;    // so many of the next calls are serial
  double serial_seconds_ = 0.0;  // of a serial call, an estimate of the median; 0: unknown
  double saved_seconds_ = 0.0;   // by parallel regions; negative: lost
};

}  // namespace fastema
