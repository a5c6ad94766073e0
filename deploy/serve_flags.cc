#include <CLI/CLI.hpp>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "deploy/commands.h"
#include "deploy/controller_flags.h"
#include "deploy/serve.h"
#include "placement/policy.h"
#include "placement/split.h"

namespace ballast {
namespace {

void AddServerFlags(CLI::App* app, ServeFlags* f) {
  const char* group = "Server";
  app->add_option("--host", f->host, "Address that HTTP and metrics listen on")->group(group);
  app->add_option("--port", f->port, "Port of the HTTP server on rank 0; 0: any free one")
      ->check(CLI::Range(0, 65535))
      ->group(group);
  app->add_option("--metrics-port", f->metrics_port,
                  "Port of the metrics of local rank 0, the next ranks follow; 0: any free ones")
      ->check(CLI::Range(0, 65535))
      ->group(group);
  app->add_flag("--no-metrics", f->no_metrics, "Do not export metrics")->group(group);
  app->add_option("--control-host", f->control_host,
                  "Address of rank 0 for the other ranks (default: its host name, or 127.0.0.1 on "
                  "one node)")
      ->group(group);
  app->add_option("--max-queue", f->max_queue, "Requests admitted at a time; more get 429")
      ->check(CLI::Range(1, 4096))
      ->group(group);
  app->add_option("--request-timeout-ms", f->request_timeout_ms, "Deadline of a request")
      ->check(CLI::Range(int64_t{1}, int64_t{86'400'000}))
      ->group(group);
  app->add_option("--drain-timeout-ms", f->drain_timeout_ms,
                  "On SIGTERM: how long running requests may take to end")
      ->check(CLI::Range(int64_t{0}, int64_t{86'400'000}))
      ->group(group);
  app->add_option("--ready-file", f->ready_file,
                  "Written when all ranks are ready: JSON with the pid of rank 0 and the ports in "
                  "use. Removed at start and at an orderly end")
      ->group(group);
  app->add_option("--log-level", f->log_level, "Lowest level that is logged")
      ->check(CLI::IsMember({"debug", "info", "warning", "error"}))
      ->group(group);
}

void AddEngineFlags(CLI::App* app, ServeFlags* f) {
  const char* group = "Engine";
  app->add_option("--device", f->device,
                  "Where the model runs: cuda takes this machine's devices in turn, one a rank")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->group(group);
  app->add_option("--dtype", f->dtype,
                  "Activations and packed parameters; auto: bf16 where the "
                  "processor multiplies it")
      ->check(CLI::IsMember({"auto", "bf16", "fp32"}))
      ->group(group);
  app->add_option("--max-seqs", f->max_seqs, "Sequences that run at a time on a rank")
      ->check(CLI::Range(1, 65536))
      ->group(group);
  app->add_option("--max-batch-tokens", f->max_batch_tokens, "Tokens of one step on a rank")
      ->check(CLI::Range(1, 1 << 20))
      ->group(group);
  app->add_option("--prefill-chunk", f->prefill_chunk, "Tokens of one prompt in one step")
      ->check(CLI::Range(1, 1 << 20))
      ->group(group);
  app->add_option("--kv-bytes", f->kv_bytes, "Memory for keys and values on a rank (e.g. 4GiB)")
      ->transform(CLI::AsSizeValue(false))
      ->group(group);
  app->add_option("--threads", f->threads,
                  "Threads of the matrix products on a rank; 0: the cores it may use")
      ->check(CLI::Range(0, 1024))
      ->group(group);
  app->add_option("--step-timeout-ms", f->step_timeout_ms, "Deadline of every wait for other ranks")
      ->check(CLI::Range(int64_t{100}, int64_t{86'400'000}))
      ->group(group);
  app->add_option("--verify-every-s", f->verify_every_s,
                  "Parameters in memory are read again once in so many seconds and compared with "
                  "their checksums; 0: only on GET /v1/verify")
      ->check(CLI::Range(int64_t{0}, int64_t{31'536'000}))
      ->group(group);
  app->add_option("--on-loss", f->on_loss,
                  "When a rank other than 0 is lost: continue without it (needs mpirun "
                  "--enable-recovery), or stop")
      ->check(CLI::IsMember({"continue", "stop"}))
      ->group(group);
  app->add_option(
         "--rank-timeout-ms", f->rank_timeout_ms,
         "A rank other than 0 that says nothing for so long is lost; 0: only when its connection "
         "breaks")
      ->check(CLI::Range(int64_t{0}, int64_t{86'400'000}))
      ->group(group);
  app->add_flag("--dry-run", f->dry_run,
                "Check the flags, the checkpoint and the memory, say what a rank takes, and end")
      ->group(group);
  app->add_option("--step-log", f->step_log, "File that gets one JSON line per step")->group(group);
}

// In-step planning exists in the laboratory only: serving it needs copies that travel before the
// dispatch of the step that asked for them.
std::string CheckWhen(const std::string& when) {
  if (when == "after-step") return "";
  if (when == "in-step") return "in-step is for `ballast replay` only, allowed: after-step";
  return absl::StrCat("'", when, "' is unknown, allowed: after-step");
}

std::string CheckPolicy(const std::string& name) {
  return std::string(MakePolicy(name).status().message());
}

void AddPlacementFlags(CLI::App* app, ServeFlags* f) {
  const char* group = "Placement";
  app->add_option("--slots-per-rank", f->slots_per_rank,
                  "Expert slots of a rank in each layer, at most the experts of a layer; 0: its "
                  "share of the experts and two more")
      ->check(CLI::Range(0, 4096))
      ->group(group);
  app->add_option("--policy", f->policy, "What plans the placement")
      ->check(CheckPolicy, absl::StrJoin(PolicyNames(), "|"))
      ->group(group);
  app->add_option("--split", f->split, "How tokens are divided over the copies of an expert")
      ->check(CLI::IsMember(SplitModeNames()))
      ->group(group);
  app->add_option("--when", f->when, "When a plan is in force: after-step, some steps later")
      ->check(CheckWhen, "{after-step}")
      ->group(group);
  AddControllerFlags(app, group, &f->controller);
  app->add_option("--rho", f->rho,
                  "Policy regret: what the transfer of one expert costs, in ideal times of a layer "
                  "and batch")
      ->check(CLI::Range(1e-6, 1e6))
      ->group(group);
  app->add_option("--copy-budget-mb", f->copy_budget_mb,
                  "Megabytes (10^6 bytes) of expert parameters per second, over all ranks, that "
                  "plans may copy; 0: no limit")
      ->check(CLI::Range(0.0, 1e9))
      ->group(group);
  app->add_option("--rebalance-every", f->rebalance_every,
                  "Plan every so many steps, whatever there is to gain; 0: only when it pays")
      ->check(CLI::Range(0, 1 << 30))
      ->group(group);
}

void AddMigrationFlags(CLI::App* app, ServeFlags* f) {
  const char* group = "Migration";
  app->add_option("--migration-bandwidth", f->migration_bandwidth_mb,
                  "Megabytes (10^6 bytes) of expert parameters per second that a rank sends at "
                  "most, and as many that it receives; 0: no limit")
      ->check(CLI::Range(0.0, 1e9))
      ->group(group);
  app->add_option("--migration-share", f->migration_share,
                  "Share of a step's time that migrations take at most; while nobody is served "
                  "they take what they need")
      ->check(CLI::Range(0.001, 1.0))
      ->group(group);
  app->add_option("--migration-slice-bytes", f->migration_slice_bytes,
                  "Most bytes of expert parameters moved between two layers of a step")
      ->transform(CLI::AsSizeValue(false))
      ->check(CLI::Range(4096.0, 1e12))
      ->group(group);
  app->add_option("--migration-chunk-bytes", f->migration_chunk_bytes, "Size of one such message")
      ->transform(CLI::AsSizeValue(false))
      ->check(CLI::Range(4096.0, 1e9))
      ->group(group);
  app->add_option("--staging-experts", f->staging_experts,
                  "Memory of a rank for copies on their way, in experts: at least its slots in a "
                  "layer; 0: as many as these. Plans bring no rank more than that")
      ->check(CLI::Range(0, 1 << 20))
      ->group(group);
  app->add_option("--layers-per-plan", f->layers_per_plan,
                  "Most layers that change at one flip; the others follow in plans of their own. "
                  "0: no limit")
      ->check(CLI::Range(0, 1 << 20))
      ->group(group);
  app->add_option("--plan-timeout-ms", f->plan_timeout_ms, "A plan not staged by then is given up")
      ->check(CLI::Range(int64_t{1}, int64_t{86'400'000}))
      ->group(group);
}

void AddWatchFlags(CLI::App* app, ServeFlags* f) {
  const char* group = "Controller";
  app->add_option("--controller-timeout-ms", f->controller_timeout_ms,
                  "A controller that works on one thing for so long is given up, and another takes "
                  "its place; 0: never")
      ->check(CLI::Range(int64_t{0}, int64_t{86'400'000}))
      ->group(group);
  app->add_option("--state-file", f->state_file,
                  "File that keeps placement and load; a server that starts goes on from it. One "
                  "that does not fit is renamed to FILE.rejected (in the place of an earlier one)")
      ->group(group);
  app->add_option("--state-every-s", f->state_every_s, "How often it is written, if there is news")
      ->check(CLI::Range(int64_t{1}, int64_t{86'400}))
      ->group(group);
}

}  // namespace

RunCommand AddServeCommand(CLI::App* app) {
  auto flags = std::make_shared<ServeFlags>();
  app->option_defaults()->always_capture_default();
  static std::string config;  // read before the parse, by FindConfigPath
  app->add_option("--model", flags->model, "Folder of a Hugging Face checkpoint")->required();
  app->add_option("--config", config, "JSON file with values for these flags");
  AddServerFlags(app, flags.get());
  AddEngineFlags(app, flags.get());
  AddPlacementFlags(app, flags.get());
  AddWatchFlags(app, flags.get());
  AddMigrationFlags(app, flags.get());
  app->footer(
      "Every flag can be set by an environment variable (BALLAST_PORT for --port) or in the file "
      "of\n"
      "--config ({\"port\": 8081}). A flag wins over the environment, the environment over the "
      "file.\n"
      "Example: mpirun -n 4 --bind-to none ballast serve --model deploy/demo/model");
  return [flags](int* argc, char*** argv) { return Serve(*flags, argc, argv); };
}

}  // namespace ballast
