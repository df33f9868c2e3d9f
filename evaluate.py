"""Accuracy against NFE, for any checkpoint and any decoder.

    python evaluate.py runs/NAME                                   the learned threshold, greedy
    python evaluate.py runs/NAME --level learned 0.01 0.1 1        beside fixed ones
    python evaluate.py runs/NAME --decoder top_k --level 1 2 4     LLaDA's rule
    python evaluate.py FOLDER_OR_HUB_NAME --task gsm8k --level 0.1 --block_length 32
    python evaluate.py runs/NAME --data problems.jsonl             your own problems

NFE is the number of denoiser calls that a completion took. A run is measured as it was trained, on
problems that were held out from it, unless flags say otherwise. Prints one JSON line for each
level, with every setting that matters, and then the same as a table. (Held out: no multiset of
numbers, no solution grid of training. A grid's twin with other digits may have been seen.)
"""

import json
import sys
import time
from pathlib import Path

import torch

import runs
import tasks
from sampler import Decoder


def share_interval(solved, clusters, draws=2000):
    """The 95% interval of a share by a bootstrap over clusters: (low, high, number of clusters).

    solved: a list of bools; clusters: a key each. Problems of one cluster (a multiset of numbers, a
    solution grid) are solved or missed together, so whole clusters are drawn. Where none or all are
    solved a bootstrap knows nothing: then Wilson's interval, as if each cluster were one problem.
    """
    names = {key: i for i, key in enumerate(dict.fromkeys(clusters))}
    k, index = len(names), torch.tensor([names[key] for key in clusters])
    if len(set(solved)) == 1:
        edge = 1.96**2 / (k + 1.96**2)
        return (1 - edge, 1.0, k) if solved[0] else (0.0, edge, k)
    right, size = torch.zeros(2, k)
    right.index_add_(0, index, torch.tensor(solved, dtype=torch.float))
    size.index_add_(0, index, torch.ones(len(index)))
    chosen = torch.randint(k, (draws, k), generator=torch.Generator().manual_seed(0))
    shares = right[chosen].sum(1) / size[chosen].sum(1)
    return (*torch.quantile(shares, torch.tensor([0.025, 0.975])).tolist(), k)


def evaluate(policy, task, problems, decoder, length, batch_size=256, seed=0):
    """One row of results: a dict of every setting and every score.

    Raises ValueError for a problem that the tokenizer cannot write or that does not fit.
    """
    generator = torch.Generator(policy.denoiser.device).manual_seed(seed)
    solved, reward, gammas, calls, tokens, began = [], [], [], 0, 0, time.perf_counter()
    for start in range(0, len(problems), batch_size):
        batch = problems[start : start + batch_size]
        prompts = policy.encode([task.prompt(problem) for problem in batch], length)
        rollout = policy.rollout(*prompts, length, decoder, generator)
        pairs = list(zip(batch, policy.decode(rollout), strict=True))
        solved += [task.solved(*pair) for pair in pairs]
        reward += [task.reward(*pair) for pair in pairs]
        calls, tokens = calls + int(rollout.nfe.sum()), tokens + int(rollout.token_mask.sum())
        gammas.append(rollout.threshold)
    gamma, n = torch.cat(gammas) if decoder.rule == "eb" else None, len(problems)
    key = getattr(task, "key", task.prompt)
    low, high, clusters = share_interval(solved, [key(problem) for problem in problems])
    return {
        "decoder": decoder.rule, "level": "learned" if decoder.level is None else decoder.level,
        "block_length": decoder.block_length or length, "length": length, "cache": decoder.cache,
        "prefill": policy.prefill, "temperature": decoder.temperature, "problems": n,
        "clusters": clusters, "seed": seed, "solved": sum(solved) / n, "solved_low": low,
        "solved_high": high, "reward": sum(reward) / n, "nfe": calls / n,
        "tokens_per_call": tokens / calls,
        "threshold_mean": None if gamma is None else gamma.mean().item(),
        "threshold_std": None if gamma is None else gamma.std(unbiased=False).item(),
        "seconds": time.perf_counter() - began, "device": str(policy.denoiser.device),
        "dtype": str(policy.denoiser.dtype).removeprefix("torch."),
    }  # fmt: skip


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
        cells = zip(line, widths, strict=True)
        print("  ".join(cell.rjust(width) for cell, width in cells))


def plot_curves(run_dir):
    """curves.png of a run folder: what metrics.jsonl says, step by step and as a running mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = runs.read_lines(run_dir / "metrics.jsonl")
    panels = {
        "reward_mean": "reward (sampled, training)", "solved_mean": "solved (sampled, training)",
        "nfe_mean": "NFE per completion", "threshold_mean": "threshold γ, nats",
        "surrogate_kl": "KL(true ‖ surrogate), nats", "grad_norm": "gradient norm, unclipped",
    }  # fmt: skip
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for axis, (key, label) in zip(axes.flat, panels.items(), strict=True):
        points = [(row["step"], row[key]) for row in rows if row[key] is not None]
        axis.set(title=label, xlabel="step")
        axis.grid(alpha=0.3)
        if points:
            steps, values = zip(*points, strict=True)
            w = max(1, len(values) // 20)
            spans = [values[max(0, i - w) : i] for i in range(1, len(values) + 1)]
            smooth = [sum(span) / len(span) for span in spans]
            axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1)
            axis.plot(steps, smooth, color="tab:blue", linewidth=2, label=f"mean of {w} steps")
            axis.legend(frameon=False)
        axis.set_ylim(bottom=0)
    figure.suptitle(str(run_dir.name))
    figure.savefig(run_dir / "curves.png.tmp", dpi=110, format="png")
    plt.close(figure)
    Path(run_dir / "curves.png.tmp").replace(run_dir / "curves.png")


def flags():
    parser = runs.OneLineParser(description="Accuracy against NFE of a run or a checkpoint.")
    parser.add_argument("path", help="a run folder, a checkpoint folder, or a hub name")
    for name, kind, default, text in (
        ("task", str, None, f"{', '.join(tasks.TASKS)} or FILE.py:NAME; default the run's"),
        ("decoder", str, "eb", "eb, confidence or top_k"),
        ("block_length", int, None, "tokens a block; 0: the whole canvas; default the run's, or 0"),
        ("cache", str, None, "block cache: none, prefix or dual; default the run's, or none"),
        ("length", int, None, "tokens a completion; default the run's, the task's own, or 256"),
        ("prefill", str, None, "how completions are made to begin; default the run's, or empty"),
        ("batch_size", int, 64, "problems at once; fewer need less memory"),
        ("temperature", float, 0.0, "0 is greedy"),
        ("problems", int, 1000, "how many"),
        (
            "split",
            str,
            None,
            "train, validation, test, or all of a file; default test, a new file all",
        ),
        ("data", str, None, "a JSON-lines file of problems; default the run's, if it had one"),
        ("seed", int, 0, "of the problems, and of the draws where temperature is above 0"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    help = "learned, or gamma, tau or k; several give several rows"
    parser.add_argument("--level", nargs="+", default=["learned"], help=help)
    return parser


def prepare(options):
    """(policy, task, problems, decoders) for the flags. Raises ValueError."""
    is_run = runs.checkpoint_of(options.path) != Path(options.path)
    trained = runs.read_json(Path(options.path) / "config.json") if is_run else {}
    defaults = {"task": None, "length": 0, "block_length": 0, "prefill": "", "data": ""}
    for name, default in (defaults | {"cache": "none"}).items():
        if getattr(options, name) is None:
            setattr(options, name, trained.get(name, default))
    if not options.task:
        raise ValueError(f"{options.path} is no run, which would know its task: give a --task")
    positive, other = (options.problems, options.batch_size), (options.block_length, options.length)
    if min(positive) < 1 or min(other) < 0:
        raise ValueError("problems and batch_size are at least 1, block_length and length 0")
    decoders = []
    for text in options.level:
        try:
            level = None if text == "learned" else float(text)
        except ValueError:
            raise ValueError(f"level {text!r} is neither a number nor learned") from None
        how = (options.block_length or None, options.temperature, options.cache, True, False)
        decoders.append(Decoder(options.decoder, level, *how))
    task, compact = tasks.find_task(options.task), runs.is_compact(options.path)
    task = tasks.for_tiny(task) if compact else task
    new_file = options.data and Path(options.data) != Path(trained.get("data") or "")
    options.split = options.split or ("all" if new_file else "test")
    task = tasks.FromFile(task, options.data) if options.data else task
    if options.data and options.split == "all":
        problems = [problem for pool in task.pools.values() for problem in pool]
    else:
        problems = task.problems(options.split, options.problems, options.seed)
    options.length = options.length or (task.length if compact else 256)
    policy = runs.load_policy(options.path, "cuda" if torch.cuda.is_available() else "cpu")
    policy.prefill = options.prefill
    if policy.threshold_head is None and any(d.rule == "eb" and d.level is None for d in decoders):
        raise ValueError(f"{options.path} has no learned threshold: give --level a number")
    return policy, task, problems, decoders


def main(arguments=None):
    parser = flags()
    options, rows = parser.parse_args(arguments), []
    try:
        policy, task, problems, decoders = prepare(options)
        about = {"name": Path(options.path).name, "task": options.task}
        about |= {"data": options.data or "", "split": options.split}
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
