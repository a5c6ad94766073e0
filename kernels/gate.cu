// CUDA twin of gate.cc. One warp chooses for one token. Lane l holds the experts l * P .. l * P +
// P - 1 as ordered keys, so a choice is a maximum in the lane, one over the warp, and the lowest
// lane that has it: the lower id where choices are equal.
//
// Fused: score, bias, groups, top-k, weights, histogram, margins.
#include <climits>

#include "base/status.h"
#include "kernels/device.cuh"
#include "kernels/gate.h"

namespace ballast::cuda {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kMostBlocks = 1024;  // enough for any device; each adds its counts up once
constexpr uint32_t kTaken = 0;          // the key of an expert that cannot be chosen (any more)

struct GateView {
  GateRule rule;
  int32_t num_tokens, num_prefill;
  const float* logits;
  const float* bias;
  int32_t* ids;
  float* weights;
  float* margin;
  float* group_margin;
  int32_t* histogram;
  int32_t* workspace;  // [2E] counts of the blocks that are done, then how many those are
};

// ---- device functions -------------------------------------------------------------------------

constexpr float kInfinity = __builtin_huge_valf();

__device__ float Margin(float best, float left) {
  return best == left ? 0.0f : best - left;
}

__device__ bool IsNan(float x) {
  return x != x;
}

// The keys of this lane's experts.
template <int kPerLane>
__device__ void LoadKeys(const GateView& g, const float* logits, unsigned lane,
                         uint32_t (&key)[kPerLane]) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int e = static_cast<int>(lane) * kPerLane + i;
    key[i] = kTaken;
    if (e >= g.rule.num_experts) continue;
    const float logit = logits[e];
    const float bias = g.bias != nullptr ? g.bias[e] : 0.0f;
    key[i] = OrderedKey(IsNan(logit) ? -kInfinity : Sigmoid(logit) + bias);
  }
}

// The best key of the warp, and where it is.
struct Best {
  uint32_t key;
  int expert;
};
template <int kPerLane>
__device__ Best BestOf(const uint32_t (&key)[kPerLane], unsigned lane) {
  uint32_t own = key[0];
  int at = 0;
#pragma unroll
  for (int i = 1; i < kPerLane; ++i) {
    if (key[i] > own) {
      own = key[i];
      at = i;
    }
  }
  const uint32_t best = __reduce_max_sync(kFullWarp, own);
  const int owner = __ffs(static_cast<int>(__ballot_sync(kFullWarp, own == best))) - 1;
  return {best, __shfl_sync(kFullWarp, static_cast<int>(lane) * kPerLane + at, owner)};
}

template <int kPerLane>
__device__ void Take(int expert, unsigned lane, uint32_t (&key)[kPerLane]) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (static_cast<int>(lane) * kPerLane + i == expert) key[i] = kTaken;
  }
}

// The sum of the two best choices of group `group`.
template <int kPerLane>
__device__ float ScoreOfGroup(const uint32_t (&key)[kPerLane], unsigned lane, int group, int size) {
  uint32_t best = kTaken, second = kTaken;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int e = static_cast<int>(lane) * kPerLane + i;
    if (e < group * size || e >= (group + 1) * size) continue;
    second = max(second, min(best, key[i]));
    best = max(best, key[i]);
  }
  const uint32_t first = __reduce_max_sync(kFullWarp, best);
  if (size == 1) return FromOrderedKey(first);
  const int owner = __ffs(static_cast<int>(__ballot_sync(kFullWarp, best == first))) - 1;
  const uint32_t rest = static_cast<int>(lane) == owner ? second : best;
  return FromOrderedKey(first) + FromOrderedKey(__reduce_max_sync(kFullWarp, rest));
}

// Takes the experts outside the best groups; returns the group margin.
template <int kPerLane>
__device__ float TakeOtherGroups(const GateRule& rule, unsigned lane, uint32_t (&key)[kPerLane]) {
  const int size = rule.num_experts / rule.num_groups;
  float own = -kInfinity;  // of group `lane`
  for (int g = 0; g < rule.num_groups; ++g) {
    const float score = ScoreOfGroup(key, lane, g, size);
    if (static_cast<int>(lane) == g) own = score;
  }
  const bool is_group = static_cast<int>(lane) < rule.num_groups;
  int better = 0;
  for (int g = 0; g < rule.num_groups; ++g) {
    const float other = __shfl_sync(kFullWarp, own, g);
    if (other > own || (other == own && g < static_cast<int>(lane))) ++better;
  }
  const uint32_t kept = __ballot_sync(kFullWarp, is_group && better < rule.top_groups);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int group = (static_cast<int>(lane) * kPerLane + i) / size;
    if (group < rule.num_groups && (kept >> group & 1) == 0) key[i] = kTaken;
  }
  if (rule.top_groups == rule.num_groups) return kInfinity;
  const unsigned in = __ballot_sync(kFullWarp, is_group && better == rule.top_groups - 1);
  const unsigned out = __ballot_sync(kFullWarp, is_group && better == rule.top_groups);
  return Margin(__shfl_sync(kFullWarp, own, __ffs(static_cast<int>(in)) - 1),
                __shfl_sync(kFullWarp, own, __ffs(static_cast<int>(out)) - 1));
}

template <int kPerLane>
__device__ void GateToken(const GateView& g, int token, unsigned lane, int* counts) {
  const GateRule& rule = g.rule;
  const float* logits = g.logits + static_cast<size_t>(token) * rule.num_experts;
  uint32_t key[kPerLane];
  LoadKeys(g, logits, lane, key);
  float group_margin = kInfinity;
  if (rule.num_groups > 1) group_margin = TakeOtherGroups(rule, lane, key);

  int own_id = 0;  // lane k keeps the k-th choice
  uint32_t last = kTaken;
  for (int k = 0; k < rule.top_k; ++k) {
    const Best best = BestOf(key, lane);
    Take(best.expert, lane, key);
    if (static_cast<int>(lane) == k) own_id = best.expert;
    last = best.key;
  }
  const bool chose = static_cast<int>(lane) < rule.top_k;
  float score = 0.0f;
  if (chose) score = IsNan(logits[own_id]) ? 0.0f : Sigmoid(logits[own_id]);
  float sum = 0.0f;
  for (int k = 0; k < rule.top_k; ++k) sum += __shfl_sync(kFullWarp, score, k);
  const float factor = rule.scale / (rule.renormalise ? sum + 1e-20f : 1.0f);
  if (chose) {
    const size_t at = static_cast<size_t>(token) * rule.top_k + lane;
    g.ids[at] = own_id;
    g.weights[at] = score * factor;
    const bool prefill = token >= g.num_tokens - g.num_prefill;
    atomicAdd(&counts[(prefill ? 0 : rule.num_experts) + own_id], 1);
  }
  if (g.margin != nullptr) {
    const Best left = BestOf(key, lane);
    const float margin =
        left.key == kTaken ? kInfinity : Margin(FromOrderedKey(last), FromOrderedKey(left.key));
    if (lane == 0) g.margin[token] = margin;
  }
  if (g.group_margin != nullptr && lane == 0) g.group_margin[token] = group_margin;
}

// Adds the block's counts to those of the others; the last block writes the sum and leaves zeros.
__device__ void AddUp(const GateView& g, const int* counts) {
  const unsigned size = 2 * static_cast<unsigned>(g.rule.num_experts);
  if (gridDim.x == 1) {
    for (unsigned i = threadIdx.x; i < size; i += kThreads) g.histogram[i] = counts[i];
    return;
  }
  for (unsigned i = threadIdx.x; i < size; i += kThreads) {
    if (counts[i] != 0) atomicAdd(&g.workspace[i], counts[i]);
  }
  __threadfence();
  bool& is_last = *reinterpret_cast<bool*>(const_cast<int*>(counts) + size);
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(&g.workspace[size], 1) == static_cast<int>(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  for (unsigned i = threadIdx.x; i < size; i += kThreads) {
    g.histogram[i] = atomicExch(&g.workspace[i], 0);
  }
  if (threadIdx.x == 0) g.workspace[size] = 0;
}

// ---- kernels ----------------------------------------------------------------------------------

template <int kPerLane>
__global__ void __launch_bounds__(kThreads) GateKernel(GateView g) {
  int* counts = &Shared<int>();  // [2E], then a flag
  const unsigned lane = threadIdx.x % kWarp;
  for (unsigned i = threadIdx.x; i < 2u * g.rule.num_experts; i += kThreads) counts[i] = 0;
  __syncthreads();
  const int warps = static_cast<int>(gridDim.x * (kThreads / kWarp));
  for (int token = static_cast<int>((blockIdx.x * kThreads + threadIdx.x) / kWarp);
       token < g.num_tokens; token += warps) {
    GateToken<kPerLane>(g, token, lane, counts);
  }
  __syncthreads();
  AddUp(g, counts);
}

}  // namespace

// ---- launchers --------------------------------------------------------------------------------

absl::Status Gate(const GateArgs& a, Stream stream) {
  BALLAST_RETURN_IF_ERROR(CheckGate(a));
  if (a.rule.top_k > kMaxTopK || a.rule.num_groups > kMaxGroups) {
    return absl::InvalidArgumentError(absl::StrCat("gate: ", a.rule.num_groups, " groups, top ",
                                                   a.rule.top_k, ": at most ", kMaxGroups,
                                                   " groups and top ", kMaxTopK, " on a device"));
  }
  const unsigned experts = static_cast<unsigned>(a.rule.num_experts);
  if (a.workspace.size() != 2 * experts + 1) {
    return absl::InvalidArgumentError("gate: the workspace does not fit the rule");
  }
  const GateView view = {a.rule,
                         a.num_tokens,
                         a.num_prefill,
                         a.logits.data(),
                         a.bias.empty() ? nullptr : a.bias.data(),
                         a.ids.data(),
                         a.weights.data(),
                         a.margin.empty() ? nullptr : a.margin.data(),
                         a.group_margin.empty() ? nullptr : a.group_margin.data(),
                         a.histogram.data(),
                         a.workspace.data()};
  const unsigned warps = kThreads / kWarp;
  const unsigned blocks = CeilDiv(static_cast<unsigned>(a.num_tokens), warps);
  const LaunchShape shape = {.blocks = std::min(std::max(blocks, 1u), kMostBlocks),
                             .threads = kThreads,
                             .shared_bytes = (2 * experts + 1) * sizeof(int)};
  const unsigned per_lane = CeilDiv(experts, kWarp);
  if (per_lane <= 1) return Launch(shape, stream, GateKernel<1>, view);
  if (per_lane <= 2) return Launch(shape, stream, GateKernel<2>, view);
  if (per_lane <= 4) return Launch(shape, stream, GateKernel<4>, view);
  if (per_lane <= 8) return Launch(shape, stream, GateKernel<8>, view);
  if (per_lane <= 16) return Launch(shape, stream, GateKernel<16>, view);
  if (per_lane <= 32) return Launch(shape, stream, GateKernel<32>, view);
  return Launch(shape, stream, GateKernel<64>, view);
}

}  // namespace ballast::cuda
