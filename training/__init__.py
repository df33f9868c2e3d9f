"""What surrounds the loop: run folder, checkpoints, several processes, logs, health checks."""
