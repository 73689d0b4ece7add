#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include <coda/export.h>

namespace coda {

// Which pairs of a head's D dimensions one plane rotation turns: (i, i + D/2) or (2i, 2i + 1).
enum class Pairs { kHalf, kInterleaved };
CODA_API Pairs parse_pairs(const std::string& name);
CODA_API std::string to_string(Pairs pairs);

enum class Policy { kRetention, kNoveltyLru };
CODA_API Policy parse_policy(const std::string& name);
CODA_API std::string to_string(Policy policy);

enum class SummaryRouting { kValue, kLowFreqKey };
CODA_API SummaryRouting parse_summary_routing(const std::string& name);
CODA_API std::string to_string(SummaryRouting routing);

// Everything that the bounded memory needs to know besides tensors. Slot counts live in the shapes of the state.
struct MemoryOptions {
  int64_t window = 256;
  int64_t chunk = 32;
  Policy policy = Policy::kRetention;
  int64_t num_sinks = 4;
  double age_decay = 1e-3;                      // per token, added to the gate logit as a recency term
  std::optional<int64_t> bank_distance = 512;   // tokens; nullopt leaves keys at their true positions
  bool gate_bias = true;
  bool mass_bias = false;
  int64_t exact_candidates = 8;
  double tau_exact = 0.10;
  double tau_summary = 0.05;
  double tau_novel = 0.70;
  double tau_match = 0.90;
  double tau_spawn = 0.50;
  bool refresh_on_hit = false;
  SummaryRouting summary_routing = SummaryRouting::kValue;
  Pairs rope_pairs = Pairs::kHalf;
};

// What turns attention logits into the output of one head.
struct AttentionOptions {
  std::optional<double> scale;   // default 1 / sqrt(D)
  Pairs theta_pairs = Pairs::kHalf;
  double norm_eps = 1e-6;        // read only where a norm weight is given
};

}  // namespace coda
