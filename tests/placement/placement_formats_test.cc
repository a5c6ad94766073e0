#include "placement/placement_formats.h"

#include <catch2/catch.hpp>

#include "base/file.h"
#include "base/random.h"
#include "tests/placement/random_instances.h"
#include "tests/support/traces.h"

namespace ballast {
namespace {

using Catch::Matchers::Contains;

Placement Small() {
  auto placement = Placement::Create(2, 3, Topology::Uniform(2, 2), {0, 1, 2, 1, 2, 0, 1, 2}, 0);
  REQUIRE(placement.ok());
  return *placement;
}

std::string Exported(const Placement& placement, PlacementFormat format, int32_t first_layer = 0) {
  const auto text = ExportPlacement(placement, format, first_layer);
  REQUIRE(text.ok());
  return *text;
}

std::string MessageOf(const std::string& text, PlacementFormat format, ImportOptions options = {}) {
  const auto placement = ImportPlacement("f.json", text, format, options);
  REQUIRE(placement.status().code() == absl::StatusCode::kInvalidArgument);
  REQUIRE_THAT(std::string(placement.status().message()), Catch::Matchers::StartsWith("f.json: "));
  return std::string(placement.status().message());
}

TEST_CASE("placements are written as other systems read them", "[placement][formats][golden]") {
  const Placement placement = Small();
  REQUIRE(Exported(placement, PlacementFormat::kEplb) ==
          R"({"phy2log":[[0,1,2,1],[2,0,1,2]],)"
          R"("log2phy":[[[0,-1],[1,3],[2,-1]],[[1,-1],[2,-1],[0,3]]],)"
          R"("logcnt":[[1,2,1],[1,1,2]]})"
          "\n");
  REQUIRE(Exported(placement, PlacementFormat::kSglang) ==
          "{\"physical_to_logical_map\":[[0,1,2,1],[2,0,1,2]]}\n");
  REQUIRE(Exported(placement, PlacementFormat::kTrtllm, 1) ==
          "num_slots: 4\nlayer_updates_per_iter: 0\ninitial_global_assignments:\n"
          "  1: [0, 1, 2, 1]\n  2: [2, 0, 1, 2]\n");
  REQUIRE(Exported(placement, PlacementFormat::kAscend) ==
          R"({"moe_layer_count":2,"layer_list":[)"
          R"({"layer_id":0,"device_count":2,"device_list":[)"
          R"({"device_id":0,"device_expert":[0,1]},{"device_id":1,"device_expert":[2,1]}]},)"
          R"({"layer_id":1,"device_count":2,"device_list":[)"
          R"({"device_id":0,"device_expert":[2,0]},{"device_id":1,"device_expert":[1,2]}]}]})"
          "\n");
  REQUIRE(Exported(placement, PlacementFormat::kCsv) ==
          "layer,rank,experts\n0,0,0 1\n0,1,2 1\n1,0,2 0\n1,1,1 2\n");
}

TEST_CASE("what is exported is imported again", "[placement][formats]") {
  const Placement placement = Small();
  for (const std::string& name : PlacementFormatNames()) {
    const PlacementFormat format = *ParsePlacementFormat(name);
    const auto back = ImportPlacement("f", Exported(placement, format), format, {.num_ranks = 2});
    INFO(name);
    REQUIRE(back.ok());
    REQUIRE(*back == placement);
  }
  // As a YAML library writes it.
  const auto block = ImportPlacement("f",
                                     "initial_global_assignments:\n  3:\n  - 0\n  - 1\n  - 2\n"
                                     "  - 1\n  4: [2, 0,\n    1, 2]\nnum_slots: 4\n",
                                     PlacementFormat::kTrtllm, {.num_ranks = 2});
  REQUIRE(block.ok());
  REQUIRE(*block == placement);
}

TEST_CASE("ranks of different sizes get empty slots", "[placement][formats]") {
  const auto placement = ImportPlacement(
      "f", "layer,rank,experts\n0,0,0 1 2\n0,1,2\n1,0,1\n1,1,0 2\n", PlacementFormat::kCsv, {});
  REQUIRE(placement.ok());
  REQUIRE(placement->topology().slot_offsets == std::vector<int32_t>{0, 3, 5});
  REQUIRE(placement->expert_of_slot(1)[1] == kNoExpert);
  REQUIRE_THAT(
      std::string(ExportPlacement(*placement, PlacementFormat::kSglang).status().message()),
      Contains("layer 0 slot 4 is empty"));
}

TEST_CASE("a bad placement file is refused with the place and the value",
          "[placement][formats][errors]") {
  using Format = PlacementFormat;
  REQUIRE_THAT(MessageOf("[]", Format::kEplb), Contains("no list \"phy2log\""));
  REQUIRE_THAT(MessageOf("{\"phy2log\":[[0,\"x\"]]}", Format::kEplb),
               Contains("layer 0 has \"x\""));
  REQUIRE_THAT(MessageOf("{\"phy2log\":[[0,1]]}", Format::kEplb), Contains("how many ranks"));
  REQUIRE_THAT(MessageOf("{\"phy2log\":[[0,1,0]]}", Format::kEplb, {.num_ranks = 2}),
               Contains("layer 0 has 3 slots, allowed: a multiple of 2"));
  REQUIRE_THAT(MessageOf("{\"phy2log\":[[0,70000]]}", Format::kEplb), Contains("has 70000"));
  REQUIRE_THAT(MessageOf("layer,rank,experts\n0,0,0 x\n", Format::kCsv), Contains("expert 'x'"));
  REQUIRE_THAT(MessageOf("0,1,0\n", Format::kCsv), Contains("line 1 has layer 0 rank 1, allowed"));
  REQUIRE_THAT(MessageOf("0,0,0\n1,0,0\n1,1,0\n", Format::kCsv), Contains("layer 1 has 2 ranks"));
  REQUIRE_THAT(MessageOf("0,0,0 2 2\n", Format::kCsv), Contains("no slot for expert 1"));
  REQUIRE_THAT(MessageOf("{\"layer_list\":[{}]}", Format::kAscend), Contains("\"device_list\""));
  REQUIRE_THAT(MessageOf("a: 1", Format::kTrtllm), Contains("no initial_global_assignments"));
  REQUIRE_THAT(MessageOf("initial_global_assignments: [1]", Format::kTrtllm),
               Contains("an expert before the first layer"));
  REQUIRE_THAT(MessageOf("initial_global_assignments:\n 0: [-1]", Format::kTrtllm),
               Contains("byte 33 is '-'"));
  REQUIRE_THAT(std::string(ParsePlacementFormat("vllm").status().message()),
               Contains("the choices are native, eplb"));
}

TEST_CASE("no mutation of a placement file does harm", "[placement][formats][property]") {
  Random random(77);
  for (const std::string& name : PlacementFormatNames()) {
    const PlacementFormat format = *ParsePlacementFormat(name);
    const std::string good = Exported(Small(), format);
    for (int round = 0; round < 3000; ++round) {
      std::string text = good;
      for (uint32_t i = 0; i <= random.Below(3) && !text.empty(); ++i) {
        const uint32_t at = random.Below(static_cast<uint32_t>(text.size()));
        if (random.Below(3) == 0)
          text.erase(at, 1 + random.Below(6));
        else
          text[at] = "0129,[]{}:- \n\"x"[random.Below(15)];
      }
      const auto placement = ImportPlacement("f", text, format, {.num_ranks = 2});
      if (placement.ok()) REQUIRE(placement->num_layers() >= 1);
    }
  }
}

TEST_CASE("recorded placements go through every format", "[placement][formats]") {
  const char* folder = testing::TracesFolder();
  if (folder == nullptr) return;
  const std::string base = std::string(folder) + "/omni_dsv3_placements/";
  for (const auto& [name, ranks, full] :
       {std::tuple("prefill_rearranged_16ranks.csv", 16, true),
        std::tuple("gsm8k_decode_32dies_plus10layers.csv", 32, false),
        std::tuple("redundant_all_layers_32devices_max4.csv", 32, false),
        std::tuple("redundant_all_layers_64dies.csv", 64, true)}) {
    INFO(name);
    const auto text = ReadFile(base + name);
    REQUIRE(text.ok());
    const auto placement = ImportPlacement(name, *text, PlacementFormat::kCsv, {});
    REQUIRE(placement.ok());
    REQUIRE(placement->num_layers() == 58);
    REQUIRE(placement->num_experts() == 256);
    REQUIRE(placement->topology().num_ranks() == ranks);
    REQUIRE(Exported(*placement, PlacementFormat::kCsv) == *text);
    for (PlacementFormat format : {PlacementFormat::kEplb, PlacementFormat::kSglang,
                                   PlacementFormat::kTrtllm, PlacementFormat::kAscend}) {
      const auto exported = ExportPlacement(*placement, format);
      REQUIRE(exported.ok() == full);
      if (!full) continue;
      const auto back = ImportPlacement(name, *exported, format, {.num_ranks = ranks});
      REQUIRE(back.ok());
      REQUIRE(*back == *placement);
    }
  }
}

}  // namespace
}  // namespace ballast
