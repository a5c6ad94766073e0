#ifndef BALLAST_DEPLOY_SERVE_H_
#define BALLAST_DEPLOY_SERVE_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "deploy/controller_flags.h"

namespace ballast {

// The flags of `ballast serve`.
struct ServeFlags {
  std::string model;
  std::string host = "127.0.0.1";
  int port = 8080;
  int metrics_port = 9420;
  bool no_metrics = false;
  std::string control_host;
  std::string device = "cpu";
  std::string dtype = "auto";
  std::string policy = "regret";
  std::string split = "exact";
  std::string when = "after-step";  // the only one that serves
  int32_t slots_per_rank = 0;
  int32_t max_seqs = 64;
  int32_t max_batch_tokens = 512;
  int32_t prefill_chunk = 128;
  uint64_t kv_bytes = 256 << 20;
  int32_t max_queue = 256;
  int64_t request_timeout_ms = 300'000;
  int64_t drain_timeout_ms = 30'000;
  int32_t threads = 0;
  ControllerFlags controller = {.batch_tokens = 1024};
  double rho = 0.1;
  int32_t rebalance_every = 0;
  double copy_budget_mb = 0.0;
  double migration_bandwidth_mb = 0.0;
  double migration_share = 0.05;
  uint64_t migration_slice_bytes = 1 << 20;
  uint64_t migration_chunk_bytes = 256 << 10;
  int32_t staging_experts = 0;
  int32_t layers_per_plan = 0;
  int64_t plan_timeout_ms = 30'000;
  int64_t step_timeout_ms = 60'000;
  int64_t verify_every_s = 600;
  std::string on_loss = "continue";
  int64_t rank_timeout_ms = 10'000;
  int64_t controller_timeout_ms = 30'000;
  std::string state_file;
  int64_t state_every_s = 30;
  bool dry_run = false;
  std::string step_log;
  std::string ready_file;
  std::string log_level = "info";
};

// Runs this rank of the server until it is told to stop. COLLECTIVE over the ranks of the job.
int Serve(const ServeFlags& flags, int* argc, char*** argv);

}  // namespace ballast

#endif  // BALLAST_DEPLOY_SERVE_H_
