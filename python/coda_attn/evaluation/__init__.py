"""Measuring a model under a bounded memory: perplexity, bytes, and the texts to read."""

from .corpus import default_text, library_docs, read_text, wiki_summaries
from .memory import SHAPES, ModelShape, full_bytes, memory_rows, state_bytes
from .perplexity import POLICIES, perplexity_rows, reading, stream_perplexity, token_losses, window_config

__all__ = ["POLICIES", "SHAPES", "ModelShape", "default_text", "full_bytes", "library_docs", "memory_rows", "perplexity_rows",
           "read_text", "reading", "state_bytes", "stream_perplexity", "token_losses", "wiki_summaries", "window_config"]
