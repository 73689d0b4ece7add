#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <coda/export.h>
#include <coda/options.h>
#include <coda/state.h>

namespace coda {

// One write gate per KV head, each with its own choice of tokens, or one for all of them.
enum class Gates { kPerHead, kShared };
CODA_API Gates parse_gates(const std::string& name);
CODA_API std::string to_string(Gates gates);

enum class HeadNorm { kIdentity, kRms };
CODA_API HeadNorm parse_head_norm(const std::string& name);
CODA_API std::string to_string(HeadNorm norm);

// Shapes, memory and positions of one CodaGqaL layer.
struct CODA_API CodaGqaLOptions {
  CodaGqaLOptions(int64_t embed_dim, int64_t num_heads, int64_t num_kv_heads);

  TORCH_ARG(int64_t, embed_dim);
  TORCH_ARG(int64_t, num_heads);
  TORCH_ARG(int64_t, num_kv_heads);
  TORCH_ARG(int64_t, head_dim) = 0;  // 0: embed_dim / num_heads
  TORCH_ARG(bool, bias) = false;     // of q_proj, k_proj, v_proj and o_proj
  TORCH_ARG(double, rope_base) = 10000.0;

  TORCH_ARG(int64_t, window) = 256;
  TORCH_ARG(int64_t, chunk) = 32;  // divides window
  TORCH_ARG(int64_t, exact_slots) = 128;
  TORCH_ARG(int64_t, summary_slots) = 0;
  TORCH_ARG(Policy, policy) = Policy::kRetention;
  TORCH_ARG(Gates, gates) = Gates::kPerHead;
  TORCH_ARG(int64_t, num_sinks) = 4;
  TORCH_ARG(double, age_decay) = 1e-3;
  TORCH_ARG(std::optional<int64_t>, bank_distance) = 512;     // tokens; nullopt leaves keys at their true positions
  TORCH_ARG(std::optional<bool>, gate_bias) = std::nullopt;  // nullopt: on for retention, off for novelty_lru
  TORCH_ARG(bool, mass_bias) = false;
  TORCH_ARG(int64_t, exact_candidates) = 8;
  TORCH_ARG(double, tau_exact) = 0.10;
  TORCH_ARG(double, tau_summary) = 0.05;
  TORCH_ARG(double, tau_novel) = 0.70;
  TORCH_ARG(double, tau_match) = 0.90;
  TORCH_ARG(double, tau_spawn) = 0.50;
  TORCH_ARG(bool, refresh_on_hit) = false;
  TORCH_ARG(SummaryRouting, summary_routing) = SummaryRouting::kValue;
  TORCH_ARG(Pairs, rope_pairs) = Pairs::kHalf;

  TORCH_ARG(bool, differential) = true;
  TORCH_ARG(Pairs, theta_pairs) = Pairs::kHalf;
  TORCH_ARG(HeadNorm, head_norm) = HeadNorm::kIdentity;
  TORCH_ARG(double, norm_eps) = 1e-6;

 public:
  // Fills head_dim in. Throws c10::ValueError that names the option, its value and what is supported.
  void validate();

  int64_t gate_groups() const;
  MemoryOptions memory() const;
  AttentionOptions attention() const;
};

// The parameters of one layer, whoever owns them.
struct CODA_API CodaGqaLWeights {
  struct Projection {
    at::Tensor weight;
    std::optional<at::Tensor> bias;
  };
  Projection q;                                 // (H D, E)
  Projection k, v;                              // (Hkv D, E)
  Projection o;                                 // (E, H D)
  std::optional<Projection> lambda;             // (H, E), with differential
  Projection write;                             // (R, E)
  std::optional<at::Tensor> theta;              // (H, D/2), with differential
  std::optional<at::Tensor> summary_eta_logit;  // (Hkv), with summary slots
  std::optional<at::Tensor> norm_weight;        // (D), with HeadNorm::kRms
};

// The layer as functions of validated options and weights: what the C++ and the Python module both call.

// Causal attention over all of x (B, L, E). Returns (B, L, E). Differentiable in x and the weights.
CODA_API at::Tensor coda_gqa_l(const CodaGqaLOptions& options, const CodaGqaLWeights& weights, const at::Tensor& x);

// The next L tokens x (B, L, E) of B sequences, attending to their bounded memory, which advances by L tokens. Where autograd
// records, the tensors of `state` are replaced, and gradients flow through them into earlier calls; otherwise they are
// overwritten in place. Returns (B, L, E). Throws c10::ValueError for a state of another layout, batch, dtype or device.
CODA_API at::Tensor coda_gqa_l_bounded(const CodaGqaLOptions& options, const CodaGqaLWeights& weights, const at::Tensor& x,
                                       State& state);

// An empty memory for `sequences` sequences. kv_options: dtype and device of the layer's activations.
CODA_API State make_state(const CodaGqaLOptions& options, int64_t sequences, const at::TensorOptions& kv_options);

// The norm over the D dimensions of each head: a holder of its weight, applied within the attention ops.
class CODA_API HeadRmsNormImpl : public torch::nn::Cloneable<HeadRmsNormImpl> {
 public:
  explicit HeadRmsNormImpl(int64_t head_dim);
  void reset() override;

  torch::Tensor weight;  // (D)

 private:
  int64_t head_dim_;
};
TORCH_MODULE(HeadRmsNorm);

// Differential grouped-query attention with a bounded memory. Parameters carry the names of the paper's checkpoints; theta
// and lambda_proj exist with `differential`, head_norm with HeadNorm::kRms.
class CODA_API CodaGqaLImpl : public torch::nn::Cloneable<CodaGqaLImpl> {
 public:
  CodaGqaLImpl(int64_t embed_dim, int64_t num_heads, int64_t num_kv_heads);
  explicit CodaGqaLImpl(const CodaGqaLOptions& options);

  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  // See coda_gqa_l.
  at::Tensor forward(const at::Tensor& x);
  // See coda_gqa_l_bounded: prefill, decode and training segments alike.
  at::Tensor forward_bounded(const at::Tensor& x, State& state);
  State make_state(int64_t batch_size, const at::TensorOptions& kv_options) const;
  // Bytes of such a state: a constant, whatever has been read.
  int64_t state_bytes(int64_t batch_size = 1, at::ScalarType dtype = at::kFloat) const;

  CodaGqaLOptions options;
  torch::nn::Linear q_proj{nullptr}, k_proj{nullptr}, v_proj{nullptr}, o_proj{nullptr};
  torch::nn::Linear lambda_proj{nullptr}, write_proj{nullptr};
  HeadRmsNorm head_norm{nullptr};
  torch::Tensor theta;              // (H, D/2)
  torch::Tensor summary_eta_logit;  // (Hkv)

 private:
  CodaGqaLWeights weights() const;
};
TORCH_MODULE(CodaGqaL);

}  // namespace coda
