// Charts of the laboratory's pages: curves as SVG, in a page that needs nothing else.
#ifndef BALLAST_DEPLOY_CHARTS_H_
#define BALLAST_DEPLOY_CHARTS_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace ballast {

// The page up to and including <body>, with the styles of what is below.
std::string PageHead(const std::string& title);
std::string Escape(const std::string& text);  // for HTML

// The i-th colour and the i-th dash pattern, over and over again. REQUIRES index >= 0
const char* ColourOf(int64_t index);
const char* DashOf(int64_t index);

struct Curve {
  std::string label;
  std::string colour;
  std::string dash;
  std::vector<std::pair<double, double>> points;  // (x in [0, 1], y)
};

struct Axis {
  double low = 0.0, high = 1.0;
  bool logarithmic = false;

  double At(double y) const;  // where on the picture, from its top
};

// The axis that shows all points. REQUIRES all y > 0 where logarithmic
Axis AxisOf(const std::vector<Curve>& curves, bool logarithmic, bool from_zero);

// Curves with a legend and a y axis, and labelled marks on the x axis at shares of its length.
std::string Chart(const std::vector<Curve>& curves, const Axis& axis,
                  const std::vector<std::pair<double, std::string>>& marks, const char* title);

}  // namespace ballast

#endif  // BALLAST_DEPLOY_CHARTS_H_
