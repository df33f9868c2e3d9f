"""Accuracy against NFE, for any checkpoint and any decoder.

    python evaluate.py runs/NAME                                   the learned threshold, greedy
    python evaluate.py runs/NAME --level learned 0.01 0.1 1        beside fixed ones
    python evaluate.py runs/NAME --decoder top_k --level 1 2 4     LLaDA's rule
    python evaluate.py FOLDER_OR_HUB_NAME --task gsm8k --level 0.1 --block_length 32
    python evaluate.py runs/NAME --data problems.jsonl             your own problems

NFE is the number of denoiser calls that a completion took. A run is measured as it was trained, on
problems held out from it, unless flags say otherwise. (Held out: no multiset of numbers, no
solution grid of training. A grid's twin with other digits may be.) Each level prints a JSON line.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path

import torch

import runs
import splits
import tasks
import tiny
from sampler import Decoder
from settings import OneLineParser


def share_interval(solved, clusters, draws=2000):
    """The 95% interval of a share by a bootstrap over clusters: (low, high, number of clusters).

    Problems of one cluster (a multiset of numbers, a solution grid) are solved or missed together,
    so whole clusters are drawn. Where none or all are solved a bootstrap knows nothing: then
    Wilson's interval, as if each cluster were one problem. solved: bools; clusters: a key each.
    """
    right = Counter(key for key, hit in zip(clusters, solved, strict=True) if hit)
    size, k = Counter(clusters), len(set(clusters))
    if len(set(solved)) == 1:
        edge = 1.96**2 / (k + 1.96**2)
        return (1 - edge, 1.0, k) if solved[0] else (0.0, edge, k)
    counts = torch.tensor([(right[key], size[key]) for key in size], dtype=torch.float)  # (k, 2)
    chosen = torch.randint(k, (draws, k), generator=torch.Generator().manual_seed(0))
    hits, total = counts[chosen].sum(dim=1).T  # (draws,) each
    return (*torch.quantile(hits / total, torch.tensor([0.025, 0.975])).tolist(), k)


def evaluate(policy, task, problems, decoder, length, batch_size=256, seed=0):
    """One row of results: every setting, every score. Raises ValueError for unfit problems."""
    began, device, n = time.perf_counter(), policy.denoiser.device, len(problems)
    generator, pairs, columns = torch.Generator(device).manual_seed(seed), [], []
    for start in range(0, n, batch_size):
        batch = problems[start : start + batch_size]
        prompts = policy.encode([task.prompt(problem) for problem in batch], length)
        rollout = policy.rollout(*prompts, length, decoder, generator)
        pairs += zip(batch, policy.decode(rollout), strict=True)
        columns.append((rollout.nfe, rollout.token_mask.sum(dim=1), rollout.threshold))
    nfe, tokens, gamma = (torch.cat(parts).double() for parts in zip(*columns, strict=True))
    solved, key = [task.solved(*pair) for pair in pairs], getattr(task, "key", task.prompt)
    low, high, clusters = share_interval(solved, [key(problem) for problem in problems])
    mean, std = gamma.mean().item(), gamma.std(unbiased=False).item()
    return {
        "decoder": decoder.rule, "level": "learned" if decoder.level is None else decoder.level,
        "block_length": decoder.block_length or length, "length": length, "cache": decoder.cache,
        "prefill": policy.prefill, "temperature": decoder.temperature, "problems": n,
        "clusters": clusters, "seed": seed, "solved": sum(solved) / n, "solved_low": low,
        "solved_high": high, "reward": sum(task.reward(*pair) for pair in pairs) / n,
        "nfe": nfe.mean().item(), "tokens_per_call": (tokens.sum() / nfe.sum()).item(),
        "threshold_mean": mean if decoder.rule == "eb" else None,
        "threshold_std": std if decoder.rule == "eb" else None,
        "seconds": time.perf_counter() - began, "device": str(device),
        "dtype": str(policy.denoiser.dtype).removeprefix("torch."),
    }  # fmt: skip


def area(rows, largest):
    """The mean, over budgets of 1 to `largest` calls, of the best accuracy within each."""
    budgets = [1 + i * (largest - 1) / 1000 for i in range(1001)]
    best = [max((r["solved"] for r in rows if r["nfe"] <= b), default=0.0) for b in budgets]
    return sum(best) / len(best)


COLUMNS = {
    "": "{name}", "decoder": "{decoder}", "level": "{level}", "gamma": "{gamma}",
    "length": "{length}", "block": "{block_length}", "cache": "{cache}", "temp": "{temperature:g}",
    "problems": "{problems}", "clusters": "{clusters}", "solved": "{solved:.1%}",
    "95%, by cluster": "{solved_low:.1%} to {solved_high:.1%}", "reward": "{reward:.3f}",
    "NFE": "{nfe:.2f}", "tokens/call": "{tokens_per_call:.2f}", "seconds": "{seconds:.1f}",
}  # fmt: skip


def print_table(rows):
    """The rows of `evaluate`, as a table. The interval is share_interval's."""
    table = [list(COLUMNS)]
    for row in rows:
        gamma = "{threshold_mean:.3f} ± {threshold_std:.3f}" if row["decoder"] == "eb" else ""
        row = row | {"gamma": gamma.format(**row)}
        table.append([form.format(**row) for form in COLUMNS.values()])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(map(str.rjust, line, widths)))


def number_or_learned(text):
    return None if text == "learned" else float(text)


FLAGS = (  # name, default, help
    ("task", "", f"{', '.join(tasks.TASKS)} or FILE.py:NAME; default the run's"),
    ("decoder", "eb", "eb, confidence or top_k"),
    ("block_length", 0, "tokens a block; 0: the whole canvas; default the run's, or 0"),
    ("cache", "none", "block cache: none, prefix or dual; default the run's, or none"),
    ("length", 0, "tokens a completion; default the run's, the task's own, or 256"),
    ("prefill", "", "how completions are made to begin; default the run's, or empty"),
    ("batch_size", 64, "problems at once; fewer need less memory"),
    ("temperature", 0.0, "0 is greedy"),
    ("problems", 1000, "how many"),
    ("split", "", "train, validation, test, or all of a file; default test, a new file all"),
    ("data", "", "a JSON-lines file of problems; default the run's, if it had one"),
    ("seed", 0, "of the problems, and of the draws where temperature is above 0"),
)
OF_RUN = ("task", "block_length", "cache", "length", "prefill", "data")  # their default: the run's


def parse(parser, arguments):
    """The flags, with what the run's config.json says where one is not given. Raises ValueError."""
    parser.add_argument("path", help="a run folder, a checkpoint folder, or a hub name")
    for name, default, text in FLAGS:
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    help = "learned, or gamma, tau or k; several give several rows"
    parser.add_argument("--level", nargs="+", type=number_or_learned, default=[None], help=help)
    path = Path(parser.parse_args(arguments).path)
    if runs.checkpoint_of(path) != path:
        trained = runs.read_json(path / "config.json")
        parser.set_defaults(**{name: trained[name] for name in OF_RUN if name in trained})
    options = parser.parse_args(arguments)
    if not options.task:
        raise ValueError(f"{path} is no run, which would know its task: give a --task")
    if options.length < 0 or min(options.problems, options.batch_size) < 1:
        raise ValueError("problems and batch_size are at least 1, length at least 0")
    is_new = options.data and Path(options.data) != Path(parser.get_default("data"))
    options.split = options.split or ("all" if is_new else "test")
    return options


def prepare(options):
    """(policy, task, problems, decoders) for the flags. Raises ValueError."""
    how = (options.block_length or None, options.temperature, options.cache, True, False)
    decoders = [Decoder(options.decoder, level, *how) for level in options.level]
    task, compact = tasks.find_task(options.task), runs.is_compact(options.path)
    task = tiny.for_tiny(task) if compact else task
    task = splits.FromFile(task, options.data) if options.data else task
    if options.data and options.split == "all":
        problems = sum(task.pools.values(), [])
    else:
        problems = task.problems(options.split, options.problems, options.seed)
    options.length = options.length or (task.length if compact else 256)
    policy = runs.load_policy(options.path, "cuda" if torch.cuda.is_available() else "cpu")
    policy.prefill = options.prefill
    if policy.threshold_head is None and options.decoder == "eb" and None in options.level:
        raise ValueError(f"{options.path} has no learned threshold: give --level a number")
    return policy, task, problems, decoders


def main(arguments=None):
    rows, parser = [], OneLineParser(description="Accuracy against NFE of a checkpoint.")
    try:
        options = parse(parser, arguments)
        policy, task, problems, decoders = prepare(options)
        about = {"name": Path(options.path).name, "task": options.task}
        about |= {"data": options.data, "split": options.split}
        how = (options.length, options.batch_size, options.seed)
        for decoder in decoders:
            rows.append(about | evaluate(policy, task, problems, decoder, *how))
            print(json.dumps(rows[-1]), flush=True)
    except ValueError as error:
        parser.exit(2, f"evaluate.py: {error}\n")
    except (MemoryError, RuntimeError) as error:
        said = runs.out_of_memory(error, f"--batch_size ({options.batch_size})")
        parser.exit(1, f"evaluate.py: {said}\n")
    print_table(rows)


if __name__ == "__main__":
    sys.exit(main())
