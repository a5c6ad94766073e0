#ifndef BALLAST_PLACEMENT_RANK_PRICES_H_
#define BALLAST_PLACEMENT_RANK_PRICES_H_

#include <cstdint>
#include <span>
#include <vector>

namespace ballast {

// A price per rank of one layer, learnt from the rank loads of past batches alone: raised where a
// rank had more than its share, lowered where it had less. A source that sends to a host in
// proportion to 1 / price needs no counts of others.
//
//   price[r] *= (load[r] / mean load)^2, then scaled to a mean of 1
//
// Batches are added up until they have 128 copies per rank, so that prices follow the load and not
// the noise. When the rank loads differ from those of before by more than they usually do, the
// traffic has shifted: all prices return to 1 and learning starts anew.
//
// ORDER  in double precision, by products and quotients only: the same loads give the same prices
//        on every machine
class RankPrices {
 public:
  explicit RankPrices(int32_t num_ranks);

  // Learns from the loads of one batch that was divided by these prices.
  // SHAPES rank_load [R], >= 0
  void Learn(std::span<const int32_t> rank_load);

  std::span<const double> prices() const { return price_; }  // [R] in [1/16, 16]

 private:
  bool Shifted();
  void Restart();

  std::vector<double> price_;     // [R]
  std::vector<int64_t> pending_;  // [R] loads not yet learnt from
  std::vector<double> relative_;  // [R] load / mean load of what is being learnt
  std::vector<double> usual_;     // [R] the running mean of relative_
  double usual_distance_ = 0.0;   // running mean of the distance between relative_ and usual_
  int32_t num_learnt_ = 0;        // since the last restart, up to 3
};

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_RANK_PRICES_H_
