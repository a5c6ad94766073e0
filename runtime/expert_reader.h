#ifndef BALLAST_RUNTIME_EXPERT_READER_H_
#define BALLAST_RUNTIME_EXPERT_READER_H_

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <span>
#include <thread>
#include <vector>

#include "absl/status/status.h"

namespace ballast {

// Fills a block with a packed expert. ERRORS any: what cannot be read, and where
using ReadExpert =
    std::function<absl::Status(int32_t layer, int32_t expert, std::span<std::byte> block)>;

// Reads experts on a thread of its own, one after the other in the order of Start, so that the step
// thread never waits for a disk. The thread begins with the first Start.
//
// A block belongs to the reader from Start until Take or Cancel names it.
// THREADS one (the step thread); `read` is called on the reader's.
class ExpertReader {
 public:
  explicit ExpertReader(ReadExpert read) : read_(std::move(read)) {}
  // Waits for the read under way.
  ~ExpertReader();

  struct Job {
    int64_t id = 0;  // of the caller
    int32_t layer = 0, expert = 0;
    std::span<std::byte> block;
  };
  void Start(const Job& job);

  struct Done {
    int64_t id = 0;
    absl::Status status;
    uint64_t checksum = 0;  // BlockChecksum of the block, taken on the reader's thread
  };
  // The next read that has ended.
  std::optional<Done> Take();
  // Drops the reads that have not begun. SHAPES the ids of these
  std::vector<int64_t> Cancel();

 private:
  void Loop();

  const ReadExpert read_;
  std::mutex mutex_;
  std::condition_variable changed_;
  // State below is protected by mutex_.
  std::deque<Job> jobs_;
  std::deque<Done> done_;
  bool stop_ = false;
  std::thread thread_;  // step thread only
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_EXPERT_READER_H_
