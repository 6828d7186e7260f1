from dae.sampling.ar import filter_logits, sample_tokens
from dae.sampling.chain import balanced_labels, generate, load_chain

__all__ = ["balanced_labels", "filter_logits", "generate", "load_chain", "sample_tokens"]
