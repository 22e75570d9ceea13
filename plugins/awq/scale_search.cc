// The scale of a site: AutoAWQ awq/quantize/quantizer.py (_search_best_scale, _compute_best_scale),
// with the identity among the candidates and ratios up to 1 as in llm-compressor
// src/llmcompressor/modifiers/transform/awq/base.py.
//
// The loss of one linear over all calibration rows X is exact without running anything:
//   || X (W' - W)^T ||^2 = sum over rows d of W' - W of d H d^T,  H = X^T X
// That of q, k, v (of gate, up) is measured on the output of the attention (of the MLP) by the
// host's block service, where there is one.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "awq.h"

namespace quantmill::awq {
namespace {

constexpr double kLeastScale = 1e-4;
constexpr double kDuoDamp = 1e-4;

// Sum over calibration rows and outputs of the squared error of one linear.
qm_status LinearLoss(qm_call* call, const Block& block, uint64_t linear, const qm_tensor& hessian,
                     const float* scale, const Workspace& workspace, double* out) {
  const qm_host_linalg* linalg = qm::HostLinalg(call);
  if (linalg == nullptr) {
    return qm::Fail(call, QM_FAILED_PRECONDITION,
                    "the host offers no qm.host.linalg/1, which awq multiplies with");
  }
  const Rows rows = block.rows(linear);
  const int64_t chunk = ChunkRows(rows.count, rows.columns);
  std::vector<float> sums(static_cast<size_t>(chunk));
  double total = 0;
  for (int64_t first = 0; first < rows.count; first += chunk) {
    QM_TRY(qm::Progress(call, -1));
    const int64_t count = std::min(chunk, rows.count - first);
    QM_TRY(FakeQuant(call, rows.Slice(first, count), scale, block.roundings()[linear], true,
                     workspace.delta));
    const qm_tensor delta =
        qm::MakeMatrix(workspace.delta, count, rows.columns, rows.columns, call->device);
    qm_tensor product =
        qm::MakeMatrix(workspace.product, count, rows.columns, rows.columns, call->device);
    QM_TRY(linalg->gemm(call, 0, 0, 1.0, &delta, &hessian, 0.0, &product));
    QM_TRY(RowDots(call, workspace.delta, workspace.product, count, rows.columns, workspace.sums));
    QM_TRY(ToHost(call, workspace.sums, count, sums.data()));
    for (int64_t r = 0; r < count; ++r) total += static_cast<double>(sums[static_cast<size_t>(r)]);
  }
  *out = total;
  return QM_OK;
}

// The windows of calibration text that trials run on, evenly spread.
std::vector<int64_t> TrialWindows(int64_t available, int64_t wanted) {
  const int64_t count = wanted <= 0 ? available : std::min(available, wanted);
  std::vector<int64_t> windows;
  for (int64_t i = 0; i < count; ++i) windows.push_back(i * available / count);
  return windows;
}

class Trials {
 public:
  Trials(qm_call* call, const Block& block, const Site& site, const std::vector<InputStats>& stats,
         const SearchOptions& options, const Workspace& workspace)
      : call_(call), block_(block), site_(site), stats_(stats), workspace_(workspace) {
    if (!options.module_loss || site.module[0] == '\0') return;
    service_ = static_cast<const qm_host_block*>(call->host_ext(call, QM_HOST_BLOCK));
    if (!QM_HAS(service_, loss) || !QM_HAS(service_, sample_count)) service_ = nullptr;
    if (service_ == nullptr) return;
    windows_ = TrialWindows(service_->sample_count(call), options.windows);
    if (windows_.empty()) service_ = nullptr;
  }

  // Of the site's linears rounded with this scale by channel; empty = none.
  qm_status Loss(const std::vector<float>& scale, double* out) {
    return service_ == nullptr ? LinearLosses(scale, out) : ModuleLoss(scale, out);
  }

 private:
  // The scale of a consumer's inputs on the device, or null.
  qm_status PutScale(const Consumer& consumer, const std::vector<float>& scale,
                     const float** out) const {
    *out = nullptr;
    if (scale.empty()) return QM_OK;
    const int64_t in = block_.linear(consumer.linear).in_features;
    const std::vector<float> by_input = ByInput(consumer, in, scale);
    QM_TRY(ToDevice(call_, by_input.data(), in, workspace_.scale));
    *out = workspace_.scale;
    return QM_OK;
  }

  qm_status LinearLosses(const std::vector<float>& scale, double* out) {
    *out = 0;
    for (const Consumer& consumer : site_.consumers) {
      if (stats_[consumer.linear].rows == 0) continue;  // an expert nobody visited
      const float* by_input = nullptr;
      QM_TRY(PutScale(consumer, scale, &by_input));
      double loss = 0;
      QM_TRY(LinearLoss(call_, block_, consumer.linear, stats_[consumer.linear].hessian, by_input,
                        workspace_, &loss));
      *out += loss;
    }
    return QM_OK;
  }

  qm_status ModuleLoss(const std::vector<float>& scale, double* out) {
    std::vector<std::string> names;
    std::vector<qm_override> overrides;
    names.reserve(site_.consumers.size());
    float* room = workspace_.rounded;
    for (const Consumer& consumer : site_.consumers) {
      const Rows rows = block_.rows(consumer.linear);
      const float* by_input = nullptr;
      QM_TRY(PutScale(consumer, scale, &by_input));
      QM_TRY(FakeQuant(call_, rows, by_input, block_.roundings()[consumer.linear], false, room));
      names.push_back(std::string(block_.linear(consumer.linear).name) + ".weight");
      overrides.push_back({names.back().c_str(), qm::MakeMatrix(room, rows.count, rows.columns,
                                                                rows.columns, call_->device)});
      room += rows.count * rows.columns;
    }
    *out = 0;
    for (const int64_t window : windows_) {
      QM_TRY(qm::Progress(call_, -1));
      double loss = 0;
      QM_TRY(service_->loss(call_, site_.module, window, 1, overrides.data(), overrides.size(),
                            &loss));
      *out += loss;
    }
    return QM_OK;
  }

  qm_call* call_;
  const Block& block_;
  const Site& site_;
  const std::vector<InputStats>& stats_;
  const Workspace& workspace_;
  const qm_host_block* service_ = nullptr;
  std::vector<int64_t> windows_;
};

// Mean |x| of each channel, over all rows that the site's linears see. Experts are weighed by their
// rows: every row goes to equally many of them, so that this is the mean over rows.
qm_status Activations(qm_call* call, const Block& block, const Site& site,
                      const std::vector<InputStats>& stats, std::vector<double>* out) {
  const size_t channels = static_cast<size_t>(site.site->channels);
  out->assign(channels, 0.0);
  std::vector<double> weights(channels, 0.0);
  for (const Consumer& consumer : site.consumers) {
    const int64_t in = block.linear(consumer.linear).in_features;
    std::vector<float> mean(static_cast<size_t>(in));
    QM_TRY(ToHost(call, stats[consumer.linear].absmean, in, mean.data()));
    const double rows = static_cast<double>(stats[consumer.linear].rows);
    for (int64_t i = 0; i < in; ++i) {
      const size_t c =
          static_cast<size_t>(consumer.channel_map == nullptr ? i : consumer.channel_map[i]);
      (*out)[c] += rows * static_cast<double>(mean[static_cast<size_t>(i)]);
      weights[c] += rows;
    }
  }
  for (size_t c = 0; c < channels; ++c) {
    if (weights[c] > 0) (*out)[c] /= weights[c];
  }
  return QM_OK;
}

// Mean over the rows of all linears of |w| relative to the largest of its group.
qm_status RelativeWeights(qm_call* call, const Block& block, const Site& site,
                          std::vector<double>* out) {
  const size_t channels = static_cast<size_t>(site.site->channels);
  out->assign(channels, 0.0);
  std::vector<double> counts(channels, 0.0);
  for (const Consumer& consumer : site.consumers) {
    const Rows rows = block.rows(consumer.linear);
    std::vector<double> sums(static_cast<size_t>(rows.columns), 0.0);
    QM_TRY(AddRelative(call, rows, block.roundings()[consumer.linear].width, &sums));
    for (int64_t i = 0; i < rows.columns; ++i) {
      const size_t c =
          static_cast<size_t>(consumer.channel_map == nullptr ? i : consumer.channel_map[i]);
      (*out)[c] += sums[static_cast<size_t>(i)];
      counts[c] += static_cast<double>(rows.count);
    }
  }
  for (size_t c = 0; c < channels; ++c) {
    if (counts[c] > 0) (*out)[c] /= counts[c];
  }
  return QM_OK;
}

std::vector<float> Candidate(const std::vector<double>& activation,
                             const std::vector<double>& weight, double ratio, bool duo) {
  std::vector<double> s(activation.size(), 0.0);
  double least = std::numeric_limits<double>::infinity(), most = 0;
  for (size_t c = 0; c < s.size(); ++c) {
    if (!(activation[c] > 0) || !std::isfinite(activation[c])) continue;
    s[c] = std::pow(activation[c], ratio);
    if (duo) s[c] /= std::pow(weight[c], 1.0 - ratio) + kDuoDamp;
    s[c] = std::max(s[c], kLeastScale);
    least = std::min(least, s[c]);
    most = std::max(most, s[c]);
  }
  const double middle = std::sqrt(least * most);
  std::vector<float> scale(s.size(), 1.0f);
  for (size_t c = 0; c < s.size(); ++c) {
    const float value = static_cast<float>(s[c] / middle);
    if (s[c] > 0 && std::isfinite(value) && value > 0) scale[c] = value;
  }
  return scale;
}

}  // namespace

std::vector<std::vector<float>> ScaleCandidates(const std::vector<double>& activation,
                                                const std::vector<double>& weight,
                                                const SearchOptions& options) {
  std::vector<std::vector<float>> candidates;
  // With duo scaling ratio 0 is no identity: it evens out the weights.
  const int32_t trials = options.grid - 1;
  for (int32_t k = 0; k < trials; ++k) {
    const double ratio = options.duo_scaling
                             ? (trials == 1 ? 0.5 : static_cast<double>(k) / (trials - 1))
                             : static_cast<double>(k + 1) / trials;
    candidates.push_back(Candidate(activation, weight, ratio, options.duo_scaling));
  }
  return candidates;
}

qm_status SearchScale(qm_call* call, const Block& block, const Site& site,
                      const std::vector<InputStats>& stats, const SearchOptions& options,
                      const Workspace& workspace, std::vector<float>* out) {
  out->clear();
  std::vector<double> activation, weight;
  QM_TRY(Activations(call, block, site, stats, &activation));
  if (options.duo_scaling) QM_TRY(RelativeWeights(call, block, site, &weight));
  Trials trials(call, block, site, stats, options, workspace);
  double best = 0;
  QM_TRY(trials.Loss({}, &best));
  for (std::vector<float>& candidate : ScaleCandidates(activation, weight, options)) {
    QM_TRY(qm::Progress(call, -1));
    double loss = 0;
    QM_TRY(trials.Loss(candidate, &loss));
    if (!(loss < best)) continue;
    best = loss;
    *out = std::move(candidate);
  }
  return QM_OK;
}

}  // namespace quantmill::awq
