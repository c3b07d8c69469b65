// The face of fastema/_kernels.so.
#include "kernel_tables.h"

namespace fastema {
namespace {

const CpuKernels table = {
    FASTEMA_VERSION,
    [](const Chunk* list, int64_t count, int shadows) {
      return new CpuChunks(std::vector<Chunk>(list, list + count), shadows);
    },
    [](CpuChunks* work) { delete work; },
    update_on_cpu,
    exchange_on_cpu,
    best_isa,
    isa_name,
    use_parallel_for,
};

}  // namespace
}  // namespace fastema

FASTEMA_EXPORT const fastema::CpuKernels* fastema_cpu_kernels() { return &fastema::table; }
