#include "runtime/carried_moe_layers.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <iterator>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "kernels/device_matmul.h"
#include "kernels/row_moves.h"

namespace ballast {
namespace {

size_t Words(int64_t count) {
  return static_cast<size_t>(count) * sizeof(int32_t);
}

// Most rows that a rank hands on to others of its node, in one exchange, now or when some ranks
// have been lost.
int64_t MostStagedRows(const MoeLayers::Options& o, const Topology& topology, int32_t max_groups) {
  std::vector<int64_t> ranks_on(static_cast<size_t>(topology.num_nodes()));
  for (const int32_t node : topology.node_of_rank) ++ranks_on[node];
  const int64_t top_k = o.gate.top_k;
  int64_t most = 0;
  for (size_t node = 0; node < ranks_on.size(); ++node) {
    for (int64_t left = 1; left <= ranks_on[node]; ++left) {
      int64_t sources = 0;  // whose proxy one rank is
      for (size_t other = 0; other < ranks_on.size(); ++other) {
        if (other != node) sources += (ranks_on[other] + left - 1) / left;
      }
      const int64_t rows = sources * std::min(top_k, left);
      const int64_t results =
          left * std::min(top_k, sources * std::min<int64_t>(top_k, max_groups));
      most = std::max(most, std::max(rows, results));
    }
  }
  return most * o.max_tokens;
}

}  // namespace

// What all generations have room for.
struct CarriedMoeLayers::Sizes {
  Sizes(const Options& o, const Topology& topology) : max_groups(o.gate.num_experts) {
    const int64_t ranks = topology.num_ranks(), tokens = o.max_tokens, top_k = o.gate.top_k;
    sent = tokens * std::min(top_k, ranks);
    own = tokens * top_k;
    // Whatever the gate chooses and wherever experts are.
    const int64_t copies = ranks * tokens * std::min<int64_t>(top_k, max_groups);
    by_expert = copies + int64_t{max_groups} * static_cast<int64_t>(kRowBlock - 1);
    arrived = std::max(ranks * tokens, by_expert);
    words = sent + 2 * int64_t{max_groups} + by_expert + copies + own;
    staged = MostStagedRows(o, topology, max_groups);
  }

  // Bytes, in the order of CarriedMoeLayers' buffers on the device.
  static constexpr size_t kNumParts = 12;
  std::array<size_t, kNumParts> PartBytes(const Options& o) const {
    const size_t experts = static_cast<size_t>(o.gate.num_experts);
    const size_t act = SizeOf(o.dtype), row = static_cast<size_t>(o.hidden) * act;
    const auto rows = [&](int64_t count) { return static_cast<size_t>(count) * row; };
    return {RoundUp(static_cast<size_t>(o.max_tokens), kRowBlock) * experts * sizeof(float),
            Words(own),
            Words(own),
            Words(kNumTokenKinds * o.gate.num_experts),
            Words(kNumTokenKinds * o.gate.num_experts + 1),
            Words(int64_t{o.num_layers} * max_groups),
            Words(words),
            rows(own),
            rows(arrived),
            rows(by_expert),
            static_cast<size_t>(by_expert) * static_cast<size_t>(o.expert_inter) * act,
            rows(staged)};
  }

  // Of a rank in a layer. Ranks that are left after a loss get more slots where theirs do not do.
  int32_t max_groups;
  int64_t sent, own, arrived, by_expert, staged;  // rows
  int64_t words;
};

size_t CarriedMoeLayers::MemoryBytes(const Options& options, const Topology& topology) {
  const auto parts = Sizes(options, topology).PartBytes(options);
  return std::accumulate(parts.begin(), parts.end(), size_t{0});
}

CarriedMoeLayers::CarriedMoeLayers(const Options& options, const Device& device)
    : options_(options),
      device_(device),
      expert_{.hidden = options.hidden, .inter = options.expert_inter, .dtype = options.dtype},
      row_bytes_(static_cast<size_t>(options.hidden) * SizeOf(options.dtype)),
      counts_(static_cast<size_t>(options.num_layers)),
      logits_(&cuda::DeviceMemory()),
      ids_(&cuda::DeviceMemory()),
      weights_(&cuda::DeviceMemory()),
      histogram_(&cuda::DeviceMemory()),
      gate_workspace_(&cuda::DeviceMemory()),
      blocks_(&cuda::DeviceMemory()),
      words_(&cuda::DeviceMemory()),
      own_(&cuda::DeviceMemory()),
      arrived_(&cuda::DeviceMemory()),
      by_expert_(&cuda::DeviceMemory()),
      activated_(&cuda::DeviceMemory()),
      staging_(&cuda::DeviceMemory()),
      read_ids_(&cuda::PinnedMemory()),
      read_histogram_(&cuda::PinnedMemory()),
      staged_(&cuda::PinnedMemory()),
      staged_blocks_(&cuda::PinnedMemory()) {}

CarriedMoeLayers::~CarriedMoeLayers() = default;

absl::StatusOr<std::unique_ptr<MoeLayers>> CarriedMoeLayers::Create(const Options& options,
                                                                    const Device& device) {
  std::unique_ptr<CarriedMoeLayers> layers(new CarriedMoeLayers(options, device));
  BALLAST_ASSIGN_OR_RETURN(layers->carrier_,
                           RowCarrier::Create({.nccl = device.nccl,
                                               .max_ctas = device.max_ctas,
                                               .stream = device.stream,
                                               .timeout_ms = options.timeout_ms}));
  // The CPU's bits, so that ids do not depend on the backend.
  BALLAST_ASSIGN_OR_RETURN(
      layers->gate_matmul_,
      cuda::MakePlainDeviceMatmul(options.gate.num_experts, options.hidden, DType::kF32));
  return layers;
}

// ---- memory and generations -------------------------------------------------------------------

absl::Status CarriedMoeLayers::TakeMemory(const Topology& topology) {
  if (sizes_ != nullptr) return absl::OkStatus();
  auto taken = std::make_unique<const Sizes>(options_, topology);
  const Sizes& sizes = *taken;
  if (sizes.arrived > INT32_MAX) {
    return absl::InvalidArgumentError(absl::StrCat("--max-batch-tokens is ", options_.max_tokens,
                                                   ", with which a rank may get ", sizes.arrived,
                                                   " rows in a layer, allowed: up to ", INT32_MAX));
  }
  Buffer* const parts[] = {&logits_, &ids_, &weights_, &histogram_, &gate_workspace_, &blocks_,
                           &words_,  &own_, &arrived_, &by_expert_, &activated_,      &staging_};
  static_assert(std::size(parts) == Sizes::kNumParts);
  const auto bytes = sizes.PartBytes(options_);
  for (size_t i = 0; i < std::size(parts); ++i) {
    BALLAST_RETURN_IF_ERROR(parts[i]->EnsureSize(bytes[i]));
  }
  BALLAST_RETURN_IF_ERROR(read_ids_.EnsureSize(counts_.size() * ids_.size()));
  BALLAST_RETURN_IF_ERROR(read_histogram_.EnsureSize(histogram_.size()));
  BALLAST_RETURN_IF_ERROR(staged_.EnsureSize(words_.size()));
  BALLAST_RETURN_IF_ERROR(staged_blocks_.EnsureSize(blocks_.size()));
  sizes_ = std::move(taken);
  return absl::OkStatus();
}

absl::Status CarriedMoeLayers::Connect(Communicator* communicator,
                                       std::span<const int32_t> job_ranks,
                                       const Topology& topology) {
  comm_ = communicator;
  table_ = nullptr;  // of other ranks
  choice_hash_ = 0;
  entries_.emplace(comm_);
  const absl::Status taken = TakeMemory(topology);
  BALLAST_RETURN_IF_ERROR(carrier_->Connect(comm_, job_ranks, topology.node_of_rank,
                                            {staging_.data(), staging_.size()}, taken));
  num_ranks_ = job_ranks.size();
  gathered_.assign(num_ranks_ * read_histogram_.size() / sizeof(int32_t), 0);
  by_source_.assign(gathered_.size() / kNumTokenKinds, 0);
  announced_.assign(2 * num_ranks_, 0);
  traffic_.assign(2 * num_ranks_ * num_ranks_, 0);
  for (auto* sizes : {&send_bytes_, &recv_bytes_, &next_row_}) sizes->assign(num_ranks_, 0);
  out_.assign(num_ranks_, {});
  in_.assign(num_ranks_, {});
  return absl::OkStatus();
}

// ---- placements -------------------------------------------------------------------------------

// The table of blocks, as it is on the device.
absl::StatusOr<std::vector<int32_t>> CarriedMoeLayers::BlocksOf(DispatchTable* table) const {
  const size_t most = static_cast<size_t>(sizes_->max_groups);
  std::vector<int32_t> blocks(counts_.size() * most);
  for (size_t layer = 0; layer < counts_.size(); ++layer) {
    const auto& of_layer = table->layer(static_cast<int32_t>(layer)).blocks;
    if (of_layer.size() > most) {
      return absl::InternalError(
          absl::StrCat("layer ", layer, " of epoch ", table->epoch(), " has ", of_layer.size(),
                       " experts on this rank, allowed: up to ", most));
    }
    std::ranges::copy(of_layer, blocks.begin() + static_cast<std::ptrdiff_t>(layer * most));
  }
  return blocks;
}

absl::Status CarriedMoeLayers::Use(const Placement& placement, const ExpertStore& store) {
  table_ = std::make_unique<DispatchTable>(placement, comm_->rank(), store, table_.get());
  BALLAST_ASSIGN_OR_RETURN(const std::vector<int32_t> blocks, BlocksOf(table_.get()));
  // The copy before this one is long done: a step has ended since.
  std::ranges::copy(blocks, staged_blocks_.as<int32_t>());
  return cuda::Copy(blocks_.data(), staged_blocks_.data(), blocks.size() * sizeof(int32_t),
                    device_.stream);
}

absl::Status CarriedMoeLayers::Check(const Placement& placement, const ExpertStore& store) {
  if (!(table_->placement() == placement)) {
    return absl::InternalError(absl::StrCat("steps run under epoch ", table_->epoch(),
                                            ", the placement in force is ", placement.epoch()));
  }
  DispatchTable wanted(placement, comm_->rank(), store, nullptr);
  BALLAST_ASSIGN_OR_RETURN(const std::vector<int32_t> blocks, BlocksOf(&wanted));
  std::vector<int32_t> found(blocks.size());
  BALLAST_RETURN_IF_ERROR(cuda::DeviceMemory().Read(std::as_writable_bytes(std::span(found)),
                                                    blocks_.data(), device_.stream));
  for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
    const size_t first = static_cast<size_t>(layer) * static_cast<size_t>(sizes_->max_groups);
    if (table_->layer(layer).group_of_expert != wanted.layer(layer).group_of_expert ||
        !std::equal(wanted.layer(layer).blocks.begin(), wanted.layer(layer).blocks.end(),
                    found.begin() + static_cast<std::ptrdiff_t>(first))) {
      return absl::InternalError(absl::StrCat("layer ", layer, " under epoch ", placement.epoch(),
                                              ": placement, memory and tables do not agree"));
    }
  }
  return absl::OkStatus();
}

// ---- a layer ----------------------------------------------------------------------------------

absl::Status CarriedMoeLayers::Run(const Args& args) {
  if (args.num_tokens > options_.max_tokens) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a batch of ", args.num_tokens, " tokens, allowed: up to ", options_.max_tokens));
  }
  BALLAST_RETURN_IF_ERROR(RunGate(args));
  BALLAST_RETURN_IF_ERROR(SplitBatch(args));
  BALLAST_RETURN_IF_ERROR(Announce(args));
  BALLAST_RETURN_IF_ERROR(SendRows(args));
  if (args.while_waiting) BALLAST_RETURN_IF_ERROR(args.while_waiting());
  BALLAST_RETURN_IF_ERROR(entries_->Wait());
  BALLAST_RETURN_IF_ERROR(PutInGroups(args));
  BALLAST_RETURN_IF_ERROR(RunExperts(args));
  return Return(args);
}

absl::Status CarriedMoeLayers::RunGate(const Args& args) {
  const size_t tokens = static_cast<size_t>(args.num_tokens), copies = Copies(args.num_tokens);
  const size_t experts = static_cast<size_t>(options_.gate.num_experts);
  if (tokens > 0) {
    BALLAST_RETURN_IF_ERROR(gate_matmul_->Run(args.x_f32, args.num_tokens, args.router.packed,
                                              logits_.as<float>(), device_.stream));
  }
  BALLAST_RETURN_IF_ERROR(
      cuda::Gate({.rule = options_.gate,
                  .num_tokens = args.num_tokens,
                  .num_prefill = args.num_prefill,
                  .logits = {logits_.as<float>(), tokens * experts},
                  .bias = args.router.bias,
                  .ids = {ids_.as<int32_t>(), copies},
                  .weights = {weights_.as<float>(), copies},
                  .histogram = {histogram_.as<int32_t>(), kNumTokenKinds * experts},
                  .workspace = {gate_workspace_.as<int32_t>(), kNumTokenKinds * experts + 1}},
                 device_.stream));
  BALLAST_RETURN_IF_ERROR(
      cuda::Copy(IdsOf(args.layer), ids_.data(), copies * sizeof(int32_t), device_.stream));
  BALLAST_RETURN_IF_ERROR(
      cuda::Copy(read_histogram_.data(), histogram_.data(), histogram_.size(), device_.stream));
  return carrier_->Wait();
}

absl::Status CarriedMoeLayers::SplitBatch(const Args& args) {
  BALLAST_RETURN_IF_ERROR(comm_->AllGather(table_->epoch(),
                                           {read_histogram_.data(), read_histogram_.size()},
                                           std::as_writable_bytes(std::span(gathered_))));
  LayerCounts& counts = counts_[args.layer];
  FoldCounts(gathered_, static_cast<size_t>(options_.gate.num_experts), by_source_, &counts);
  Splitter& splitter = *table_->layer(args.layer).splitter;
  splitter.Run(options_.split, by_source_, &split_);
  splitter.Cut(options_.split, by_source_, split_, comm_->rank(), &part_);
  choice_hash_ = ChoiceHash(by_source_, split_.quota, choice_hash_);
  counts.rank_load.assign(split_.rank_load.begin(), split_.rank_load.end());
  return absl::OkStatus();
}

// Tells the others what goes to them: who needs which row by a message, how much it is to all.
absl::Status CarriedMoeLayers::Announce(const Args& args) {
  const std::span<const int32_t> ids(IdsOf(args.layer), Copies(args.num_tokens));
  BALLAST_RETURN_IF_ERROR(cpu::AssignCopies({.num_tokens = args.num_tokens,
                                             .top_k = options_.gate.top_k,
                                             .ids = ids,
                                             .hosts = &table_->placement().hosts(args.layer),
                                             .share = part_.send,
                                             .route = &route_},
                                            nullptr));
  for (size_t r = 0; r < num_ranks_; ++r) {
    const DispatchMessage& message = route_.message[r];
    announced_[2 * r] = message.num_rows;
    announced_[2 * r + 1] = message.num_copies;
    send_bytes_[r] = message.num_copies > 0 ? message.bytes(0) : 0;
    out_[r] = entries_->SendBuffer(static_cast<int>(r), send_bytes_[r]);
    const DispatchMessage coming{.num_copies = static_cast<uint32_t>(part_.receive[r])};
    recv_bytes_[r] = coming.num_copies > 0 ? coming.bytes(0) : 0;
  }
  cpu::Pack({.num_tokens = args.num_tokens,
             .top_k = options_.gate.top_k,
             .ids = ids,
             .route = &route_,
             .rows = {},
             .out = out_},
            nullptr);
  BALLAST_RETURN_IF_ERROR(entries_->Post(table_->epoch(), send_bytes_, recv_bytes_));
  BALLAST_RETURN_IF_ERROR(comm_->AllGather(table_->epoch(), std::as_bytes(std::span(announced_)),
                                           std::as_writable_bytes(std::span(traffic_))));
  const size_t self = static_cast<size_t>(comm_->rank());
  for (size_t r = 0; r < num_ranks_; ++r) {
    const size_t rows = NumRows(r, self), copies = NumCopies(r, self);
    if (copies != static_cast<size_t>(part_.receive[r]) || rows > copies ||
        rows > static_cast<size_t>(options_.max_tokens)) {
      return absl::InternalError(absl::StrCat("rank ", r, " announces ", rows, " rows for ", copies,
                                              " copies; the split says ", part_.receive[r]));
    }
  }
  return absl::OkStatus();
}

absl::Status CarriedMoeLayers::SendRows(const Args& args) {
  PlanExchange(Freight::kRows);
  for (size_t r = 0; r < num_ranks_; ++r) next_row_[r] = carrier_->send_offset(r) / row_bytes_;
  last_token_.assign(num_ranks_, -1);
  int32_t* const index = staged_.as<int32_t>();
  size_t rows = 0;
  for (size_t copy = 0; copy < Copies(args.num_tokens); ++copy) {
    const int32_t token = static_cast<int32_t>(copy) / options_.gate.top_k;
    const size_t r = static_cast<size_t>(route_.copy_rank[copy]);
    if (std::exchange(last_token_[r], token) == token) continue;
    index[next_row_[r]++] = token;
    ++rows;
  }
  BALLAST_RETURN_IF_ERROR(Upload(0, rows));
  BALLAST_RETURN_IF_ERROR(Gather(0, rows, static_cast<const std::byte*>(args.x_act), own_.data()));
  return carrier_->Send(own_.data(), arrived_.data());
}

// Which row of those that come is where by expert, and which result goes where.
absl::Status CarriedMoeLayers::PutInGroups(const Args& args) {
  const DispatchTable::Layer& layer = table_->layer(args.layer);
  for (size_t r = 0; r < num_ranks_; ++r) in_[r] = entries_->Received(static_cast<int>(r));
  BALLAST_RETURN_IF_ERROR(cpu::Group({.received = in_,
                                      .group_of_expert = layer.group_of_expert,
                                      .num_groups = static_cast<int32_t>(layer.blocks.size()),
                                      .grouped = &grouped_,
                                      .x = &no_rows_},
                                     nullptr));
  const size_t groups = layer.blocks.size();
  const size_t rows = static_cast<size_t>(grouped_.group_begin[groups]);
  if (rows > static_cast<size_t>(sizes_->by_expert)) {
    return absl::InternalError(absl::StrCat(rows, " rows come for this rank's experts, which have ",
                                            "room for ", sizes_->by_expert));
  }
  at_.begin = static_cast<size_t>(sizes_->sent);  // the words before are in use
  at_.rows = at_.begin + groups;
  at_.to_expert = at_.rows + groups;
  at_.back = at_.to_expert + rows;
  at_.combine = at_.back + static_cast<size_t>(grouped_.num_copies);
  at_.end = at_.combine + Copies(args.num_tokens);
  int32_t* const words = staged_.as<int32_t>();
  std::copy_n(grouped_.group_begin.begin(), groups, words + at_.begin);
  std::copy_n(grouped_.group_rows.begin(), groups, words + at_.rows);
  std::fill_n(words + at_.to_expert, rows, -1);  // rows between groups
  for (size_t r = 0; r < num_ranks_; ++r) {
    const size_t first = carrier_->recv_offset(r) / row_bytes_;
    const std::byte* entry = in_[r].data() + DispatchMessage::kEntriesOffset;
    for (int32_t i = grouped_.source_begin[r]; i < grouped_.source_begin[r + 1]; ++i) {
      DispatchMessage::Entry its;
      std::memcpy(&its, entry, sizeof its);
      entry += sizeof its;
      if (its.row >= NumRows(r, static_cast<size_t>(comm_->rank()))) {
        return absl::InternalError(absl::StrCat("rank ", r, " names row ", its.row, " of ",
                                                NumRows(r, static_cast<size_t>(comm_->rank())),
                                                " that it announced"));
      }
      words[at_.to_expert + static_cast<size_t>(grouped_.position[i])] =
          static_cast<int32_t>(first + its.row);
    }
  }
  PlanExchange(Freight::kResults);
  for (size_t r = 0; r < num_ranks_; ++r) {
    const auto begin = grouped_.position.begin() + grouped_.source_begin[r];
    std::copy(begin, grouped_.position.begin() + grouped_.source_begin[r + 1],
              words + at_.back + carrier_->send_offset(r) / row_bytes_);
  }
  for (size_t copy = 0; copy < Copies(args.num_tokens); ++copy) {
    const size_t r = static_cast<size_t>(route_.copy_rank[copy]);
    words[at_.combine + copy] =
        static_cast<int32_t>(carrier_->recv_offset(r) / row_bytes_) + route_.copy_index[copy];
  }
  return Upload(at_.begin, at_.end);
}

absl::Status CarriedMoeLayers::RunExperts(const Args& args) {
  BALLAST_RETURN_IF_ERROR(carrier_->Receive());
  if (grouped_.num_copies == 0) return absl::OkStatus();
  const size_t groups = at_.rows - at_.begin, rows = at_.back - at_.to_expert;
  BALLAST_RETURN_IF_ERROR(Gather(at_.to_expert, rows, arrived_.data(), by_expert_.data()));
  const ExpertArena experts = device_.experts();
  constexpr size_t kSmallRows = 64;
  return cuda::GroupedMlp(
      {.shape = expert_,
       .groups = {.num_groups = static_cast<int32_t>(groups),
                  .num_rows = static_cast<int32_t>(rows),
                  .max_rows = static_cast<int32_t>(rows),
                  .size = rows <= kSmallRows * groups ? GroupSize::kSmall : GroupSize::kLarge,
                  .begin = words_.as<int32_t>() + at_.begin,
                  .rows = words_.as<int32_t>() + at_.rows,
                  .block = blocks_.as<int32_t>() + args.layer * sizes_->max_groups,
                  .arena = experts.at,
                  .block_bytes = experts.block_bytes,
                  .num_blocks = experts.num_blocks},
       .path = device_.path,
       .x = by_expert_.data(),
       .activated = activated_.data(),
       .y = arrived_.data()},
      device_.stream);
}

absl::Status CarriedMoeLayers::Return(const Args& args) {
  BALLAST_RETURN_IF_ERROR(Gather(at_.back, static_cast<size_t>(grouped_.num_copies),
                                 arrived_.data(), by_expert_.data()));
  BALLAST_RETURN_IF_ERROR(carrier_->Send(by_expert_.data(), own_.data()));
  BALLAST_RETURN_IF_ERROR(carrier_->Receive());
  return cuda::CombineRows({.num_tokens = args.num_tokens,
                            .top_k = options_.gate.top_k,
                            .width = options_.hidden,
                            .type = options_.dtype,
                            .weights = weights_.as<float>(),
                            .index = words_.as<int32_t>() + at_.combine,
                            .results = own_.data(),
                            .base = args.base,
                            .out = args.y},
                           device_.stream);
}

// ---- what a layer is made of ------------------------------------------------------------------

void CarriedMoeLayers::PlanExchange(Freight freight) {
  const std::span<size_t> pair_bytes = carrier_->pair_bytes();
  for (size_t from = 0; from < num_ranks_; ++from) {
    for (size_t to = 0; to < num_ranks_; ++to) {
      const size_t rows = freight == Freight::kRows ? NumRows(from, to) : NumCopies(to, from);
      pair_bytes[from * num_ranks_ + to] = rows * row_bytes_;
    }
  }
  carrier_->Plan();
}

// By the indices that begin at `word`.
absl::Status CarriedMoeLayers::Gather(size_t word, size_t num_rows, const std::byte* in,
                                      std::byte* out) {
  return cuda::GatherRows({.num_rows = static_cast<int32_t>(num_rows),
                           .row_bytes = static_cast<int32_t>(row_bytes_),
                           .index = words_.as<int32_t>() + word,
                           .in = in,
                           .out = out},
                          device_.stream);
}

// Nothing of the layer before reads or writes them any more: the gate has waited for it.
absl::Status CarriedMoeLayers::Upload(size_t begin, size_t end) {
  return cuda::Copy(words_.as<int32_t>() + begin, staged_.as<int32_t>() + begin,
                    (end - begin) * sizeof(int32_t), device_.stream);
}

// ---- the end of a step ------------------------------------------------------------------------

absl::Status CarriedMoeLayers::Finish(std::vector<LayerCounts>* counts) {
  BALLAST_RETURN_IF_ERROR(carrier_->Wait());
  std::swap(*counts, counts_);
  counts_.resize(counts->size());
  return absl::OkStatus();
}

int32_t* CarriedMoeLayers::IdsOf(int32_t layer) const {
  return read_ids_.as<int32_t>() + static_cast<size_t>(layer) * Copies(options_.max_tokens);
}

absl::StatusOr<std::span<const int32_t>> CarriedMoeLayers::Ids(int32_t layer, int32_t num_tokens) {
  return std::span<const int32_t>(IdsOf(layer), Copies(num_tokens));
}

}  // namespace ballast
