"""Training: config, objective, optimizer, the loop, and a run's folder. Knows no host."""
