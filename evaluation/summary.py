"""What a run says of itself: its log; base and trained model measured; a table, words, completions.

    runs/NAME/  metrics.jsonl     a line of METRICS a step
                samples.jsonl     a few completions a step
                frontier.json     a row for each model, "base" and "trained", and each gamma
                eval.json         the rows of the table: the base and the trained model, greedy
                completions.json  what both wrote for the first held-out problems

The base is measured before the first step. So a resumed run needs its weights no more.
"""

import json
import time
from statistics import fmean
from textwrap import fill, wrap

from evaluate import evaluate, generate
from evaluation.metrics import area
from evaluation.plots import printable, shorten
from models.checkpoints import read_json
from models.device import peak_memory_gib
from training import distributed, files, run_folder

GAMMAS = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the frontier, in nats
WIDTH = 80  # columns of a terminal
METRICS = (  # every key of metrics.jsonl; EXPERIMENTS.md says what each is, and a test compares
    "step", "reward_mean", "speed_reward_mean", "solved_mean", "frac_reward_zero_std", "nfe_mean",
    "completion_length_mean", "threshold_mean", "threshold_std", "denoiser_rows", "loss",
    "ratio_mean", "clip_fraction", "importance_weight_mean", "importance_weight_max",
    "capped_weight_fraction", "unit_weight_error",
    "ess_fraction", "surrogate_kl", "reference_kl", "cache_kl", "grad_norm", "threshold_loss",
    "threshold_ratio", "threshold_clip_fraction", "seconds_rollout", "seconds_update",
    "tokens_per_second", "peak_memory_gib",
)  # fmt: skip


# ---- measuring -----------------------------------------------------------------------------------


def measure(run_dir, name, step, policy, task, problems, settings):
    """Measure the policy as it is after `step` steps; note it as "base" or as "trained"."""
    learned = name == "trained" and settings.train_target != "policy"
    gammas = [None] * learned + [settings.initial_threshold, *(GAMMAS if settings.frontier else ())]
    size = 256 if policy.compact else settings.prompts_per_step * settings.num_generations
    size *= distributed.world_size()
    about, rows = {"name": name, "step": step}, []
    how = {"temperature": 0.0, "sample_threshold": False}
    decoders = [
        run_folder.rollout_decoder(settings, level=gamma, **how) for gamma in dict.fromkeys(gammas)
    ]
    for decoder in decoders:
        rows.append(
            about | evaluate(policy, task, problems, decoder, settings.max_completion_length, size)
        )
        if name == "base" and decoder is decoders[0]:
            print(fill(describe_base(rows[0]), WIDTH))
    texts = [about | row for row in complete(policy, task, problems[:3], decoders[0], settings)]
    table = rows[:1] + [row | {"name": "trained at the starting γ"} for row in rows[1:2] if learned]
    if not distributed.is_main_process():
        return
    # eval.json comes last: where it says that a model was measured, all of it is there.
    for file, new in {"completions": texts, "frontier": rows, "eval": table}.items():
        path = run_dir / f"{file}.json"
        old = read_json(path) if name == "trained" else []
        files.write_json(path, [row for row in old if row["name"] == "base"] + new)


def complete(policy, task, problems, decoder, settings):
    """A row for each problem: what the model writes. `asked` is short, unlike most prompts."""
    prompts = [task.prompt(problem) for problem in problems]
    texts, nfes, *_ = generate(policy, task, problems, decoder, settings.max_completion_length)
    rows = zip(problems, prompts, texts, nfes.long().tolist(), strict=True)
    for problem, prompt, text, nfe in rows:
        asked = prompt if policy.compact else "; ".join(f"{k} {v}" for k, v in problem.items())
        row = {"problem": problem, "asked": asked, "text": text, "nfe": nfe}
        yield row | {"solved": bool(task.solved(problem, text))}


# ---- while it runs -------------------------------------------------------------------------------


def batch_metrics(rollout, advantage, calls, began, rolled_out):
    """What the log says of a batch, whoever learns from it."""
    return {
        "frac_reward_zero_std": (advantage == 0).float().mean().item(),
        "nfe_mean": rollout.nfe.float().mean().item(),
        "completion_length_mean": rollout.token_mask.sum(1).float().mean().item(),
        "denoiser_rows": calls,
        "threshold_mean": rollout.threshold.mean().item(),
        "threshold_std": rollout.threshold.std(unbiased=False).item(),
        "seconds_rollout": rolled_out - began,
        "seconds_update": time.perf_counter() - rolled_out,
        "tokens_per_second": rollout.token_mask.sum().item() / (rolled_out - began),
        "peak_memory_gib": distributed.all_reduce_max(peak_memory_gib()),
    }


def sample_rows(problems, texts, rollout, reward):
    """The first completion of each of the first four different prompts, for samples.jsonl.

    unmask_steps: the step, from 1, at which each token of the text was drawn, its end token too.
    """
    first = []
    for i, problem in enumerate(problems):
        if len(first) < 4 and all(problem != problems[j] for j in first):
            first.append(i)
    return [
        {
            "problem": problems[i], "text": texts[i], "reward": rounded(reward[i]),
            "nfe": rollout.nfe[i].item(), "threshold": rounded(rollout.threshold[i]),
            "unmask_steps": rollout.unmask_step[i][rollout.token_mask[i]].tolist(),
        }
        for i in first
    ]  # fmt: skip


def rounded(number):
    """To four significant digits: enough to read."""
    return float(f"{number.item():.4g}")


def log_step(run_dir, bar, step, metrics, samples):
    """A line into metrics.jsonl, completions into samples.jsonl, two figures onto the bar."""
    logs = {"metrics": [dict.fromkeys(METRICS) | metrics], "samples": samples}
    for name, rows in logs.items():
        with open(run_dir / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row | {"step": step}) + "\n" for row in rows)
    bar.set_postfix_str(f"reward {metrics['reward_mean']:.3f}, NFE {metrics['nfe_mean']:.2f}")


def describe_base(row):
    """The base's row in words."""
    solved = f"{row['solved']:.1%} of {problems_in(row)} solved"
    return f"base: {solved}, {row['nfe']:.2f} calls each, at γ {gamma(row)}"


def print_progress(run_dir, bar, step):
    """Ten times a run a line stays on the terminal: means over its last tenth, seconds of all."""
    if step * 10 // bar.total == (step - 1) * 10 // bar.total:
        return
    rows = files.read_log(run_dir / "metrics.jsonl")
    seconds = sum(row["seconds_rollout"] + row["seconds_update"] for row in rows)
    rows = rows[-max(1, bar.total // 10) :]
    names = ("reward", "solved", "nfe", "threshold")
    reward, solved, nfe, level = (fmean(row[f"{name}_mean"] for row in rows) for name in names)
    said = f"reward {reward:.3f}  solved {solved:5.1%}  NFE {nfe:.2f}  γ {level:.3f}"
    bar.write(f"step {step:{len(str(bar.total))}}/{bar.total}  {said}  {seconds:.0f} s")


# ---- at the end ----------------------------------------------------------------------------------


def print_summary(run_dir, settings):
    """Print the table, what happened, and three completions."""
    rows, every, texts = (
        read_json(run_dir / f"{name}.json") for name in ("eval", "frontier", "completions")
    )
    halves = [[row for row in every if row["name"] == name] for name in ("base", "trained")]
    best = max(halves[0], key=lambda row: (row["solved"], -row["nfe"]))
    is_other = best["level"] != rows[0]["level"]
    other = [best | {"name": "base at its best γ"}] if is_other else []
    print("", *table(rows[:1] + other + rows[1:]), "", sep="\n")
    said = describe_results(rows, best, settings)
    if settings.frontier:
        said.append(frontier(*halves))
    print(*(fill(line, WIDTH, subsequent_indent="  ") for line in said), "", sep="\n")
    print(*completions(texts, rows[0]), "", sep="\n")


def problems_in(row):
    return f"{row['problems']} held-out problem{'s' * (row['problems'] != 1)}"


def gamma(row):
    if row["level"] != "learned":
        return f"{row['level']:g}"
    return f"{row['threshold_mean']:.3f} ±{row['threshold_std']:.3f}"


def percent(row):
    """As it is printed: so that differences are those of what the reader sees."""
    return round(100 * row["solved"], 1)


def calls(row):
    return round(row["nfe"], 2)


def with_tasks(rows):
    """The rows, and below each of a run of several tasks what it says of each task."""
    for row in rows:
        yield row
        for name, part in row.get("tasks", {}).items():
            yield row | part | {"name": f"  {shorten(name.rpartition(':')[2], 22)}"}


def table(rows):
    """The lines of a table of rows of `evaluate`, and below it what all rows share."""
    cells = [("", "γ", "solved, %", "NFE", "tokens")]
    for row in with_tasks(rows):
        interval = f"{100 * row['solved_low']:.1f} to {100 * row['solved_high']:.1f}"
        scores = f"{calls(row):.2f}", f"{row['tokens_per_call']:.2f}"
        cells.append((row["name"], gamma(row), f"{percent(row):.1f} ({interval})", *scores))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for name, *others in cells:
        numbers = map(str.rjust, others, widths[1:])
        yield "  ".join([name.ljust(widths[0]), *numbers])
    row = rows[0]
    block = f", blocks of {row['block_length']}" if row["block_length"] < row["length"] else ""
    parts = row.get("tasks", {"": row}).values()
    lengths = " or ".join(str(n) for n in sorted({part["length"] for part in parts}))
    shared = f"{problems_in(row)} in {row['clusters']} clusters, greedy, {lengths} tokens"
    shared += f" a completion{block}. In brackets: the 95% interval, over clusters. NFE: calls a"
    yield from wrap(shared + " completion. tokens: those that a call unmasks.", WIDTH)


def describe_results(rows, best, settings):
    """Three lines on what happened, whatever happened. rows: eval.json's; best: of the base's."""
    trained, its = rows[1], "its best γ," if settings.frontier else "γ"
    gain = percent(trained) - percent(best)
    low = max(trained["solved_low"], best["solved_low"])
    high = min(trained["solved_high"], best["solved_high"])
    overlap = "overlap: within the noise" if low <= high else "do not overlap"
    more = round(100 * (calls(trained) / calls(best) - 1))
    return [
        f"Accuracy: {percent(best)}% (base at {its} {gamma(best)}) to {percent(trained)}% of "
        f"{problems_in(trained)}, "
        + (f"{gain:+.1f} points. The 95% intervals {overlap}." if gain else "no change."),
        f"Speed: {calls(best):.2f} (the same base) to {calls(trained):.2f} calls a completion, "
        + (f"{abs(more)}% {'more' if more > 0 else 'fewer'}." if more else "about as many."),
        " ".join(["Why:", *reasons(rows, settings.train_target)]),
    ]


def reasons(rows, train):
    """First what the weights do at the gamma that training began with, then what gamma does."""
    base, trained, start = rows[0], rows[1], rows[-1]
    if train == "sampler":
        yield "the weights did not learn."
    else:
        # Within one threshold more tokens fit if each is surer. 2% are taken for no difference.
        was, now = (row["tokens_per_call"] for row in (base, start))
        sure = "surer than" if now > 1.02 * was else "as sure as"
        sure = "less sure than" if now < 0.98 * was else sure
        yield f"at γ {gamma(base)}, where training began, the new weights alone change"
        yield f"{difference(base, start)}: the model is {sure} before ({now:.2f} tokens a call,"
        yield f"before {was:.2f})."
    if train == "policy":
        yield "γ did not learn."
    else:
        yield f"γ, at first {gamma(base)} and now {gamma(trained)}, changes"
        yield f"{difference(start, trained)}."


def difference(one, other):
    more, points = calls(other) - calls(one), percent(other) - percent(one)
    return f"calls by {more:+.2f} and accuracy by {points:+.1f} points"


def frontier(base, trained):
    """The area under both frontiers in words."""
    largest = max(row["nfe"] for row in base + trained)
    of_base, of_trained = (area(rows, largest) for rows in (base, trained))
    return (
        f"Frontier: averaged over budgets of 1 to {largest:.3g} calls, the base's best γ within "
        f"each solves {of_base:.1%}, the trained model's {of_trained:.1%} (frontier.png)."
    )


def completions(texts, row):
    """The lines of completions.json's rows, cut to the terminal's width."""
    n = len(texts) // 2
    yield f"The first {n} of {problems_in(row)}, greedy, each model at its own γ:"
    for base, trained in zip(texts[:n], texts[n:], strict=True):
        yield shorten(f"  {printable(base['asked'])}", WIDTH)
        for one in (base, trained):
            mark = "✓" if one["solved"] else "✗"
            said = f"    {one['name']:7}  {mark} NFE {one['nfe']}  {printable(one['text'])}"
            yield shorten(said, WIDTH)
