#pragma once

// The whole public C++ API of CoDA-GQA-L.

#include <coda/export.h>
#include <coda/nn/coda_gqa_l.h>
#include <coda/ops/apply_rope.h>
#include <coda/ops/bounded.h>
#include <coda/ops/diff_attention.h>
#include <coda/ops/route_exact_bank.h>
#include <coda/options.h>
#include <coda/state.h>
