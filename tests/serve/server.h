// A real `ballast serve` under mpirun, for tests that speak to it as its users do.
#ifndef BALLAST_TESTS_SERVE_SERVER_H_
#define BALLAST_TESTS_SERVE_SERVER_H_

#include <sys/types.h>

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "deploy/http_client.h"

namespace ballast::testing {

using Environment = std::vector<std::pair<std::string, std::string>>;

// A folder that goes away with its owner.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

std::string ReadText(const std::string& path);
void PutText(const std::string& path, const std::string& text);
std::string DemoModel();

// A child of the test with its output in files. Killed, with its own children, on destruction.
class Process {
 public:
  Process(const std::vector<std::string>& command, const Environment& environment,
          const std::string& out, const std::string& err);
  ~Process();
  Process(const Process&) = delete;

  pid_t pid() const { return pid_; }
  // Its exit code (128 + signal where it was killed), or nothing when it still runs after that.
  std::optional<int> Wait(int timeout_ms);
  std::vector<pid_t> Children() const;

 private:
  pid_t pid_ = -1;
  std::optional<int> code_;
};

// The command line `mpirun -n ranks ... ballast arguments...` in the environment of
// deploy/environment.sh.
std::vector<std::string> MpirunBallast(int ranks, const std::vector<std::string>& arguments);

// How a program that is expected to end by itself ended.
struct Ended {
  std::optional<int> code;
  std::string out;
  std::string err;
};
Ended RunBallast(int ranks, const std::vector<std::string>& arguments,
                 const Environment& environment = {});

struct Answer {
  int status = 0;  // of HTTP; 0: the connection broke
  std::map<std::string, std::string> headers;
  std::string body;
  nlohmann::json json;  // of the body; discarded where it is none
  std::vector<int32_t> ids() const;
  std::string text() const;
  std::string finish() const;
};

// The samples of one scrape: "name{labels}" to value.
class Scrape {
 public:
  explicit Scrape(const std::string& text);
  // Sum over the samples of a metric whose labels contain all of `labels` (`key="value"`).
  double Sum(const std::string& name, const std::vector<std::string>& labels = {}) const;
  int Count(const std::string& name) const;

  std::string text;
  bool valid = true;  // every line is a comment or a sample with a number

 private:
  std::multimap<std::string, std::pair<std::string, double>> samples_;
};

class Server {
 public:
  // Waits until the server is ready; a Catch assertion fails if it never is. Serves the demo's
  // model where the flags name none.
  Server(int ranks, const std::vector<std::string>& flags, const Environment& environment = {});
  ~Server();

  int ranks() const { return ranks_; }
  int port() const { return port_; }
  const std::vector<int>& metrics_ports() const { return metrics_ports_; }
  pid_t leader_pid() const { return leader_pid_; }
  pid_t RankPid(int rank) const;
  Process& mpirun() { return *process_; }
  std::string Log() const { return ReadText(dir_ / "log"); }
  std::string ready_path() const { return dir_ / "ready.json"; }

  Answer Request(const std::string& method, const std::string& path, const std::string& body = "",
                 const std::string& headers = "") const;
  Answer Complete(const nlohmann::json& body) const;
  Scrape Metrics(int rank) const;
  // Sum over the ranks.
  double MetricSum(const std::string& name, const std::vector<std::string>& labels = {}) const;
  // Waits until the sum over the ranks is `value`, at most 10 s; returns whether it came to that.
  bool AwaitMetric(const std::string& name, double value,
                   const std::vector<std::string>& labels = {}) const;
  int64_t Epoch() const;
  // Waits until the leader says that the rank is in the state, at most 10 s; whether it came to
  // that.
  bool AwaitState(int rank, const std::string& state) const;
  // Resident bytes of every rank.
  std::vector<int64_t> ResidentBytes() const;
  // SIGTERM to rank 0; the exit code of mpirun.
  std::optional<int> Stop();

 private:
  TempDir dir_;
  int ranks_;
  int port_ = 0;
  std::vector<int> metrics_ports_;
  pid_t leader_pid_ = -1;
  std::unique_ptr<Process> process_;
};

// A completion that is read while it is generated.
class Stream {
 public:
  Stream(const Server& server, nlohmann::json body);
  int status() const { return status_; }
  // The next event; discarded at the end of the stream or when it breaks.
  nlohmann::json Next();
  // Reads what is left. The stream is complete when its last event was [DONE].
  void ReadAll();
  bool done() const { return done_; }
  const std::vector<int32_t>& ids() const { return ids_; }
  const std::string& text() const { return text_; }
  const std::string& finish() const { return finish_; }
  void Close() { client_->Close(); }

 private:
  std::optional<HttpClient> client_;
  int status_ = 0;
  std::string received_;  // and not parsed
  bool done_ = false;
  std::vector<int32_t> ids_;
  std::string text_, finish_;
};

// Sends all bodies, `concurrency` at a time; answers in the order of the bodies.
std::vector<Answer> CompleteAll(const Server& server, const std::vector<nlohmann::json>& bodies,
                                int concurrency);

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_SERVE_SERVER_H_
