#include "monitor/exporter.h"

#include <CivetServer.h>

#include <exception>
#include <utility>
#include <vector>

#include "base/status.h"

namespace ballast {
namespace {

// Why the server could not start: it logs the reason on the thread that starts it, first what went
// wrong, then that something did.
thread_local std::string server_log;

int KeepLog(const mg_connection*, const char* message) {
  if (server_log.empty()) server_log = message;
  return 1;  // not printed by the server
}

void Answer(mg_connection* connection, int code, const char* reason, const char* content_type,
            const std::string& body) {
  mg_printf(connection,
            "HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %zu\r\n"
            "Cache-Control: no-store\r\nConnection: close\r\n\r\n",
            code, reason, content_type, body.size());
  mg_write(connection, body.data(), body.size());
}

class MetricsHandler : public CivetHandler {
 public:
  explicit MetricsHandler(MetricsExporter::Render render) : render_(std::move(render)) {}

  bool handleGet(CivetServer*, mg_connection* connection) override {
    const absl::StatusOr<std::string> text = RenderSafely();
    if (text.ok()) {
      Answer(connection, 200, "OK", "text/plain; version=0.0.4; charset=utf-8", *text);
    } else {
      Answer(connection, 500, "Internal Server Error", "text/plain; charset=utf-8",
             absl::StrCat(text.status().message(), "\n"));
    }
    return true;
  }

 private:
  // The exporter must outlive whatever a collector throws.
  absl::StatusOr<std::string> RenderSafely() {
    try {
      return render_();
    } catch (const std::exception& e) {
      return absl::InternalError(e.what());
    } catch (...) {
      return absl::InternalError("rendering the metrics threw");
    }
  }

  MetricsExporter::Render render_;
};

class HealthHandler : public CivetHandler {
 public:
  bool handleGet(CivetServer*, mg_connection* connection) override {
    Answer(connection, 200, "OK", "text/plain; charset=utf-8", "ok\n");
    return true;
  }
};

}  // namespace

struct MetricsExporter::Server {
  Server(const std::vector<std::string>& options, const CivetCallbacks& callbacks, Render render)
      : metrics(std::move(render)), civet(options, &callbacks) {
    civet.addHandler("/metrics$", metrics);  // $: exactly this path
    civet.addHandler("/healthz$", health);
  }

  MetricsHandler metrics;  // before the server, which calls them until it is gone
  HealthHandler health;
  CivetServer civet;
};

absl::StatusOr<std::unique_ptr<MetricsExporter>> MetricsExporter::Start(
    const MetricsExporterOptions& options, Render render) {
  const std::string address = absl::StrCat(options.host, ":", options.port);
  if (options.port < 0 || options.port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat("metrics port ", options.port, " is outside [0, 65535]"));
  }
  // A scraper that stops reading may hold one of the two threads for that long.
  const std::vector<std::string> settings = {"listening_ports",    address, "num_threads", "2",
                                             "request_timeout_ms", "5000"};
  CivetCallbacks callbacks;
  callbacks.log_message = KeepLog;
  server_log.clear();
  std::unique_ptr<MetricsExporter> exporter(new MetricsExporter());
  try {
    exporter->server_ = std::make_unique<Server>(settings, callbacks, std::move(render));
    const std::vector<int> ports = exporter->server_->civet.getListeningPorts();
    if (ports.empty()) return absl::UnavailableError(absl::StrCat("no listener on ", address));
    exporter->port_ = ports.front();
  } catch (const std::exception& e) {
    return absl::UnavailableError(absl::StrCat("cannot serve metrics on ", address, ": ",
                                               server_log.empty() ? e.what() : server_log));
  }
  return exporter;
}

MetricsExporter::MetricsExporter() = default;
MetricsExporter::~MetricsExporter() = default;

}  // namespace ballast
