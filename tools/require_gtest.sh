#!/usr/bin/env bash
# Makes sure that the C++ tests find GoogleTest; as root on Debian or Ubuntu it installs the distribution's package.
set -euo pipefail
found() { echo '#include <gtest/gtest.h>' | "${CXX:-c++}" -E -x c++ - > /dev/null 2>&1; }

found && exit
if [[ $(id -u) == 0 ]] && command -v apt-get > /dev/null; then
  apt-get update -q
  DEBIAN_FRONTEND=noninteractive apt-get install -qy libgtest-dev
fi
found || { echo "the C++ tests need GoogleTest; install it (Debian and Ubuntu: apt-get install libgtest-dev)" >&2; exit 1; }
