#ifndef BALLAST_MONITOR_EXPORTER_H_
#define BALLAST_MONITOR_EXPORTER_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace ballast {

struct MetricsExporterOptions {
  std::string host = "127.0.0.1";  // address to listen on; IPv6 in brackets
  int port = 0;                    // 0: any free port, which port() then tells
};

// Answers GET /metrics with a rendered text and GET /healthz with "ok", on threads of its own.
// Nothing that fails while rendering ends the process: the scrape gets HTTP 500 and the reason.
class MetricsExporter {
 public:
  using Render = std::function<absl::StatusOr<std::string>()>;

  // `render` is called by the exporter's threads, possibly two at once, until the exporter is gone.
  // ERRORS kUnavailable names the address when nothing can listen there
  static absl::StatusOr<std::unique_ptr<MetricsExporter>> Start(
      const MetricsExporterOptions& options, Render render);
  // Ends the threads.
  ~MetricsExporter();

  int port() const { return port_; }

 private:
  struct Server;
  MetricsExporter();

  std::unique_ptr<Server> server_;
  int port_ = 0;
};

}  // namespace ballast

#endif  // BALLAST_MONITOR_EXPORTER_H_
