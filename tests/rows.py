"""Rows of results that are known, for tables and pictures."""


def row(name, rule, level, nfe, solved, **others):
    """A row as evaluate makes it."""
    return {
        "name": name,
        "decoder": rule,
        "level": level,
        "nfe": nfe,
        "solved": solved,
        "solved_low": solved - 0.02,
        "solved_high": solved + 0.02,
        "length": 10,
        "block_length": 10,
        "temperature": 0.0,
        "cache": "none",
        "problems": 848,
        "clusters": 65,
        "reward": 0.5,
        "tokens_per_call": 2.0,
        "threshold_mean": 0.1,
        "threshold_std": 0.01,
    } | others


ROWS = [
    row("base", "eb", 0.1, 5.0, 0.13),
    row("base", "eb", 1.0, 3.0, 0.10),
    row("trained", "eb", 0.1, 2.3, 0.20),
    row("trained", "eb", "learned", 3.1, 0.24),
    row("trained", "top_k", 2, 5.0, 0.22),
    row("trained", "top_k", 1, 10.0, 0.25),
]
