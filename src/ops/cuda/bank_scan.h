#pragma once

// The scan as ops launch it.

#include <kernels/bank_scan/launch.h>

#include "../memory_args.h"
#include "launch.h"

namespace coda::cuda {

// The arguments in the form that kernels take; keeps the tensors alive.
struct ScanProblem {
  at::Tensor k, v, gate, cu_seqlens, eta_logit, inv_freq;
  State state;
  BankKeys turned;
  kernels::BankScanParams params{};

  ScanProblem(const at::Tensor& k_, const at::Tensor& v_, const at::Tensor& gate_, const at::Tensor& cu_seqlens_,
              at::TensorList state_, const std::optional<at::Tensor>& eta_logit_, const at::Tensor& inv_freq_,
              const MemoryOptions& memory)
      : k(k_.contiguous()), v(v_.contiguous()), gate(gate_.contiguous()), cu_seqlens(int64(cu_seqlens_)),
        eta_logit(widened(eta_logit_, k_)), inv_freq(inv_freq_.contiguous()), state(contiguous_state(state_)) {
    auto& p = params;
    p.sequences = state.k.size(0);
    p.tokens = k.size(0);
    p.chunk_rows = p.tokens / memory.chunk + 2 * p.sequences;
    p.kv_heads = static_cast<int>(k.size(1));
    p.dim = static_cast<int>(k.size(2));
    set_memory(p, state, memory);
    set_rule(p, memory);
    // Only the summary bank reads turned keys; copies into the exact bank turn their own.
    turned = p.summary_slots > 0 ? bank_keys(k, state, cu_seqlens, inv_freq, memory) : BankKeys{k, state.k};
    p.k = read(k);
    p.v = read(v);
    p.gate = read(gate);
    p.cu_seqlens = sequence_ends(cu_seqlens, p.tokens, p.sequences);
    p.state_k = read(state.k);
    p.state_v = read(state.v);
    p.state_gate = read(state.gate);
    p.exact_pos = read<int64_t>(state.exact_pos);
    p.tokens_seen = read<int64_t>(state.tokens_seen);
    p.last_touch = read<int64_t>(state.last_touch);
    p.state_summary_k = read(state.summary_k);
    p.state_summary_v = read(state.summary_v);
    p.state_summary_mass = read(state.summary_mass);
    p.eta_logit = read(eta_logit);
    p.inv_freq = read<double>(inv_freq);
    p.kbar = read(turned.fresh);
    p.state_kbar = read(turned.state);
  }
};

// A scan with the tensors that it writes.
struct Scan : ScanProblem {
  at::Tensor index, summary_k, summary_v, summary_mass, source, assignment, scratch;
  State made;
  kernels::BankScanForward params;

  Scan(const at::Tensor& k_, const at::Tensor& v_, const at::Tensor& gate_, const at::Tensor& cu_seqlens_, at::TensorList state_,
       const std::optional<at::Tensor>& eta_logit_, const at::Tensor& inv_freq_, const MemoryOptions& memory)
      : ScanProblem(k_, v_, gate_, cu_seqlens_, state_, eta_logit_, inv_freq_, memory),
        params(with_outputs<kernels::BankScanForward>(ScanProblem::params)) {
    auto& p = params;
    const auto int32 = k.options().dtype(at::kInt);
    const auto fresh = [](const at::Tensor& t) { return at::empty(t.sizes(), t.options()); };
    index = at::empty({p.chunk_rows, static_cast<int64_t>(p.gate_groups), static_cast<int64_t>(p.exact_slots)}, int32);
    summary_k = at::empty({p.chunk_rows, p.kv_heads, p.summary_slots, p.dim}, state.summary_k.options());
    summary_v = at::empty_like(summary_k);
    summary_mass = at::empty({p.chunk_rows, p.summary_slots}, state.summary_mass.options());
    source = at::empty({p.sequences, p.gate_groups, p.exact_slots}, int32);
    assignment = at::empty({p.chunk_rows, p.summary_slots > 0 ? p.chunk : 0}, int32);
    made = {.k = fresh(state.k),
            .v = fresh(state.v),
            .gate = fresh(state.gate),
            .exact_pos = fresh(state.exact_pos),
            .tokens_seen = fresh(state.tokens_seen),
            .last_touch = fresh(state.last_touch),
            .counts = fresh(state.counts),
            .summary_k = fresh(state.summary_k),
            .summary_v = fresh(state.summary_v),
            .summary_mass = fresh(state.summary_mass)};
    p.index = data<int32_t>(index);
    p.summary_k = data(summary_k);
    p.summary_v = data(summary_v);
    p.summary_mass = data(summary_mass);
    p.source = data<int32_t>(source);
    p.assignment = data<int32_t>(assignment);
    p.new_k = data(made.k);
    p.new_v = data(made.v);
    p.new_gate = data(made.gate);
    p.new_exact_pos = data<int64_t>(made.exact_pos);
    p.new_last_touch = data<int64_t>(made.last_touch);
    p.counts = read<int64_t>(state.counts);
    p.new_tokens_seen = data<int64_t>(made.tokens_seen);
    p.new_counts = data<int64_t>(made.counts);
    p.new_summary_k = data(made.summary_k);
    p.new_summary_v = data(made.summary_v);
    p.new_summary_mass = data(made.summary_mass);
    scratch = workspace(kernels::bank_scan_workspace(p, dtype_of(k)), k);
    p.workspace = data(scratch);
  }
};

}  // namespace coda::cuda
