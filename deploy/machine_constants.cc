#include "deploy/machine_constants.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <functional>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/clock.h"
#include "base/random.h"
#include "base/status.h"
#include "deploy/lab.h"
#include "kernels/gated_mlp.h"

namespace ballast {
namespace {

constexpr size_t kLeastStreamBytes = 256u << 20;
constexpr size_t kMostStreamBytes = 1u << 30;
constexpr int kStreamRuns = 7, kBlockRuns = 51, kBatchRuns = 9;
constexpr int kManyRows = 512;
constexpr int kRoundTrips = 101;
constexpr int kTokensInMessage = 256;
constexpr int64_t kLinkDeadlineNs = 60'000'000'000;
constexpr int kTag = 1;

// Median time of `run`, after one that does not count.
absl::StatusOr<double> MedianUs(int runs, const std::function<absl::Status()>& run) {
  BALLAST_RETURN_IF_ERROR(run());
  std::vector<double> times;
  for (int i = 0; i < runs; ++i) {
    const int64_t began = NowNs();
    BALLAST_RETURN_IF_ERROR(run());
    times.push_back(static_cast<double>(NowNs() - began) * 1e-3);
  }
  return PercentileOf(std::move(times), 0.5);
}

// Far beyond the last-level cache, where the system says how large that is.
size_t StreamBytes() {
  const long cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
  const size_t wanted = cache > 0 ? 4 * static_cast<size_t>(cache) : 0;
  return std::clamp(wanted, kLeastStreamBytes, kMostStreamBytes);
}

absl::Status MeasureRead(ComputeConstants* out) {
  const size_t count = StreamBytes() / sizeof(uint64_t);
  const std::unique_ptr<uint64_t[]> words(new (std::nothrow) uint64_t[count]);
  if (words == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no memory to stream ", count * sizeof(uint64_t), " bytes"));
  }
  std::iota(words.get(), words.get() + count, uint64_t{1});
  volatile uint64_t sum = 0;  // so that the reads happen
  BALLAST_ASSIGN_OR_RETURN(const double us, MedianUs(kStreamRuns, [&] {
                             sum = std::accumulate(words.get(), words.get() + count, uint64_t{0});
                             return absl::OkStatus();
                           }));
  out->read_bytes = static_cast<double>(count * sizeof(uint64_t));
  out->read_gb_per_s = out->read_bytes / us * 1e-3;
  return absl::OkStatus();
}

// `values` numbers of small size, as `type` stores them.
AlignedBuffer RandomValues(size_t values, DType type, uint64_t seed) {
  AlignedBuffer buffer(values * SizeOf(type));
  for (size_t i = 0; i < values; ++i) {
    const float value = static_cast<float>(RandomUniform(seed, i) - 0.5) * 0.1f;
    if (type == DType::kF32) {
      buffer.as<float>()[i] = value;
    } else {
      buffer.as<uint16_t>()[i] = static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
    }
  }
  return buffer;
}

// One message there and one back. REQUIRES the ranks are 0 and 1
absl::Status RoundTrip(Transport* transport, std::span<std::byte> there,
                       std::span<std::byte> back) {
  const bool begins = transport->rank() == 0;
  const int64_t deadline = NowNs() + kLinkDeadlineNs;
  for (const bool sends : {begins, !begins}) {
    const int peer = begins ? 1 : 0;
    const std::span<std::byte> bytes = sends == begins ? there : back;
    BALLAST_ASSIGN_OR_RETURN(
        const Transport::Handle handle,
        sends ? transport->PostSend(peer, kTag, bytes) : transport->PostRecv(peer, kTag, bytes));
    while (true) {
      BALLAST_ASSIGN_OR_RETURN(const bool done, transport->Test(handle, nullptr));
      if (done) break;
      if (NowNs() > deadline) {
        return absl::DeadlineExceededError(absl::StrCat("rank ", peer, " does not answer"));
      }
      sched_yield();  // where ranks share a core, the other one has to run
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ComputeConstants> MeasureCompute(const ExpertShape& shape) {
  ComputeConstants out;
  BALLAST_RETURN_IF_ERROR(MeasureRead(&out));
  const bool plain = shape.dtype == DType::kBF16 && !cpu::OneDnnHasBFloat16();
  const KernelSet& kernels = plain ? PlainKernels() : DefaultCpuKernels();
  BALLAST_ASSIGN_OR_RETURN(const auto mlp,
                           GatedMlp::Create(kernels, shape.hidden, shape.inter, shape.dtype));
  const size_t values = static_cast<size_t>(shape.hidden) * static_cast<size_t>(shape.inter);
  const AlignedBuffer gate = RandomValues(values, shape.dtype, 1);
  const AlignedBuffer up = RandomValues(values, shape.dtype, 2);
  const AlignedBuffer down = RandomValues(values, shape.dtype, 3);
  AlignedBuffer packed(mlp->packed_bytes());
  BALLAST_RETURN_IF_ERROR(
      mlp->Pack(gate.data(), up.data(), down.data(), shape.dtype, packed.data()));
  const AlignedBuffer x =
      RandomValues(static_cast<size_t>(kManyRows) * shape.hidden, shape.dtype, 4);
  AlignedBuffer y(static_cast<size_t>(kManyRows) * shape.hidden * sizeof(float));
  const auto run = [&](int rows) {
    return mlp->Run(x.data(), rows, packed.data(), y.as<float>(), nullptr);
  };
  BALLAST_ASSIGN_OR_RETURN(out.block_us, MedianUs(kBlockRuns, [&] { return run(kRowBlock); }));
  BALLAST_ASSIGN_OR_RETURN(const double many_us,
                           MedianUs(kBatchRuns, [&] { return run(kManyRows); }));
  out.token_us = many_us / kManyRows;
  out.gflop_per_s = 6.0 * static_cast<double>(values) * kManyRows / many_us * 1e-3;
  out.expert_bytes = static_cast<double>(mlp->packed_bytes());
  out.expert_read_us = out.expert_bytes / out.read_gb_per_s * 1e-3;
  return out;
}

absl::StatusOr<LinkConstants> MeasureLink(const ExpertShape& shape, size_t expert_bytes,
                                          Transport* transport) {
  const size_t row_bytes = static_cast<size_t>(shape.hidden) * SizeOf(shape.dtype);
  AlignedBuffer there(std::max(kTokensInMessage * row_bytes, expert_bytes)), back(kCacheLineBytes);
  const auto measure = [&](size_t bytes) {
    return MedianUs(kRoundTrips, [&] {
      return RoundTrip(transport, {there.data(), bytes}, {back.data(), sizeof(uint64_t)});
    });
  };
  BALLAST_ASSIGN_OR_RETURN(const double empty_us, measure(sizeof(uint64_t)));
  BALLAST_ASSIGN_OR_RETURN(const double rows_us, measure(kTokensInMessage * row_bytes));
  BALLAST_ASSIGN_OR_RETURN(const double expert_us, measure(expert_bytes));
  if (transport->rank() != 0) return LinkConstants{};
  // The way back carries an empty message. What noise makes of a fast link is no less than nothing.
  const double one_way_us = empty_us / 2;
  constexpr double kLeastUs = 1e-6;
  return LinkConstants{
      .message_us = std::max(one_way_us, kLeastUs),
      .link_us_per_token = std::max((rows_us - empty_us) / kTokensInMessage, kLeastUs),
      .copy_us = std::max(expert_us - one_way_us, kLeastUs)};
}

}  // namespace ballast
