"""Fused operations for latent generative models; works with torch alone, uses Triton where it launches."""
