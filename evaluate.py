"""Accuracy against NFE, for any checkpoint and any decoder setting.

    python evaluate.py runs/NAME --task countdown                                   the learned threshold, greedy
    python evaluate.py runs/NAME --task countdown --setting learned 0.01 0.1 1      beside fixed ones
    python evaluate.py runs/NAME --task countdown --decoder top_k --setting 1 2 4   the LLaDA rule
    python evaluate.py runs/NAME --task countdown --data problems.jsonl             your own problems, or d1's test file
    python evaluate.py GSAI-ML/LLaDA-8B-Instruct --task gsm8k --decoder top_k --setting 2 --block_length 32 --prefill "<reasoning>"

NFE is the number of denoiser calls a completion took. Prints one JSON line per setting, with every sampler setting in it,
and then the same as a table.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch

from runs import checkpoint_of, is_compact, load_policy, out_of_memory, read_json, read_lines
from sampler import Decoder
from tasks import TASKS, check_split, find_task, for_tiny


def wilson_interval(successes, n, z=1.96):
    """The 95% score interval of a share: honest near 0 and 1, where the normal approximation is not."""
    share, spread = successes / n, z * math.sqrt(successes * (n - successes) / n + z * z / 4) / n
    middle, scale = share + z * z / (2 * n), 1 + z * z / n
    return (middle - spread) / scale, (middle + spread) / scale


def evaluate(
    policy, task, problems, decoder, temperature=0.0, seed=0, batch_size=256, length=None, cache="none", prefill=""
):  # fmt: skip
    """One row of results: a dict of every setting and every score. length None is the tiny model's.

    Raises ValueError for a problem that the tokenizer cannot write or that does not fit.
    """
    length = length or (task.length if policy.compact else 256)
    generator = torch.Generator(policy.denoiser.device).manual_seed(seed)
    solved, reward, calls, tokens, gammas = 0, 0.0, 0, 0, []
    began = time.perf_counter()
    for start in range(0, len(problems), batch_size):
        batch = problems[start : start + batch_size]
        prompt_ids, prompt_mask = policy.encode([task.prompt(problem) for problem in batch], prefill, length)
        rollout = policy.rollout(
            prompt_ids, prompt_mask, length, decoder, generator, temperature, sample_threshold=False, stop_at_eos=True, cache=cache
        )
        texts = [prefill + text for text in policy.decode(rollout)]
        solved += sum(task.solved(problem, text) for problem, text in zip(batch, texts, strict=True))
        reward += sum(task.reward(problem, text) for problem, text in zip(batch, texts, strict=True))
        calls += int(rollout.nfe.sum())
        tokens += int(rollout.token_mask.sum())
        gammas.append(rollout.threshold)
    n, gamma = len(problems), torch.cat(gammas)
    low, high = wilson_interval(solved, n)
    return {
        "decoder": decoder.rule,
        "setting": "learned" if decoder.setting is None else decoder.setting,
        "block_length": decoder.block_length or length,
        "length": length,
        "cache": cache,
        "prefill": prefill,
        "temperature": temperature,
        "problems": n,
        "seed": seed,
        "solved": solved / n,
        "solved_low": low,
        "solved_high": high,
        "reward": reward / n,
        "nfe": calls / n,
        "tokens_per_call": tokens / calls,
        "threshold_mean": gamma.mean().item() if decoder.rule == "eb" else None,
        "threshold_std": gamma.std(unbiased=False).item() if decoder.rule == "eb" else None,
        "seconds": time.perf_counter() - began,
        "device": str(policy.denoiser.device),
        "dtype": str(policy.denoiser.dtype).removeprefix("torch."),
    }


def print_table(rows):
    columns = {
        "": lambda row: row["name"],
        "decoder": lambda row: row["decoder"],
        "setting": lambda row: row["setting"] if isinstance(row["setting"], str) else f"{row['setting']:g}",
        "gamma": lambda row: "" if row["threshold_mean"] is None else f"{row['threshold_mean']:.3f} ± {row['threshold_std']:.3f}",
        "length": lambda row: str(row["length"]),
        "block": lambda row: str(row["block_length"]),
        "cache": lambda row: row["cache"],
        "T": lambda row: f"{row['temperature']:g}",
        "problems": lambda row: str(row["problems"]),
        "solved": lambda row: f"{row['solved']:.1%}",
        "95% interval": lambda row: f"{row['solved_low']:.1%} to {row['solved_high']:.1%}",
        "reward": lambda row: f"{row['reward']:.3f}",
        "NFE": lambda row: f"{row['nfe']:.2f}",
        "tokens/call": lambda row: f"{row['tokens_per_call']:.2f}",
        "seconds": lambda row: f"{row['seconds']:.1f}",
    }
    table = [list(columns)] + [[show(row) for show in columns.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def plot_curves(run_dir):
    """curves.png of a run folder: what metrics.jsonl says, step by step and as a running mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_lines(run_dir / "metrics.jsonl")
    panels = {
        "reward_mean": "reward (sampled, training problems)",
        "solved_mean": "solved share (sampled, training problems)",
        "nfe_mean": "NFE per completion",
        "threshold_mean": "threshold γ, nats",
        "surrogate_kl": "KL(true ‖ surrogate), nats per token",
        "grad_norm": "gradient norm before clipping",
    }
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for axis, (key, label) in zip(axes.flat, panels.items(), strict=True):
        points = [(row["step"], row[key]) for row in rows if row[key] is not None]
        axis.set(title=label, xlabel="step")
        axis.grid(alpha=0.3)
        if points:
            steps, values = zip(*points, strict=True)
            window = max(1, len(values) // 20)
            smooth = [sum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]
            axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1)
            axis.plot(steps, smooth, color="tab:blue", linewidth=2, label=f"mean of {window} steps")
            axis.legend(frameon=False)
        axis.set_ylim(bottom=0)
    figure.suptitle(str(run_dir.name))
    figure.savefig(run_dir / "curves.png.tmp", dpi=110, format="png")
    plt.close(figure)
    Path(run_dir / "curves.png.tmp").replace(run_dir / "curves.png")


class OneLineParser(argparse.ArgumentParser):
    """Bad flags get one line, like all other bad input, not a page of usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists all flags)\n")


def main(arguments=None):
    parser = OneLineParser(description="Accuracy against NFE of a run folder or checkpoint folder.")
    parser.add_argument("path", help="a run folder, a checkpoint folder, or a hub name")
    parser.add_argument("--task", required=True, help=f"one of {', '.join(TASKS)}")
    parser.add_argument("--decoder", default="eb", help="eb, confidence or top_k")
    parser.add_argument("--setting", nargs="+", default=["learned"], help="learned, or gamma, tau or k; several give several rows")
    parser.add_argument("--block_length", type=int, help="tokens a block; 0 is the whole canvas; default as the run was trained, or 0")
    parser.add_argument("--cache", default="none", help="block cache: none (exact), prefix or dual; needs --block_length")
    parser.add_argument("--length", type=int, help="tokens a completion; default as the run was trained, or 256")
    parser.add_argument(
        "--prefill", help="how every completion is made to begin, e.g. <reasoning>; default as the run was trained, or empty"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="problems at once; fewer need less memory")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--problems", type=int, default=1000, help="how many generated problems")
    parser.add_argument("--split", default="test", help="train, validation or test")
    parser.add_argument("--data", help="a JSON-lines file of problems instead")
    parser.add_argument("--seed", type=int, default=0, help="of the problems, and of the draws where temperature is above 0")
    options = parser.parse_args(arguments)
    try:
        task = find_task(options.task)
        check_split(options.split)
        # A run is measured as it was trained, unless flags say otherwise.
        trained = read_json(Path(options.path) / "config.json") if checkpoint_of(options.path) != Path(options.path) else {}
        for name, default in {"length": 0, "block_length": 0, "prefill": ""}.items():
            if getattr(options, name) is None:
                setattr(options, name, trained.get(name, default))
        if min(options.problems, options.batch_size) < 1 or min(options.temperature, options.block_length, options.length) < 0:
            raise ValueError("problems and batch_size have to be at least 1, temperature, block_length and length at least 0")
        decoders = []
        for text in options.setting:
            try:
                value = None if text == "learned" else float(text)
            except ValueError:
                raise ValueError(f"setting {text!r} is neither a number nor learned") from None
            decoders.append(Decoder(options.decoder, value, options.block_length or None))
        task = for_tiny(task) if is_compact(options.path) else task
        problems = task.load(options.data) if options.data else task.problems(options.split, options.problems, options.seed)
        policy = load_policy(options.path, "cuda" if torch.cuda.is_available() else "cpu")
        if policy.threshold_head is None and any(decoder.rule == "eb" and decoder.setting is None for decoder in decoders):
            raise ValueError(f"{options.path} has no learned threshold: give --setting a number")
        rows = []
        for decoder in decoders:
            row = {"name": Path(options.path).name, "task": options.task, "data": options.data or options.split}
            how = (options.temperature, options.seed, options.batch_size, options.length, options.cache, options.prefill)
            rows.append(row | evaluate(policy, task, problems, decoder, *how))
            print(json.dumps(rows[-1]), flush=True)
    except ValueError as error:
        parser.exit(2, f"evaluate.py: {error}\n")
    except (MemoryError, RuntimeError) as error:
        parser.exit(1, f"evaluate.py: {out_of_memory(error, f'lower --batch_size ({options.batch_size})')}\n")
    print_table(rows)


if __name__ == "__main__":
    sys.exit(main())
