// The CPU kernels: threads x SIMD over the chunk list. No torch.
#pragma once

#include <cstdint>
#include <vector>

#include "chunks.h"

namespace fastema {

enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The best instruction set of this machine, or what FASTEMA_CPU_ISA (baseline, avx2, avx512) lowers it to.
Isa best_isa();
const char* isa_name(Isa isa);

// Chunks with the running sum of the bytes each moves, by which the threads share them out.
struct CpuChunks {
  std::vector<Chunk> chunks;
  std::vector<int64_t> bytes_before;  // [chunks + 1]

  explicit CpuChunks(std::vector<Chunk> list);
};

// One update over all chunks with up to `threads` threads. Returns how many elements the guard kept.
int64_t update_on_cpu(const CpuChunks& work, const UpdateArgs& args, int threads, Isa isa);

// Swaps the contents of shadow and live, bit for bit. Both sides of every chunk have the same element size.
void exchange_on_cpu(const CpuChunks& work, int threads);

}  // namespace fastema
