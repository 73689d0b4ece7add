#include <coda/options.h>

#include <c10/util/Exception.h>

namespace coda {

Pairs parse_pairs(const std::string& name) {
  if (name == "half") return Pairs::kHalf;
  if (name == "interleaved") return Pairs::kInterleaved;
  TORCH_CHECK_VALUE(false, "pairs '", name, "' is not supported; choose 'half' (i, i + D/2) or 'interleaved' (2i, 2i + 1)");
}

std::string to_string(Pairs pairs) { return pairs == Pairs::kHalf ? "half" : "interleaved"; }

Policy parse_policy(const std::string& name) {
  if (name == "retention") return Policy::kRetention;
  if (name == "novelty_lru") return Policy::kNoveltyLru;
  TORCH_CHECK_VALUE(false, "policy '", name, "' is not supported; choose 'retention' or 'novelty_lru'");
}

std::string to_string(Policy policy) { return policy == Policy::kRetention ? "retention" : "novelty_lru"; }

SummaryRouting parse_summary_routing(const std::string& name) {
  if (name == "value") return SummaryRouting::kValue;
  if (name == "low_freq_key") return SummaryRouting::kLowFreqKey;
  TORCH_CHECK_VALUE(false, "summary_routing '", name, "' is not supported; choose 'value' or 'low_freq_key'");
}

std::string to_string(SummaryRouting routing) { return routing == SummaryRouting::kValue ? "value" : "low_freq_key"; }

}  // namespace coda
