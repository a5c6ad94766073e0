#include "tests/fuzz/targets.h"

#include <CLI/CLI.hpp>

#include "absl/strings/match.h"
#include "base/file.h"
#include "base/npy.h"
#include "base/status.h"
#include "deploy/flags.h"
#include "placement/cluster_model.h"
#include "placement/cost_model.h"
#include "placement/esft.h"
#include "placement/migration_plan.h"
#include "placement/placement_formats.h"
#include "placement/trace.h"
#include "runtime/control_frames.h"

namespace ballast::fuzz {
namespace {

const std::string kName = "a-file";

// What is wrong with a refusal, or "".
std::string CheckRefusal(const absl::Status& status, const std::string& name) {
  if (!absl::IsInvalidArgument(status)) return "refused with " + status.ToString();
  if (status.message().empty()) return "refused without a message";
  if (!absl::StrContains(status.message(), name)) {
    return absl::StrCat("the refusal does not name the file: ", status.message());
  }
  return "";
}

std::string BytesToText(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::span<const std::byte> TextToBytes(const std::string& text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

// ---- arrays ------------------------------------------------------------------------------------

std::string CheckNpy(const std::string& input, Random&) {
  const auto array = ParseNpy(kName, input);
  if (!array.ok()) return CheckRefusal(array.status(), kName);
  if (array->num_elements() * static_cast<int64_t>(SizeOf(array->type)) !=
      static_cast<int64_t>(array->data.size())) {
    return "the data do not fill the shape";
  }
  const auto again = ParseNpy(kName, SerializeNpy(*array));
  return again.ok() && *again == *array ? "" : "it does not survive writing and reading";
}

std::string CheckConstants(const std::string& input, Random&) {
  const auto constants = CostConstantsFromJson(kName, input, /*num_ranks=*/2);
  if (!constants.ok()) return CheckRefusal(constants.status(), kName);
  return constants->expert_read_us >= 0.0 && constants->token_us >= 0.0 ? "" : "a negative time";
}

std::string CheckCluster(const std::string& input, Random&) {
  const auto model = ClusterModel::FromJson(kName, input);
  if (!model.ok()) return CheckRefusal(model.status(), kName);
  return model->ranks_per_node >= 1 ? "" : "nodes without ranks";
}

std::string CheckLoad(const LoadTable& table) {
  if (table.num_layers < 1 || table.num_experts < 1 ||
      table.load.size() != static_cast<size_t>(table.num_layers) * table.num_experts) {
    return "a load without its shape";
  }
  for (const int64_t load : table.load) {
    if (load < 0 || load > int64_t{1} << 53) return absl::StrCat("a load of ", load);
  }
  return "";
}

std::string CheckLoadArray(const std::string& input, Random&) {
  const auto array = ParseNpy(kName, input);
  if (!array.ok()) return CheckRefusal(array.status(), kName);
  const auto table = LoadFromArray({kName, *array});
  return table.ok() ? CheckLoad(*table) : CheckRefusal(table.status(), kName);
}

std::string CheckLoadCsv(const std::string& input, Random&) {
  const auto table = LoadFromCsv(kName, input);
  if (!table.ok()) return CheckRefusal(table.status(), kName);
  if (const std::string wrong = CheckLoad(*table); !wrong.empty()) return wrong;
  const auto again = LoadFromCsv(kName, LoadToCsv(*table));
  return again.ok() && again->load == table->load ? "" : "it does not survive writing and reading";
}

std::string CheckTrace(const std::string& input, Random& random) {
  const auto array = ParseNpy(kName, input);
  if (!array.ok()) return CheckRefusal(array.status(), kName);
  const int32_t experts[] = {0, 4, 300, 65536};
  const TraceOptions options{.step_tokens = 1 + random.Below(8),
                             .num_experts = experts[random.Below(4)]};
  std::vector<NamedArray> phases(1 + random.Below(2), {kName, *array});
  const auto trace = CountSteps(phases, options);
  if (!trace.ok()) return CheckRefusal(trace.status(), kName);
  const size_t step = static_cast<size_t>(trace->num_layers) * trace->num_experts;
  if (trace->num_steps() < 1 ||
      trace->counts.size() != static_cast<size_t>(trace->num_steps()) * step) {
    return "counts that do not fill their shape";
  }
  for (const int32_t count : trace->counts) {
    if (count < 0) return absl::StrCat("a count of ", count);
  }
  for (int64_t index = 0; index < trace->num_steps(); ++index) {
    const StepCounts of = trace->counts_of(index);
    for (TokenKind kind : kTokenKinds) {
      const auto counts = of.counts[kind];
      const bool any = std::any_of(counts.begin(), counts.end(), [](int32_t n) { return n > 0; });
      // A step of one kind has its tokens whatever it copies.
      const bool apart = !trace->kind_counts.empty();
      if (of.num_tokens[kind] < any || (apart && !any && of.num_tokens[kind] > 0)) {
        return absl::StrCat("kinds of ", of.num_tokens[kind], " tokens");
      }
    }
    for (size_t i = 0; i < step; ++i) {
      int64_t sum = 0;
      for (const auto& counts : of.counts) sum += counts.empty() ? 0 : counts[i];
      if (sum != trace->step(index)[i]) return absl::StrCat("kinds that add up to ", sum);
    }
  }
  return "";
}

std::vector<std::string> ArraySeeds() {
  std::vector<int64_t> values;
  for (int64_t i = 0; i < 48; ++i) values.push_back(i * 7 % 16);
  std::vector<std::string> seeds;
  for (const NpyType type :
       {NpyType::kU8, NpyType::kU16, NpyType::kI32, NpyType::kI64, NpyType::kF32, NpyType::kF64}) {
    seeds.push_back(SerializeNpy(MakeNpyArray(type, {8, 3, 2}, values)));
    seeds.push_back(SerializeNpy(MakeNpyArray(type, {6, 8}, values)));
    seeds.push_back(SerializeNpy(MakeNpyArray(type, {4, 2, 3, 2}, values)));
  }
  return seeds;
}

std::string CheckEsft(const std::string& input, Random& random) {
  const int32_t top_k = 1 + static_cast<int32_t>(random.Below(3));
  const std::vector<NamedText> layers(1 + random.Below(2), {kName, input});
  const auto arrays = ParseEsft(layers, top_k);
  if (!arrays.ok()) return CheckRefusal(arrays.status(), kName);
  if (arrays->ids.shape != arrays->weights.shape || arrays->ids.shape.size() != 3 ||
      arrays->ids.shape[2] != top_k || arrays->ids.num_elements() == 0) {
    return "arrays of different shapes";
  }
  const auto trace = CountSteps(std::vector<NamedArray>{{kName, arrays->ids}}, {.step_tokens = 1});
  return trace.ok() ? "" : "its ids are no trace: " + trace.status().ToString();
}

// ---- placements and plans ----------------------------------------------------------------------

Placement SamplePlacement() {
  return *Placement::Contiguous(3, 6, Topology::Uniform(2, 4), /*fill_spare=*/true);
}

// What is wrong with a placement, or "": the invariants of Placement::Create, by other means.
std::string CheckPlacement(const Placement& placement) {
  const int32_t slots = placement.topology().num_slots();
  for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
    std::vector<int32_t> copies(static_cast<size_t>(placement.num_experts()));
    for (int32_t slot = 0; slot < slots; ++slot) {
      const int32_t expert = placement.expert_of_slot(layer)[slot];
      if (expert < kNoExpert || expert >= placement.num_experts()) {
        return absl::StrCat("slot ", slot, " holds ", expert);
      }
      if (expert == kNoExpert) continue;
      ++copies[expert];
      if (!placement.Hosts(layer, expert, placement.topology().rank_of_slot(slot))) {
        return absl::StrCat("slot ", slot, " is not among the hosts of ", expert);
      }
    }
    for (int32_t e = 0; e < placement.num_experts(); ++e) {
      if (copies[e] < 1 || copies[e] != placement.num_replicas(layer, e)) {
        return absl::StrCat("expert ", e, " has ", copies[e], " slots");
      }
    }
  }
  const auto again = Placement::FromJson(placement.ToJson());
  return again.ok() && *again == placement ? "" : "it does not survive writing and reading";
}

Target PlacementTarget(const std::string& format_name) {
  const PlacementFormat format = *ParsePlacementFormat(format_name);
  return {.name = "placement-" + format_name,
          .seeds = {*ExportPlacement(SamplePlacement(), format)},
          .check = [format](const std::string& input, Random& random) -> std::string {
            const ImportOptions options{.num_ranks = static_cast<int32_t>(random.Below(4)),
                                        .num_nodes = 1 + static_cast<int32_t>(random.Below(2)),
                                        .num_experts = random.Below(2) == 0 ? 0 : 6};
            const auto placement = ImportPlacement(kName, input, format, options);
            return placement.ok() ? CheckPlacement(*placement)
                                  : CheckRefusal(placement.status(), kName);
          }};
}

std::string SamplePlan() {
  std::vector<Placement::LayerRow> rows = {{1, {0, 1, 2, 5, 3, 4, 5, 0}}};
  const auto plan = MakeMigrationPlan(SamplePlacement(), std::move(rows), /*plan_id=*/7);
  return BytesToText(plan->Serialize());
}

std::string CheckPlan(const std::string& input, Random&) {
  const auto plan = MigrationPlan::Deserialize(TextToBytes(input));
  if (!plan.ok()) return CheckRefusal(plan.status(), "plan");
  if (BytesToText(plan->Serialize()) != input) return "it does not survive writing and reading";
  const auto after = plan->Apply(SamplePlacement());
  return after.ok() ? CheckPlacement(*after) : "";
}

// ---- frames and flags --------------------------------------------------------------------------

template <typename Frame>
std::string CheckFrame(const std::string& input,
                       absl::StatusOr<Frame> (*parse)(std::span<const std::byte>)) {
  const auto frame = parse(TextToBytes(input));
  if (!frame.ok()) return CheckRefusal(frame.status(), "control frame");
  return BytesToText(Serialize(*frame)) == input ? "" : "it does not survive writing and reading";
}

std::vector<std::string> LeaderFrameSeeds() {
  GenerationRequest request;
  request.prompt = {1, 2, 3};
  request.generated = {4};
  request.max_tokens = 9;
  const std::vector<LeaderFrame> frames = {{1, SubmitFrame{request}},
                                           {2, CancelFrame{7}},
                                           {3, PlanFrame{std::vector<std::byte>(9)}},
                                           {4, StopFrame{}},
                                           {7, VerifyFrame{9}},
                                           {5, HaltFrame{3, true}},
                                           {6, ResumeFrame{.generation = 3,
                                                           .members = {{0, 0, 0, 0}, {2, -1, 9, 1}},
                                                           .commit_plan_id = 8,
                                                           .step = 1'000,
                                                           .epoch = 12,
                                                           .placement = {std::byte{'x'}}}}};
  std::vector<std::string> seeds;
  for (const LeaderFrame& frame : frames) seeds.push_back(BytesToText(Serialize(frame)));
  return seeds;
}

std::vector<std::string> RankFrameSeeds() {
  const std::vector<RankFrame> frames = {
      {EventsFrame{{{1, 65, FinishReason::kNone}, {2, -1, FinishReason::kStop}}}},
      {RankStatusFrame{3, 4, 5}},
      {RoutingFrame{2, 100, 108, 103, std::vector<std::byte>(6)}},
      {HaltedFrame{.generation = 3,
                   .step = 999,
                   .epoch = 11,
                   .staged_plan_id = 8,
                   .placement = {std::byte{'p'}},
                   .staged_placement = {std::byte{'q'}}}},
      {TroubleFrame{.generation = 2, .missing = {1, 4}}},
      {VerifiedFrame{.id = 9,
                     .step = 100,
                     .epoch = 3,
                     .fingerprint = 5,
                     .fault = std::vector<std::byte>(4),
                     .copies = {{0, 1, 2, 3}, {1, 2, 4, 5}}}}};
  std::vector<std::string> seeds;
  for (const RankFrame& frame : frames) seeds.push_back(BytesToText(Serialize(frame)));
  return seeds;
}

std::string CheckConfig(const std::string& path, const std::string& input) {
  if (!WriteFile(path, input).ok()) return "cannot write " + path;
  CLI::App app;
  int32_t number = 4;
  std::string text;
  std::vector<double> list;
  bool flag = false;
  app.add_option("--number", number)->check(CLI::Range(1, 100))->required();
  app.add_option("--text", text)->check(CLI::IsMember({"one", "two"}));
  app.add_option("--list", list)->delimiter(',');
  app.add_flag("--flag", flag);
  NameEnvironment(&app);
  const absl::Status status = ApplyConfigFile(path, &app);
  return status.ok() ? "" : CheckRefusal(status, path);
}

}  // namespace

std::vector<Target> MakeTargets(const std::string& folder) {
  std::vector<Target> targets = {
      {"npy", ArraySeeds(), CheckNpy},
      {"load-npy", ArraySeeds(), CheckLoadArray},
      {"load-csv",
       {"e0,e1,e2\n1,2,3\n4,5,6\n", "0.5,1e3,7\n1,2,3\n", "9007199254740992,0\n"},
       CheckLoadCsv},
      {"trace", ArraySeeds(), CheckTrace},
      {"esft", {"0\t1\t2\t3\t\t0.5\t0.25\t0.5\t0.25\n1\t3\t\t0.5\t0.5\n", "300\t\t1\n"}, CheckEsft},
      {"cost-constants",
       {"{\"expert_read_us\": 9, \"token_us\": 0.1, \"speed\": [1, 0.5], \"note\": null}"},
       CheckConstants},
      {"cluster",
       {R"({ "ranks_per_node": 8, "link_gb_per_s": 320, "link_latency_us": 2,
"network_gb_per_s": 45, "network_latency_us": 5, "message_us": 0.1,
"dispatch_row_bytes": 7392, "combine_row_bytes": 14336, "expert_bytes": 44040192,
"expert_read_us": 9.2, "token_us": 0.074, "background_share": 0.2})"},
       CheckCluster},
      {"migration-plan", {SamplePlan()}, CheckPlan},
      {"leader-frame", LeaderFrameSeeds(),
       [](const std::string& input, Random&) { return CheckFrame(input, ParseLeaderFrame); }},
      {"rank-frame", RankFrameSeeds(),
       [](const std::string& input, Random&) { return CheckFrame(input, ParseRankFrame); }},
      {"config",
       {"{\"number\": 7, \"text\": \"two\", // a comment\n \"list\": \"1,2.5\", \"flag\": true}",
        "{\"list\": 3}"},
       [path = folder + "/config.json"](const std::string& input, Random&) {
         return CheckConfig(path, input);
       }}};
  for (const std::string& format : PlacementFormatNames()) {
    targets.push_back(PlacementTarget(format));
  }
  return targets;
}

}  // namespace ballast::fuzz
