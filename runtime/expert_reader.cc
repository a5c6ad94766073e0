#include "runtime/expert_reader.h"

#include <utility>

#include "base/block_checksum.h"

namespace ballast {

ExpertReader::~ExpertReader() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void ExpertReader::Start(const Job& job) {
  {
    const std::lock_guard lock(mutex_);
    jobs_.push_back(job);
  }
  changed_.notify_all();
  if (!thread_.joinable()) thread_ = std::thread(&ExpertReader::Loop, this);
}

std::optional<ExpertReader::Done> ExpertReader::Take() {
  const std::lock_guard lock(mutex_);
  if (done_.empty()) return std::nullopt;
  Done done = std::move(done_.front());
  done_.pop_front();
  return done;
}

std::vector<int64_t> ExpertReader::Cancel() {
  const std::lock_guard lock(mutex_);
  std::vector<int64_t> dropped;
  for (const Job& job : jobs_) dropped.push_back(job.id);
  jobs_.clear();
  return dropped;
}

void ExpertReader::Loop() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return stop_ || !jobs_.empty(); });
    if (stop_) return;
    const Job job = jobs_.front();
    jobs_.pop_front();
    lock.unlock();
    Done done{.id = job.id, .status = read_(job.layer, job.expert, job.block)};
    if (done.status.ok()) done.checksum = BlockChecksum(job.block);
    lock.lock();
    done_.push_back(std::move(done));
    changed_.notify_all();
  }
}

}  // namespace ballast
