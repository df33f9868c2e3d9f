"""Tables: what all rows share stands above, what differs inside, and lines fit a terminal."""

import re

from rows import ROWS, row

from evaluation import tables


def test_a_line_for_each_name_and_rule_by_nfe_and_the_learned_point_apart():
    nfe = {curve: [x["nfe"] for x in rows] for curve, rows in tables.curves_of(ROWS).items()}
    expected = {
        ("base", "eb"): [3.0, 5.0],
        ("trained", "learned"): [3.1],
        ("trained", "eb"): [2.3],
        ("trained", "top_k"): [5.0, 10.0],
    }
    assert nfe == expected and list(nfe) == list(expected)


def test_the_caption_says_what_all_rows_share_and_nothing_else():
    shared = "greedy, length 10, one block, no cache, 848 problems in 65 clusters"
    assert tables.conditions(ROWS) == shared
    rows = [
        row(
            "a",
            "top_k",
            k,
            nfe=5,
            solved=0.1,
            task="sudoku",
            cache="dual",
            temperature=0.5,
            block_length=5,
            clusters=k,
        )
        for k in (1, 2)
    ]
    shared = "sudoku, top_k, temperature 0.5, length 10, blocks of 5, dual cache, 848 problems"
    assert tables.conditions(rows) == shared


def test_the_table_has_a_column_for_what_differs_and_for_scores_that_all_rows_have(capsys):
    learned = row("a", "eb", "learned", 3.1, 0.24, adapter="", pass_at_n=0.5, samples=4, aup=7.25)
    fixed = row("a", "eb", 0.1, 2.3, 0.20, adapter="x", pass_at_n=0.25, samples=4, aup=7.25)
    tables.print_table([learned, fixed | {"cells": 0.5}])
    shared, header, *lines = capsys.readouterr().out.splitlines()
    assert shared.startswith("a: eb, greedy, length 10")
    explained = " ".join(lines[2:])
    columns = [
        "adapter",
        "level",
        "gamma",
        "solved",
        "pass@4",
        "95% interval",
        "reward",
        "NFE",
        "tokens/call",
        "AUP",
    ]
    assert re.split("  +", header.strip()) == columns
    assert re.split("  +", lines[1].strip()) == [
        "x",
        "0.1",
        "0.100 σ 0.010",
        "20.0%",
        "25.0%",
        "18.0% to 22.0%",
        "0.500",
        "2.30",
        "2.00",
        "7.2",
    ]
    assert explained.startswith("AUP: accuracy under parallelism") and "penalty" in explained


def test_long_names_of_runs_are_cut_where_they_are_alike():
    assert tables.shorten_name("countdown-joint", 15) == "countdown-joint"
    short = tables.shorten_name("countdown-joint-20261130-000235", 20)
    assert short == "countdown-…30-000235" and len(short) == 20


def test_what_may_steer_a_terminal_is_escaped_and_the_rest_is_not():
    assert tables.printable("γ ✓ 好 é") == "γ ✓ 好 é"
    assert tables.printable("\x1b[2J\n") == r"\x1b[2J\n"


def test_one_is_singular():
    assert tables.count_of(1, "problem") == "1 problem" and tables.count_of(2, "problem")[-1] == "s"
    one = tables.conditions([row("a", "eb", 0.1, 3.0, 1.0, problems=1, clusters=1)])
    assert "1 problem in 1 cluster" in one and "problems" not in one
