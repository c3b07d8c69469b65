// The face of fastema/_cuda.so.
#include "kernel_tables.h"

#ifndef FASTEMA_GPU    // tests/accelerator runs the kernels on a device of its own
#define FASTEMA_GPU 1  // c10::DeviceType::CUDA, which is torch's name on ROCm too
#endif

namespace fastema {
namespace {

const GpuKernels table = {FASTEMA_GPU, resident_blocks, launch_update, launch_exchange, launch_clock, probe};

}  // namespace
}  // namespace fastema

FASTEMA_EXPORT const fastema::GpuKernels* fastema_gpu_kernels() { return &fastema::table; }
