#!/usr/bin/env bash
# The first quarter of an hour on a new GPU, tests/gpu.py's table; then its tests. Without one, all at small shape.
cd "$(dirname "$0")/.." || exit 1
python tests/gpu.py "$@"
python -m pytest -n 1 -rs tests/test_gpu.py tests/test_4bit.py
