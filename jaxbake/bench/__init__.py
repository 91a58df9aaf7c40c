"""Speed, measured: the step, the divergence, the sampler, the reading of weights; alone and beside others."""
