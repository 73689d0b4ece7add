"""Measurements of speed and of what a bounded memory costs; ``python -m benchmarks.run`` lists them."""
