from dae.sampling.ar import filter_logits, sample_tokens

__all__ = ["filter_logits", "sample_tokens"]
