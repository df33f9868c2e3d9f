#!/usr/bin/env bash
# The first half hour on a new GPU: its tests, then tests/gpu.py's table. Without one, all at small shape.
cd "$(dirname "$0")/.." || exit 1
python -m pytest -n 1 -rs tests/test_gpu.py tests/test_4bit.py
python tests/gpu.py "$@"
