"""Chains of other lengths, as tasks: how many stages does a chain of a given length need?

    python -m models.make_base --task experiments/chains.py:chain12 --layers 2 --steps 1500 \\
        --habit_steps 600 --careless 0.5 --batch 128 --out bases/chain12
    python train.py --task experiments/chains.py:chain12 --model bases/chain12 --block_length 1
"""

from tasks.chain import Chain

chain4 = Chain(steps=4)
chain8 = Chain(steps=8)
chain12 = Chain(steps=12)
