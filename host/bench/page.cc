// The page of a bench: one file that a browser opens from the disk.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "host/bench/tables.h"

namespace quantmill {
namespace {

using Json = nlohmann::ordered_json;

// The plot's area inside its axes, in pixels.
constexpr double kWidth = 720, kHeight = 380, kLeft = 70, kTop = 15, kBottom = 45, kRight = 130;

std::string Escaped(const std::string& text) {
  return absl::StrReplaceAll(text,
                             {{"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}, {"\"", "&quot;"}});
}

struct Point {
  std::string name;
  double bits = 0, kl = 0, error = 0;
};

std::vector<Point> PointsOf(const Json& rows, const std::string& model) {
  std::vector<Point> points;
  for (const Json& row : rows) {
    if (row.at("model") != model || !row.contains("kl_mean")) continue;
    const double kl = row.at("kl_mean");
    if (!(kl > 0)) continue;  // the original: no place on a logarithmic axis
    points.push_back(
        {row.at("row"), row.at("bits_per_weight_all"), kl, row.value("kl_mean_stderr", 0.0)});
  }
  return points;
}

// x: bits per weight, linear; y: KL, logarithmic.
class Plot {
 public:
  explicit Plot(const std::vector<Point>& points) : points_(points) {
    double least = points[0].kl, most = points[0].kl;
    first_bits_ = points[0].bits;
    for (const Point& point : points) {
      least = std::min(least, std::max(point.kl - point.error, point.kl / 10));
      most = std::max(most, point.kl + point.error);
      first_bits_ = std::min(first_bits_, point.bits);
      last_bits_ = std::max(last_bits_, point.bits);
    }
    first_bits_ = std::floor(first_bits_ - 0.25);
    last_bits_ = std::ceil(last_bits_ + 0.25);
    low_ = std::floor(std::log10(least));
    high_ = std::max(low_ + 1, std::ceil(std::log10(most)));
  }

  std::string Svg() const {
    std::string text = absl::StrFormat(
        "<svg viewBox=\"0 0 %g %g\" role=\"img\" aria-label=\"KL over bits per weight\">\n",
        kLeft + kWidth + kRight, kTop + kHeight + kBottom);
    DrawAxes(&text);
    for (const Point& point : points_) DrawPoint(point, &text);
    absl::StrAppend(&text, "</svg>\n");
    return text;
  }

 private:
  double X(double bits) const {
    return kLeft + kWidth * (bits - first_bits_) / (last_bits_ - first_bits_);
  }
  double Y(double kl) const {
    return kTop + kHeight * (high_ - std::max(low_, std::log10(kl))) / (high_ - low_);
  }
  static std::string Line(const char* style, double x1, double y1, double x2, double y2) {
    return absl::StrFormat("<line class=\"%s\" x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\"/>\n",
                           style, x1, y1, x2, y2);
  }
  static std::string Label(const char* anchor, double x, double y, const std::string& text) {
    return absl::StrFormat("<text text-anchor=\"%s\" x=\"%.1f\" y=\"%.1f\">%s</text>\n", anchor, x,
                           y, Escaped(text));
  }

  void DrawAxes(std::string* text) const {
    const double right = kLeft + kWidth, bottom = kTop + kHeight;
    for (int power = static_cast<int>(low_); power <= static_cast<int>(high_); ++power) {
      const double y = Y(std::pow(10, power));
      absl::StrAppend(text, Line("grid", kLeft, y, right, y),
                      Label("end", kLeft - 8, y + 4, absl::StrFormat("%g", std::pow(10, power))));
    }
    const int step = last_bits_ - first_bits_ > 10 ? 2 : 1;
    for (int bits = static_cast<int>(first_bits_); bits <= static_cast<int>(last_bits_);
         bits += step) {
      absl::StrAppend(text, Line("grid", X(bits), kTop, X(bits), bottom),
                      Label("middle", X(bits), bottom + 18, absl::StrCat(bits)));
    }
    absl::StrAppend(
        text,
        Label("middle", kLeft + kWidth / 2, bottom + 38, "bits per weight, all that is stored"),
        Label("start", kLeft + 6, kTop + 14, "KL to the original (nats)"));
  }

  void DrawPoint(const Point& point, std::string* text) const {
    const double x = X(point.bits), y = Y(point.kl);
    const double high = Y(point.kl + point.error);
    const double low = point.error < point.kl ? Y(point.kl - point.error) : kTop + kHeight;
    absl::StrAppendFormat(text, "<g><title>%s: %.3f bits, KL %.4g ± %.2g</title>\n",
                          Escaped(point.name), point.bits, point.kl, point.error);
    if (point.error > 0) {
      absl::StrAppend(text, Line("error", x, low, x, high), Line("error", x - 4, high, x + 4, high),
                      Line("error", x - 4, low, x + 4, low));
    }
    absl::StrAppendFormat(text, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\"/>\n", x, y);
    absl::StrAppend(text, Label("start", x + 8, y + 4, point.name), "</g>\n");
  }

  const std::vector<Point>& points_;
  double first_bits_ = 0, last_bits_ = 0;
  double low_ = 0, high_ = 0;  // powers of ten
};

std::string HtmlTable(const Json& results) {
  const auto table = BenchTable(results);
  std::string text = "<table>\n";
  for (size_t r = 0; r < table.size(); ++r) {
    const char* tag = r == 0 ? "th" : "td";
    absl::StrAppend(&text, "<tr>");
    for (const std::string& cell : table[r]) {
      absl::StrAppend(&text, "<", tag, ">", Escaped(cell), "</", tag, ">");
    }
    absl::StrAppend(&text, "</tr>\n");
  }
  absl::StrAppend(&text, "</table>\n");
  return text;
}

constexpr char kHead[] = R"(<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>quantmill bench</title>
<style>
body { font: 15px/1.45 sans-serif; margin: 2em; color: #222; background: #fff; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
th { border-bottom: 2px solid #888; }
svg { max-width: 60em; width: 100%; }
svg text { font: 12px sans-serif; fill: #222; }
svg .grid { stroke: #e3e3e3; }
svg .error { stroke: #1f5fa8; }
svg circle { fill: #1f5fa8; }
</style></head><body>
)";

}  // namespace

std::string BenchPage(const Json& results) {
  std::string text = absl::StrCat(kHead, "<h1>", Escaped(results.value("bench", "quantmill bench")),
                                  "</h1>\n", HtmlTable(results), "<ul>\n");
  for (const std::string& note : BenchNotes(results)) {
    absl::StrAppend(&text, "<li>", Escaped(note), "</li>\n");
  }
  absl::StrAppend(&text, "</ul>\n");
  std::vector<std::string> models;
  for (const Json& row : results.at("rows")) {
    const std::string model = row.at("model");
    if (std::find(models.begin(), models.end(), model) != models.end()) continue;
    models.push_back(model);
    const std::vector<Point> points = PointsOf(results.at("rows"), model);
    if (points.empty()) continue;
    absl::StrAppend(&text, "<h2>", Escaped(model), "</h2>\n", Plot(points).Svg());
  }
  absl::StrAppend(&text, "</body></html>\n");
  return text;
}

}  // namespace quantmill
