#!/usr/bin/env bash
# run.sh BUILD_FOLDER: builds and runs the consumer project against the installed package, the way a user outside this tree does,
# and checks that another torch is refused by name.
set -euo pipefail
source=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
build=$1
prefix=$(python -c 'import coda_attn; print(coda_attn.cmake_prefix_path)')

cmake -S "$source" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$prefix"
cmake --build "$build"
"$build/consumer"
"$build/readme"

other=$build/other-torch
mkdir -p "$other/include/torch/headeronly" "$other/include/torch/csrc/api/include/torch"
printf '#define TORCH_VERSION_%s\n' 'MAJOR 2' 'MINOR 1' 'PATCH 3' > "$other/include/torch/headeronly/version.h"
touch "$other/include/torch/csrc/api/include/torch/torch.h"
if cmake -S "$source" -B "$build/refused" -G Ninja -DCMAKE_PREFIX_PATH="$prefix" -DCODA_TORCH_ROOT="$(realpath "$other")" \
    > "$build/refused.log" 2>&1; then
  echo "find_package(coda) accepted torch 2.1.3" >&2
  exit 1
fi
# CMake wraps its messages, so words are compared, not lines.
if ! tr -s ' \n' ' ' < "$build/refused.log" | grep -Eq 'was built for torch 2\.[0-9]+, but .* holds torch 2\.1\.3'; then
  cat "$build/refused.log" >&2
  exit 1
fi
