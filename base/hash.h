// A 64-bit checksum of bytes, the same on every machine of one byte order.
#ifndef BALLAST_BASE_HASH_H_
#define BALLAST_BASE_HASH_H_

#include <cstdint>
#include <cstring>
#include <span>

#include "base/random.h"

namespace ballast {

// Hash of `bytes` under `seed`; every bit of the input reaches every bit of the result. It finds
// accidents, not attackers.
inline uint64_t Hash64(std::span<const std::byte> bytes, uint64_t seed = 0) {
  uint64_t lanes[4] = {seed + 1, seed + 2, seed + 3, seed + 4};
  size_t at = 0;
  for (; at + 32 <= bytes.size(); at += 32) {
    uint64_t words[4];
    std::memcpy(words, bytes.data() + at, 32);
    for (int i = 0; i < 4; ++i) {
      lanes[i] = (lanes[i] ^ words[i]) * 0x9e3779b97f4a7c15ull;
      lanes[i] ^= lanes[i] >> 29;
    }
  }
  uint64_t tail[4] = {};
  if (at < bytes.size()) std::memcpy(tail, bytes.data() + at, bytes.size() - at);
  uint64_t hash = Mix64(bytes.size() ^ seed);
  for (int i = 0; i < 4; ++i)
    hash = Mix64(hash ^ Mix64(lanes[i]) ^ (tail[i] * 0xd1b54a32d192ed03ull));
  return hash;
}

}  // namespace ballast

#endif  // BALLAST_BASE_HASH_H_
