"""Accuracy against NFE, for any checkpoint and any decoder.

    python evaluate.py runs/NAME                                   the learned threshold, greedy
    python evaluate.py runs/NAME --decoder top_k --level 1 2 4     LLaDA's rule
    python evaluate.py runs/A runs/B --frontier                    all rules and levels, a picture
    python evaluate.py runs/NAME --trace 3                         completions, call by call
    python evaluate.py --help                                      more of them

NFE is the number of denoiser calls that a completion took. A run is measured as it was trained, on
problems held out from it, unless flags say otherwise. (Held out: no multiset of numbers, no
solution grid of training. A grid's twin with other digits may be.) Each level prints a JSON line.
"""

import json
import os
import sys
import time
from pathlib import Path
from statistics import fmean
from textwrap import fill
from types import SimpleNamespace

from evaluation.flags import DEFAULTS, OF_RUN, parse_evaluate_flags

if __name__ == "__main__":  # --help answers here: what follows takes seconds to import
    parse_evaluate_flags()

import torch

from evaluation import completions, plots, traces
from evaluation.metrics import area, aup, cluster_bootstrap_interval, pass_at_k
from models import loading
from models.checkpoints import find_checkpoint, load_policy, read_json, reads_compact_prompts
from models.device import describe_out_of_memory, device_name
from sampler import Decoder
from tasks import mixture, published_prompts, registry
from tasks.registry import TASKS
from training import distributed, files

LEVELS = {  # of --frontier
    "eb": (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3),
    "top_k": (1, 2, 3, 4, 6, 8),
    "confidence": (0.5, 0.7, 0.8, 0.9, 0.95, 0.99),
}


def evaluate(policy, task, problems, decoder, length, batch_size=256, seed=0):
    """One row of results: every setting, every score; of several tasks each one's scores too.

    Raises ValueError for unfit problems.
    """
    began, device, n = time.perf_counter(), policy.denoiser.device, len(problems)
    texts, *columns = generate(policy, task, problems, decoder, length, batch_size, seed)
    pairs, key = list(zip(problems, texts, strict=True)), getattr(task, "key", task.prompt)
    rewards, solved = zip(*mixture.score_completions(task, problems, texts), strict=True)
    columns = decoder, solved, [key(problem) for problem in problems], *columns
    row = {
        "decoder": decoder.rule, "level": "learned" if decoder.level is None else decoder.level,
        "block_length": decoder.block_length or length, "length": length, "cache": decoder.cache,
        "prefill": policy.prefill, "temperature": decoder.temperature, "seed": seed,
        **summarise(range(n), *columns), "reward": sum(rewards) / n,
        "solved_each": "".join("01"[bool(hit)] for hit in solved),  # in the problems' order
        "seconds": time.perf_counter() - began, "device": device_name(device),
        "dtype": loading.dtype_of(policy.denoiser),
    }  # fmt: skip
    if hasattr(task, "cells"):
        row["cells"] = sum(task.cells(*pair) for pair in pairs) / n
    for name, places in mixture.places_by_task(task, problems).items():
        if name:
            part = {"length": mixture.completion_length(task, problems[places[0]], length)}
            row.setdefault("tasks", {})[name] = part | summarise(places, *columns)
    return row


def generate(policy, task, problems, decoder, length, batch_size=256, seed=0):
    """Completes n problems. -> texts, and NFE, tokens and gamma, (n,) each, in their order."""
    generator = torch.Generator(policy.denoiser.device).manual_seed(seed)
    order, texts, columns = [], [], []
    for places, L in mixture.batches_by_task(task, problems, length, batch_size):
        prompts = policy.encode([task.prompt(problems[i]) for i in places], L)
        rollout = distributed.rollout(policy, *prompts, L, decoder, generator)
        order, texts = order + places, texts + policy.decode(rollout)
        columns.append((rollout.nfe, rollout.token_mask.sum(dim=1), rollout.threshold))
    back = torch.tensor(order).argsort()  # tasks were completed one after the other
    columns = (torch.cat(parts).double()[back] for parts in zip(*columns, strict=True))
    return [texts[i] for i in back.tolist()], *columns


def summarise(places, decoder, solved, clusters, nfe, tokens, gamma):
    """What a row says of the problems at these places, all of them or one task's."""
    places = list(places)
    hits, nfe, gamma = [solved[i] for i in places], nfe[places], gamma[places]
    low, high, k = cluster_bootstrap_interval(hits, [clusters[i] for i in places])
    mean, std = gamma.mean().item(), gamma.std(unbiased=False).item()
    return {
        "problems": len(places), "clusters": k, "solved": sum(hits) / len(places),
        "solved_low": low, "solved_high": high, "nfe": nfe.mean().item(),
        "tokens_per_call": (tokens[places].sum() / nfe.sum()).item(),
        "threshold_mean": mean if decoder.rule == "eb" else None,
        "threshold_std": std if decoder.rule == "eb" else None,
    }  # fmt: skip


# ---- the table -----------------------------------------------------------------------------------

SCORES = {  # a column stands where all rows have the score
    "solved": ("{solved:.1%}", "solved"), "pass@N": ("{pass_at_n:.1%}", "pass_at_n"),
    "95% interval": ("{solved_low:.1%} to {solved_high:.1%}", "solved"),
    "cells": ("{cells:.1%}", "cells"), "reward": ("{reward:.3f}", "reward"),
    "NFE": ("{nfe:.2f}", "nfe"), "tokens/call": ("{tokens_per_call:.2f}", "nfe"),
    "AUP": ("{aup:.1f}", "aup"),
}  # fmt: skip


def print_table(rows):
    """The rows of `evaluate`, as a table: what they share above it. The interval is
    cluster_bootstrap_interval's.
    """
    settings = ("name", "adapter", *plots.SHARED)
    differ = [name for name in settings if len({row.get(name) for row in rows}) > 1]
    columns = {name: f"{{{name}}}" for name in differ} | {"level": "{level}"}
    if any(row["decoder"] == "eb" for row in rows):
        columns["gamma"] = "{gamma}"
    n = rows[0].get("samples")
    for name, (form, key) in SCORES.items():
        if all(key in row for row in rows):
            columns[f"pass@{n}" if name == "pass@N" else name] = form
    table = [["" if name == "name" else name for name in columns]]
    for row in rows:
        gamma = "{threshold_mean:.3f} ± {threshold_std:.3f}" if row["decoder"] == "eb" else ""
        row = row | {"gamma": gamma.format(**row)}
        table.append([form.format(**row) for form in columns.values()])
    name = "" if "name" in differ else f"{rows[0]['name']}: "
    print(fill(f"{name}{plots.conditions(rows)}", 80))
    print_columns(table)


def print_columns(table):
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(map(str.rjust, line, widths)).rstrip())


# ---- what is asked for ---------------------------------------------------------------------------


def options_for(path, given):
    """The flags for one path, with what its config.json says where none is given. ValueError."""
    path, saved = Path(path), {}
    if find_checkpoint(path) != path:
        saved = read_json(path / "config.json")
    trained = {name: saved[name] for name in OF_RUN if name in saved}
    trained["max_completion_length"] = [saved.get("max_completion_length", 0)]
    options = SimpleNamespace(**DEFAULTS | trained | given, path=path)
    if not options.task:
        raise ValueError(f"{path} is no run, which would know its task: give a --task")
    if options.task != trained.get("task", options.task):
        raise ValueError(f"{path} was trained on {trained['task']}: leave out --task")
    if len(options.max_completion_length) > 1 and (options.frontier or options.trace):
        raise ValueError("--frontier and --trace take one --max_completion_length at a time")
    is_new = options.data and Path(options.data) != Path(trained.get("data", ""))
    options.split = options.split or ("all" if is_new else "test")
    options.is_trained_on_own = bool(saved and is_new and not trained.get("data"))
    options.folder = path if saved else Path()
    options.lengths = options.max_completion_length
    options.length = options.lengths[0]
    options.how = (options.block_length or None, options.temperature, options.cache, True, False)
    options.decoders = [Decoder(options.decoder, level, *options.how) for level in options.level]
    return options


def prepare(options):
    """(policy, task, problems) for the options; it sets their length. Raises ValueError."""
    compact = reads_compact_prompts(options.path)
    task = registry.load_task(options.task, compact, options.data, options.length)
    if compact and options.prompt:
        raise ValueError(f"{options.path} reads short prompts alone: leave out --prompt")
    task = published_prompts.asked(task, options.prompt, options.shots)
    if options.data and options.split == "all":
        problems = sum(task.pools.values(), [])
    else:
        problems = task.problems(options.split, options.trace or options.problems, options.seed)
    if options.is_trained_on_own:
        published_prompts.warn_of_training(
            options, registry.load_task(options.task, compact), problems
        )
    options.lengths = [L or (task.length if compact else 256) for L in options.lengths]
    options.length = options.lengths[0]
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", loading.DTYPES[options.dtype]
    policy = load_policy(options.path, device, dtype, adapter=options.adapter)
    policy.prefill = options.prefill
    return policy, task, problems[: options.trace or None]


def decoders_for(options, has_head):
    """The decoders to measure. Raises ValueError for a learned threshold that is not there."""
    if options.frontier:
        found = [(rule, level) for rule, levels in LEVELS.items() for level in levels]
        found = [x for x in found if x[0] != "top_k" or x[1] == 1 or x[1] < options.length]
        return [Decoder(*x, *options.how) for x in found + [("eb", None)] * has_head]
    if not has_head and options.decoder == "eb" and None in options.level:
        raise ValueError(f"{options.path} has no learned threshold: give --level a number")
    return options.decoders


def revision(path, denoiser):
    """What tells versions of a checkpoint apart: a run's step, a hub model's commit, or None."""
    state, hub = (
        find_checkpoint(path) / "state.pt",
        getattr(denoiser, "hub_folder", None),
    )
    if state.is_file():
        return torch.load(state, map_location="cpu", weights_only=True, mmap=True)["step"]
    return hub.name if hub and hub.parent.name == "snapshots" else None


def show_traces(options, policy, task, problems, decoder):
    """--trace: the first completions, printed, as a page and as an animation."""
    lengths = [mixture.completion_length(task, problem, options.length) for problem in problems]
    each = [(problem, decoder, L) for problem, L in zip(problems, lengths, strict=True)]
    found = [traces.record(policy, task, *how, options.seed) for how in each]
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for trace in found:
        print(traces.printed(trace, colour))
    longest = max(range(len(found)), key=lambda i: len(found[i].read))
    stages = traces.two_stages(policy, task, *each[longest], options.seed)
    print("\nwritten:", *traces.write(found, stages, options.folder, options.path.name))


def show_frontiers(rows, folder):
    """--frontier: the picture, the rows with their line's area and AUP, and a table of these."""
    largest, best = max(row["nfe"] for row in rows), max(row["solved"] for row in rows)
    table = [["", "decoder", "points", "area", "AUP", "best", "its NFE"]]
    for (name, rule), line in plots.curves_of(rows).items():
        scores = {"area": area(line, largest), "aup": aup(line, best)}
        for row in line:
            row |= scores
        top = max(line, key=lambda row: row["solved"])
        scores = (f"{scores['area']:.3f}", f"{scores['aup']:.1f}")
        table.append([name, rule, str(len(line)), *scores, f"{top['solved']:.1%}"])
        table[-1].append(f"{top['nfe']:.2f}")
    paths = folder / "frontiers.png", folder / "frontiers.jsonl"
    plots.plot_frontier(rows, paths[0], f"{rows[0]['task']}: accuracy against calls")
    with files.atomic_write(paths[1]) as aside:
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(fill(plots.conditions(rows), 80))
    print_columns(table)
    print(f"area: mean solved share over budgets of 1 to {largest:.2f} calls")
    print("written:", *paths)


def measure(options, name):
    """The rows of one checkpoint, each printed as JSON; or its traces, and no rows."""
    policy, task, problems = prepare(options)
    rows, has_head = [], policy.threshold_head is not None
    if options.trace:
        show_traces(options, policy, task, problems, decoders_for(options, has_head)[0])
        return rows
    n, problems = options.samples, [p for p in problems for _ in range(options.samples)]
    about = {"name": name, "task": options.task, "data": options.data, "split": options.split}
    about |= {name: getattr(options, name) for name in ("adapter", "prompt", "shots", "samples")}
    about |= {"checkpoint": str(options.path), "revision": revision(options.path, policy.denoiser)}
    for length in options.lengths:
        options.length, how = length, (length, options.batch_size, options.seed)
        for decoder in decoders_for(options, has_head):
            row = about | evaluate(policy, task, problems, decoder, *how)
            if n > 1:
                each = row["solved_each"]
                right = [each[i : i + n].count("1") for i in range(0, len(each), n)]
                passed = {k: fmean(pass_at_k(x, n, k) for x in right) for k in range(1, n + 1)}
                row |= {"problems": len(right), "pass_at_k": passed, "pass_at_n": passed[n]}
            rows.append(row)
            print(json.dumps({k: v for k, v in row.items() if k != "solved_each"}), flush=True)
    for length in options.lengths:
        line = [row for row in rows if row["length"] == length]
        if len(line) > 1:
            score = aup(line, max(row["solved"] for row in line))
            for row in line:
                row["aup"] = score
    return rows


def main(arguments=None):
    given, rows = parse_evaluate_flags(arguments), []
    try:
        if "completions" in given:
            return print_columns(completions.score_file(given["completions"], TASKS))
        asked = [options_for(path, given) for path in given["paths"]]
        same = dict.fromkeys(f"{options.task} {options.data}".strip() for options in asked)
        if asked[0].frontier and len(same) > 1:
            raise ValueError(f"--frontier compares runs of one task, not of {' and '.join(same)}")
        names = [options.path.name for options in asked]
        names = names if len(set(names)) == len(names) else given["paths"]
        for options, name in zip(asked, names, strict=True):
            rows += measure(options, name)
        if asked[0].frontier:
            show_frontiers(rows, asked[0].folder)
        elif rows:
            print_table(rows)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        size = f"--batch_size ({given.get('batch_size', DEFAULTS['batch_size'])})"
        print(f"evaluate.py: {describe_out_of_memory(error, size)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # an old terminal gets a ? for a γ
    sys.exit(main())
