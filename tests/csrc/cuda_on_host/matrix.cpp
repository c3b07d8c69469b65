// The CUDA kernels' own source, run on the host over the whole matrix and compared with the CPU kernels bit for bit.
// Built with AddressSanitizer and UBSan: every buffer ends where its tensor ends, so an access beyond is caught, and so
// is a 16-byte access at an address that is not a multiple of 16.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "chunks.h"
#include "cpu_kernels.h"
#include "cuda_kernels.h"
#include "ema_math.h"

using namespace fastema;

namespace {

std::mt19937 generator(20260815);

// `count` elements of one dtype, `offset` elements into a buffer of its own that ends with the last of them.
struct Buffer {
  int64_t bytes, offset_bytes;
  std::unique_ptr<char, decltype(&std::free)> memory;

  // malloc aligns to 16 bytes, and under AddressSanitizer the first byte after it is poisoned.
  Buffer(int64_t count, int64_t offset, int64_t element_bytes)
      : bytes((count + offset) * element_bytes),
        offset_bytes(offset * element_bytes),
        memory(static_cast<char*>(std::malloc(bytes > 0 ? bytes : 1)), &std::free) {
    for (int64_t i = 0; i < bytes; ++i) memory.get()[i] = static_cast<char>(generator());
  }
  char* data() { return memory.get() + offset_bytes; }
};

void fill(Buffer& buffer, Dtype dtype, bool with_nonfinite) {
  const int64_t count = buffer.bytes / dtype_bytes(dtype);
  for (int64_t i = 0; i < count; ++i) {
    float value = static_cast<float>(static_cast<int32_t>(generator())) * 0x1p-29f;  // the same on every processor
    if (with_nonfinite && generator() % 7 == 0) value = generator() % 2 ? INFINITY : NAN;
    char* at = buffer.memory.get() + i * dtype_bytes(dtype);
    const auto put = [&](auto stored) { std::memcpy(at, &stored, sizeof stored); };
    switch (dtype) {
      case Dtype::kFloat32:
        put(value);
        break;
      case Dtype::kFloat64:
        put(static_cast<double>(value) * 1.000000001);
        break;
      case Dtype::kBFloat16:
      case Dtype::kPlanes:  // the high one; any bits do for the low one
        put(store_as<BFloat16>(value));
        break;
      default:
        put(store_as<Float16>(value));
    }
  }
}

struct Case {
  Kind kind;
  Dtype shadow, live;
  int shadows;
  bool skip_nonfinite;
  double weight;
  const float* skip;
  bool weights_on_device;
  int64_t chunk_elements = 1024;
};

constexpr int64_t kManyTiles = 20001;  // of every dtype pair, the last one ragged

int64_t failures = 0, cases = 0, elements_checked = 0;
uint64_t digest = 0xcbf29ce484222325;  // of all shadows, to compare processors: FNV-1a

void run(const Case& c) {
  const std::vector<int64_t> sizes = {0, 1, 3, 4, 5, 15, 16, 17, 63, 1023, 1024, 1025, 4097, kManyTiles};
  std::vector<Buffer> lives;
  std::vector<std::vector<Buffer>> on_gpu(c.shadows), on_cpu(c.shadows), gpu_lows(c.shadows), cpu_lows(c.shadows);
  std::vector<std::vector<Segment>> gpu_segments(c.shadows), cpu_segments(c.shadows);
  const bool bytes_only = c.kind == kCopyBytes;
  const int64_t shadow_size = bytes_only ? 1 : dtype_bytes(c.shadow), live_size = bytes_only ? 1 : dtype_bytes(c.live);
  for (const int64_t size : sizes) {
    for (const int64_t shadow_offset : {0, 1, 3}) {
      for (const int64_t live_offset : {0, 1, 2}) {
        if (size == kManyTiles && (shadow_offset == 3 || live_offset != shadow_offset)) continue;
        lives.emplace_back(size, live_offset, live_size);
        if (!bytes_only) fill(lives.back(), c.live, c.skip_nonfinite);
        for (int k = 0; k < c.shadows; ++k) {
          // Shadow 1 has another alignment than the others, as no allocator of ours makes it.
          const int64_t offset = shadow_offset + (k == 1 && size == 1025 ? 1 : 0);
          on_gpu[k].emplace_back(size, offset, shadow_size);
          on_cpu[k].emplace_back(size, offset, shadow_size);
          if (!bytes_only) fill(on_gpu[k].back(), c.shadow, c.skip_nonfinite);
          std::memcpy(on_cpu[k].back().memory.get(), on_gpu[k].back().memory.get(), on_cpu[k].back().bytes);
          void *gpu_low = nullptr, *cpu_low = nullptr;
          if (has_planes(c.kind)) {
            // The planes of shadow 2 are aligned apart, as no allocator of ours makes them.
            const int64_t low_offset = offset + (k == 2 && size == 1025 ? 1 : 0);
            gpu_lows[k].emplace_back(size, low_offset, 2);
            cpu_lows[k].emplace_back(size, low_offset, 2);
            for (int64_t i = 0; i < size; ++i) {  // as a split leaves them: a stale one is not kept everywhere
              uint16_t high;
              std::memcpy(&high, on_gpu[k].back().data() + 2 * i, 2);
              if ((high & 0x7f80) == 0x7f80) std::memset(gpu_lows[k].back().data() + 2 * i, 0, 2);
            }
            std::memcpy(cpu_lows[k].back().memory.get(), gpu_lows[k].back().memory.get(), cpu_lows[k].back().bytes);
            gpu_low = gpu_lows[k].back().data(), cpu_low = cpu_lows[k].back().data();
          }
          gpu_segments[k].push_back({on_gpu[k].back().data(), gpu_low, lives.back().data(), size, c.kind});
          cpu_segments[k].push_back({on_cpu[k].back().data(), cpu_low, lives.back().data(), size, c.kind});
        }
      }
    }
  }
  std::vector<Chunk> gpu_chunks, cpu_chunks;
  for (int k = 0; k < c.shadows; ++k) {
    for (const Chunk& chunk : cut(gpu_segments[k], c.chunk_elements)) gpu_chunks.push_back(chunk);
    for (const Chunk& chunk : cut(cpu_segments[k], kCpuChunkElements)) cpu_chunks.push_back(chunk);
  }
  const CpuChunks work(cpu_chunks, c.shadows);
  UpdateArgs args{};
  args.shadows = c.shadows;
  args.skip_nonfinite = c.skip_nonfinite;
  args.count_live = true;
  for (int k = 0; k < c.shadows; ++k) args.weights[k] = c.weight / (k + 1);
  const int64_t nonfinite_on_cpu = c.skip != nullptr ? 0 : update_on_cpu(work, 0, args, 1, best_isa());

  double device_weights[kMaxShadows];
  std::memcpy(device_weights, args.weights, sizeof device_weights);
  if (c.weights_on_device) {
    args.device_weights = device_weights;
    for (double& weight : args.weights) weight = -1.0;
  }
  args.skip = c.skip;
  unsigned long long nonfinite = 0;
  const int64_t count = static_cast<int64_t>(gpu_chunks.size()) / c.shadows;
  if (launch_update(gpu_chunks.data(), count, args, &nonfinite, 0, nullptr) != nullptr) std::abort();
  bool equal = static_cast<int64_t>(nonfinite) == nonfinite_on_cpu;
  for (int k = 0; k < c.shadows; ++k) {
    for (size_t i = 0; i < on_gpu[k].size(); ++i) {
      // The whole buffer: what lies before the segment is nobody's to touch.
      equal = equal && std::memcmp(on_gpu[k][i].memory.get(), on_cpu[k][i].memory.get(), on_gpu[k][i].bytes) == 0;
      for (int64_t at = 0; at < on_cpu[k][i].bytes; ++at) {
        digest = (digest ^ static_cast<unsigned char>(on_cpu[k][i].memory.get()[at])) * 0x100000001b3;
      }
      elements_checked += on_gpu[k][i].bytes / shadow_size;
      if (!has_planes(c.kind)) continue;
      const Buffer &gpu_low = gpu_lows[k][i], &cpu_low = cpu_lows[k][i];
      equal = equal && std::memcmp(gpu_low.memory.get(), cpu_low.memory.get(), gpu_low.bytes) == 0;
      for (int64_t at = 0; at < cpu_low.bytes; ++at) {
        digest = (digest ^ static_cast<unsigned char>(cpu_low.memory.get()[at])) * 0x100000001b3;
      }
    }
  }
  // The exchange of contents, there and back, where both sides have one size.
  if (shadow_size == live_size) {
    const std::vector<Chunk> first(gpu_chunks.begin(), gpu_chunks.begin() + count);
    std::vector<std::vector<char>> before;
    for (Buffer& buffer : lives) before.emplace_back(buffer.memory.get(), buffer.memory.get() + buffer.bytes);
    if (launch_exchange(first.data(), count, 0, nullptr) != nullptr) std::abort();
    for (size_t i = 0; i < lives.size(); ++i) {
      const int64_t length = lives[i].bytes - lives[i].offset_bytes;
      if (length == 0) continue;
      equal = equal && std::memcmp(lives[i].data(), on_cpu[0][i].data(), length) == 0;
      equal = equal && std::memcmp(on_gpu[0][i].data(), before[i].data() + lives[i].offset_bytes, length) == 0;
    }
  }
  ++cases;
  if (!equal) {
    ++failures;
    std::printf(
        "differs: kind %d, %d shadows, skip_nonfinite %d, weight %g, skip %d, nonfinite %llu on the GPU and %lld on "
        "the CPU\n",
        c.kind, c.shadows, c.skip_nonfinite, c.weight, c.skip != nullptr, nonfinite,
        static_cast<long long>(nonfinite_on_cpu));
  }
}

}  // namespace

// Reads a clock from stdin and prints what each step leaves: step, updates, whether it is skipped, the bits of the
// weights. Numbers: shadows, rows, update_every, the table, then one found_inf a step, "none" where there is none.
int run_clock() {
  ClockArgs args{};
  if (std::scanf("%d %" SCNd64 " %" SCNd64, &args.shadows, &args.rows, &args.update_every) != 3) return 1;
  std::vector<double> table(args.rows * args.shadows), weights(args.shadows);
  for (double& weight : table) {
    if (std::scanf("%la", &weight) != 1) return 1;
  }
  int64_t step = 0, num_updates = 0;
  float skip = -1.0f, found_inf;
  args.table = table.data(), args.weights = weights.data();
  args.step = &step, args.num_updates = &num_updates, args.skip = &skip;
  for (char word[64]; std::scanf("%63s", word) == 1;) {
    found_inf = std::strtof(word, nullptr);
    args.found_inf = std::strcmp(word, "none") == 0 ? nullptr : &found_inf;
    if (launch_clock(args, 0, nullptr) != nullptr) return 1;
    std::printf("%" PRId64 " %" PRId64 " %g", step, num_updates, skip);
    for (const double weight : weights) std::printf(" %a", weight);
    std::printf("\n");
  }
  return 0;
}

int main(int count, char** arguments) {
  if (count > 1 && std::strcmp(arguments[1], "clock") == 0) return run_clock();
  const std::vector<Dtype> dtypes = {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16};
  const float found_inf = 1.0f;
  std::vector<std::pair<Dtype, Dtype>> pairs;
  for (const Dtype shadow : dtypes) {
    for (const Dtype live : dtypes) pairs.emplace_back(shadow, live);
  }
  pairs.emplace_back(Dtype::kPlanes, Dtype::kBFloat16);
  for (const auto& [shadow, live] : pairs) {
    const Kind pair = dtype_pair(shadow, live);
    for (const int shadows : {1, 2, 4}) {
      for (const bool skip_nonfinite : {false, true}) {
        for (const double weight : {1e-3, 0.5, 1.0}) {
          run({static_cast<Kind>(kAverage + pair), shadow, live, shadows, skip_nonfinite, weight, nullptr,
               shadows == 2});
        }
      }
    }
    for (const int shadows : {1, 3}) {
      run({static_cast<Kind>(kAverage + pair), shadow, live, shadows, true, 0.1, nullptr, false, kChunkElements});
    }
    run({static_cast<Kind>(kConvert + pair), shadow, live, 2, true, 0.1, nullptr, false});
    run({static_cast<Kind>(kAverage + pair), shadow, live, 1, true, 0.1, &found_inf, false});
  }
  run({kCopyBytes, Dtype::kFloat32, Dtype::kFloat32, 1, true, 0.1, nullptr, false});
  run({kCopyBytes, Dtype::kFloat32, Dtype::kFloat32, 3, true, 0.1, nullptr, false});
  std::printf("%lld cases, %lld elements compared, %lld differ, digest 0x%016" PRIx64 "\n",
              static_cast<long long>(cases), static_cast<long long>(elements_checked), static_cast<long long>(failures),
              digest);
  return failures == 0 ? 0 : 1;
}
