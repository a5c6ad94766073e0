// `ballast doctor`: is this machine fit, and what are the constants of its cost model?
#include <dlfcn.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "absl/strings/str_split.h"
#include "base/file.h"
#include "base/status.h"
#include "comm/communicator.h"
#include "comm/mpi_transport.h"
#include "deploy/commands.h"
#include "deploy/lab.h"
#include "deploy/machine_constants.h"
#include "kernels/matmul.h"
#include "runtime/model_config.h"

namespace ballast {
namespace {

using Json = nlohmann::ordered_json;

constexpr double kGiB = 1024.0 * 1024.0 * 1024.0;

struct DoctorFlags {
  bool constants = false;
  std::string model;
  int32_t hidden = 0, intermediate = 0, top_k = 8;
  std::string dtype = "auto";
  int64_t step_tokens = 1024;
  int32_t ranks = 2;
  std::string json;
};

// ---- checks ------------------------------------------------------------------------------------

struct Check {
  const char* name;
  const char* result;  // ok, warn or fail
  std::string seen;
  std::string fix;
};

// The first line of words that a shell command prints, and whether it succeeded.
std::pair<bool, std::string> FirstLine(const std::string& command) {
  std::FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  if (pipe == nullptr) return {false, "no shell"};
  std::string text;
  char block[512];
  while (std::fgets(block, sizeof block, pipe) != nullptr) text += block;
  const bool good = pclose(pipe) == 0;
  // mpirun rules its messages off.
  for (const std::string& line : std::vector<std::string>(absl::StrSplit(text, '\n'))) {
    if (line.find_first_not_of("- ") != std::string::npos) return {good, line};
  }
  return {good, "nothing"};
}

std::vector<Check> CheckMpi(int32_t ranks) {
  std::vector<Check> checks;
  const auto [found, version] = FirstLine("mpirun --version");
  const bool open_mpi = found && version.find("Open MPI") != std::string::npos;
  checks.push_back({"mpirun", open_mpi ? "ok" : "fail", version,
                    open_mpi ? "" : "install Open MPI (deploy/setup.sh)"});
  if (!open_mpi) return checks;
  const auto [starts, said] = FirstLine(
      absl::StrCat("timeout 30 mpirun -n ", ranks, " --oversubscribe --bind-to none true"));
  checks.push_back({"ranks start", starts ? "ok" : "fail",
                    starts ? absl::StrCat(ranks, " with --oversubscribe --bind-to none") : said,
                    starts ? ""
                    : geteuid() == 0
                        ? "as root: OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
                        : "see what mpirun says"});
  return checks;
}

Check CheckCores(int32_t ranks) {
  const int cores = CoresHere();
  return {
      "cores", cores >= ranks ? "ok" : "warn", absl::StrCat(cores, " for ", ranks, " ranks"),
      cores >= ranks ? "" : "ranks share cores: speeds mean little; fewer ranks, or more cores"};
}

Check CheckSharedMemory(int32_t ranks) {
  struct statvfs stat {};
  const bool there = statvfs("/dev/shm", &stat) == 0;
  const double free_gib =
      static_cast<double>(stat.f_bavail) * static_cast<double>(stat.f_frsize) / kGiB;
  // Open MPI keeps some MiB for each pair of ranks.
  const double wanted_gib = 0.0625 * ranks;
  const bool enough = there && free_gib >= wanted_gib;
  return {"/dev/shm", enough ? "ok" : "warn", absl::StrCat(Fixed(free_gib, 2), " GiB free"),
          enough ? ""
                 : absl::StrCat("give it ", Fixed(wanted_gib, 2),
                                " GiB (containers: --shm-size), or messages go another way")};
}

Check CheckMemory() {
  const double gib = static_cast<double>(sysconf(_SC_AVPHYS_PAGES)) *
                     static_cast<double>(sysconf(_SC_PAGESIZE)) / kGiB;
  return {"memory", gib >= 1.0 ? "ok" : "warn", absl::StrCat(Fixed(gib, 1), " GiB free"),
          gib >= 1.0 ? "" : "a rank needs its experts and --kv-bytes; huge pages are not required"};
}

Check CheckProducts() {
  const bool bf16 = cpu::OneDnnHasBFloat16();
  return {"bf16 products", bf16 ? "ok" : "warn", bf16 ? "oneDNN has them here" : "not here",
          bf16 ? "" : "serve with --dtype fp32 (auto does)"};
}

// CUDA and NCCL serve nothing yet, so their absence is no fault.
Check CheckLibrary(const char* name, const char* library) {
  void* handle = dlopen(library, RTLD_LAZY | RTLD_LOCAL);
  if (handle != nullptr) dlclose(handle);
  return {name, "ok", handle != nullptr ? "present (not used: serving is CPU only)" : "absent", ""};
}

absl::Status RunChecks(const DoctorFlags& flags, bool* fit) {
  BALLAST_RETURN_IF_ERROR(CheckOutputs({{"--json", flags.json}}));
  std::vector<Check> checks = CheckMpi(flags.ranks);
  checks.push_back(CheckCores(flags.ranks));
  checks.push_back(CheckSharedMemory(flags.ranks));
  checks.push_back(CheckMemory());
  checks.push_back(CheckProducts());
  checks.push_back(CheckLibrary("CUDA driver", "libcuda.so.1"));
  checks.push_back(CheckLibrary("NCCL", "libnccl.so.2"));
  Json rows = Json::array();
  *fit = true;
  for (const Check& check : checks) {
    *fit = *fit && std::string(check.result) != "fail";
    std::cout << check.result << "\t" << check.name << ": " << check.seen << "\n";
    if (!check.fix.empty()) std::cout << "\tfix: " << check.fix << "\n";
    rows.push_back({{"check", check.name},
                    {"result", check.result},
                    {"seen", check.seen},
                    {"fix", check.fix}});
  }
  if (flags.json.empty()) return absl::OkStatus();
  return WriteFile(flags.json, Json{{"commit", BALLAST_COMMIT}, {"checks", rows}}.dump(2) + "\n");
}

// ---- constants ---------------------------------------------------------------------------------

// Takes hidden, intermediate and top-k from the model where one is given.
absl::Status Resolve(DoctorFlags* flags) {
  if (!flags->model.empty()) {
    if (flags->hidden > 0 || flags->intermediate > 0) {
      return absl::InvalidArgumentError(
          "--model gives the sizes: allowed without --hidden and --intermediate");
    }
    BALLAST_ASSIGN_OR_RETURN(const std::string text, ReadFile(flags->model + "/config.json"));
    const absl::StatusOr<ModelConfig> config = ModelConfig::FromJson(text);
    if (!config.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("--model ", flags->model, ": ", config.status().message()));
    }
    flags->hidden = config->hidden;
    flags->intermediate = config->expert_inter;
    flags->top_k = config->gate.top_k;
  }
  if (flags->hidden > 0 && flags->intermediate > 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("--constants needs --model, or --hidden and --intermediate; they are ",
                   flags->hidden, " and ", flags->intermediate));
}

// What every rank found, and what only ranks 0 and 1 found together.
struct Measured {
  ComputeConstants compute;  // of the slowest rank, figure by figure
  LinkConstants link;
};

absl::StatusOr<Measured> Measure(const ExpertShape& shape, MpiRuntime* mpi) {
  const std::unique_ptr<Transport> transport = mpi->MakeTransport();
  Communicator communicator(transport.get(), {});
  cpu::SetMatmulThreads(std::max(1, CoresHere() / std::max(1, mpi->local_size())));
  // All ranks measure at a time, as they work; one that fails still takes part in what follows.
  const absl::StatusOr<ComputeConstants> own = MeasureCompute(shape);
  if (mpi->Highest(own.ok() ? 0 : 1) != 0) {
    return own.ok() ? absl::UnavailableError("another rank could not measure") : own.status();
  }
  std::vector<ComputeConstants> all(static_cast<size_t>(mpi->size()));
  BALLAST_RETURN_IF_ERROR(communicator.AllGather(0, std::as_bytes(std::span(&*own, 1)),
                                                 std::as_writable_bytes(std::span(all))));
  Measured measured{.compute = all[0], .link = {}};
  for (const ComputeConstants& c : all) {
    ComputeConstants& slowest = measured.compute;
    slowest.read_gb_per_s = std::min(slowest.read_gb_per_s, c.read_gb_per_s);
    slowest.expert_read_us = std::max(slowest.expert_read_us, c.expert_read_us);
    slowest.block_us = std::max(slowest.block_us, c.block_us);
    slowest.token_us = std::max(slowest.token_us, c.token_us);
    slowest.gflop_per_s = std::min(slowest.gflop_per_s, c.gflop_per_s);
  }
  if (mpi->size() < 2 || mpi->rank() > 1) return measured;
  BALLAST_ASSIGN_OR_RETURN(
      measured.link,
      MeasureLink(shape, static_cast<size_t>(measured.compute.expert_bytes), transport.get()));
  return measured;
}

Json JsonOf(const DoctorFlags& flags, int ranks, const Measured& measured) {
  const ComputeConstants& c = measured.compute;
  const LinkConstants& link = measured.link;
  const bool linked = ranks > 1;
  const auto or_null = [&](double value) { return linked ? Json(value) : Json(nullptr); };
  // A rank's share of the copies of one layer and step.
  const double ideal_us = static_cast<double>(flags.step_tokens) * flags.top_k / ranks * c.token_us;
  Json json = {{"commit", BALLAST_COMMIT},
               {"machine", {{"cpu", CpuModel()}, {"cores", CoresHere()}}},
               {"ranks", ranks},
               {"hidden", flags.hidden},
               {"intermediate", flags.intermediate},
               {"dtype", NameOf(DTypeOfFlag(flags.dtype))},
               {"read_bytes", c.read_bytes},
               {"read_gb_per_s", c.read_gb_per_s},
               {"expert_bytes", c.expert_bytes},
               {"expert_read_us", c.expert_read_us},
               {"row_block", kRowBlock},
               {"block_us", c.block_us},
               {"token_us", c.token_us},
               {"gflop_per_s", c.gflop_per_s},
               {"message_us", or_null(link.message_us)},
               {"link_us_per_token", or_null(link.link_us_per_token)},
               {"copy_us", or_null(link.copy_us)},
               {"step_tokens", flags.step_tokens},
               {"top_k", flags.top_k},
               {"rho", or_null(link.copy_us / ideal_us)}};
  if (!linked) json["note"] = "one rank has no link: run it with mpirun -n 2 or more";
  return json;
}

absl::StatusOr<int> RunConstants(DoctorFlags flags, int* argc, char*** argv) {
  absl::Status resolved = Resolve(&flags);
  resolved.Update(CheckOutputs({{"--json", flags.json}}));
  if (!resolved.ok()) return RefuseOnAllRanks(std::string(resolved.message()));
  const ExpertShape shape{
      .hidden = flags.hidden, .inter = flags.intermediate, .dtype = DTypeOfFlag(flags.dtype)};
  BALLAST_ASSIGN_OR_RETURN(const std::unique_ptr<MpiRuntime> mpi, MpiRuntime::Start(argc, argv));
  const absl::StatusOr<Measured> measured = Measure(shape, mpi.get());
  if (!measured.ok()) {
    // An orderly end needs all ranks, and one of them may be gone.
    std::fprintf(stderr, "ballast: %s\n", std::string(measured.status().message()).c_str());
    _exit(ExitCodeOf(measured.status()));
  }
  absl::Status written;
  if (mpi->rank() == 0) {
    const Json json = JsonOf(flags, mpi->size(), *measured);
    for (const auto& [key, value] : json.items()) std::cout << key << ": " << value << "\n";
    if (!flags.json.empty()) written = WriteFile(flags.json, json.dump(2) + "\n");
  }
  mpi->Finish();
  BALLAST_RETURN_IF_ERROR(written);
  return int{kExitOk};
}

}  // namespace

RunCommand AddDoctorCommand(CLI::App* app) {
  auto flags = std::make_shared<DoctorFlags>();
  AddConfigFlag(app);
  app->add_option("--ranks", flags->ranks, "Ranks that are meant to run here")
      ->check(CLI::Range(1, 4096));
  app->add_option("--json", flags->json, "Write what was found to this file");
  app->add_flag("--constants", flags->constants,
                "Measure the constants of the cost model instead of checking");
  const char* group = "With --constants";
  app->add_option("--model", flags->model, "Folder of a checkpoint that gives the sizes")
      ->group(group);
  app->add_option("--hidden", flags->hidden, "Width of a row")
      ->check(CLI::Range(0, 1 << 16))
      ->group(group);
  app->add_option("--intermediate", flags->intermediate, "Inner width of an expert")
      ->check(CLI::Range(0, 1 << 16))
      ->group(group);
  app->add_option("--dtype", flags->dtype,
                  "Activations and packed parameters; auto: bf16 where the processor multiplies it")
      ->check(CLI::IsMember({"auto", "bf16", "fp32"}))
      ->group(group);
  app->add_option("--top-k", flags->top_k, "Experts of a token, for rho; --model knows it")
      ->check(CLI::Range(1, 1024))
      ->group(group);
  app->add_option("--step-tokens", flags->step_tokens, "Tokens of a step over all ranks, for rho")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 30))
      ->group(group);
  app->footer(
      "Checks print ok, warn or fail, what was seen and the fix; exit 1 when one fails.\n"
      "Constants are medians; of several ranks the slowest's. The link needs two ranks:\n"
      "  mpirun -n 2 --bind-to none ballast doctor --constants --model deploy/demo/model");
  return [flags](int* argc, char*** argv) {
    if (flags->constants) {
      const absl::StatusOr<int> constants = RunConstants(*flags, argc, argv);
      return constants.ok() ? *constants : Finish(constants.status());
    }
    bool fit = false;
    const int code = Finish(RunChecks(*flags, &fit));
    return code == kExitOk && !fit ? int{kExitFailed} : code;
  };
}

}  // namespace ballast
