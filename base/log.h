// One line per event on stderr: `time level rank component: message`.
#ifndef BALLAST_BASE_LOG_H_
#define BALLAST_BASE_LOG_H_

#include <string>

namespace ballast {

enum class LogLevel { kDebug, kInfo, kWarning, kError, kOff };

// Sets the lowest level that is written; kInfo at start.
void SetLogLevel(LogLevel level);

// Sets the rank that each line of this process names; -1 (none) at start.
void SetLogRank(int rank);

// Writes one line. THREADS any; the line goes out in one write.
// REQUIRES not called per token or per kernel: logging is for events.
void Log(LogLevel level, const char* component, const std::string& message);

inline void LogInfo(const char* component, const std::string& message) {
  Log(LogLevel::kInfo, component, message);
}
inline void LogWarning(const char* component, const std::string& message) {
  Log(LogLevel::kWarning, component, message);
}
inline void LogError(const char* component, const std::string& message) {
  Log(LogLevel::kError, component, message);
}

}  // namespace ballast

#endif  // BALLAST_BASE_LOG_H_
