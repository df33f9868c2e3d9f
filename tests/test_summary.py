"""What a run says of itself is true whatever happened: better, worse, the same, one problem."""

import json
import random
import re
from types import SimpleNamespace

import pytest

from config import Config
from evaluation import summary

LEARNED = {"level": "learned", "threshold_mean": 0.0402, "threshold_std": 0.0081}


def row(name, solved, nfe, tokens=2.0, spread=0.02, **others):
    """A row as evaluate makes it."""
    interval = {"solved_low": max(0.0, solved - spread), "solved_high": min(1.0, solved + spread)}
    about = {"name": name, "level": 0.1, "problems": 848, "clusters": 65, "length": 10}
    about |= {"block_length": 10, "solved": solved, "nfe": nfe, "tokens_per_call": tokens}
    return about | interval | others


BASE = row("base", 0.131, 4.93, 2.03)
TRAINED = row("trained", 0.236, 3.15, 3.17, **LEARNED)
START = row("trained at the starting γ", 0.2, 2.31, 4.33)


def said(rows, best=None, train_target="joint", frontier=True):
    return summary.describe_results(
        rows, best or rows[0], Config(train_target=train_target, frontier=frontier)
    )


def test_a_better_and_faster_model_in_words():
    assert said([BASE, TRAINED, START]) == [
        "Accuracy: 13.1% (base at its best γ, 0.1) to 23.6% of 848 held-out problems, "
        "+10.5 points. The 95% intervals do not overlap.",
        "Speed: 4.93 (the same base) to 3.15 calls a completion, 36% fewer.",
        "Why: at γ 0.1, where training began, the new weights alone change calls by -2.62 and "
        "accuracy by +6.9 points: the model is surer than before (4.33 tokens a call, before "
        "2.03). γ, at first 0.1 and now 0.040 ±0.008, changes calls by +0.84 and accuracy by "
        "+3.6 points.",
    ]


def test_a_worse_and_slower_model_in_words():
    start = row("trained at the starting γ", 0.07, 6.0, 1.6)
    accuracy, speed, why = said([BASE, row("trained", 0.08, 7.0, 1.4, **LEARNED), start])
    assert "to 8.0%" in accuracy and "-5.1 points" in accuracy and "do not overlap" in accuracy
    assert "4.93 (the same base) to 7.00 calls a completion, 42% more." in speed
    assert "calls by +1.07 and accuracy by -6.1 points: the model is less sure than" in why
    assert "calls by +1.00 and accuracy by +1.0 points" in why


def test_what_did_not_change_is_called_so():
    same = [BASE | {"name": "trained"} | LEARNED, BASE | {"name": "trained at the starting γ"}]
    accuracy, speed, why = said([BASE, *same])
    assert accuracy.endswith("problems, no change.") and speed.endswith("about as many.")
    assert "as sure as before" in why and why.count("calls by +0.00 and accuracy by +0.0") == 2


@pytest.mark.parametrize(
    ("solved", "spread", "overlap"),
    [(0.16, 0.02, True), (0.18, 0.02, False), (0.11, 0.02, True), (0.05, 0.02, False)],
)
def test_a_difference_within_the_noise_is_called_so(solved, spread, overlap):
    trained = row("trained", solved, 3.0, spread=spread)
    accuracy = said([BASE, trained], train_target="policy")[0]
    assert ("within the noise" in accuracy) == overlap
    assert ("do not overlap" in accuracy) != overlap


def test_one_problem_is_one_problem_and_proves_nothing():
    """Wilson's intervals, which evaluate gives there, are 0 to 0.79 and 0.21 to 1."""
    one = {"problems": 1, "clusters": 1}
    base = row("base", 0.0, 5.0, **one) | {"solved_high": 0.79}
    trained = row("trained", 1.0, 4.0, **one) | {"solved_low": 0.21}
    accuracy = said([base, trained], train_target="policy")[0]
    assert "0.0%" in accuracy and "100.0% of 1 held-out problem, +100.0 points" in accuracy
    assert "within the noise" in accuracy


def test_what_did_not_learn_is_given_no_part():
    why = said([BASE, row("trained", 0.2, 2.31, 4.33)], train_target="policy")[2]
    assert why.endswith("γ did not learn.") and why.count("change") == 1
    why = said(
        [BASE, TRAINED, BASE | {"name": "trained at the starting γ"}], train_target="sampler"
    )[2]
    assert why.startswith("Why: the weights did not learn. γ, at first 0.1 and now 0.040 ±0.008,")
    assert "calls by -1.78 and accuracy by +10.5 points" in why and why.count("change") == 1


def test_accuracy_and_speed_are_against_the_base_at_its_best_gamma():
    best = row("base", 0.15, 3.5, level=1.0)
    accuracy, speed, why = said([BASE, TRAINED, START], best)
    assert "15.0% (base at its best γ, 1) to 23.6%" in accuracy and "+8.6 points" in accuracy
    assert "3.50 (the same base) to 3.15 calls a completion, 10% fewer." in speed
    assert "at γ 0.1, where training began" in why and "-2.62" in why
    assert "(base at γ 0.1)" in said([BASE, TRAINED, START], frontier=False)[0]


def test_the_parts_add_up_to_what_the_table_shows():
    rng = random.Random(0)
    for _ in range(200):
        rows = [row(name, rng.random(), rng.uniform(1, 256)) for name in "abc"]
        rows[1] |= LEARNED
        why = said(rows)[2]
        lines = list(summary.table(rows))[1:4]
        nfe = [float(line.split()[-2]) for line in lines]
        solved = [float(re.search(r"([0-9.]+) \(", line)[1]) for line in lines]
        for values, kind in ((nfe, "calls by"), (solved, "accuracy by")):
            parts = [float(x) for x in re.findall(rf"{kind} ([+-][0-9.]+)", why)]
            assert sum(parts) == pytest.approx(values[1] - values[0], abs=1e-9)


def test_the_table_fits_80_columns_and_names_each_row():
    wide = row("trained at the starting γ", 1.0, 256.0, 256.0, level=0.123456)
    high = row("trained", 0.5, 1.0) | LEARNED | {"threshold_mean": 10.0, "threshold_std": 10.0}
    lines = list(summary.table([BASE, high, wide | {"solved_low": 0.9822}]))
    assert max(map(len, lines)) <= 80
    assert [line[:25].strip() for line in lines[1:4]] == ["base", "trained", wide["name"]]
    assert "10.000 ±10.000" in lines[2] and "100.0 (98.2 to 100.0)" in lines[3]
    below = " ".join(lines[4:])
    assert "848 held-out problems in 65 clusters, greedy, 10 tokens a completion." in below
    assert "blocks of 5" in " ".join(summary.table([BASE | {"block_length": 5}]))


def test_the_table_of_several_tasks_has_each_ones_line_below_each_models():
    part = row("", 0.3, 12.5, level="learned", length=19)
    parts = {"countdown": row("", 0.25, 2.5, **LEARNED), "/a/b/" + "long" * 20 + ".py:Own": part}
    for one in parts.values():
        del one["name"], one["level"]
    both = {"length": 19, "block_length": 19, "tasks": parts}
    parts["/a/b/" + "long" * 20 + ".py:Own"] |= {"threshold_mean": 1.5, "threshold_std": 0.25}
    lines = list(summary.table([BASE | both, TRAINED | both]))
    assert max(map(len, lines)) <= 80
    names = [line[:11].rstrip() for line in lines[1:7]]
    assert names == ["base", "  countdown", "  Own", "trained", "  countdown", "  Own"]
    assert lines[2].split()[1:] == ["0.1", "25.0", "(23.0", "to", "27.0)", "2.50", "2.00"]
    assert "1.500 ±0.250" in lines[6] and lines[6].split()[-2:] == ["12.50", "2.00"]
    assert "10 or 19 tokens a completion. In" in " ".join(lines[7:])


def test_the_frontier_is_told_by_its_areas():
    base, trained = [row("base", 0.2, 3.0)], [row("trained", 0.4, 2.0)]
    line = summary.frontier(base, trained)  # nothing below 2 and 3 calls
    assert "budgets of 1 to 3 calls" in line and "(frontier.png)" in line
    shares = [float(x) for x in re.findall(r"([0-9.]+)%", line)]
    assert shares[0] < 1 and shares[1] == pytest.approx(20, abs=1)


# ---- completions ---------------------------------------------------------------------------------


def completion(name, text, solved=False, asked="3 4 5 = 35"):
    return {"name": name, "asked": asked, "text": text, "nfe": 3, "solved": solved}


def test_completions_are_shown_side_by_side_with_calls_and_marks():
    texts = [completion("base", "wrong"), completion("trained", "( 3 + 4 ) * 5", True)]
    lines = list(summary.completions(texts, BASE))
    assert lines == [
        "The first 1 of 848 held-out problems, greedy, each model at its own γ:",
        "  3 4 5 = 35",
        "    base     ✗ NFE 3  wrong",
        "    trained  ✓ NFE 3  ( 3 + 4 ) * 5",
    ]


def test_a_hostile_completion_cannot_steer_the_terminal():
    hostile = "\x1b[2Jgone\r\n\x07\x9b31m \u202eright to left \ud800 " + "long " * 100
    texts = [completion(name, hostile, asked=hostile) for name in ("base", "trained")]
    for line in summary.completions(texts, BASE):
        assert line.isprintable() and len(line) <= 80
        line.encode("utf-8")
    shown = list(summary.completions(texts, BASE))[2]
    assert r"\x1b[2Jgone\r\n\x07\x9b31m \u202eright" in shown and shown.endswith("…")
    assert summary.printable("γ ✓ 好 é") == "γ ✓ 好 é"


# ---- while it runs -------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "lines"), [(300, 10), (25, 10), (10, 10), (3, 3), (1, 1)])
def test_a_line_stays_for_every_tenth_of_a_run(tmp_path, steps, lines):
    kept, file = [], tmp_path / "metrics.jsonl"
    bar = SimpleNamespace(total=steps, write=kept.append)
    with open(file, "w") as log:
        for step in range(1, steps + 1):
            names = ("reward", "solved", "nfe", "threshold")
            metrics = {f"{name}_mean": step / 1000 for name in names}
            metrics |= {"step": step, "seconds_rollout": 1.5, "seconds_update": 0.5}
            print(json.dumps(metrics), file=log, flush=True)
            summary.print_progress(tmp_path, bar, step)
    assert len(kept) == lines and all(len(line) <= 80 for line in kept)
    w = max(1, steps // 10)
    mean = sum(range(steps - w + 1, steps + 1)) / w / 1000
    assert kept[-1].startswith(f"step {steps}/{steps}  reward {mean:.3f}  solved {mean:5.1%}")
    assert kept[-1].endswith(f"  {2 * steps} s")


def test_a_run_without_a_frontier_says_nothing_of_one(tmp_path, capsys):
    rows = [BASE, TRAINED, START]
    texts = [completion("base", "a"), completion("trained", "b")]
    every = [BASE, row("base", 0.15, 3.5, level=1.0), TRAINED]
    for frontier in (True, False):
        for name, value in (("eval", rows), ("completions", texts), ("frontier", every)):
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        every = [BASE, TRAINED]
        summary.print_summary(tmp_path, Config(frontier=frontier))
        out = capsys.readouterr().out
        assert ("frontier.png" in out) == frontier
        assert ("base at its best γ  " in out) == frontier
        assert max(map(len, out.splitlines())) <= 80
