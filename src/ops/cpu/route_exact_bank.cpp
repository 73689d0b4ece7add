#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../check.h"
#include "banks.h"

namespace coda::cpu {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> route_exact_bank(
    const at::Tensor& value_, const at::Tensor& gate_, const at::Tensor& position_, const at::Tensor& bank_value_,
    const at::Tensor& used_, const at::Tensor& last_touch_, double tau_exact, double tau_novel, double tau_match,
    bool refresh_on_hit, int64_t num_sinks) {
  check_route_exact_bank(value_, gate_, position_, bank_value_, used_, last_touch_, num_sinks);
  const auto value = value_.contiguous(), bank_value = bank_value_.contiguous(), used = used_.contiguous(),
             position = position_.contiguous(), gate = gate_.to(at::kDouble).contiguous();
  const int64_t batch = value.size(0), heads = value.size(1), candidates = value.size(2), dim = value.size(3),
                slots = bank_value.size(2);
  const auto slot = at::full({batch, candidates}, -1, position.options());
  const auto action = at::full({batch, candidates}, static_cast<int64_t>(RouteAction::kSkip), position.options());
  const auto last_touch = last_touch_.clone(at::MemoryFormat::Contiguous);
  if (slots == num_sinks) return {slot, action, last_touch};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, value.scalar_type(), "coda::route_exact_bank", [&] {
    const auto rows_of = [&](const at::Tensor& t, int64_t b, int64_t i) {
      return [&t, b, i, heads, dim](int64_t h) {
        return t.const_data_ptr<scalar_t>() + ((b * heads + h) * t.size(2) + i) * dim;
      };
    };
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        NoveltyBank<acc_t<scalar_t>> bank(slots, {num_sinks, tau_novel, tau_match, refresh_on_hit});
        int64_t* touched = last_touch.data_ptr<int64_t>() + b * slots;
        for (int64_t j = 0; j < slots; ++j) {
          bank.last_touch[j] = touched[j];
          bank.used[j] = used.const_data_ptr<bool>()[b * slots + j];
          if (bank.used[j]) bank.rows[j].load(heads, dim, rows_of(bank_value, b, j));
        }
        Rows<acc_t<scalar_t>> candidate;
        for (int64_t t = 0; t < candidates; ++t) {
          const int64_t at_candidate = b * candidates + t;
          if (!(gate.const_data_ptr<double>()[at_candidate] >= tau_exact)) continue;
          candidate.load(heads, dim, rows_of(value, b, t));
          const auto decision = bank.route(candidate, position.const_data_ptr<int64_t>()[at_candidate]);
          slot.data_ptr<int64_t>()[at_candidate] = decision.slot;
          action.data_ptr<int64_t>()[at_candidate] = static_cast<int64_t>(decision.action);
        }
        std::copy_n(bank.last_touch.data(), slots, touched);
      }
    });
  });
  return {slot, action, last_touch};
}

}  // namespace

TORCH_LIBRARY_IMPL(coda, CPU, m) { m.impl("route_exact_bank", route_exact_bank); }

}  // namespace coda::cpu
