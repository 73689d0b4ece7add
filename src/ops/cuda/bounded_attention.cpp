#include <string>
#include <vector>

#include <coda/ops/bounded.h>
#include <kernels/bounded_attention/launch.h>
#include <torch/library.h>

#include "../memory_args.h"
#include "bank_scan.h"
#include "launch.h"
#include "path.h"

namespace coda::cuda {
namespace {

constexpr const char* kPathVariable = "CODA_BOUNDED_ATTENTION_PATH";

// What a path is made of.
struct Kernels {
  decltype(&kernels::portable::bounded_attention_forward) forward;
  decltype(&kernels::portable::bounded_attention_backward_needs) needs;
  decltype(&kernels::portable::bounded_attention_backward) backward;
};
Kernels kernels_of(Path path) {
  switch (path) {
    case Path::kSm90:
      return {kernels::sm90::bounded_attention_forward, kernels::sm80::bounded_attention_backward_needs,
              kernels::sm80::bounded_attention_backward};
    case Path::kSm80:
      return {kernels::portable::bounded_attention_forward, kernels::sm80::bounded_attention_backward_needs,
              kernels::sm80::bounded_attention_backward};
    default:
      return {kernels::portable::bounded_attention_forward, kernels::portable::bounded_attention_backward_needs,
              kernels::portable::bounded_attention_backward};
  }
}

// Contiguous, from a multiple of 16 bytes on, as the fast paths read.
at::Tensor aligned(const at::Tensor& t) {
  const auto packed = t.contiguous();
  return reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16 == 0 ? packed : packed.clone();
}
State aligned_state(at::TensorList tensors) {
  std::vector<at::Tensor> held;
  held.reserve(tensors.size());
  for (const auto& t : tensors) held.push_back(aligned(t));
  return State::from_tensors(held);
}

// What is of q's narrower type goes into the accumulation type with the keys, in one launch.
bool is_narrow(const std::optional<at::Tensor>& t, const at::Tensor& q) {
  return t && t->scalar_type() == q.scalar_type() && q.scalar_type() != wide_type(q);
}
at::Tensor wide_place(const std::optional<at::Tensor>& t, const at::Tensor& q, bool as_is) {
  if (!is_narrow(t, q)) return widened(t, q);
  return as_is ? t->contiguous() : at::empty(t->sizes(), wide(q));
}

// The arguments in the form that kernels take; keeps the tensors alive. The snapshots come with `prepare`, so that the scan may
// be launched in between.
struct Problem {
  Path path;
  bool as_is;             // the sm90 forward: it takes lam and theta in the type that they have
  bool prepared = false;  // the preparation has been launched
  at::Tensor q, k, v, lam, theta, norm_weight, gate, cu_seqlens, inv_freq;
  at::Tensor narrow_lam, narrow_theta;  // those to widen
  at::Tensor claims;                    // of the sm90 forward
  Snapshots snapshots;
  State state;
  BankKeys turned;
  kernels::BoundedAttentionParams params{};

  Problem(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_, const std::optional<at::Tensor>& lam_,
          const std::optional<at::Tensor>& theta_, const std::optional<at::Tensor>& norm_weight_, const at::Tensor& gate_,
          const at::Tensor& cu_seqlens_, at::TensorList state_, const at::Tensor& inv_freq_, const MemoryOptions& memory,
          const AttentionOptions& attention, bool backward)
      : path(choose_path(kPathVariable, q_, scale_of(attention, q_.size(-1))).path),
        as_is(path == Path::kSm90 && !backward), q(aligned(q_)), k(aligned(k_)), v(aligned(v_)),
        lam(wide_place(lam_, q_, as_is)), theta(wide_place(theta_, q_, as_is)), norm_weight(widened(norm_weight_, q_)),
        gate(aligned(gate_)), cu_seqlens(int64(cu_seqlens_)), inv_freq(aligned(inv_freq_)), state(aligned_state(state_)),
        turned{k, state.k} {
    auto& p = params;
    p.sequences = state.k.size(0);
    p.tokens = q.size(0);
    p.chunk_rows = p.tokens / memory.chunk + 2 * p.sequences;
    p.heads = static_cast<int>(q.size(1));
    p.kv_heads = static_cast<int>(k.size(1));
    p.dim = static_cast<int>(q.size(2));
    p.streams = lam_ ? 2 : 1;
    set_memory(p, state, memory);
    p.bank_distance = memory.bank_distance.value_or(0);
    p.gate_bias = memory.gate_bias;
    p.mass_bias = memory.mass_bias;
    p.theta_interleaved = interleaved(attention.theta_pairs);
    p.scale = scale_of(attention, p.dim);
    p.norm_eps = attention.norm_eps;
    p.q = read(q);
    p.k = read(k);
    p.v = read(v);
    p.lam = read(lam);
    p.theta = read(theta);
    p.norm_weight = read(norm_weight);
    p.gate = read(gate);
    p.cu_seqlens = sequence_ends(cu_seqlens, p.tokens, p.sequences);
    p.tokens_seen = read<int64_t>(state.tokens_seen);
    p.state_k = read(state.k);
    p.state_v = read(state.v);
    p.state_gate = read(state.gate);
    p.inv_freq = read<double>(inv_freq);
    const auto widens = [&](const std::optional<at::Tensor>& t) { return !as_is && is_narrow(t, q); };
    if (widens(lam_)) narrow_lam = lam_->contiguous();
    if (widens(theta_)) narrow_theta = theta_->contiguous();
    if (turns()) turned = {at::empty_like(k), at::empty_like(state.k)};
    if (as_is) claims = at::empty({1}, q.options().dtype(at::kInt));
    p.kbar = read(turned.fresh);
    p.state_kbar = read(turned.state);
  }

  bool turns() const { return params.has_bank_distance && params.exact_slots > 0; }

  // Takes the snapshots and launches the preparation. behind_scan: see its params.
  void prepare(const Snapshots& made, bool behind_scan = false) {
    snapshots = {aligned(made.index), aligned(made.summary_k), aligned(made.summary_v), aligned(made.summary_mass)};
    params.index = read<int32_t>(snapshots.index);
    params.summary_k = read(snapshots.summary_k);
    params.summary_v = read(snapshots.summary_v);
    params.summary_mass = read(snapshots.summary_mass);
    auto p = with_outputs<kernels::BoundedAttentionPrepare>(params);
    p.behind_scan = behind_scan;
    p.narrow_lam = read(narrow_lam);
    p.narrow_theta = read(narrow_theta);
    if (p.narrow_lam) p.wide_lam = data(lam);
    if (p.narrow_theta) p.wide_theta = data(theta);
    if (turns()) {
      p.new_kbar = data(turned.fresh);
      p.new_state_kbar = data(turned.state);
    }
    p.claims = static_cast<uint32_t*>(data(claims));
    prepared = p.new_kbar || p.narrow_lam || p.narrow_theta;
    C10_CUDA_CHECK(kernels::bounded_attention_prepare(p, dtype_of(q), c10::cuda::getCurrentCUDAStream()));
  }
};

// The attention itself, into y (T, H, D), contiguous, and into what the backward takes of it; of size 0 what is not asked.
void run_forward(const Problem& problem, const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
                 const at::Tensor& y, const at::Tensor& o2, const at::Tensor& diff, const at::Tensor& lse) {
  auto p = with_outputs<kernels::BoundedAttentionForward>(problem.params);
  p.y = data(y);
  p.o2 = data(o2);
  p.diff = data(diff);
  p.lse = data(lse);
  p.narrow_lam = problem.as_is && is_narrow(lam, problem.q);
  p.narrow_theta = problem.as_is && is_narrow(theta, problem.q);
  p.prepared = problem.prepared;
  p.claims = static_cast<uint32_t*>(data(problem.claims));
  const bool rounds = problem.path == Path::kSm90 && p.summary_slots > 0;
  const auto summary_rounded =
      rounds ? at::empty({2, p.chunk_rows, p.kv_heads, p.summary_slots, p.dim}, y.options()) : at::empty({0}, y.options());
  p.summary_rounded = data(summary_rounded);
  C10_CUDA_CHECK(kernels_of(problem.path).forward(p, dtype_of(y), c10::cuda::getCurrentCUDAStream()));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
    const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
    const at::Tensor& cu_seqlens, at::TensorList state, const at::Tensor& index, const at::Tensor& summary_k,
    const at::Tensor& summary_v, const at::Tensor& summary_mass, const at::Tensor& inv_freq, CODA_MEMORY_PARAMS,
    CODA_ATTENTION_PARAMS, bool save) {
  const c10::cuda::CUDAGuard guard(q.device());
  Problem problem(q, k, v, lam, theta, norm_weight, gate, cu_seqlens, state, inv_freq, CODA_MEMORY_OPTIONS,
                  CODA_ATTENTION_OPTIONS, false);
  problem.prepare({index, summary_k, summary_v, summary_mass});
  const auto saved = [&](bool present) {
    return save && present ? at::empty(q.sizes(), q.options()) : at::empty({0}, q.options());
  };
  const auto y = at::empty(q.sizes(), q.options()), o2 = saved(lam.has_value()), diff = saved(norm_weight.has_value());
  const auto lse = at::empty({save ? problem.params.streams : 0, q.size(0), q.size(1)}, wide(q));
  run_forward(problem, lam, theta, y, o2, diff, lse);
  return {y, o2, diff, lse};
}

void forward_into(
    const at::Tensor& y, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
    const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
    const at::Tensor& cu_seqlens, at::TensorList state, const at::Tensor& index, const at::Tensor& summary_k,
    const at::Tensor& summary_v, const at::Tensor& summary_mass, const at::Tensor& inv_freq, CODA_MEMORY_PARAMS,
    CODA_ATTENTION_PARAMS) {
  const c10::cuda::CUDAGuard guard(q.device());
  Problem problem(q, k, v, lam, theta, norm_weight, gate, cu_seqlens, state, inv_freq, CODA_MEMORY_OPTIONS,
                  CODA_ATTENTION_OPTIONS, false);
  problem.prepare({index, summary_k, summary_v, summary_mass});
  const auto none = at::empty({0}, q.options());
  run_forward(problem, lam, theta, y, none, none, none);
}

std::tuple<at::Tensor, std::vector<at::Tensor>> scan_and_attend(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lam,
    const std::optional<at::Tensor>& theta, const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate,
    const at::Tensor& cu_seqlens, at::TensorList state, const std::optional<at::Tensor>& eta_logit, const at::Tensor& inv_freq,
    CODA_MEMORY_PARAMS, CODA_ATTENTION_PARAMS) {
  const c10::cuda::CUDAGuard guard(q.device());
  Problem problem(q, k, v, lam, theta, norm_weight, gate, cu_seqlens, state, inv_freq, CODA_MEMORY_OPTIONS,
                  CODA_ATTENTION_OPTIONS, false);
  const Scan scan(problem.k, problem.v, problem.gate, problem.cu_seqlens, problem.state.tensors(), eta_logit, problem.inv_freq,
                  CODA_MEMORY_OPTIONS);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  bool copied = false;
  C10_CUDA_CHECK(kernels::bank_scan_snapshots(scan.params, dtype_of(q), stream, copied));
  problem.prepare({scan.index, scan.summary_k, scan.summary_v, scan.summary_mass}, /*behind_scan=*/true);
  const auto y = at::empty(q.sizes(), q.options()), none = at::empty({0}, q.options());
  run_forward(problem, lam, theta, y, none, none, none);
  if (!copied) {  // beside the last of the attention
    C10_CUDA_CHECK(kernels::bank_scan_new_state(scan.params, dtype_of(q), stream, /*behind_attention=*/true));
  }
  return {y, scan.made.tensors()};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
           at::Tensor, at::Tensor, at::Tensor, at::Tensor>
backward(const at::Tensor& grad_y, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
         const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& theta,
         const std::optional<at::Tensor>& norm_weight, const at::Tensor& gate, const at::Tensor& cu_seqlens,
         at::TensorList state, const at::Tensor& index, const at::Tensor& summary_k, const at::Tensor& summary_v,
         const at::Tensor& summary_mass, const at::Tensor& inv_freq, const at::Tensor& y, const at::Tensor& o2,
         const at::Tensor& diff, const at::Tensor& lse_, CODA_MEMORY_PARAMS, CODA_ATTENTION_PARAMS) {
  const c10::cuda::CUDAGuard guard(q.device());
  Problem problem(q, k, v, lam, theta, norm_weight, gate, cu_seqlens, state, inv_freq, CODA_MEMORY_OPTIONS,
                  CODA_ATTENTION_OPTIONS, true);
  problem.prepare({index, summary_k, summary_v, summary_mass});
  const auto out = output_gradient(aligned(grad_y), y.contiguous(), o2.contiguous(), diff.contiguous(), problem.lam,
                                   problem.norm_weight, norm_eps);
  const auto lse = lse_.contiguous(), grad_diff = aligned(out.grad_diff);
  const auto dtype = dtype_of(q);
  const auto path = kernels_of(problem.path);
  const auto needs = path.needs(problem.params, dtype);
  const auto options = wide(q);
  const auto& held = problem.state;
  auto p = with_outputs<kernels::BoundedAttentionBackward>(problem.params);
  const auto grad_q = at::empty(q.sizes(), q.options()), grad_k = at::empty(k.sizes(), k.options()),
             grad_v = at::empty(v.sizes(), v.options()), grad_state_k = at::empty(held.k.sizes(), k.options()),
             grad_state_v = at::empty(held.v.sizes(), v.options());
  const auto grad_summary_k = at::zeros(summary_k.sizes(), options), grad_summary_v = at::zeros(summary_v.sizes(), options);
  const auto theta_partial =
      theta ? at::zeros({needs.theta_shares, p.heads, p.dim / 2}, options) : at::empty({0}, options);
  const auto gate_partial = at::zeros({p.tokens, p.kv_heads}, options);
  const auto state_gate_partial = at::zeros({p.sequences, p.kv_heads, held.k.size(2)}, options);
  const auto mass_partial = at::zeros({p.chunk_rows, p.kv_heads, p.summary_slots}, options);
  const auto scratch = workspace(needs.workspace_bytes, q);
  p.lse = read(lse);
  p.grad_diff = read(grad_diff);
  p.delta = read(out.delta);
  p.grad_q = data(grad_q);
  p.grad_k = data(grad_k);
  p.grad_v = data(grad_v);
  p.grad_state_k = data(grad_state_k);
  p.grad_state_v = data(grad_state_v);
  p.grad_summary_k = data(grad_summary_k);
  p.grad_summary_v = data(grad_summary_v);
  p.theta_partial = data(theta_partial);
  p.gate_partial = data(gate_partial);
  p.state_gate_partial = data(state_gate_partial);
  p.mass_partial = data(mass_partial);
  p.workspace = data(scratch);
  C10_CUDA_CHECK(path.backward(p, dtype, c10::cuda::getCurrentCUDAStream()));
  const bool shared = p.gate_groups < p.kv_heads;
  return {grad_q,
          grad_k,
          grad_v,
          gradient_like(out.grad_lam, lam),
          gradient_like(theta ? theta_partial.sum(0) : theta_partial, theta),
          gradient_like(out.grad_norm_weight, norm_weight),
          shared ? gate_partial.sum(1, true) : gate_partial,
          grad_state_k,
          grad_state_v,
          shared ? state_gate_partial.sum(1, true) : state_gate_partial,
          grad_summary_k,
          grad_summary_v,
          mass_partial.sum(1)};
}

std::tuple<std::string, std::string> path(const at::Tensor& q, std::optional<double> scale) {
  const auto choice = choose_path(kPathVariable, q, scale.value_or(1.0));
  return {name_of(choice.path), choice.reason};
}

}  // namespace

TORCH_LIBRARY_IMPL(coda, CUDA, m) {
  m.impl("bounded_attention_path", path);
  m.impl("_bounded_attention_forward", forward);
  m.impl("_bounded_attention_into_", forward_into);
  m.impl("_bounded_read", scan_and_attend);
  m.impl("_bounded_attention_backward", backward);
}

}  // namespace coda::cuda
