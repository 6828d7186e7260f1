from dae.sampling.ar import filter_logits, sample_tokens
from dae.sampling.chain import balanced_labels, generate, load_chain
from dae.sampling.flow import log_likelihood, sample_latents

__all__ = ["balanced_labels", "filter_logits", "generate", "load_chain", "log_likelihood", "sample_latents", "sample_tokens"]
