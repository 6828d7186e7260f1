from dae.priors.ar import filter_logits, sample_tokens
from dae.priors.dit import log_likelihood, sample_latents
from dae.sampling.chain import balanced_labels, generate, load_chain

__all__ = ["balanced_labels", "filter_logits", "generate", "load_chain", "log_likelihood", "sample_latents", "sample_tokens"]
