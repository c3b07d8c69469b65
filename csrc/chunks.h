// Plain-data descriptors, shared by the CPU and the CUDA kernels: no torch, no CUDA.
//
// A segment is a contiguous run of elements, live and shadow, under one rule. A chunk is a piece of a segment that
// one thread (CPU) or one block (GPU) takes as a whole. The chunk list is built once and read at every step.
//
// Several shadows of one model (several decays) are averaged in one read of the live weights. Their chunks have the
// same cuts: chunk i of shadow k is chunks[k * count + i], and differs from chunk i only in its shadow pointer.
#pragma once

#include <cstdint>
#include <vector>

namespace fastema {

// Order matters: Kind packs these.
enum class Dtype : uint8_t {
  kFloat32 = 0,
  kFloat64 = 1,
  kBFloat16 = 2,
  kFloat16 = 3,
  kPlanes = 4,  // of a shadow alone: a float32 in two planes, see ema_math.h; its live tensor is bfloat16
};

// What happens to every element of a chunk: an average or a converting copy between two dtypes, or a copy of bytes.
using Kind = uint16_t;
constexpr Kind kAverage = 0;     // + dtype pair
constexpr Kind kConvert = 32;    // + dtype pair
constexpr Kind kCopyBytes = 64;  // elements are bytes

constexpr Kind dtype_pair(Dtype shadow, Dtype live) {
  return static_cast<Kind>(static_cast<int>(shadow) * 4 + static_cast<int>(live));
}

constexpr int64_t dtype_bytes(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }
// Of the shadow, or of its high plane.
constexpr int64_t shadow_bytes(Kind kind) {
  return kind == kCopyBytes ? 1 : dtype_bytes(static_cast<Dtype>(kind % 32 / 4));
}
constexpr bool has_planes(Kind kind) {
  return kind != kCopyBytes && static_cast<Dtype>(kind % 32 / 4) == Dtype::kPlanes;
}
constexpr int64_t low_bytes(Kind kind) { return has_planes(kind) ? 2 : 0; }
constexpr int64_t live_bytes(Kind kind) { return kind == kCopyBytes ? 1 : dtype_bytes(static_cast<Dtype>(kind % 4)); }

struct Segment {
  void* shadow;      // [count], dtype by kind; of two planes the high one, bfloat16
  void* shadow_low;  // [count], int16: the low plane; null where there is none
  const void* live;  // [count], dtype by kind
  int64_t count;     // elements
  Kind kind;
};

struct alignas(16) Chunk {
  void* shadow;
  void* shadow_low;  // the low plane, or null
  const void* live;
  uint32_t count;  // elements, 1 .. kChunkElements (bytes for kCopyBytes)
  Kind kind;
  uint16_t shadow_element_bytes;  // what an exchange of contents needs of the kind
};
static_assert(sizeof(Chunk) == 32, "the chunk table is read by host and device, there as two 16-byte loads");

// On a GPU: the sizes are multiples of the tile of most dtype pairs (see cuda_kernels.cu), so that few tiles are
// ragged.
constexpr int64_t kSmallestChunkElements = 4096;
constexpr int64_t kChunkElements = 16384;
// On a CPU: the live values of a chunk (16 KiB of floats) stay in the first-level cache while several shadows take
// them in turn. One shadow does not mind the size.
constexpr int64_t kCpuChunkElements = 4096;

// The chunk size for `elements` in all, a power of two, so that `workers` blocks have four to eight chunks each: few
// mid-size tensors still fill the chip.
constexpr int64_t chunk_elements_for(int64_t elements, int64_t workers) {
  int64_t size = kSmallestChunkElements;
  while (size < kChunkElements && size * workers * 8 < elements) size *= 2;
  return size;
}

// Cuts segments into chunks of at most `chunk_elements`; empty segments give none. Every element of every segment is
// in exactly one chunk, in order.
inline std::vector<Chunk> cut(const std::vector<Segment>& segments, int64_t chunk_elements) {
  std::vector<Chunk> chunks;
  for (const Segment& segment : segments) {
    for (int64_t begin = 0; begin < segment.count; begin += chunk_elements) {
      const int64_t left = segment.count - begin;
      Chunk chunk{};
      chunk.shadow = static_cast<char*>(segment.shadow) + begin * shadow_bytes(segment.kind);
      if (segment.shadow_low != nullptr) {
        chunk.shadow_low = static_cast<char*>(segment.shadow_low) + begin * low_bytes(segment.kind);
      }
      chunk.live = static_cast<const char*>(segment.live) + begin * live_bytes(segment.kind);
      chunk.count = static_cast<uint32_t>(left < chunk_elements ? left : chunk_elements);
      chunk.kind = segment.kind;
      chunk.shadow_element_bytes = static_cast<uint16_t>(shadow_bytes(segment.kind));
      chunks.push_back(chunk);
    }
  }
  return chunks;
}

constexpr int kMaxShadows = 8;  // of one launch; more take several

// What one update needs beside the chunks.
struct UpdateArgs {
  int shadows;                   // 1 .. kMaxShadows
  double weights[kMaxShadows];   // 1 - decay of each, in double
  const double* device_weights;  // or null: [shadows], read instead of `weights` when the update runs
  const float* skip;             // or null: a non-zero value skips the update when it runs
  bool skip_nonfinite;           // store no average that is NaN or infinite: see takes_live() in ema_math.h
  bool count_live;               // count live values that are not finite: once for all shadows
};

}  // namespace fastema
