#include "deploy/replay_report.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "deploy/charts.h"
#include "deploy/lab.h"

namespace ballast {
namespace {

constexpr int64_t kMostPoints = 400;  // of a curve
constexpr int kShades = 24;           // of a heat map
constexpr int64_t kMostColumns = 48;  // of a heat map
std::string FileName(const std::string& path) {
  return path.substr(path.find_last_of('/') + 1);
}

class Report {
 public:
  Report(const std::string& steps, const StepTrace& trace, const ReplayOptions& options,
         const ReplayResult& result)
      : steps_(steps), trace_(trace), options_(options), result_(result) {}

  std::string Page() const {
    return absl::StrCat(PageHead("Ballast replay"), Heading(), Table(), Predicted(), OverTime(),
                        OverRho(), HeatMaps(), "</body></html>\n");
  }

 private:
  // Name, colour and dash of a series: a colour per policy, a dash per split.
  Curve Styled(size_t index) const {
    const ReplaySeries& series = result_.series[index];
    const auto policy =
        std::find(options_.policies.begin(), options_.policies.end(), series.policy) -
        options_.policies.begin();
    const auto split = std::find(options_.splits.begin(), options_.splits.end(), series.split) -
                       options_.splits.begin();
    Curve curve{.label = absl::StrCat(series.policy, ", ", NameOf(series.split)),
                .colour = ColourOf(policy),
                .dash = DashOf(split),
                .points = {}};
    if (series.rhos.size() < options_.rhos.size()) {
      absl::StrAppend(&curve.label, ", ρ ", series.rhos[0]);
    }
    return curve;
  }

  std::string Heading() const {
    const Topology& topology = options_.topology;
    std::string files;
    for (const std::string& name : trace_.phase_names) {
      absl::StrAppend(&files, files.empty() ? "" : " → ", FileName(name));
    }
    return absl::StrCat("<h1>Replay of ", Escape(files), "</h1><p>", steps_, ", ",
                        result_.num_layers, " layers, ", trace_.num_experts, " experts in ",
                        topology.num_slots(), " slots on ", topology.num_ranks(),
                        " ranks; plans take effect ", NameOf(options_.when), ".</p>\n");
  }

  std::string Table() const {
    std::string html =
        "<h2>Result</h2><p class=\"note\">Imbalance: largest rank load over mean, 1 is perfect. "
        "Copies: experts that entered a rank, per layer and step. Cost: imbalance + ρ · copies of "
        "the busiest rank. Critical: what each layer waits for in each step: the split, and the "
        "planning where it is in-step.</p><div class=\"scroll\"><table><tr>";
    for (const char* name : {"policy", "split", "ρ", "imbalance", "99 %", "copies", "busiest",
                             "cost", "plan µs", "split µs", "critical µs"}) {
      absl::StrAppend(&html, "<th>", name, "</th>");
    }
    for (const ReplayFigures& f : result_.figures) {
      absl::StrAppend(&html, "</tr>\n<tr><td>", Escape(f.policy), "</td><td>", NameOf(f.split));
      for (const std::string& text :
           {absl::StrCat(f.rho), Fixed(f.mean_imbalance, 3), Fixed(f.p99_imbalance, 3),
            Fixed(f.copies_per_layer_step, 2), Fixed(f.busiest_copies_per_layer_step, 2),
            Fixed(f.total_cost, 3), Fixed(f.plan_us_mean, 1), Fixed(f.split_us_mean, 2),
            Fixed(f.critical_us_mean, 1)}) {
        absl::StrAppend(&html, "</td><td>", text);
      }
      html += "</td>";
    }
    return html + "</tr></table></div>\n";
  }

  std::string Predicted() const {
    if (!options_.cluster.has_value()) return "";
    std::string html = absl::StrCat(
        "<h2>Predicted time of a step</h2><p class=\"note\">Microseconds of all layers. ",
        Escape(options_.cluster->Assumptions()), "</p><div class=\"scroll\"><table>");
    for (const std::vector<std::string>& row : PredictedTable(result_)) {
      const char* cell = html.ends_with("<table>") ? "th" : "td";
      html += "<tr>";
      for (const std::string& text : row) {
        absl::StrAppend(&html, "<", cell, ">", Escape(text), "</", cell, ">");
      }
      html += "</tr>\n";
    }
    return html + "</table></div>\n";
  }

  // Mean over the layers (and over neighbouring steps, where there are many) of `values`.
  template <typename T>
  std::vector<std::pair<double, double>> PointsOf(const std::vector<T>& values) const {
    const int64_t num_points = std::min(result_.num_steps, kMostPoints);
    std::vector<std::pair<double, double>> points;
    for (int64_t i = 0; i < num_points; ++i) {
      const int64_t first = i * result_.num_steps / num_points * result_.num_layers;
      const int64_t end = (i + 1) * result_.num_steps / num_points * result_.num_layers;
      double sum = 0.0;
      for (int64_t at = first; at < end; ++at) sum += static_cast<double>(values[at]);
      points.emplace_back((static_cast<double>(i) + 0.5) / static_cast<double>(num_points),
                          sum / static_cast<double>(end - first));
    }
    return points;
  }

  std::string OverTime() const {
    std::vector<std::pair<double, std::string>> marks;
    for (size_t i = 0; i < trace_.phase_names.size(); ++i) {
      marks.emplace_back(
          static_cast<double>(trace_.phase_offsets[i]) / static_cast<double>(result_.num_steps),
          FileName(trace_.phase_names[i]));
    }
    std::vector<Curve> imbalance, copies;
    for (size_t i = 0; i < result_.series.size(); ++i) {
      imbalance.push_back(Styled(i));
      imbalance.back().points = PointsOf(result_.series[i].imbalance);
      if (result_.series[i].split != options_.splits[0]) continue;  // copies do not depend on it
      copies.push_back(Styled(i));
      const std::string split = absl::StrCat(", ", NameOf(options_.splits[0]));
      copies.back().label.erase(copies.back().label.find(split), split.size());
      copies.back().points = PointsOf(result_.series[i].copies);
    }
    return absl::StrCat("<h2>Imbalance over time</h2>",
                        Chart(imbalance, AxisOf(imbalance, false, false), marks, "imbalance"),
                        "<h2>Copies received per layer and step</h2>",
                        Chart(copies, AxisOf(copies, false, true), marks, "copies"));
  }

  std::string OverRho() const {
    std::vector<double> rhos = options_.rhos;
    std::sort(rhos.begin(), rhos.end());
    const double steps = std::max(1.0, static_cast<double>(rhos.size()) - 1.0);
    std::vector<std::pair<double, std::string>> marks;
    for (size_t i = 0; i < rhos.size(); ++i) {
      marks.emplace_back(static_cast<double>(i) / steps, absl::StrCat("ρ ", rhos[i]));
    }
    std::vector<Curve> curves;
    for (size_t i = 0; i < result_.series.size(); ++i) {
      const ReplaySeries& series = result_.series[i];
      if (series.rhos[0] != options_.rhos[0]) continue;  // belongs to the curve of the first rho
      curves.push_back(Styled(i));
      curves.back().label = absl::StrCat(series.policy, ", ", NameOf(series.split));
      for (size_t k = 0; k < rhos.size(); ++k) {
        for (const ReplayFigures& f : result_.figures) {
          if (f.policy != series.policy || f.split != series.split || f.rho != rhos[k]) continue;
          curves.back().points.emplace_back(static_cast<double>(k) / steps, f.total_cost);
          break;
        }
      }
      if (rhos.size() == 1) curves.back().points.emplace_back(1.0, curves.back().points[0].second);
    }
    return absl::StrCat("<h2>Cost over ρ, the price of a copy</h2>",
                        Chart(curves, AxisOf(curves, true, false), marks, "total cost"));
  }

  std::string HeatMaps() const {
    float most = 1.0f;
    for (const ReplaySeries& series : result_.series) {
      for (float value : series.imbalance) most = std::max(most, value);
    }
    std::string html = absl::StrCat(
        "<h2>Imbalance per layer over time</h2><p class=\"note\">Layers from top to bottom, steps "
        "from left to right; from pale (1) to dark red (",
        Fixed(most, 2), ").</p><div class=\"maps\">");
    for (size_t i = 0; i < result_.series.size(); ++i) {
      absl::StrAppend(&html, "<figure><figcaption>", Escape(Styled(i).label), "</figcaption>",
                      HeatMap(result_.series[i], most), "</figure>\n");
    }
    return html + "</div>\n";
  }

  std::string HeatMap(const ReplaySeries& series, float most) const {
    const int64_t columns = std::min(result_.num_steps, kMostColumns);
    std::vector<std::string> cells(kShades);  // one path for all cells of a shade
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t first = column * result_.num_steps / columns;
      const int64_t end = (column + 1) * result_.num_steps / columns;
      for (int32_t layer = 0; layer < result_.num_layers; ++layer) {
        double sum = 0.0;
        for (int64_t t = first; t < end; ++t) {
          sum += series.imbalance[t * result_.num_layers + layer];
        }
        const double heat = (sum / static_cast<double>(end - first) - 1.0) / (most - 1.0 + 1e-9);
        const double shade = std::sqrt(std::clamp(heat, 0.0, 1.0));  // the low end matters most
        absl::StrAppend(&cells[static_cast<size_t>(std::lround(shade * (kShades - 1)))], "M",
                        column, " ", layer, "h1v1h-1z");
      }
    }
    std::string svg = absl::StrCat("<svg viewBox=\"0 0 ", columns, " ", result_.num_layers,
                                   "\" preserveAspectRatio=\"none\" style=\"height:9rem\" ",
                                   "shape-rendering=\"crispEdges\">");
    for (int i = 0; i < kShades; ++i) {
      if (cells[i].empty()) continue;
      absl::StrAppend(&svg, "<path fill=\"hsl(", 48 - 48 * i / (kShades - 1), " 85% ",
                      94 - 60 * i / (kShades - 1), "%)\" d=\"", cells[i], "\"/>");
    }
    return svg + "</svg>";
  }

  const std::string& steps_;
  const StepTrace& trace_;
  const ReplayOptions& options_;
  const ReplayResult& result_;
};

}  // namespace

std::vector<std::vector<std::string>> PredictedTable(const ReplayResult& result) {
  std::vector<std::vector<std::string>> rows = {
      {"policy", "split", "rho", "step us", "p99", "dispatch", "compute", "combine", "copies",
       "blocking", "background", "layer us", "layer p99"}};
  for (const ReplayFigures& f : result.figures) {
    if (!f.predicted.has_value()) continue;
    rows.push_back({f.policy, NameOf(f.split), absl::StrCat(f.rho)});
    for (double us :
         {f.predicted->step_us_mean, f.predicted->step_us_p99, f.predicted->dispatch_us_mean,
          f.predicted->compute_us_mean, f.predicted->combine_us_mean, f.predicted->copy_us_mean,
          f.predicted->blocking_step_us_mean, f.predicted->background_step_us_mean,
          f.predicted->layer_us_mean, f.predicted->layer_us_p99}) {
      rows.back().push_back(Fixed(us, 1));
    }
  }
  return rows;
}

std::string StepsText(const StepTrace& trace, bool of_counts) {
  const int64_t steps = trace.num_steps();
  if (!of_counts) return absl::StrCat(steps, " steps of ", trace.step_tokens, " tokens");
  if (trace.top_k == 0) {
    return absl::StrCat(steps, " steps of counts (--top-k would say of how many tokens; each is ",
                        "taken as ", trace.step_tokens, ")");
  }
  int64_t tokens = 0;
  for (int64_t t = 0; t < steps; ++t) tokens += trace.tokens_of(t);
  return absl::StrCat(steps, " steps of counts of ", tokens, " tokens in all");
}

std::string ReplayReport(const std::string& steps, const StepTrace& trace,
                         const ReplayOptions& options, const ReplayResult& result) {
  return Report(steps, trace, options, result).Page();
}

}  // namespace ballast
