#pragma once

// The scalar arguments that the memory ops share, in schema order: declared, forwarded and packed in one place.

#include <optional>
#include <string_view>

#include <coda/options.h>

#define CODA_MEMORY_PARAMS                                                                                               \
  int64_t window, int64_t chunk, std::string_view policy, int64_t num_sinks, double age_decay,                           \
      std::optional<int64_t> bank_distance, bool gate_bias, bool mass_bias, int64_t exact_candidates, double tau_exact,  \
      double tau_summary, double tau_novel, double tau_match, double tau_spawn, bool refresh_on_hit,                     \
      std::string_view summary_routing, std::string_view rope_pairs

#define CODA_MEMORY_ARGS                                                                                              \
  window, chunk, policy, num_sinks, age_decay, bank_distance, gate_bias, mass_bias, exact_candidates, tau_exact,      \
      tau_summary, tau_novel, tau_match, tau_spawn, refresh_on_hit, summary_routing, rope_pairs

#define CODA_MEMORY_OPTIONS                                                                                            \
  ::coda::MemoryOptions {                                                                                              \
    window, chunk, ::coda::parse_policy(std::string(policy)), num_sinks, age_decay, bank_distance, gate_bias,          \
        mass_bias, exact_candidates, tau_exact, tau_summary, tau_novel, tau_match, tau_spawn, refresh_on_hit,          \
        ::coda::parse_summary_routing(std::string(summary_routing)), ::coda::parse_pairs(std::string(rope_pairs))      \
  }

// The same for a MemoryOptions value `m`: expands to the arguments of a dispatcher call.
#define CODA_MEMORY_VALUES(m)                                                                                          \
  (m).window, (m).chunk, to_string((m).policy), (m).num_sinks, (m).age_decay, (m).bank_distance, (m).gate_bias,        \
      (m).mass_bias, (m).exact_candidates, (m).tau_exact, (m).tau_summary, (m).tau_novel, (m).tau_match,               \
      (m).tau_spawn, (m).refresh_on_hit, to_string((m).summary_routing), to_string((m).rope_pairs)

#define CODA_ATTENTION_PARAMS std::optional<double> scale, std::string_view theta_pairs, double norm_eps
#define CODA_ATTENTION_ARGS scale, theta_pairs, norm_eps
#define CODA_ATTENTION_OPTIONS \
  ::coda::AttentionOptions { scale, ::coda::parse_pairs(std::string(theta_pairs)), norm_eps }
#define CODA_ATTENTION_VALUES(a) (a).scale, to_string((a).theta_pairs), (a).norm_eps
