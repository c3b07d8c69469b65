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

// The chunks of all shadows, with the running sum of the bytes that chunk i of all of them moves, by which the threads
// share them out.
struct CpuChunks {
  std::vector<Chunk> chunks;          // [shadows * count]
  int64_t count;                      // of one shadow
  std::vector<int64_t> bytes_before;  // [count + 1]

  CpuChunks(std::vector<Chunk> list, int shadows);
};

// One update of shadows first .. first + args.shadows - 1 with up to `threads` threads. Returns how many elements the
// guard kept.
int64_t update_on_cpu(const CpuChunks& work, int first, const UpdateArgs& args, int threads, Isa isa);

// Swaps the contents of one shadow and live, bit for bit. Both sides of every chunk have the same element size.
void exchange_on_cpu(const CpuChunks& work, int shadow, int threads);

}  // namespace fastema
