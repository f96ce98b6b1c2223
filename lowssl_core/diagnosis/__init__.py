"""The paper's diagnosis as an experiment: quality against crop scale, pixel scale or alpha."""
