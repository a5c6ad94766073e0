#include "deploy/demo/driver/report.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <vector>

namespace ballast {
namespace {

constexpr int kColumns = 120;
constexpr int kColumnWidth = 8;
constexpr int kRowHeight = 24;
constexpr int kLeft = 64;  // room for the ranks' names
constexpr int kTop = 40;   // room for the phases' names and the epochs' marks
constexpr double kColdest = 0.5, kHottest = 2.0;  // load / mean at the ends of the colour scale

__attribute__((format(printf, 1, 2))) std::string Format(const char* format, ...) {
  char text[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  return text;
}

std::string Escape(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '&':
        out += "&amp;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

// Where a moment of the run lies, in columns.
class TimeAxis {
 public:
  explicit TimeAxis(const RunRecord& run) {
    if (run.phases.empty()) return;
    begin_us_ = run.phases.front().begin_us;
    span_us_ = std::max<int64_t>(run.phases.back().end_us - begin_us_, 1);
  }
  double At(int64_t unix_us) const {
    return std::clamp(static_cast<double>(unix_us - begin_us_) / static_cast<double>(span_us_), 0.0,
                      1.0) *
           kColumns;
  }
  size_t Column(int64_t unix_us) const {
    return std::min<size_t>(static_cast<size_t>(At(unix_us)), kColumns - 1);
  }
  int64_t span_us() const { return span_us_; }

 private:
  int64_t begin_us_ = 0;
  int64_t span_us_ = 1;
};

using Load = std::vector<std::vector<int64_t>>;  // [L][R]

// The load / mean of a rank in the layer where it is largest; negative where there is no load.
double Hottest(const Load& load, size_t rank) {
  double hottest = -1;
  for (const std::vector<int64_t>& ranks : load) {
    int64_t total = 0;
    for (const int64_t copies : ranks) total += copies;
    if (total == 0) continue;
    hottest = std::max(hottest, static_cast<double>(ranks[rank]) *
                                    static_cast<double>(ranks.size()) / static_cast<double>(total));
  }
  return hottest;
}

std::string Cells(const std::vector<Load>& columns, size_t num_ranks) {
  std::string svg;
  for (size_t rank = 0; rank < num_ranks; ++rank) {
    const int y = kTop + static_cast<int>(rank) * kRowHeight;
    svg += Format("<text x=\"%d\" y=\"%d\" text-anchor=\"end\">rank %zu</text>\n", kLeft - 6,
                  y + kRowHeight / 2 + 4, rank);
    for (size_t c = 0; c < columns.size(); ++c) {
      const double value = Hottest(columns[c], rank);
      if (value < 0) continue;
      const double heat = std::clamp((value - kColdest) / (kHottest - kColdest), 0.03, 1.0);
      svg += Format(
          "<rect class=\"cell\" x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" "
          "fill-opacity=\"%.2f\"><title>rank %zu: %.2f</title></rect>\n",
          kLeft + static_cast<int>(c) * kColumnWidth, y, kColumnWidth, kRowHeight - 2, heat, rank,
          value);
    }
  }
  return svg;
}

std::string Marks(const RunRecord& run, const TimeAxis& axis, int bottom) {
  std::string svg;
  int64_t epoch = -1;
  for (const PhaseRecord& phase : run.phases) {
    const double x = kLeft + axis.At(phase.begin_us) * kColumnWidth;
    svg += Format(
        "<line class=\"phase\" x1=\"%.1f\" y1=\"4\" x2=\"%.1f\" y2=\"%d\"/>"
        "<text x=\"%.1f\" y=\"16\">%s</text>\n",
        x, x, bottom, x + 4, Escape(phase.name).substr(0, 100).c_str());
    for (const StepRecord& step : phase.steps) {
      if (epoch >= 0 && step.epoch != epoch) {
        const double at = kLeft + axis.At(step.unix_us) * kColumnWidth;
        svg += Format(
            "<path class=\"flip\" d=\"M%.1f %d l-4 -9 h8 z\"><title>epoch %lld, %lld "
            "copies</title></path>\n",
            at, kTop - 2, static_cast<long long>(step.epoch), static_cast<long long>(step.copies));
      }
      epoch = step.epoch;
    }
  }
  return svg;
}

std::string Row(const std::string& phase, const char* run, const PhaseMeasures& m,
                bool is_dynamic) {
  return "<tr><th>" + Escape(phase) + "</th><td class=\"name\">" + run + "</td>" +
         Format(
             "<td>%.3f</td><td>%s</td><td>%.3f</td><td>%.2f</td><td>%.2f</td><td>%.2f</td>"
             "<td>%.0f</td><td>%s</td></tr>\n",
             m.imbalance, is_dynamic ? Format("%.3f", m.settled_imbalance).c_str() : "–",
             m.step_imbalance, m.critical_path_ms, m.step_ms_p50, m.step_ms_p99, m.tokens_per_s,
             is_dynamic ? std::to_string(m.copies_moved).c_str() : "–");
}

std::string Legend() {
  std::string legend = "<p class=\"legend\">load ÷ mean";
  for (const double value : {0.5, 1.0, 1.5, 2.0}) {
    const double heat = std::clamp((value - kColdest) / (kHottest - kColdest), 0.03, 1.0);
    legend += Format(
        " <svg width=\"18\" height=\"14\"><rect class=\"cell\" width=\"18\" "
        "height=\"14\" fill-opacity=\"%.2f\"/></svg> %.1f%s",
        heat, value, value == kHottest ? " and more" : "");
  }
  return legend +
         " &nbsp; <svg width=\"10\" height=\"10\"><path class=\"flip\" d=\"M5 9 l-4 -8 "
         "h8 z\"/></svg> a new placement in force</p>\n";
}

constexpr char kHead[] = R"(<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Ballast: static against dynamic placement</title>
<style>
:root { color-scheme: light dark;
  --ink: #1b2330; --paper: #fbfbf9; --line: #c9ccd2; --hot: #c2410c; --mark: #1d4ed8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ec; --paper: #14171c; --line: #3a404a; --hot: #fb923c; --mark: #93c5fd; } }
body { margin: 0 auto; padding: 1rem; max-width: 64rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
.wide > svg { min-width: 40rem; width: 100%; height: auto; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
.cell { fill: var(--hot); } .phase { stroke: var(--ink); } .flip { fill: var(--mark); }
.legend { font-size: 0.9rem; }
.legend svg { vertical-align: middle; border: 1px solid var(--line); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; }
tbody th, .name, thead th:first-child, thead th:nth-child(2) { text-align: left; }
.bad { color: var(--hot); font-weight: bold; }
</style></head><body>
)";

constexpr char kTableHead[] =
    "<div class=\"wide\"><table><thead><tr><th>phase</th><th>run</th><th>imbalance</th>"
    "<th>settled</th><th>per step</th><th>critical path ms</th><th>step p50 ms</th>"
    "<th>step p99 ms</th><th>tokens/s</th><th>copies moved</th></tr></thead><tbody>\n";

constexpr char kNotes[] =
    "<p>Imbalance is the largest rank load divided by the mean: averaged over layers and over "
    "windows of 4,096 tokens; <i>settled</i> takes the second half of a phase's windows; <i>per "
    "step</i> is the plain mean over single steps, however many tokens a step has. The critical "
    "path is the largest processor time of a rank, averaged over steps.</p>\n";

}  // namespace

std::string HeatMapSvg(const RunRecord& run) {
  const TimeAxis axis(run);
  std::vector<Load> columns(kColumns);
  size_t num_ranks = 0;
  for (const PhaseRecord& phase : run.phases) {
    for (const StepRecord& step : phase.steps) {
      num_ranks = std::max(num_ranks, step.cpu_us.size());
      Load& column = columns[axis.Column(step.unix_us)];
      if (column.empty()) column.assign(step.load.size(), std::vector<int64_t>(step.cpu_us.size()));
      for (size_t layer = 0; layer < step.load.size(); ++layer) {
        for (size_t rank = 0; rank < step.load[layer].size(); ++rank) {
          column[layer][rank] += step.load[layer][rank];
        }
      }
    }
  }
  const int bottom = kTop + static_cast<int>(num_ranks) * kRowHeight;
  const int right = kLeft + kColumns * kColumnWidth;
  return Format(
             "<svg viewBox=\"0 0 %d %d\" role=\"img\" aria-label=\"load of each rank over "
             "time\">\n",
             right + 8, bottom + 24) +
         Cells(columns, num_ranks) + Marks(run, axis, bottom) +
         Format(
             "<text x=\"%d\" y=\"%d\">0 s</text><text x=\"%d\" y=\"%d\" text-anchor=\"end\">%.1f "
             "s</text>\n</svg>\n",
             kLeft, bottom + 16, right, bottom + 16, static_cast<double>(axis.span_us()) * 1e-6);
}

std::string ReportHtml(const RunRecord& fixed, const RunRecord& dynamic,
                       const Comparison& comparison) {
  std::string html = kHead;
  html += "<h1>Ballast: static against dynamic placement</h1>\n";
  html += comparison.texts_identical ? "<p>Both runs gave the same texts, token by token.</p>\n"
                                     : "<p class=\"bad\">The texts differ, first at " +
                                           Escape(comparison.first_difference) + ".</p>\n";
  if (const auto note = Oversubscribed(comparison)) {
    html += "<p class=\"bad\">" + *note +
            ": wall times say little here; the critical path is processor time.</p>\n";
  }
  html += kTableHead;
  for (const PhaseComparison& phase : comparison.phases) {
    html += Row(phase.name, "static", phase.fixed, false) + Row("", "dynamic", phase.dynamic, true);
  }
  html += std::string("</tbody></table></div>\n") + kNotes;
  html += "<h2>Load of each rank, static placement</h2>\n<div class=\"wide\">" + HeatMapSvg(fixed) +
          "</div>\n";
  html += "<h2>Load of each rank, dynamic placement</h2>\n<div class=\"wide\">" +
          HeatMapSvg(dynamic) + "</div>\n";
  html += Legend();
  html += "<p>The colour is a rank's load ÷ mean in the layer where it is largest.</p>\n";
  return html + "</body></html>\n";
}

}  // namespace ballast
