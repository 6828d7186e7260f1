"""How complex a generator a latent needs: the generator-induced distance D^G, complexity curves, and the latent that is best."""
