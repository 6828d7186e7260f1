"""What a training will take, before it runs: parameters, memory by part, arithmetic, time, tokens, and size of the cache."""
