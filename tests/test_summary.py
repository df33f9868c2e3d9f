"""What a run says of itself is true whatever happened: better, worse, the same, one problem."""

import json
from statistics import stdev

import pytest
from rows import ROWS

from evaluation import summary

LEARNED = {"level": "learned", "threshold_mean": 0.0402, "threshold_std": 0.0081}


def row(name, solved, nfe, tokens=2.0, spread=0.02, **others):
    """A row as evaluate makes it."""
    return {
        "name": name,
        "level": 0.1,
        "problems": 848,
        "clusters": 65,
        "length": 10,
        "block_length": 10,
        "solved": solved,
        "solved_low": max(0.0, solved - spread),
        "solved_high": min(1.0, solved + spread),
        "nfe": nfe,
        "tokens_per_call": tokens,
    } | others


BASE = row("base", 0.131, 4.93, tokens=2.03)
TRAINED = row("trained", 0.236, 3.15, tokens=3.17, **LEARNED)
START = row("trained at starting γ", 0.2, 2.31, tokens=4.33)


# ---- what changed --------------------------------------------------------------------------------


def test_a_better_and_faster_model_in_words():
    assert summary.describe_results(TRAINED, BASE, has_choice=True) == [
        "Accuracy: 13.1% (base at its best γ, 0.1) to 23.6% of 848 held-out problems, "
        "+10.5 points.",
        "Speed: 4.93 (the same base) to 3.15 calls per completion, 36% fewer.",
    ]


def test_a_worse_and_slower_model_in_words():
    trained = row("trained", 0.08, 7.0, tokens=1.4, **LEARNED)
    accuracy, speed = summary.describe_results(trained, BASE, has_choice=True)
    assert "to 8.0%" in accuracy and accuracy.endswith(", -5.1 points.")
    assert "4.93 (the same base) to 7.00 calls per completion, 42% more." in speed


def test_what_did_not_change_is_called_so():
    same = BASE | {"name": "trained"} | LEARNED
    accuracy, speed = summary.describe_results(same, BASE, has_choice=True)
    assert accuracy.endswith("problems, no change.") and speed.endswith("about as many.")


def row_of_each(name, solved_each, nfe_each, clusters):
    """A row whose problems are known one by one."""
    nfe = [int(calls) for calls in nfe_each.split()]
    return row(
        name,
        solved=solved_each.count("1") / len(solved_each),
        nfe=sum(nfe) / len(nfe),
        problems=len(nfe),
        solved_each=solved_each,
        nfe_each=nfe_each,
        cluster_each=clusters,
    )


def test_a_difference_has_its_own_interval_paired_by_problem():
    """Four problems, a cluster each: the means are 0.5 and -2.5, Student's t of 3 degrees 3.182."""
    base = row_of_each("base", "1000", "4 4 4 4", "0 1 2 3")
    trained = row_of_each("trained", "1110", "1 2 1 2", "0 1 2 3")
    half = 100 * 3.182 * stdev([0, 1, 1, 0]) / 2
    calls = 3.182 * stdev([-3, -2, -3, -2]) / 2
    accuracy, speed = summary.describe_results(trained, base, has_choice=True)
    assert 50 + half > 100  # where the interval is cut
    assert accuracy.endswith(f", +50.0 points ({50 - half:.1f} to 100.0).")
    interval = f"({-2.5 - calls:.2f} to {-2.5 + calls:.2f} calls)"
    assert speed.endswith(
        f"4.00 (the same base) to 1.50 calls per completion, 62% fewer {interval}."
    )


def test_as_many_solved_are_no_change_with_the_interval_of_that():
    base = row_of_each("base", "1010", "2 2 2 2", "0 1 2 3")
    trained = row_of_each("trained", "0101", "2 1 3 2", "0 1 2 3")
    accuracy, speed = summary.describe_results(trained, base, has_choice=True)
    assert accuracy.endswith("4 held-out problems, no change (-100.0 to 100.0).")
    assert speed.endswith("about as many (-1.30 to 1.30 calls).")


def test_one_problem_is_one_problem_and_proves_nothing():
    base = row_of_each("base", "0", "5", "0")
    trained = row_of_each("trained", "1", "4", "0")
    accuracy, speed = summary.describe_results(trained, base, has_choice=True)
    assert accuracy.endswith("0.0% of 1 held-out problem, +100.0 points.")
    assert speed.endswith("20% fewer.")


def test_of_several_tasks_each_has_its_own_differences():
    base = row_of_each("base", "10100000", "2 2 2 2 5 5 5 5", "0 1 2 3 4 5 6 7")
    trained = row_of_each("trained", "11111001", "2 1 2 2 5 5 5 5", "0 1 2 3 4 5 6 7")
    base["tasks"] = {
        "countdown": row_of_each("", "1010", "2 2 2 2", "0 1 2 3"),
        "own.py:Own": row_of_each("", "0000", "5 5 5 5", "4 5 6 7"),
    }
    trained["tasks"] = {
        "countdown": row_of_each("", "1111", "2 1 2 2", "0 1 2 3"),
        "own.py:Own": row_of_each("", "1001", "5 5 5 5", "4 5 6 7"),
    }
    *_, countdown, own_task = summary.describe_results(trained, base, has_choice=True)
    assert countdown.startswith("countdown: +50.0 points (-41.9 to 100.0); calls: 12% fewer (-1.0")
    assert own_task == "Own: +50.0 points (-41.9 to 100.0); calls: about as many."


def test_accuracy_and_speed_are_against_the_base_at_its_best_gamma():
    best = row("base", 0.15, 3.5, level=1.0)
    accuracy, speed = summary.describe_results(TRAINED, best, has_choice=True)
    assert "15.0% (base at its best γ, 1) to 23.6%" in accuracy and "+8.6 points" in accuracy
    assert "3.50 (the same base) to 3.15 calls per completion, 10% fewer." in speed
    accuracy, _ = summary.describe_results(TRAINED, BASE, has_choice=False)
    assert "(base at γ 0.1)" in accuracy


def test_the_base_is_described_in_a_line():
    line = "base: 13.1% of 848 held-out problems solved, 4.93 calls each, at γ 0.1"
    assert summary.describe_base(BASE) == line


# ---- the table -----------------------------------------------------------------------------------


def test_the_table_fits_80_columns_and_names_each_row():
    wide = row("trained at starting γ", 1.0, 256.0, tokens=256.0, level=0.123456)
    # A gamma of all prompts at its ceiling.
    high = row("trained", 0.5, 1.0) | LEARNED | {"threshold_mean": 10.0, "threshold_std": 0.0}
    lines = list(summary.results_table([BASE, high, wide | {"solved_low": 0.9822}]))
    assert max(map(len, lines)) <= 80
    assert [line[:21].strip() for line in lines[1:4]] == ["base", "trained", wide["name"]]
    assert "10.000 σ0.000" in lines[2] and "100.0 (98.2 to 100.0)" in lines[3]
    below = " ".join(lines[4:])
    assert "848 held-out problems in 65 clusters, greedy, 10 tokens a completion." in below
    in_blocks = summary.results_table([BASE | {"block_length": 5}])
    assert "blocks of 5" in " ".join(in_blocks)


def test_the_table_of_several_tasks_has_each_ones_line_below_each_models():
    countdown = row("", 0.25, 2.5, **LEARNED)
    own_task = row("", 0.3, 12.5, length=19, threshold_mean=1.5, threshold_std=0.25)
    for part in (countdown, own_task):
        del part["name"], part["level"]
    tasks = {"countdown": countdown, "/a/b/" + "long" * 20 + ".py:Own": own_task}
    both = {"length": 19, "block_length": 19, "tasks": tasks}
    lines = list(summary.results_table([BASE | both, TRAINED | both]))
    assert max(map(len, lines)) <= 80
    names = [line[:11].rstrip() for line in lines[1:7]]
    assert names == ["base", "  countdown", "  Own", "trained", "  countdown", "  Own"]
    assert lines[2].split()[1:] == ["0.1", "25.0", "(23.0", "to", "27.0)", "2.50", "2.00"]
    assert "1.500 σ0.250" in lines[6] and lines[6].split()[-2:] == ["12.50", "2.00"]
    assert "10 or 19 tokens a completion. In" in " ".join(lines[7:])


# ---- completions ---------------------------------------------------------------------------------


def completion(name, text, solved=False, question="3 4 5 = 35"):
    return {"name": name, "question": question, "text": text, "nfe": 3, "solved": solved}


def test_completions_are_shown_side_by_side_with_calls_and_marks():
    texts = [completion("base", "wrong"), completion("trained", "( 3 + 4 ) * 5", solved=True)]
    assert list(summary.describe_completions(texts, BASE)) == [
        "The first 1 of 848 held-out problems, greedy, each model at its own γ:",
        "  3 4 5 = 35",
        "    base     ✗ NFE 3  wrong",
        "    trained  ✓ NFE 3  ( 3 + 4 ) * 5",
    ]


def test_a_hostile_completion_cannot_steer_the_terminal():
    hostile = "\x1b[2Jgone\r\n\x07\x9b31m \u202eright to left \ud800 " + "long " * 100
    texts = [completion(name, hostile, question=hostile) for name in ("base", "trained")]
    for line in summary.describe_completions(texts, BASE):
        assert line.isprintable() and len(line) <= 80
        line.encode("utf-8")
    shown = list(summary.describe_completions(texts, BASE))[2]
    assert r"\x1b[2Jgone\r\n\x07\x9b31m \u202eright" in shown and shown.endswith("…")


# ---- all together --------------------------------------------------------------------------------


def test_the_summary_has_the_base_at_its_best_gamma_if_it_was_measured_at_several(capsys):
    texts = [completion("base", "a"), completion("trained", "b")]
    several = [BASE, row("base", 0.15, 3.5, level=1.0), TRAINED]
    one = [BASE, TRAINED]
    for frontier in (several, one):
        summary.print_summary(rows=[BASE, TRAINED, START], frontier=frontier, completions=texts)
        out = capsys.readouterr().out
        assert ("base at its best γ  " in out) == (frontier is several)
        assert ("(base at its best γ, 1)" in out) == (frontier is several)
        assert ("(base at γ 0.1)" in out) == (frontier is one)
        assert max(map(len, out.splitlines())) <= 80


# ---- what was measured, read back ----------------------------------------------------------------


def write_results(folder, **changed):
    """The files of a run that has measured its base; `changed` {name: text} are other contents."""
    row = ROWS[0] | {"step": 0}
    completion = {"name": "base", "question": "?", "text": "!", "nfe": 1, "solved": True}
    files = {"eval": [row], "frontier": [row], "completions": [completion]}
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(changed.get(name, json.dumps(rows)))


BROKEN = [
    "",
    "{",
    "[]",
    "{}",
    "null",
    "[3]",
    "[{}]",
    json.dumps([ROWS[0] | {"step": 0, "nfe": "x"}]),
    json.dumps([ROWS[0] | {"step": 0, "solved_each": 1}]),
    json.dumps([ROWS[0] | {"step": 0, "solved_each": "0x"}]),
    json.dumps([ROWS[0] | {"step": 0, "solved_each": "01", "nfe_each": "2 3 4"}]),
]


@pytest.mark.parametrize("name", summary.RESULTS)
@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_file_of_results_is_named_in_one_line(tmp_path, name, text):
    write_results(tmp_path, **{name: text})
    with pytest.raises(ValueError, match=f"cannot read .*{name}.json") as error:
        summary.has_results(tmp_path)
    assert "\n" not in str(error.value)


def test_results_that_are_whole_are_read_and_missing_ones_are_none(tmp_path):
    assert not summary.has_results(tmp_path)
    write_results(tmp_path)
    assert summary.has_results(tmp_path)
    assert summary.read_results(tmp_path, "eval")[0]["nfe"] == 5.0
    tasks = {"countdown": {"length": 10}}
    write_results(tmp_path, eval=json.dumps([ROWS[0] | {"step": 0, "tasks": tasks}]))
    with pytest.raises(ValueError, match="eval.json: countdown has no problems"):
        summary.has_results(tmp_path)
    (tmp_path / "frontier.json").unlink()
    assert not summary.has_results(tmp_path)
