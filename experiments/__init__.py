"""The paper's claims measured, benchmarks, and the grids behind EXPERIMENTS.md."""
