#ifndef BALLAST_DEPLOY_SERVER_H_
#define BALLAST_DEPLOY_SERVER_H_

#include <signal.h>

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "comm/communicator.h"
#include "comm/control_channel.h"
#include "comm/mpi_transport.h"
#include "deploy/serve.h"
#include "monitor/exporter.h"
#include "monitor/metrics.h"
#include "monitor/trace_recorder.h"
#include "runtime/engine.h"
#include "runtime/frontend.h"
#include "runtime/http_server.h"
#include "runtime/leader.h"
#include "runtime/rank_observer.h"
#include "runtime/tokenizer.h"
#include "runtime/verification.h"

namespace ballast {

// SIGTERM and SIGINT.
sigset_t StopSignals();

// One rank of the server, from start to stop. Members are destroyed in reverse order: HTTP first,
// then what it calls.
class Server {
 public:
  Server(const ServeFlags& flags, MpiRuntime* mpi) : flags_(flags), mpi_(mpi) {}

  // Everything that can fail on this rank alone: flags, checkpoint, metrics. Removes the file of
  // --ready-file that an earlier server left.
  absl::Status Prepare();
  // What a rank will take of its machine's memory, for --dry-run. REQUIRES prepared
  absl::StatusOr<std::string> DescribeMemory() const;
  // COLLECTIVE: control channels, parameters, HTTP. Announces that the server is ready.
  absl::Status Start();
  // COLLECTIVE: serves until told to stop.
  absl::Status Run() { return engine_->Run(); }
  // An orderly end: what was admitted is finished, and the file of --ready-file is gone.
  void Stop();
  // Whether one of the ranks has said already why Start failed.
  bool said_why() const { return said_why_; }
  // Whether all ranks of the job have come to its end.
  bool complete() const { return engine_->complete(); }

 private:
  bool is_leader() const { return mpi_->rank() == 0; }
  absl::Status ChooseTypes();
  absl::Status ChooseThreads();
  absl::Status RemoveReadyFile() const;
  absl::Status MakePlacement();
  EngineOptions MakeEngineOptions() const;
  absl::Status CheckMemory() const;
  absl::Status CheckDeviceMemory() const;
  absl::Status StartMetrics();
  absl::StatusOr<ServerState> ReadState() const;
  absl::StatusOr<std::string> TakeUpState();
  absl::Status ResumeState();
  absl::Status ConnectControl();
  absl::Status MakeFrontend(std::vector<std::unique_ptr<ControlChannel>> channels);
  absl::Status StartLeader();
  absl::Status StartEngine();
  absl::Status CompareParameters();
  absl::Status StartHttp();
  absl::Status Announce();
  std::map<std::string, std::function<HttpReply(const std::string&)>> OperatorEndpoints();
  std::vector<int32_t> SlotsOfRanks() const;
  void OnLost(int rank, const absl::Status& why);
  absl::Status Agree(absl::Status mine, const char* what);
  void AwaitSignal();

  const ServeFlags flags_;
  MpiRuntime* mpi_;
  std::unique_ptr<Checkpoint> checkpoint_;
  std::optional<Tokenizer> tokenizer_;
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<Communicator> communicator_;
  std::unique_ptr<Backend> backend_;
  DType dtype_ = DType::kF32;
  SplitMode split_ = SplitMode::kExact;
  std::optional<Placement> placement_;
  LeaderLoop::Window window_;  // of the server before, on the leader
  std::unique_ptr<RankMetrics> metrics_;
  std::unique_ptr<MetricsExporter> exporter_;
  std::unique_ptr<TraceRecorder> recorder_;  // of the leader
  std::unique_ptr<ControlChannel> channel_;
  std::unique_ptr<Verification> verification_;
  std::unique_ptr<Frontend> frontend_;
  std::unique_ptr<Leader> leader_;
  std::unique_ptr<RankObserver> observer_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<HttpServer> http_;
  std::thread signal_thread_;
  std::atomic<bool> ready_{false};
  bool said_why_ = false;
};

}  // namespace ballast

#endif  // BALLAST_DEPLOY_SERVER_H_
