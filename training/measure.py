"""How a run evaluates base and trained model on held-out problems, before and after training.

    eval.json         the rows of the table that is printed at the end
    frontier.json     a row for each model and gamma
    completions.json  what each model wrote for the first problems
    curves.png, frontier.png

evaluate.py does the measuring and knows nothing about training runs. This file chooses the gammas;
it is the only one in this folder that imports evaluate.py.
"""

from evaluate import evaluate, generate
from evaluation.progress import Progress
from evaluation.summary import GAMMAS, describe_base, read_results
from evaluation.tables import count_of
from sampler import Decoder
from training import distributed, files, run_folder
from training.logging import read_metrics


def measure_at(config, policy, task, problems, name, step, gammas):
    """Measure a policy greedily on held-out problems: one row of evaluate.evaluate for each gamma.

    name: "base" or "trained". gammas: in nats; None means each prompt's own.
    """
    batch_size = config.prompts_per_step * config.num_generations
    if policy.compact_prompts:
        batch_size = 256
    print(
        f"measuring the {name} model: {count_of(len(problems), 'held-out problem')}, "
        f"{count_of(len(gammas), 'threshold')}",
        flush=True,
    )
    rows = []
    progress = Progress(f"the {name} model", total=len(problems) * len(gammas))

    def on_batch(indices, outcomes):
        if distributed.is_main_process():
            progress.add(len(indices))

    with policy.remembering_states():  # the same canvases recur at several thresholds
        for gamma in gammas:
            scores = evaluate(
                policy,
                task,
                problems,
                greedy_decoder(config, gamma),
                length=config.max_completion_length,
                batch_size=batch_size * distributed.world_size(),
                rollout=distributed.rollout,
                on_batch=on_batch,
            )
            rows.append({"name": name, "step": step} | scores)
    return rows


def greedy_decoder(config, gamma):
    """The Decoder for held-out problems. gamma: in nats; None means each prompt's own."""
    return Decoder(
        rule="eb",
        level=gamma,
        block_length=config.block_length or None,
        temperature=0.0,
        cache=config.cache,
        sample_threshold=False,
    )


def complete_first(config, policy, task, problems, name, step, gamma):
    """Completions of the first three problems, as rows of completions.json."""
    first = problems[:3]
    outcomes = generate(
        policy,
        task,
        first,
        greedy_decoder(config, gamma),
        length=config.max_completion_length,
        rollout=distributed.rollout,
    )
    completions = []
    for problem, text, nfe in zip(first, outcomes.texts, outcomes.nfe.tolist(), strict=True):
        question = "; ".join(f"{key} {value}" for key, value in problem.items())
        if policy.compact_prompts:
            question = task.prompt(problem)
        completions.append(
            {
                "name": name,
                "step": step,
                "problem": problem,
                "question": question,
                "text": text,
                "nfe": int(nfe),
                "solved": bool(task.solved(problem, text)),
            }
        )
    return completions


def write_results(run_dir, completions, frontier, table):
    """Write what has been measured so far, in the main process.

    completions  what each model wrote for the first problems
    frontier     a row for each model and gamma
    table        the rows of the summary's table. Their file is written last: if it says that a
                 model was measured, the other files are complete.
    """
    if distributed.is_main_process():
        files.write_json(run_dir / "completions.json", completions)
        files.write_json(run_dir / "frontier.json", frontier)
        files.write_json(run_dir / "eval.json", table)


def measure_base(config, policy, task, problems, run_dir):
    """Measure the base before the first step, but only at the starting gamma: training has to wait.

    measure_trained measures it at the other gammas at the end.
    """
    base = run_folder.untrained_policy(config, policy, run_dir)
    gamma = config.initial_threshold
    rows = measure_at(config, base, task, problems, name="base", step=0, gammas=[gamma])
    print(describe_base(rows[0]), flush=True)
    completions = complete_first(config, base, task, problems, name="base", step=0, gamma=gamma)
    write_results(run_dir, completions=completions, frontier=rows, table=rows)


def measure_trained(config, policy, task, problems, run_dir):
    """Measure the trained model and, for the frontier, the base at the remaining gammas.

    Each result is written as soon as it is measured, so a killed run resumes here.
    """

    def rows_of_base(name):
        if not distributed.is_main_process():
            return []
        return [row for row in read_results(run_dir, name) if row["name"] == "base"]

    base_completions = rows_of_base("completions")
    base_frontier = rows_of_base("frontier")
    base_table = rows_of_base("eval")
    starting_gamma = config.initial_threshold
    other_gammas = []
    if config.frontier:
        other_gammas = [gamma for gamma in GAMMAS if gamma != starting_gamma]

    if other_gammas and distributed.all_reduce_max(len(base_frontier)) == 1:
        base = run_folder.untrained_policy(config, policy, run_dir)
        base_frontier += measure_at(
            config, base, task, problems, name="base", step=0, gammas=other_gammas
        )
        write_results(run_dir, base_completions, frontier=base_frontier, table=base_table)

    gammas = [starting_gamma, *other_gammas]
    is_learned = config.train_target != "policy"
    if is_learned:
        gammas.insert(0, None)  # each prompt's own
    step = config.steps
    rows = measure_at(config, policy, task, problems, name="trained", step=step, gammas=gammas)
    completions = complete_first(
        config, policy, task, problems, name="trained", step=step, gamma=gammas[0]
    )
    table = rows[:1]
    if is_learned:
        table.append(rows[1] | {"name": "trained at starting γ"})
    write_results(
        run_dir,
        completions=base_completions + completions,
        frontier=base_frontier + rows,
        table=base_table + table,
    )


def draw_pictures(config, run_dir):
    """curves.png and, if it was measured, frontier.png. Returns their paths."""
    from evaluation.plots import plot_curves, plot_frontier  # matplotlib takes a while to import

    path = run_dir / "curves.png"
    with files.atomic_write(path) as temporary_path:
        plot_curves(
            rows=read_metrics(run_dir),
            measured=read_results(run_dir, "eval"),
            title=run_dir.name,
            path=temporary_path,
        )
    paths = [path]
    if config.frontier:
        path = run_dir / "frontier.png"
        with files.atomic_write(path) as temporary_path:
            plot_frontier(read_results(run_dir, "frontier"), temporary_path, title=run_dir.name)
        paths.append(path)
    return paths
