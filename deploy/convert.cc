// `ballast convert`: traces, loads and placements from one format to another.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <filesystem>
#include <iostream>
#include <memory>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_join.h"
#include "base/file.h"
#include "base/status.h"
#include "deploy/commands.h"
#include "deploy/lab.h"
#include "placement/esft.h"
#include "placement/placement_formats.h"

namespace ballast {
namespace {

struct ConvertFlags {
  std::vector<std::string> in;
  std::string from;
  std::string to;
  std::string out;
  std::string weights_out;
  int32_t top_k = 6;
  int32_t experts = 0;
  int64_t step_tokens = 1024;
  int32_t ranks = 0;
  int32_t nodes = 1;
  int32_t first_layer = 0;
};

constexpr char kFormats[] =
    "Formats:\n"
    "  esft    the text that ESFT publishes: one file per layer, one line per sample: the expert\n"
    "          ids of its tokens one after another (--top-k for each), an empty column, and as "
    "many\n"
    "          gate weights, separated by tabs. --in is the folder of expert_weights_<layer>.txt, "
    "or\n"
    "          the files in the order of the layers\n"
    "  ids     .npy u8/u16 [tokens, layers, top-k]; several files are phases\n"
    "  steps   .npy i32 [steps, layers, experts]; read also [steps, 2, layers, experts]\n"
    "  load    .npy i64 [layers, experts], or text (any other name) with a line per layer\n"
    "  native, eplb, sglang, trtllm, ascend, csv: placements (csv: layer,rank,experts)\n"
    "From esft to ids, steps, load; ids to steps, load; steps to load; load to load; placement to\n"
    "placement.\n"
    "Example: ballast convert --from esft --in expert_scores/intent --to ids --out ids_intent.npy";

bool IsPlacement(const std::string& format) {
  const std::vector<std::string> names = PlacementFormatNames();
  return std::find(names.begin(), names.end(), format) != names.end();
}

// The files expert_weights_<layer>.txt of a folder in the order of their layers.
absl::StatusOr<std::vector<std::string>> EsftFiles(const std::string& folder) {
  const std::string prefix = "expert_weights_", suffix = ".txt";
  std::vector<std::pair<int32_t, std::string>> found;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    int32_t layer = -1;
    if (!absl::StartsWith(name, prefix) || !absl::EndsWith(name, suffix) ||
        !absl::SimpleAtoi(name.substr(prefix.size(), name.size() - prefix.size() - suffix.size()),
                          &layer)) {
      continue;
    }
    found.emplace_back(layer, entry.path().string());
  }
  if (error || found.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(folder, ": a folder without expert_weights_<layer>.txt"));
  }
  std::sort(found.begin(), found.end());
  std::vector<std::string> files;
  for (size_t i = 0; i < found.size(); ++i) {
    if (found[i].first != found[0].first + static_cast<int32_t>(i)) {
      return absl::InvalidArgumentError(
          absl::StrCat(folder, ": no expert_weights_", found[0].first + i, ".txt"));
    }
    files.push_back(found[i].second);
  }
  return files;
}

absl::StatusOr<EsftArrays> ReadEsft(const ConvertFlags& flags) {
  std::vector<std::string> files = flags.in;
  if (files.size() == 1 && std::filesystem::is_directory(files[0])) {
    BALLAST_ASSIGN_OR_RETURN(files, EsftFiles(files[0]));
  }
  std::vector<NamedText> layers;
  for (const std::string& path : files) {
    BALLAST_ASSIGN_OR_RETURN(std::string text, ReadFile(path));
    layers.push_back({.name = path, .text = std::move(text)});
  }
  return ParseEsft(layers, flags.top_k);
}

absl::Status WriteLoad(const std::string& path, const LoadTable& load) {
  if (!absl::EndsWith(path, ".npy")) return WriteFile(path, LoadToCsv(load));
  return WriteNpy(path,
                  MakeNpyArray(NpyType::kI64, {load.num_layers, load.num_experts}, load.load));
}

absl::Status ConvertTrace(const ConvertFlags& flags) {
  std::vector<NamedArray> phases;
  if (flags.from == "esft") {
    BALLAST_ASSIGN_OR_RETURN(EsftArrays arrays, ReadEsft(flags));
    if (!flags.weights_out.empty()) {
      BALLAST_RETURN_IF_ERROR(WriteNpy(flags.weights_out, arrays.weights));
    }
    std::cout << "read ids " << ShapeText(arrays.ids.shape) << "\n";
    if (flags.to == "ids") return WriteNpy(flags.out, arrays.ids);
    phases.push_back({.name = flags.in[0], .array = std::move(arrays.ids)});
  } else {
    for (const std::string& path : flags.in) {
      BALLAST_ASSIGN_OR_RETURN(NamedArray phase, ReadArray(path));
      const bool ids = phase.array.type == NpyType::kU8 || phase.array.type == NpyType::kU16;
      if (ids != (flags.from == "ids")) {
        return absl::InvalidArgumentError(absl::StrCat(path, ": ", NameOf(phase.array.type),
                                                       ", allowed with --from ", flags.from, ": ",
                                                       ids ? "i32, i64" : "u8, u16"));
      }
      phases.push_back(std::move(phase));
    }
  }
  // A load is the sum of all tokens, so its steps need drop none.
  const bool to_load = flags.to == "load";
  BALLAST_ASSIGN_OR_RETURN(const StepTrace trace,
                           CountSteps(phases, {.step_tokens = to_load ? 1 : flags.step_tokens,
                                               .num_experts = flags.experts}));
  if (to_load) return WriteLoad(flags.out, TotalLoad(trace));
  std::cout << "counted " << trace.num_steps() << " steps, " << trace.dropped_tokens
            << " tokens dropped at the ends of the files\n";
  return WriteNpy(
      flags.out,
      MakeNpyArray(NpyType::kI32, {trace.num_steps(), trace.num_layers, trace.num_experts},
                   std::vector<int64_t>(trace.counts.begin(), trace.counts.end())));
}

absl::Status ConvertPlacement(const ConvertFlags& flags) {
  BALLAST_ASSIGN_OR_RETURN(const PlacementFormat from, ParsePlacementFormat(flags.from));
  BALLAST_ASSIGN_OR_RETURN(const PlacementFormat to, ParsePlacementFormat(flags.to));
  BALLAST_ASSIGN_OR_RETURN(const std::string text, ReadFile(flags.in[0]));
  BALLAST_ASSIGN_OR_RETURN(
      const Placement placement,
      ImportPlacement(
          flags.in[0], text, from,
          {.num_ranks = flags.ranks, .num_nodes = flags.nodes, .num_experts = flags.experts}));
  absl::StatusOr<std::string> converted = ExportPlacement(placement, to, flags.first_layer);
  if (!converted.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat(flags.in[0], ": ", converted.status().message()));
  }
  return WriteFile(flags.out, *converted);
}

absl::Status RunConvert(const ConvertFlags& flags) {
  if (flags.from != "esft" && flags.to == "esft") {
    return absl::InvalidArgumentError("--to is esft, which is only read");
  }
  const bool takes_many = flags.from == "esft" || flags.from == "ids" || flags.from == "steps";
  if (flags.in.size() > 1 && !takes_many) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--in names ", flags.in.size(), " files, allowed with --from ", flags.from, ": one"));
  }
  BALLAST_RETURN_IF_ERROR(
      CheckOutputs({{"--out", flags.out}, {"--weights-out", flags.weights_out}}));
  if (IsPlacement(flags.from) && IsPlacement(flags.to)) return ConvertPlacement(flags);
  if (flags.from == "load" && flags.to == "load") {
    BALLAST_ASSIGN_OR_RETURN(const LoadTable load, ReadLoad(flags.in[0]));
    return WriteLoad(flags.out, load);
  }
  const std::vector<std::string> order = {"esft", "ids", "steps", "load"};
  const auto from = std::find(order.begin(), order.end(), flags.from);
  const auto to = std::find(order.begin(), order.end(), flags.to);
  if (from < to && to != order.end()) return ConvertTrace(flags);
  return absl::InvalidArgumentError(absl::StrCat("--from ", flags.from, " --to ", flags.to,
                                                 " is none of the conversions that --help lists"));
}

}  // namespace

RunCommand AddConvertCommand(CLI::App* app) {
  auto flags = std::make_shared<ConvertFlags>();
  ConvertFlags* f = flags.get();
  std::vector<std::string> formats = {"esft", "ids", "steps", "load"};
  for (const std::string& name : PlacementFormatNames()) formats.push_back(name);
  AddConfigFlag(app);
  app->add_option("--in", f->in, "What to read; several files separated by commas")
      ->required()
      ->delimiter(',');
  app->add_option("--from", f->from, "Format of --in")->required()->check(CLI::IsMember(formats));
  app->add_option("--to", f->to, "Format of --out")->required()->check(CLI::IsMember(formats));
  app->add_option("--out", f->out, "What to write")->required();
  app->add_option("--weights-out", f->weights_out,
                  "From esft: write the gate weights here too, .npy u16, times 10,000");
  app->add_option("--top-k", f->top_k, "From esft: experts per token")->check(CLI::Range(1, 1024));
  app->add_option("--experts", f->experts,
                  "Logical experts of a layer; 0: the largest id and one more")
      ->check(CLI::Range(0, 65536));
  app->add_option("--step-tokens", f->step_tokens, "To steps: tokens of one step")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 30));
  app->add_option("--ranks", f->ranks,
                  "From eplb, sglang, trtllm: ranks, which the files do not say")
      ->check(CLI::Range(0, 65536));
  app->add_option("--nodes", f->nodes, "Nodes of an imported placement, equal blocks of ranks")
      ->check(CLI::Range(1, 65536));
  app->add_option("--first-layer", f->first_layer, "To trtllm: what it calls the first MoE layer")
      ->check(CLI::Range(0, 65536));
  app->footer(kFormats);
  return [flags](int*, char***) { return Finish(RunConvert(*flags)); };
}

}  // namespace ballast
