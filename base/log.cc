#include "base/log.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <ctime>

namespace ballast {
namespace {

std::atomic<LogLevel> lowest_level{LogLevel::kInfo};
std::atomic<int> log_rank{-1};

}  // namespace

void SetLogLevel(LogLevel level) { lowest_level = level; }
void SetLogRank(int rank) { log_rank = rank; }

void Log(LogLevel level, const char* component, const std::string& message) {
  if (level < lowest_level.load(std::memory_order_relaxed)) return;
  static constexpr const char* kNames[] = {"debug", "info", "warning", "error"};
  const auto now = std::chrono::system_clock::now();
  const std::time_t seconds = std::chrono::system_clock::to_time_t(now);
  const auto millis =
      std::chrono::duration_cast<std::chrono::milliseconds>(now.time_since_epoch()).count() % 1000;
  std::tm utc{};
  gmtime_r(&seconds, &utc);
  char head[96];
  const int rank = log_rank.load(std::memory_order_relaxed);
  char rank_text[16] = "-";
  if (rank >= 0) std::snprintf(rank_text, sizeof rank_text, "%d", rank);
  std::snprintf(head, sizeof head, "%04d-%02d-%02dT%02d:%02d:%02d.%03dZ %s rank=%s ",
                utc.tm_year + 1900, utc.tm_mon + 1, utc.tm_mday, utc.tm_hour, utc.tm_min,
                utc.tm_sec, static_cast<int>(millis), kNames[static_cast<int>(level)], rank_text);
  const std::string line = std::string(head) + component + ": " + message + "\n";
  // A log line that cannot be written has nowhere to be reported.
  [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, line.data(), line.size());
}

}  // namespace ballast
