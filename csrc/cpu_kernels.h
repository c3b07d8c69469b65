// The CPU kernels: threads x SIMD over the chunk list. No torch.
#pragma once

#include <cstdint>
#include <vector>

#include "chunks.h"
#include "sharing.h"

namespace fastema {

enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The best instruction set of this machine, or what FASTEMA_CPU_ISA (baseline, avx2, avx512) lowers it to.
Isa best_isa();
const char* isa_name(Isa isa);

// The chunks of all shadows, and the ranges of them that a thread takes at a time, which move about equally many bytes.
struct CpuChunks {
  std::vector<Chunk> chunks;    // [shadows * count]
  int64_t count;                // of one shadow
  std::vector<int64_t> grains;  // [grains + 1]: grain i is chunks grains[i] .. grains[i + 1] - 1 of every shadow
  mutable Sharing sharing;      // of updates and exchanges among threads; one of them at a time

  CpuChunks(std::vector<Chunk> list, int shadows);
};

// One update of shadows first .. first + args.shadows - 1 with up to `threads` threads. Returns how many live
// elements were not finite.
int64_t update_on_cpu(const CpuChunks& work, int first, const UpdateArgs& args, int threads, Isa isa);

// Swaps the contents of one shadow and live, bit for bit. Both sides of every chunk have the same element size.
void exchange_on_cpu(const CpuChunks& work, int shadow, int threads);

}  // namespace fastema
