"""Around the training loop: run folder, checkpoints, several processes, logs, health checks."""
