#!/usr/bin/env bash
# What a new GPU is asked first: tests/gpu.py's table, then the GPU's tests. Without one, all at small shape.
cd "$(dirname "$0")/.." || exit 1
python tests/gpu.py "$@"
python -m pytest -n 1 -rs tests/test_gpu.py tests/test_4bit.py
