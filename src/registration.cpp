#include <torch/library.h>

#include <coda/coda.h>

// The schemas: the one list of what exists. Implementations register themselves in src/ops/**, one file per dispatch key.
// Public ops first; a leading underscore marks the halves that autograd and torch.compile see.

#define CODA_ATTENTION_SCHEMA "float? scale=None, str theta_pairs=\"half\", float norm_eps=1e-6"
#define CODA_MEMORY_SCHEMA                                                                                          \
  "int window, int chunk, str policy, int num_sinks, float age_decay, int? bank_distance, bool gate_bias, "         \
  "bool mass_bias, int exact_candidates, float tau_exact, float tau_summary, float tau_novel, float tau_match, "    \
  "float tau_spawn, bool refresh_on_hit, str summary_routing, str rope_pairs"

TORCH_LIBRARY(coda, m) {
  m.def("apply_rope(Tensor x, Tensor positions, Tensor inv_freq, float attention_scaling=1.0, str pairs=\"half\", "
        "bool inverse=False) -> Tensor");

  m.def("diff_attention(Tensor q, Tensor k, Tensor v, Tensor? lam=None, Tensor? theta=None, Tensor? norm_weight=None, "
        "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, *, bool causal=True, " CODA_ATTENTION_SCHEMA ") -> Tensor");
  m.def("diff_attention_path(Tensor q, *, float? scale=None) -> (str path, str reason)");
  m.def("_diff_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? lam, Tensor? theta, Tensor? norm_weight, "
        "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, *, bool causal, " CODA_ATTENTION_SCHEMA
        ", bool save=True) -> (Tensor y, Tensor o2, Tensor diff, Tensor lse)");
  m.def("_diff_attention_backward(Tensor grad_y, Tensor q, Tensor k, Tensor v, Tensor? lam, Tensor? theta, "
        "Tensor? norm_weight, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor y, Tensor o2, Tensor diff, Tensor lse, *, "
        "bool causal, " CODA_ATTENTION_SCHEMA
        ") -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_lam, Tensor grad_theta, Tensor grad_norm_weight)");

  m.def("route_exact_bank(Tensor value, Tensor gate, Tensor position, Tensor bank_value, Tensor used, Tensor last_touch, *, "
        "float tau_exact=0.10, float tau_novel=0.70, float tau_match=0.90, bool refresh_on_hit=False, int num_sinks=0) "
        "-> (Tensor slot, Tensor action, Tensor last_touch)");

  m.def("bank_scan(Tensor k, Tensor v, Tensor gate, Tensor cu_seqlens, Tensor[] state, Tensor? eta_logit, Tensor inv_freq, *, "
        CODA_MEMORY_SCHEMA
        ") -> (Tensor index, Tensor summary_k, Tensor summary_v, Tensor summary_mass, Tensor[] new_state)");
  m.def("_bank_scan_forward(Tensor k, Tensor v, Tensor gate, Tensor cu_seqlens, Tensor[] state, Tensor? eta_logit, "
        "Tensor inv_freq, *, " CODA_MEMORY_SCHEMA
        ") -> (Tensor index, Tensor summary_k, Tensor summary_v, Tensor summary_mass, Tensor[] new_state, "
        "Tensor source, Tensor assignment)");
  m.def("_bank_scan_backward(Tensor grad_summary_k, Tensor grad_summary_v, Tensor grad_summary_mass, Tensor grad_new_k, "
        "Tensor grad_new_v, Tensor grad_new_gate, Tensor grad_new_summary_k, Tensor grad_new_summary_v, "
        "Tensor grad_new_summary_mass, Tensor k, Tensor v, Tensor gate, Tensor cu_seqlens, Tensor[] state, "
        "Tensor? eta_logit, Tensor inv_freq, Tensor summary_k, Tensor summary_v, Tensor summary_mass, Tensor source, "
        "Tensor assignment, *, " CODA_MEMORY_SCHEMA
        ") -> (Tensor grad_k, Tensor grad_v, Tensor grad_gate, Tensor grad_state_k, Tensor grad_state_v, "
        "Tensor grad_state_gate, Tensor grad_state_summary_k, Tensor grad_state_summary_v, Tensor grad_state_summary_mass, "
        "Tensor grad_eta_logit)");

  m.def("bounded_attention(Tensor q, Tensor k, Tensor v, Tensor? lam, Tensor? theta, Tensor? norm_weight, Tensor gate, "
        "Tensor cu_seqlens, Tensor[] state, Tensor index, Tensor summary_k, Tensor summary_v, Tensor summary_mass, "
        "Tensor inv_freq, *, " CODA_MEMORY_SCHEMA ", " CODA_ATTENTION_SCHEMA ") -> Tensor");
  m.def("bounded_attention_path(Tensor q, *, float? scale=None) -> (str path, str reason)");
  m.def("_bounded_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? lam, Tensor? theta, Tensor? norm_weight, "
        "Tensor gate, Tensor cu_seqlens, Tensor[] state, Tensor index, Tensor summary_k, Tensor summary_v, "
        "Tensor summary_mass, Tensor inv_freq, *, " CODA_MEMORY_SCHEMA ", " CODA_ATTENTION_SCHEMA
        ", bool save=True) -> (Tensor y, Tensor o2, Tensor diff, Tensor lse)");
  m.def("_bounded_attention_into_(Tensor(a!) y, Tensor q, Tensor k, Tensor v, Tensor? lam, Tensor? theta, Tensor? norm_weight, "
        "Tensor gate, Tensor cu_seqlens, Tensor[] state, Tensor index, Tensor summary_k, Tensor summary_v, "
        "Tensor summary_mass, Tensor inv_freq, *, " CODA_MEMORY_SCHEMA ", " CODA_ATTENTION_SCHEMA ") -> ()");
  m.def("_bounded_attention_backward(Tensor grad_y, Tensor q, Tensor k, Tensor v, Tensor? lam, Tensor? theta, "
        "Tensor? norm_weight, Tensor gate, Tensor cu_seqlens, Tensor[] state, Tensor index, Tensor summary_k, "
        "Tensor summary_v, Tensor summary_mass, Tensor inv_freq, Tensor y, Tensor o2, Tensor diff, Tensor lse, *, "
        CODA_MEMORY_SCHEMA ", " CODA_ATTENTION_SCHEMA
        ") -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_lam, Tensor grad_theta, Tensor grad_norm_weight, "
        "Tensor grad_gate, Tensor grad_state_k, Tensor grad_state_v, Tensor grad_state_gate, Tensor grad_summary_k, "
        "Tensor grad_summary_v, Tensor grad_summary_mass)");

  m.def("bounded_forward(Tensor q, Tensor k, Tensor v, Tensor? lam, Tensor? theta, Tensor? norm_weight, Tensor gate, "
        "Tensor? cu_seqlens, Tensor[] state, Tensor? eta_logit, Tensor inv_freq, *, " CODA_MEMORY_SCHEMA ", "
        CODA_ATTENTION_SCHEMA ", int segment=32768) -> (Tensor y, Tensor[] new_state)");
  m.def("_bounded_read(Tensor q, Tensor k, Tensor v, Tensor? lam, Tensor? theta, Tensor? norm_weight, Tensor gate, "
        "Tensor cu_seqlens, Tensor[] state, Tensor? eta_logit, Tensor inv_freq, *, " CODA_MEMORY_SCHEMA ", "
        CODA_ATTENTION_SCHEMA ") -> (Tensor y, Tensor[] new_state)");

  m.def("_clear_state_(Tensor(a!)[] state) -> ()");

  m.def("decode_step_(Tensor q, Tensor k, Tensor v, Tensor? lam, Tensor? theta, Tensor? norm_weight, Tensor gate, "
        "Tensor(a!)[] state, Tensor? eta_logit, Tensor inv_freq, *, " CODA_MEMORY_SCHEMA ", " CODA_ATTENTION_SCHEMA
        ") -> Tensor");
}
