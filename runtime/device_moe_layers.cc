#include "runtime/device_moe_layers.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/status.h"
#include "comm/relax.h"
#include "kernels/copy_route.h"
#include "kernels/device_hosts.h"
#include "kernels/device_matmul.h"
#include "kernels/device_split.h"

namespace ballast {
namespace {

// Layers that may be under way: the driver's queue has room for some hundreds of launches.
constexpr size_t kLayersAhead = 8;

}  // namespace

size_t DeviceMoeLayers::MemoryBytes(const Options& options, const Topology& topology) {
  const DeviceMoeLayout layout(options, topology);
  const auto parts = layout.PartBytes(options);
  return std::accumulate(parts.begin(), parts.end(), layout.shape.bytes());
}

DeviceMoeLayers::DeviceMoeLayers(const Options& options, const Device& device,
                                 cuda::OwnedStream side)
    : options_(options),
      device_(device),
      expert_{.hidden = options.hidden, .inter = options.expert_inter, .dtype = options.dtype},
      row_bytes_(static_cast<size_t>(options.hidden) * SizeOf(options.dtype)),
      side_(std::move(side)),
      tables_(&cuda::DeviceMemory()),
      state_(&cuda::DeviceMemory()),
      place_(&cuda::DeviceMemory()),
      logits_(&cuda::DeviceMemory()),
      ids_log_(&cuda::DeviceMemory()),
      weights_(&cuda::DeviceMemory()),
      histogram_(&cuda::DeviceMemory()),
      gate_workspace_(&cuda::DeviceMemory()),
      log_(&cuda::DeviceMemory()),
      send_(&cuda::DeviceMemory()),
      row_begin_(&cuda::DeviceMemory()),
      group_begin_(&cuda::DeviceMemory()),
      group_rows_(&cuda::DeviceMemory()),
      copy_rank_(&cuda::DeviceMemory()),
      copy_row_(&cuda::DeviceMemory()),
      tile_counts_(&cuda::DeviceMemory()),
      rows_(&cuda::DeviceMemory()),
      staged_tables_(&cuda::PinnedMemory()),
      read_log_(&cuda::PinnedMemory()),
      word_(&cuda::PinnedMemory()) {}

DeviceMoeLayers::~DeviceMoeLayers() = default;

absl::StatusOr<std::unique_ptr<MoeLayers>> DeviceMoeLayers::Create(const Options& options,
                                                                   const Device& device) {
  if (options.split != SplitMode::kExact) {
    return absl::UnimplementedError(
        absl::StrCat("--split is ", NameOf(options.split), ", allowed on a device: exact"));
  }
  BALLAST_ASSIGN_OR_RETURN(cuda::OwnedStream side,
                           cuda::OwnedStream::Create(cuda::OwnedStream::Priority::kHigh));
  std::unique_ptr<DeviceMoeLayers> layers(new DeviceMoeLayers(options, device, std::move(side)));
  // The CPU's bits, so that ids do not depend on the backend.
  BALLAST_ASSIGN_OR_RETURN(
      layers->gate_matmul_,
      cuda::MakePlainDeviceMatmul(options.gate.num_experts, options.hidden, DType::kF32));
  return layers;
}

// ---- memory and generations -------------------------------------------------------------------

absl::Status DeviceMoeLayers::TakeMemory(const Topology& topology) {
  layout_ = std::make_unique<const DeviceMoeLayout>(options_, topology);
  exchange_.shape = layout_->shape;
  BALLAST_RETURN_IF_ERROR(CheckArenaShape(exchange_.shape));
  // First, since it is a thing of all ranks: who then fails does so alone.
  BALLAST_ASSIGN_OR_RETURN(arenas_, device_.lend(exchange_.shape.bytes()));
  Buffer* const parts[] = {&tables_,      &state_,       &place_,          &logits_,    &ids_log_,
                           &weights_,     &histogram_,   &gate_workspace_, &log_,       &send_,
                           &row_begin_,   &group_begin_, &group_rows_,     &copy_rank_, &copy_row_,
                           &tile_counts_, &rows_};
  static_assert(std::size(parts) == DeviceMoeLayout::kNumParts);
  const auto bytes = layout_->PartBytes(options_);
  for (size_t i = 0; i < std::size(parts); ++i) {
    BALLAST_RETURN_IF_ERROR(parts[i]->EnsureSize(bytes[i]));
  }
  BALLAST_RETURN_IF_ERROR(staged_tables_.EnsureSize(tables_.size()));
  BALLAST_RETURN_IF_ERROR(read_log_.EnsureSize(log_.size()));
  BALLAST_RETURN_IF_ERROR(word_.EnsureSize(2 * sizeof(uint32_t)));
  for (size_t i = 0; i < kLayersAhead; ++i) {
    BALLAST_ASSIGN_OR_RETURN(cuda::Event mark, cuda::Event::Create());
    marks_.push_back(std::move(mark));
  }
  return absl::OkStatus();
}

absl::Status DeviceMoeLayers::Connect(Communicator* communicator,
                                      std::span<const int32_t> job_ranks,
                                      const Topology& topology) {
  comm_ = communicator;
  ExchangeState state = {.number = 1};
  if (arenas_.empty()) {
    BALLAST_RETURN_IF_ERROR(TakeMemory(topology));
  } else {
    BALLAST_ASSIGN_OR_RETURN(state.number, NextNumber());
  }
  BALLAST_RETURN_IF_ERROR(state_.Assign(std::as_bytes(std::span(&state, 1)), device_.stream));
  members_.assign(job_ranks.begin(), job_ranks.end());
  BALLAST_RETURN_IF_ERROR(place_.Assign(std::as_bytes(std::span(members_)), device_.stream));
  exchange_.shape.num_ranks = comm_->size();
  for (int r = 0; r < comm_->size(); ++r) exchange_.arena[r] = arenas_[members_[r]];
  exchange_.place = place_.as<int32_t>();
  exchange_.rank = comm_->rank();
  exchange_.deadline_ns = static_cast<uint64_t>(options_.timeout_ms) * 1'000'000;
  exchange_.max_blocks = device_.max_blocks;
  exchange_.state = state_.as<ExchangeState>();
  num_groups_ = std::min(topology.slots_on(exchange_.rank), layout_->max_groups);
  choice_hash_ = 0;
  ++launch_version_;
  return cuda::Wait(device_.stream);
}

// Above all that a rank of this generation has had before. None has a kernel under way then.
absl::StatusOr<uint32_t> DeviceMoeLayers::NextNumber() {
  ExchangeState last;
  BALLAST_RETURN_IF_ERROR(cuda::DeviceMemory().Read(std::as_writable_bytes(std::span(&last, 1)),
                                                    state_.data(), device_.stream));
  std::vector<uint32_t> numbers(static_cast<size_t>(comm_->size()));
  BALLAST_RETURN_IF_ERROR(comm_->AllGather(/*epoch=*/0, std::as_bytes(std::span(&last.number, 1)),
                                           std::as_writable_bytes(std::span(numbers))));
  // Numbers go round: the largest is the farthest ahead of the first.
  const auto ahead = [&](uint32_t n) { return static_cast<int32_t>(n - numbers[0]); };
  return *std::ranges::max_element(numbers, {}, ahead) + 1;
}

// What was put on the stream comes to its end, if need be for want of patience.
absl::Status DeviceMoeLayers::Settle() {
  BALLAST_ASSIGN_OR_RETURN(const bool done, cuda::IsDone(device_.stream));
  if (done) return absl::OkStatus();
  BALLAST_RETURN_IF_ERROR(GiveUp());
  const int64_t began = NowNs();
  for (int polls = 0;; ++polls) {
    BALLAST_ASSIGN_OR_RETURN(const bool ended, cuda::IsDone(device_.stream));
    if (ended) return absl::OkStatus();
    BALLAST_RETURN_IF_ERROR(CheckAlive(began));
    Relax(polls);
  }
}

absl::Status DeviceMoeLayers::GiveUp() {
  word_.as<uint32_t>()[0] = StatusWord(ExchangeCode::kAborted, exchange_.rank);
  BALLAST_RETURN_IF_ERROR(
      cuda::Copy(&exchange_.state->status, word_.data(), sizeof(uint32_t), side_.get()));
  return cuda::Wait(side_.get());
}

std::optional<int64_t> DeviceMoeLayers::launch_version() {
  const std::byte* const arena = device_.experts().at;
  launch_version_ += arena != launched_arena_;
  launched_arena_ = arena;
  return launch_version_;
}

// ---- placements -------------------------------------------------------------------------------

absl::Status DeviceMoeLayers::MakeTables(const Placement& placement, const ExpertStore& store,
                                         std::vector<std::byte>* tables) const {
  tables->assign(static_cast<size_t>(options_.num_layers) * layout_->table_stride, std::byte{0});
  for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
    const CompiledHosts compiled(placement.hosts(layer), placement.epoch());
    const DeviceMoeLayout::Table table = layout_->TableOf(layer);
    if (WordBytes(static_cast<int64_t>(compiled.words().size())) > table.blocks - table.words ||
        compiled.num_groups(exchange_.rank) > num_groups_) {
      return absl::InternalError(
          absl::StrCat("layer ", layer, " of epoch ", placement.epoch(),
                       " has more copies than the tables on the device have room for"));
    }
    const DeviceHosts there =
        compiled.At(reinterpret_cast<const int32_t*>(tables_.data() + table.words));
    std::memcpy(tables->data() + table.hosts, &there, sizeof there);
    std::memcpy(tables->data() + table.words, compiled.words().data(),
                WordBytes(static_cast<int64_t>(compiled.words().size())));
    const DeviceHosts here = compiled.At(compiled.words().data());
    for (int32_t g = 0; g < compiled.num_groups(exchange_.rank); ++g) {
      const int32_t host = here.rank_hosts[here.rank_offsets[exchange_.rank] + g];
      const int32_t block = store.BlockOf(layer, here.expert_of_host[host]);
      if (block < 0) {
        return absl::InternalError(absl::StrCat("layer ", layer, ", expert ",
                                                here.expert_of_host[host],
                                                " is placed here and is not in memory"));
      }
      std::memcpy(tables->data() + table.blocks + WordBytes(g), &block, sizeof block);
    }
  }
  return absl::OkStatus();
}

absl::Status DeviceMoeLayers::Use(const Placement& placement, const ExpertStore& store) {
  BALLAST_RETURN_IF_ERROR(MakeTables(placement, store, &tables_in_use_));
  hosts_of_layer_.clear();
  for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
    hosts_of_layer_.push_back(static_cast<int32_t>(placement.hosts(layer).host_rank.size()));
  }
  // The copy before this one may have been put there since the last step; it does not take long.
  BALLAST_RETURN_IF_ERROR(cuda::Wait(device_.stream));
  std::memcpy(staged_tables_.data(), tables_in_use_.data(), tables_in_use_.size());
  return cuda::Copy(tables_.data(), staged_tables_.data(), tables_in_use_.size(), device_.stream);
}

absl::Status DeviceMoeLayers::Check(const Placement& placement, const ExpertStore& store) {
  std::vector<std::byte> wanted, found(tables_in_use_.size());
  BALLAST_RETURN_IF_ERROR(MakeTables(placement, store, &wanted));
  BALLAST_RETURN_IF_ERROR(cuda::DeviceMemory().Read(found, tables_.data(), device_.stream));
  for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
    const DeviceMoeLayout::Table table = layout_->TableOf(layer);
    const auto of = [&](const std::vector<std::byte>& all) {
      return std::span(all).subspan(table.hosts, table.end - table.hosts);
    };
    if (!std::ranges::equal(of(wanted), of(found))) {
      return absl::InternalError(absl::StrCat("layer ", layer, " under epoch ", placement.epoch(),
                                              ": placement, memory and tables do not agree"));
    }
  }
  return absl::OkStatus();
}

// ---- a layer ----------------------------------------------------------------------------------

absl::Status DeviceMoeLayers::Run(const Args& args) {
  if (args.num_tokens > options_.max_tokens) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a batch of ", args.num_tokens, " tokens, allowed: up to ", options_.max_tokens));
  }
  BALLAST_RETURN_IF_ERROR(RunGate(args));
  BALLAST_RETURN_IF_ERROR(Split(args));
  const auto* const x = static_cast<const std::byte*>(args.x_act);
  BALLAST_RETURN_IF_ERROR(cuda::Dispatch({.num_tokens = args.num_tokens,
                                          .x = x,
                                          .copy_rank = copy_rank_.as<int32_t>(),
                                          .copy_row = copy_row_.as<int32_t>()},
                                         exchange_, device_.stream));
  if (args.while_waiting) BALLAST_RETURN_IF_ERROR(args.while_waiting());
  BALLAST_RETURN_IF_ERROR(cuda::Expand({.own = x, .x = rows_.data()}, exchange_, device_.stream));
  BALLAST_RETURN_IF_ERROR(RunExperts(args));
  return cuda::PullCombine({.num_tokens = args.num_tokens,
                            .type = options_.dtype,
                            .copy_rank = copy_rank_.as<int32_t>(),
                            .copy_row = copy_row_.as<int32_t>(),
                            .weights = weights_.as<float>(),
                            .base = args.base,
                            .out = args.y},
                           exchange_, device_.stream);
}

absl::Status DeviceMoeLayers::RunGate(const Args& args) {
  const size_t tokens = static_cast<size_t>(args.num_tokens);
  const size_t experts = static_cast<size_t>(options_.gate.num_experts);
  const size_t copies = tokens * static_cast<size_t>(options_.gate.top_k);
  if (tokens > 0) {
    BALLAST_RETURN_IF_ERROR(gate_matmul_->Run(args.x_f32, args.num_tokens, args.router.packed,
                                              logits_.as<float>(), device_.stream));
  }
  int32_t* const ids = ids_log_.as<int32_t>() +
                       static_cast<size_t>(args.layer) * options_.max_tokens * options_.gate.top_k;
  return cuda::Gate({.rule = options_.gate,
                     .num_tokens = args.num_tokens,
                     .num_prefill = args.num_prefill,
                     .logits = {logits_.as<float>(), tokens * experts},
                     .bias = args.router.bias,
                     .ids = {ids, copies},
                     .weights = {weights_.as<float>(), copies},
                     .histogram = {histogram_.as<int32_t>(), kNumTokenKinds * experts},
                     .workspace = {gate_workspace_.as<int32_t>(), kNumTokenKinds * experts + 1}},
                    device_.stream);
}

absl::Status DeviceMoeLayers::Split(const Args& args) {
  const ArenaShape& shape = exchange_.shape;
  const auto* const hosts =
      reinterpret_cast<const DeviceHosts*>(tables_.data() + layout_->TableOf(args.layer).hosts);
  const auto* const counts =
      reinterpret_cast<const int32_t*>(exchange_.arena[exchange_.rank] + shape.counts_offset());
  const size_t num_counts =
      static_cast<size_t>(layout_->places) * kNumTokenKinds * shape.num_experts;
  int32_t* const log = log_.as<int32_t>() + static_cast<size_t>(args.layer) * layout_->log_stride;
  uint32_t* const status = &exchange_.state->status;
  BALLAST_RETURN_IF_ERROR(
      cuda::ExchangeCountsAndSplit({.layer = hosts,
                                    .num_experts = shape.num_experts,
                                    .num_ranks = shape.num_ranks,
                                    .max_hosts = layout_->max_hosts,
                                    .max_groups = num_groups_,
                                    .rank = exchange_.rank,
                                    .row_align = 1,
                                    .row_capacity = shape.row_capacity,
                                    .num_kinds = kNumTokenKinds,
                                    .counts = counts,
                                    .place = exchange_.place,
                                    .quota = log + num_counts,
                                    .rank_load = log + num_counts + layout_->max_hosts,
                                    .send = send_.as<int32_t>(),
                                    .row_begin = row_begin_.as<int32_t>(),
                                    .group_begin = group_begin_.as<int32_t>(),
                                    .group_rows = group_rows_.as<int32_t>(),
                                    .status = status},
                                   exchange_, histogram_.as<int32_t>(), device_.stream));
  // Before this rank raises a flag of the next layer, which lets others overwrite them.
  BALLAST_RETURN_IF_ERROR(cuda::Copy(log, counts, num_counts * sizeof(int32_t), device_.stream));
  const int32_t* const ids = ids_log_.as<int32_t>() + static_cast<size_t>(args.layer) *
                                                          options_.max_tokens * options_.gate.top_k;
  return cuda::RouteCopies({.rank = exchange_.rank,
                            .num_tokens = args.num_tokens,
                            .top_k = shape.top_k,
                            .ids = ids,
                            .layer = hosts,
                            .num_experts = shape.num_experts,
                            .send = send_.as<int32_t>(),
                            .row_begin = row_begin_.as<int32_t>(),
                            .copy_rank = copy_rank_.as<int32_t>(),
                            .copy_row = copy_row_.as<int32_t>(),
                            .tile_counts = tile_counts_.as<int32_t>(),
                            .status = status},
                           device_.stream);
}

absl::Status DeviceMoeLayers::RunExperts(const Args& args) {
  const ExpertArena experts = device_.experts();
  const int32_t capacity = exchange_.shape.row_capacity;
  // What comes is mostly as much as goes.
  const int64_t rows =
      std::min<int64_t>(capacity, int64_t{std::max(args.num_tokens, 1)} * options_.gate.top_k);
  constexpr int64_t kSmallRows = 64;
  const auto* const blocks =
      reinterpret_cast<const int32_t*>(tables_.data() + layout_->TableOf(args.layer).blocks);
  return cuda::GroupedMlp(
      {.shape = expert_,
       .groups = {.num_groups = num_groups_,
                  .num_rows = capacity,
                  .max_rows = static_cast<int32_t>(rows),
                  .size = rows <= kSmallRows * num_groups_ ? GroupSize::kSmall : GroupSize::kLarge,
                  .begin = group_begin_.as<int32_t>(),
                  .rows = group_rows_.as<int32_t>(),
                  .block = blocks,
                  .arena = experts.at,
                  .block_bytes = experts.block_bytes,
                  .num_blocks = experts.num_blocks},
       .path = device_.path,
       .x = rows_.data(),
       .activated = rows_.data() + static_cast<size_t>(capacity) * row_bytes_,
       .y = exchange_.arena[exchange_.rank] + exchange_.shape.results_offset()},
      device_.stream);
}

// ---- the end of a step ------------------------------------------------------------------------

absl::Status DeviceMoeLayers::Finish(std::vector<LayerCounts>* counts) {
  auto* const words = word_.as<uint32_t>();
  BALLAST_RETURN_IF_ERROR(cuda::Copy(read_log_.data(), log_.data(), log_.size(), device_.stream));
  BALLAST_RETURN_IF_ERROR(
      cuda::Copy(&words[1], &exchange_.state->status, sizeof(uint32_t), device_.stream));
  BALLAST_RETURN_IF_ERROR(Await([this] { return cuda::IsDone(device_.stream); }));
  BALLAST_RETURN_IF_ERROR(TakeStatus());
  const size_t experts = static_cast<size_t>(options_.gate.num_experts);
  const size_t of_rank = kNumTokenKinds * experts;
  gathered_.resize(members_.size() * of_rank);
  by_source_.resize(members_.size() * experts);
  counts->resize(static_cast<size_t>(options_.num_layers));
  for (int32_t layer = 0; layer < options_.num_layers; ++layer) {
    const int32_t* const log =
        read_log_.as<int32_t>() + static_cast<size_t>(layer) * layout_->log_stride;
    const int32_t* const quota = log + static_cast<size_t>(layout_->places) * of_rank;
    const int32_t* const load = quota + layout_->max_hosts;
    for (size_t r = 0; r < members_.size(); ++r) {
      std::copy_n(log + static_cast<size_t>(members_[r]) * of_rank, of_rank,
                  gathered_.begin() + static_cast<std::ptrdiff_t>(r * of_rank));
    }
    LayerCounts& out = (*counts)[layer];
    FoldCounts(gathered_, experts, by_source_, &out);
    choice_hash_ =
        ChoiceHash(by_source_, {quota, static_cast<size_t>(hosts_of_layer_[layer])}, choice_hash_);
    out.rank_load.assign(load, load + members_.size());
  }
  return absl::OkStatus();
}

// ERRORS what `interrupted` of the communicator says; then nothing is under way any more
absl::Status DeviceMoeLayers::Await(const std::function<absl::StatusOr<bool>()>& is_done) {
  const int64_t began = NowNs(), cpu_began = ThreadCpuNs();
  for (int polls = 0;; ++polls) {
    BALLAST_ASSIGN_OR_RETURN(const bool done, is_done());
    if (done) break;
    if (polls % kPollsPerLook == kPollsPerLook - 1) {
      const absl::Status interrupted = comm_->LookAround();
      if (!interrupted.ok()) {
        BALLAST_RETURN_IF_ERROR(Settle());
        return interrupted;
      }
      BALLAST_RETURN_IF_ERROR(CheckAlive(began));
    }
    Relax(polls);
  }
  comm_->CountWait(NowNs() - began, ThreadCpuNs() - cpu_began);
  return absl::OkStatus();
}

// Waits of the device have a deadline, so a step that lasts for several is none that will end.
absl::Status DeviceMoeLayers::CheckAlive(int64_t began_ns) const {
  constexpr int64_t kDeadlines = 4, kWorkMs = 30'000;  // of a step, without its waits
  const int64_t most_ms = kDeadlines * options_.timeout_ms + kWorkMs;
  if (NowNs() - began_ns < most_ms * 1'000'000) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat("the device has not come to the end of its work for ", most_ms, " ms"));
}

absl::Status DeviceMoeLayers::Pace() {
  cuda::Event& mark = marks_[next_mark_];
  next_mark_ = (next_mark_ + 1) % marks_.size();
  // That of the layer so many before this one.
  BALLAST_RETURN_IF_ERROR(Await([&] { return mark.IsDone(); }));
  return mark.Record(device_.stream);
}

absl::Status DeviceMoeLayers::TakeStatus() {
  const uint32_t word = word_.as<uint32_t>()[1];
  const int32_t missing = MissingRank(word);
  if (missing >= 0) comm_->Miss(missing);
  return ToStatus(word);
}

absl::StatusOr<std::span<const int32_t>> DeviceMoeLayers::Ids(int32_t layer, int32_t num_tokens) {
  const size_t top_k = static_cast<size_t>(options_.gate.top_k);
  ids_.resize(static_cast<size_t>(num_tokens) * top_k);
  const int32_t* const from =
      ids_log_.as<int32_t>() + static_cast<size_t>(layer) * options_.max_tokens * top_k;
  BALLAST_RETURN_IF_ERROR(cuda::DeviceMemory().Read(std::as_writable_bytes(std::span(ids_)),
                                                    reinterpret_cast<const std::byte*>(from),
                                                    device_.stream));
  return std::span<const int32_t>(ids_);
}

}  // namespace ballast
