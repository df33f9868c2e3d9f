"""Accuracy against NFE, for any checkpoint and any decoder.

    python evaluate.py runs/NAME                                   the learned threshold, greedy
    python evaluate.py runs/NAME --decoder top_k --level 1 2 4     LLaDA's rule
    python evaluate.py runs/A runs/B --frontier                    all rules and levels, with a plot
    python evaluate.py runs/NAME --trace 3                         completions, call by call
    python evaluate.py runs/NAME --json rows.jsonl                 rows and completions, to a file
    python evaluate.py --help                                      the other flags

NFE is the number of denoiser calls that a completion took. By default a run is measured on held-out
problems with its own task, length, blocks and cache, greedily, at each prompt's median gamma.
"Held-out" means that no multiset of numbers and no solution grid is in both training and test,
though a grid with relabelled digits may be. evaluation/options.py combines the flags with these
defaults.

Shapes: n problems, L completion tokens.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from evaluation.flags import DEFAULTS, completions_file, parse_flags
from models import terminal

if __name__ == "__main__":  # flags are checked before torch is imported, which takes seconds
    terminal.prepare()
    parse_flags()

import torch

from diffusion_policy import DiffusionPolicy
from evaluation import traces
from evaluation.completions import (
    append_completions,
    completions_differences,
    completions_table,
    score_file,
)
from evaluation.metrics import aup, cluster_interval, pass_rates
from evaluation.options import make_decoder, resolve_options
from evaluation.outputs import verify_replaceable, write_rows
from evaluation.paired import describe_problems, number_clusters
from evaluation.progress import Progress
from evaluation.tables import print_columns, print_differences, print_table
from models.checkpoints import find_checkpoint, load_policy, reads_compact_prompts, revision
from models.device import describe_out_of_memory, device_name, pick_device
from models.inputs import bare_name
from models.loading import DTYPES, dtype_of
from models.prompting import decode_completions, encode_prompts
from tasks import mixture, published_prompts, registry

LEVELS = {  # of --frontier
    "eb": (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3),
    "top_k": (1, 2, 3, 4, 6, 8),
    "confidence": (0.5, 0.7, 0.8, 0.9, 0.95, 0.99),
}


# ---- accuracy against NFE ------------------------------------------------------------------------


def evaluate(
    policy,
    task,
    problems,
    decoder,
    length,
    batch_size=256,
    seed=0,
    rollout=DiffusionPolicy.rollout,
    on_batch=None,
):
    """Complete the problems and score them. Returns one row of results, a dict for JSON.

    policy      a DiffusionPolicy
    task        a task (tasks/task.py) or a TaskMixture
    problems    n of its problems, dicts
    decoder     sampler.Decoder
    length      L; for a mixture whose tasks have their own lengths, the longest
    batch_size  problems completed at once
    seed        of the draws, if the decoder's temperature is above 0
    rollout     the function that completes a batch; training/distributed.py has one for several
                processes
    on_batch    called after each batch with the indices of its problems and the Outcomes so far

    The row holds all settings and scores and, for a mixture, each task's scores. Raises ValueError
    for problems that do not fit the model.
    """
    began = time.perf_counter()
    outcomes = generate(
        policy,
        task,
        problems,
        decoder,
        length,
        batch_size=batch_size,
        seed=seed,
        rollout=rollout,
        on_batch=on_batch,
    )
    scores = mixture.score_completions(task, problems, outcomes.texts)
    rewards = [reward for reward, _ in scores]
    solved = [is_solved for _, is_solved in scores]
    cluster_of = getattr(task, "key", task.prompt)
    clusters = [cluster_of(problem) for problem in problems]
    row = {
        "decoder": decoder.rule,
        "level": "learned" if decoder.level is None else decoder.level,
        "block_length": decoder.block_length or length,
        "length": length,
        "cache": decoder.cache,
        "prefill": policy.prefill,
        "temperature": decoder.temperature,
        "seed": seed,
    }
    row |= summarise(range(len(problems)), decoder, solved, clusters, outcomes)
    row["reward"] = fmean(rewards)
    row |= describe_problems(
        solved, clusters, number_of_cluster=number_clusters(clusters), nfe=outcomes.nfe
    )
    row |= {
        "seconds": time.perf_counter() - began,
        "device": device_name(policy.denoiser.device),
        "dtype": dtype_of(policy.denoiser),
    }
    if hasattr(task, "cells"):
        cells = [task.cells(*pair) for pair in zip(problems, outcomes.texts, strict=True)]
        row["cells"] = fmean(cells)
    for name, indices in mixture.indices_by_task(task, problems).items():
        if name:
            part = {"length": mixture.completion_length(task, problems[indices[0]], length)}
            part |= summarise(indices, decoder, solved, clusters, outcomes)
            clusters_of_part = [clusters[i] for i in indices]
            part |= describe_problems(
                [solved[i] for i in indices],
                clusters_of_part,
                number_of_cluster=number_clusters(clusters_of_part),
                nfe=outcomes.nfe[indices],
            )
            row.setdefault("tasks", {})[name] = part
    return row


@dataclass
class Outcomes:
    """Results of n completions, in the order of the problems."""

    texts: list  #              (n,) str
    nfe: torch.Tensor  #        (n,) double, denoiser calls
    tokens: torch.Tensor  #     (n,) double, number of tokens in the text
    threshold: torch.Tensor  #  (n,) double, gamma in nats; nan if the rule has none


def generate(
    policy,
    task,
    problems,
    decoder,
    length,
    batch_size=256,
    seed=0,
    rollout=DiffusionPolicy.rollout,
    on_batch=None,
) -> Outcomes:
    """Complete n problems, batch by batch; arguments as in `evaluate`."""
    generator = torch.Generator(policy.denoiser.device).manual_seed(seed)
    texts = [None] * len(problems)
    nfe = torch.zeros(len(problems), dtype=torch.double)
    tokens = torch.zeros(len(problems), dtype=torch.double)
    threshold = torch.zeros(len(problems), dtype=torch.double)
    outcomes = Outcomes(texts, nfe, tokens, threshold)  # filled in below
    for indices, L in mixture.batches_by_task(task, problems, length, batch_size):
        prompts = [task.prompt(problems[i]) for i in indices]
        prompt_ids, prompt_mask = encode_prompts(policy, prompts, room=L)
        completed = rollout(
            policy, prompt_ids, prompt_mask, length=L, decoder=decoder, generator=generator
        )
        for i, text in zip(indices, decode_completions(policy, completed), strict=True):
            texts[i] = text
        nfe[indices] = completed.nfe.double().cpu()
        tokens[indices] = completed.token_mask.sum(dim=1).double().cpu()
        threshold[indices] = completed.threshold.double().cpu()
        if on_batch is not None:
            on_batch(indices, outcomes)
    return outcomes


def summarise(indices, decoder, solved, clusters, outcomes):
    """The scores of the problems with these indices: all problems, or those of one task."""
    indices = list(indices)
    is_solved = [solved[i] for i in indices]
    nfe = outcomes.nfe[indices]
    threshold = outcomes.threshold[indices]
    low, high, number_of_clusters = cluster_interval(is_solved, [clusters[i] for i in indices])
    has_threshold = decoder.rule == "eb"
    return {
        "problems": len(indices),
        "clusters": number_of_clusters,
        "solved": sum(is_solved) / len(indices),
        "solved_low": low,
        "solved_high": high,
        "nfe": nfe.mean().item(),
        "tokens_per_call": (outcomes.tokens[indices].sum() / nfe.sum()).item(),
        "threshold_mean": threshold.mean().item() if has_threshold else None,
        "threshold_std": threshold.std(unbiased=False).item() if has_threshold else None,
    }


# ---- one checkpoint ------------------------------------------------------------------------------


def decoders_for(options, length, has_head):
    """The decoders to measure. Raises ValueError if a learned threshold is missing."""
    if not options.frontier:
        if options.decoder == "eb" and None in options.level and not has_head:
            raise ValueError(f"{options.path} has no learned threshold: give --level a number")
        return [make_decoder(options, options.decoder, level) for level in options.level]
    decoders = []
    for rule, levels in LEVELS.items():
        for level in levels:
            if rule != "top_k" or level == 1 or level < length:
                decoders.append(make_decoder(options, rule, level))
    if has_head:
        decoders.append(make_decoder(options, "eb", None))
    return decoders


def load(options):
    """(policy, task, problems, lengths) to measure, from the options. Raises ValueError.

    If no flag gave a block length, sets options.block_length to the checkpoint's own.
    """
    compact = reads_compact_prompts(options.path)
    task = registry.load_task(options.task, compact, options.data, options.max_completion_length[0])
    if compact and options.prompt:
        raise ValueError(f"{options.path} reads only short prompts: leave out --prompt")
    task = published_prompts.with_published_prompts(task, options.prompt, options.shots)
    problems = task.problems(options.split, options.trace or options.problems, options.seed)
    if options.is_new_file and find_checkpoint(options.path) != options.path:
        training_data = options.run_data if Path(options.run_data).is_file() else ""
        published_prompts.warn_of_training_overlap(
            problems,
            task=registry.load_task(options.task, compact, training_data),
            data=options.data,
            run=options.path,
        )
    lengths = [L or (task.length if compact else 256) for L in options.max_completion_length]
    policy = load_policy(
        options.path,
        device=pick_device(options.device),
        dtype=DTYPES[options.dtype],
        adapter=options.adapter,
    )
    policy.prefill = options.prefill
    if options.block_length is None:
        options.block_length = policy.denoiser.block_length
    if options.is_threshold_fixed:
        policy.threshold_head = None
    return policy, task, problems, lengths


def measure(options, name, rows):
    """Measures one checkpoint and appends its rows to `rows`: one for each length and decoder.

    With --json, each row is written as soon as it is measured, and completions after each batch.
    """
    policy, task, problems, lengths = load(options)
    samples = options.samples
    problems = [problem for problem in problems for _ in range(samples)]
    decoders_of = {
        length: decoders_for(options, length, policy.threshold_head is not None)
        for length in lengths
    }
    progress = Progress(name, total=len(problems) * sum(map(len, decoders_of.values())))
    rows_of_checkpoint = []
    with policy.remembering_states():  # the same canvases recur under several decoders
        for length in lengths:
            for decoder in decoders_of[length]:
                level = "learned" if decoder.level is None else decoder.level
                label = f"{name}, {decoder.rule} {level}, length {length}"

                def on_batch(indices, outcomes, label=label):
                    progress.add(len(indices))
                    if options.json:
                        append_completions(
                            completions_file(options.json),
                            name=label,
                            task=options.task,
                            problems=[problems[i] for i in indices],
                            texts=[outcomes.texts[i] for i in indices],
                            nfe=outcomes.nfe[indices].tolist(),
                        )

                row = {
                    "name": name,
                    "task": options.task,
                    "data": options.data,
                    "split": options.split,
                    "adapter": options.adapter,
                    "prompt": options.prompt,
                    "shots": options.shots,
                    "samples": samples,
                    "checkpoint": str(options.path),
                    "revision": revision(policy),
                }
                row |= evaluate(
                    policy,
                    task,
                    problems,
                    decoder,
                    length,
                    batch_size=options.batch_size,
                    seed=options.seed,
                    on_batch=on_batch,
                )
                if samples > 1:
                    row |= pass_rates(row["solved_each"], samples)
                rows_of_checkpoint.append(row)
                rows.append(row)
                if options.json:
                    write_rows(rows, options.json)
                if options.frontier:
                    print(
                        f"{name}: {row['decoder']} {row['level']}: {row['solved']:.1%} solved, "
                        f"NFE {row['nfe']:.2f}",
                        flush=True,
                    )
    for length in lengths:
        curve = [row for row in rows_of_checkpoint if row["length"] == length]
        if len(curve) > 1 and not options.frontier:
            score = aup(curve, best=max(row["solved"] for row in curve))
            for row in curve:
                row["aup"] = score


# ---- what is shown -------------------------------------------------------------------------------


def show_traces(options):
    """--trace: shows the first completions in the terminal, as a web page and as an animation."""
    from evaluation import trace_page  # matplotlib and pillow take a while to import

    trace_page.verify_folder(options.folder)
    policy, task, problems, lengths = load(options)
    decoder = decoders_for(options, lengths[0], policy.threshold_head is not None)[0]
    lengths = [mixture.completion_length(task, problem, lengths[0]) for problem in problems]
    recorded = [
        traces.record(policy, task, problem, decoder, length, options.seed)
        for problem, length in zip(problems, lengths, strict=True)
    ]
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for trace in recorded:
        print(traces.describe_trace(trace, colour))
    # The two-stages picture shows the problem that took the most calls.
    i = max(range(len(recorded)), key=lambda i: recorded[i].nfe)
    stages = traces.two_stages(
        policy,
        task,
        problems[i],
        decoder,
        length=lengths[i],
        seed=options.seed,
        samples=min(8, options.batch_size),
    )
    paths = trace_page.write(recorded, stages, options.folder, title=options.path.name)
    print("\nwritten:", *paths)


# ---- the program ---------------------------------------------------------------------------------


def run(flags):
    """Does what the flags ask for. Raises ValueError for flags that do not go together."""
    flags = dict(flags)
    paths = flags.pop("paths")
    if "completions" in flags:
        tasks = dict(registry.TASKS)
        for name in flags.get("task", "").split(","):
            if name:
                tasks[bare_name(name)] = registry.load_task(name, compact=False)
        rows = score_file(flags["completions"], tasks)
        print_columns(completions_table(rows))
        for table in completions_differences(rows):
            print_differences(table)
        if "json" in flags:
            write_rows(rows, flags["json"])
        return

    all_options = [resolve_options(path, flags) for path in paths]
    first = all_options[0]
    tasks = dict.fromkeys(f"{options.task} {options.data}".strip() for options in all_options)
    if first.frontier and len(tasks) > 1:
        raise ValueError(f"--frontier compares runs of one task, not of {' and '.join(tasks)}")
    if first.trace:
        for options in all_options:
            show_traces(options)
        return
    if first.frontier:
        from evaluation.frontiers import show_frontiers  # matplotlib takes a while to import

        verify_replaceable(
            first.folder / "frontiers.jsonl",
            pictures=[first.folder / "frontiers.png"],
            content='"tokens_per_call"',
        )

    names = [options.path.name for options in all_options]
    if len(set(names)) < len(names):  # runs in different folders may have the same name
        names = paths
    rows = []
    try:
        for options, name in zip(all_options, names, strict=True):
            measure(options, name, rows)
    except BaseException:  # Ctrl-C or out of memory: print the rows measured so far
        if rows and not first.frontier:
            print_table(rows)
        if first.json and completions_file(first.json).exists():
            print(f"completions so far: {completions_file(first.json)}", file=sys.stderr)
        raise
    if first.frontier:
        show_frontiers(rows, first.folder)
    else:
        print_table(rows)
    if first.json:
        write_rows(rows, first.json)


def main(arguments=None):
    """The program. Returns its exit status: 0, 1 (out of memory), 2 (bad input), 130 (Ctrl-C).

    Raises SystemExit, with status 2, for flags that parse_flags refuses.
    """
    flags = parse_flags(arguments)
    try:
        run(flags)
        return 0
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        lower = f"--batch_size ({flags.get('batch_size', DEFAULTS['batch_size'])})"
        print(f"evaluate.py: {describe_out_of_memory(error, lower)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
