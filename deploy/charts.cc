#include "deploy/charts.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "deploy/lab.h"

namespace ballast {
namespace {

constexpr double kWidth = 480, kHeight = 260, kLeft = 52, kRight = 12, kTop = 14, kBottom = 34;
constexpr const char* kColours[] = {"#2f6fde", "#d9480f", "#2b8a3e", "#9c36b5", "#b08900",
                                    "#0b7285", "#c2255c", "#5c677d", "#74a12e", "#6741d9"};
constexpr const char* kDashes[] = {"", "6 3", "2 3", "8 3 2 3"};

constexpr char kHead[] = R"(<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>)";

constexpr char kStyle[] = R"(</title><style>
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#667;--line:#d5d9e0;--page:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#9aa3b2;--line:#3a404a;--page:#15181c}}
body{margin:0 auto;max-width:60rem;padding:1rem;font:16px/1.5 system-ui,sans-serif;
color:var(--ink);background:var(--page)}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin:2rem 0 .4rem}p{margin:.4rem 0}
svg{display:block;width:100%;height:auto}svg text{font-size:12px;fill:var(--soft)}
.chart{max-width:44rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;white-space:nowrap}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid var(--line)}
th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){text-align:left}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.85rem;padding:0;margin:.3rem 0;
list-style:none}.legend svg{display:inline-block;width:28px;height:10px;margin-right:.35rem}
.maps{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:1rem}
figure{margin:0}figcaption,.note{font-size:.85rem;color:var(--soft)}
</style></head><body>
)";

std::string Stroke(const Curve& curve) {
  return absl::StrCat(
      "stroke=\"", curve.colour, "\" stroke-width=\"2\" fill=\"none\"",
      curve.dash.empty() ? "" : absl::StrCat(" stroke-dasharray=\"", curve.dash, "\""));
}

std::string Legend(const std::vector<Curve>& curves) {
  std::string html = "<ul class=\"legend\">";
  for (const Curve& curve : curves) {
    absl::StrAppend(&html, "<li><svg viewBox=\"0 0 28 10\"><path d=\"M0 5H28\" ", Stroke(curve),
                    "/></svg>", Escape(curve.label), "</li>");
  }
  return html + "</ul>\n";
}

}  // namespace

std::string PageHead(const std::string& title) {
  return absl::StrCat(kHead, Escape(title), kStyle);
}

std::string Escape(const std::string& text) {
  std::string escaped;
  for (char c : text) {
    switch (c) {
      case '<':
        escaped += "&lt;";
        break;
      case '>':
        escaped += "&gt;";
        break;
      case '&':
        escaped += "&amp;";
        break;
      case '"':
        escaped += "&quot;";
        break;
      default:
        escaped += c;
    }
  }
  return escaped;
}

const char* ColourOf(int64_t index) {
  return kColours[static_cast<size_t>(index) % std::size(kColours)];
}

const char* DashOf(int64_t index) {
  return kDashes[static_cast<size_t>(index) % std::size(kDashes)];
}

double Axis::At(double y) const {
  const double share =
      logarithmic ? std::log(y / low) / std::log(high / low) : (y - low) / (high - low);
  return kTop + (1.0 - share) * (kHeight - kTop - kBottom);
}

Axis AxisOf(const std::vector<Curve>& curves, bool logarithmic, bool from_zero) {
  double low = 1e300, high = -1e300;
  for (const Curve& curve : curves) {
    for (const auto& [x, y] : curve.points) low = std::min(low, y), high = std::max(high, y);
  }
  if (low > high) return {};
  if (logarithmic) return {.low = low / 1.05, .high = high * 1.05, .logarithmic = true};
  if (from_zero) low = 0.0;
  const double margin = high > low ? 0.05 * (high - low) : 0.5;
  return {.low = from_zero ? 0.0 : low - margin, .high = high + margin};
}

// Curves with a y axis, and labelled marks on the x axis at shares of its length.
std::string Chart(const std::vector<Curve>& curves, const Axis& axis,
                  const std::vector<std::pair<double, std::string>>& marks, const char* title) {
  const auto x_at = [](double x) { return Fixed(kLeft + x * (kWidth - kLeft - kRight), 1); };
  std::string svg = absl::StrCat(Legend(curves), "<svg class=\"chart\" viewBox=\"0 0 ", kWidth, " ",
                                 kHeight, "\" role=\"img\" ", "aria-label=\"", title, "\">");
  constexpr int kLines = 5;
  for (int i = 0; i < kLines; ++i) {
    const double share = static_cast<double>(i) / (kLines - 1);
    const double y = axis.logarithmic ? axis.low * std::pow(axis.high / axis.low, share)
                                      : axis.low + share * (axis.high - axis.low);
    absl::StrAppend(&svg, "<path stroke=\"var(--line)\" d=\"M", kLeft, " ", Fixed(axis.At(y), 1),
                    "H", kWidth - kRight, "\"/><text text-anchor=\"end\" x=\"", kLeft - 6,
                    "\" y=\"", Fixed(axis.At(y) + 4, 1), "\">", Fixed(y, y < 100 ? 2 : 0),
                    "</text>");
  }
  for (const auto& [x, label] : marks) {
    absl::StrAppend(&svg, "<path stroke=\"var(--line)\" stroke-dasharray=\"3 3\" d=\"M", x_at(x),
                    " ", kTop, "V", kHeight - kBottom, "\"/><text x=\"", x_at(x), "\" y=\"",
                    kHeight - kBottom + 18, "\"", x > 0.9 ? " text-anchor=\"end\"" : "", ">",
                    Escape(label), "</text>");
  }
  for (const Curve& curve : curves) {
    absl::StrAppend(&svg, "<path ", Stroke(curve), " d=\"");
    char command = 'M';
    for (const auto& [x, y] : curve.points) {
      absl::StrAppend(&svg, std::string(1, command), x_at(x), " ", Fixed(axis.At(y), 1));
      command = 'L';
    }
    absl::StrAppend(&svg, "\"><title>", Escape(curve.label), "</title></path>");
  }
  return svg + "</svg>\n";
}

}  // namespace ballast
