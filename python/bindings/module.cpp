#include <tuple>
#include <utility>
#include <vector>

#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <coda/coda.h>

namespace py = pybind11;

namespace {

using Projection = std::pair<at::Tensor, std::optional<at::Tensor>>;

coda::CodaGqaLOptions make_options(
    int64_t embed_dim, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, double rope_base, int64_t window, int64_t chunk,
    int64_t exact_slots, int64_t summary_slots, const std::string& policy, const std::string& gates, int64_t num_sinks,
    double age_decay, std::optional<int64_t> bank_distance, bool differential, std::optional<bool> gate_bias, bool mass_bias,
    int64_t exact_candidates, double tau_exact, double tau_summary, double tau_novel, double tau_match, double tau_spawn,
    bool refresh_on_hit, const std::string& summary_routing, const std::string& theta_pairs, const std::string& rope_pairs,
    const std::string& head_norm, double norm_eps) {
  auto options = coda::CodaGqaLOptions(embed_dim, num_heads, num_kv_heads)
                     .head_dim(head_dim)
                     .rope_base(rope_base)
                     .window(window)
                     .chunk(chunk)
                     .exact_slots(exact_slots)
                     .summary_slots(summary_slots)
                     .policy(coda::parse_policy(policy))
                     .gates(coda::parse_gates(gates))
                     .num_sinks(num_sinks)
                     .age_decay(age_decay)
                     .bank_distance(bank_distance)
                     .differential(differential)
                     .gate_bias(gate_bias)
                     .mass_bias(mass_bias)
                     .exact_candidates(exact_candidates)
                     .tau_exact(tau_exact)
                     .tau_summary(tau_summary)
                     .tau_novel(tau_novel)
                     .tau_match(tau_match)
                     .tau_spawn(tau_spawn)
                     .refresh_on_hit(refresh_on_hit)
                     .summary_routing(coda::parse_summary_routing(summary_routing))
                     .theta_pairs(coda::parse_pairs(theta_pairs))
                     .rope_pairs(coda::parse_pairs(rope_pairs))
                     .head_norm(coda::parse_head_norm(head_norm))
                     .norm_eps(norm_eps);
  options.validate();
  return options;
}

coda::CodaGqaLWeights make_weights(Projection q, Projection k, Projection v, Projection o, std::optional<Projection> lambda,
                                   Projection write, std::optional<at::Tensor> theta,
                                   std::optional<at::Tensor> summary_eta_logit, std::optional<at::Tensor> norm_weight) {
  const auto take = [](Projection& p) {
    return coda::CodaGqaLWeights::Projection{std::move(p.first), std::move(p.second)};
  };
  return {.q = take(q),
          .k = take(k),
          .v = take(v),
          .o = take(o),
          .lambda = lambda ? std::optional(take(*lambda)) : std::nullopt,
          .write = take(write),
          .theta = std::move(theta),
          .summary_eta_logit = std::move(summary_eta_logit),
          .norm_weight = std::move(norm_weight)};
}

std::tuple<at::Tensor, std::vector<at::Tensor>> forward_bounded(const coda::CodaGqaLOptions& options,
                                                                const coda::CodaGqaLWeights& weights, const at::Tensor& x,
                                                                const std::vector<at::Tensor>& tensors) {
  auto state = coda::State::from_tensors(tensors);
  auto y = coda::coda_gqa_l_bounded(options, weights, x, state);
  return {std::move(y), state.tensors()};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ layer coda::CodaGqaL as functions of options, weights and state; coda_attn.CodaGqaL owns the parameters.";

  py::class_<coda::CodaGqaLOptions>(m, "CodaGqaLOptions", "Validated options of one layer: those of coda_attn.CodaGqaL.")
      .def(py::init(torch::wrap_pybind_function(make_options)), py::arg("embed_dim"), py::arg("num_heads"),
           py::arg("num_kv_heads"), py::kw_only(), py::arg("head_dim"), py::arg("rope_base"), py::arg("window"),
           py::arg("chunk"), py::arg("exact_slots"), py::arg("summary_slots"), py::arg("policy"), py::arg("gates"),
           py::arg("num_sinks"), py::arg("age_decay"), py::arg("bank_distance"), py::arg("differential"),
           py::arg("gate_bias"), py::arg("mass_bias"), py::arg("exact_candidates"), py::arg("tau_exact"),
           py::arg("tau_summary"), py::arg("tau_novel"), py::arg("tau_match"), py::arg("tau_spawn"),
           py::arg("refresh_on_hit"), py::arg("summary_routing"), py::arg("theta_pairs"), py::arg("rope_pairs"),
           py::arg("head_norm"), py::arg("norm_eps"))
      .def_property_readonly("head_dim", [](const coda::CodaGqaLOptions& options) { return options.head_dim(); })
      .def_property_readonly("gate_groups", &coda::CodaGqaLOptions::gate_groups);

  py::class_<coda::CodaGqaLWeights>(m, "CodaGqaLWeights",
                                    "The parameters of one call. A projection is (weight, bias or None).")
      .def(py::init(torch::wrap_pybind_function(make_weights)), py::arg("q_proj"), py::arg("k_proj"), py::arg("v_proj"),
           py::arg("o_proj"), py::arg("lambda_proj"), py::arg("write_proj"), py::arg("theta"), py::arg("summary_eta_logit"),
           py::arg("head_norm"));

  m.def("forward", torch::wrap_pybind_function_no_gil(coda::coda_gqa_l), py::arg("options"), py::arg("weights"), py::arg("x"),
        "Causal attention over all of x (B, L, E) -> (B, L, E).");
  m.def("forward_bounded", torch::wrap_pybind_function_no_gil(forward_bounded), py::arg("options"), py::arg("weights"),
        py::arg("x"), py::arg("state"),
        "The next tokens x (B, L, E) after state, tensors in State order -> (y, state): the same tensors, overwritten, or "
        "new ones where autograd records.");
}
