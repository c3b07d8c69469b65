// The CUDA kernels: one launch over a chunk table in device memory. No torch: raw pointers and a stream.
//
// Every function returns null, or CUDA's own words for what went wrong. The caller has made `device` current in torch.
#pragma once

#include <cstdint>

#include "chunks.h"

namespace fastema {

using CudaError = const char*;

// How many blocks the device holds at once: what the chunk size is adapted to.
CudaError resident_blocks(int device, int64_t& blocks);

// One update. `chunks` [args.shadows * count] and `nonfinite` (a count of live values and averages that are not finite)
// lie in the memory of `device`.
CudaError launch_update(const Chunk* chunks, int64_t count, const UpdateArgs& args, unsigned long long* nonfinite,
                        int device, void* stream);

// Swaps the contents of shadow and live, bit for bit. Both sides of every chunk have the same element size.
CudaError launch_exchange(const Chunk* chunks, int64_t count, int device, void* stream);

// One optimizer step of `capturable`, counted on the device; all pointers lie in the memory of `device`.
struct ClockArgs {
  const double* table;     // [rows, shadows], the weights of update 1, 2, ...; later ones take the last row
  int64_t rows;            // 1 or more
  int shadows;             // 1 or more
  int64_t update_every;    // steps
  const float* found_inf;  // or null; not 0: the step is not counted
  int64_t* step;           // counted up
  int64_t* num_updates;    // counted up where the step averages
  double* weights;         // [shadows], written
  float* skip;             // written: 1 where the step averages nothing, else 0
};

CudaError launch_clock(const ClockArgs& args, int device, void* stream);

// Whether `device` has machine code of every kernel and a driver for it. Loads them: a first launch may be captured.
CudaError probe(int device);

}  // namespace fastema
