import pathlib
import sys

# The benchmarks are run from the source tree and not installed.
sys.path.append(str(pathlib.Path(__file__).parents[3]))
