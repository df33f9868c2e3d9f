"""Train a masked-diffusion language model to reason better and faster.

    python train.py --task countdown --model tiny     a laptop, no GPU, no download
    python train.py --task countdown,sudoku           both, by one model (tasks/mixture.py)
    python train.py --task my_task.py:MyTask          your own task (tasks/task.py)
    python train.py --resume --run_dir runs/NAME      go on after Ctrl-C, a kill or a power cut
    python train.py --task gsm8k --model GSAI-ML/LLaDA-8B-Instruct        a GPU of 24 GB or more
    torchrun --nproc_per_node 4 train.py --task countdown --run_dir runs/a     four processes

DiFFPO is GRPO with four changes:
    1. the policy is a diffusion process: each step unmasks several tokens      diffusion_policy.py
    2. its likelihood is a surrogate, scored from two states instead of all     likelihood.py
    3. so learning is off-policy, and tokens carry importance weights           diffpo_loss.py
    4. how much to unmask at once is learned too, by the same rewards           sampler.py

The algorithm is the first half of this file. Supporting code (run folder, checkpoints, several
processes, logs) is in training/; each call says what it does.

Shapes: P prompts a step, G completions each, B = P * G rows, L completion tokens, m stages.
"""

import random
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from models import terminal
from training.flags import parse_flags

if __name__ == "__main__":  # flags are checked before torch is imported, which takes seconds
    terminal.prepare()
    parse_flags()

import torch
from tqdm import tqdm

import likelihood
from diffpo_loss import (
    diffpo_loss,
    group_advantages,
    importance_weights,
    reference_kl,
    threshold_loss,
    weight_metrics,
)
from evaluate import evaluate, generate
from evaluation.progress import Progress
from evaluation.summary import GAMMAS, describe_base, has_results, print_summary, read_results
from evaluation.tables import count_of
from models import inputs
from models.device import describe_out_of_memory
from models.prompting import decode_completions, encode_prompts
from sampler import Decoder
from tasks import mixture
from training import checkpoint, distributed, files, health, run_folder
from training.logging import (
    cost_metrics,
    log_step,
    open_tracker,
    print_progress,
    read_metrics,
    rollout_metrics,
    sample_rows,
)

# ---- the algorithm -------------------------------------------------------------------------------


@dataclass
class InnerUpdate:
    """What is random in one of the mu updates; the same for new, old and reference policy."""

    boundaries: torch.Tensor  #            (B, m-1), the steps between stages
    masked_prompt: torch.Tensor | None  #  (B, P) bool, prompt tokens to mask while scoring
    dropout_seed: int


@dataclass
class FixedScores:
    """Log-probs, (B, L) each, that do not change while one inner update runs."""

    old: torch.Tensor | None  #         the old policy's; None: the first update, where new is old
    for_weight: torch.Tensor | None  #  the weight's numerator; None: it is the old policy's, or no
    #                                   weights are used
    reference: torch.Tensor | None  #   the base model's; None: no KL

    def rows(self, rows):
        """The same for some rows."""

        def part(logp):
            return None if logp is None else logp[rows]

        return FixedScores(part(self.old), part(self.for_weight), part(self.reference))


def diffpo_step(config, task, policy, reference, optimizers, step):
    """One step of DiFFPO: the README's list, with its numbers.

    Returns the step's metrics and a few sampled completions, as dicts for JSON.
    """
    step_began = time.perf_counter()
    scorers = [policy] if reference is None else [policy, reference]
    for scorer in scorers:
        scorer.rows_run = 0
    G = config.num_generations
    # With several tasks, each step trains on one of them, with that task's own length.
    task, L = mixture.task_for_step(task, step, config.max_completion_length)
    # All randomness is derived from (seed, step), so resuming is deterministic.
    step_seed = random.Random(f"{config.seed} {step}").getrandbits(63)
    generator = torch.Generator(policy.denoiser.device).manual_seed(step_seed)

    # 1. Draw P prompts c, and repeat each G times.
    problems = task.problems("train", config.prompts_per_step, f"{config.seed} {step}")
    problems = [problem for problem in problems for _ in range(G)]  # B = P * G
    prompts = [task.prompt(problem) for problem in problems]
    prompt_ids, prompt_mask = encode_prompts(policy, prompts, room=L)  # (B, P), (B, P)

    # 2. Complete them with the true policy. The threshold gamma says how much to unmask in each
    #    step; the probability of what is drawn is recorded.
    rollout = distributed.rollout(
        policy,
        prompt_ids,
        prompt_mask,
        length=L,
        decoder=rollout_decoder(config),
        generator=generator,
        num_generations=G,
    )
    texts = decode_completions(policy, rollout)
    rollout_ended = time.perf_counter()

    # 3. Verify. Speed multiplies the reward: a wrong answer gains nothing by being fast, and a
    #    partial reward is scaled in the same way. [OUR CHOICE]
    reward, solved = compute_rewards(task, problems, texts, G, device=prompt_ids.device)  # (B,)
    speed_reward = reward * (1 - config.nfe_penalty * rollout.nfe / L)  # (B,)

    # 4. Compare each completion with its group.
    advantage = group_advantages(speed_reward, G, config.scale_rewards)  # (B,)

    # 5. Draw fresh stage boundaries for each of the mu inner updates and, as d1 does, prompt tokens
    #    to mask.
    updates = []
    for i in range(config.num_iterations):
        boundaries = likelihood.draw_boundaries(rollout.nfe, config.num_stages, generator)
        masked_prompt = None
        if config.p_mask_prompt > 0:
            masked_prompt = likelihood.draw_masked_prompt(
                prompt_mask, G, config.p_mask_prompt, generator
            )
        updates.append(InnerUpdate(boundaries, masked_prompt, dropout_seed=step_seed + i))

    # 6. Ascend the corrected, clipped objective: the model by its tokens, the sampler by its gamma.
    #    A token's score takes the selected positions as given. Under a learned gamma, *which*
    #    positions are selected depends on the model too; that part of the gradient is left out.
    #    [OUR CHOICE]
    metrics = {
        "reward_mean": reward.mean().item(),
        "speed_reward_mean": speed_reward.mean().item(),
        "solved_mean": solved.mean().item(),
    }
    metrics |= rollout_metrics(rollout, advantage, G)
    if config.cache != "none":
        one_row = rollout.rows(slice(0, 1))
        metrics["cache_kl"] = likelihood.cache_kl(policy, one_row, generator=generator)
    if config.train_target != "sampler":
        metrics |= update_denoiser(
            config, policy, reference, optimizers[0], rollout, advantage, updates
        )
    if config.train_target != "policy":
        metrics |= update_threshold(config, policy, optimizers[1], rollout, advantage)
    denoiser_rows = distributed.all_reduce_sum(sum(scorer.rows_run for scorer in scorers))
    metrics |= cost_metrics(rollout, denoiser_rows, step_began, rollout_ended)
    return metrics, sample_rows(problems, texts, rollout, reward)


def rollout_decoder(config):
    """The entropy-bounded rule, at the learned gamma or, if only the policy learns, a fixed one."""
    return Decoder(
        rule="eb",
        level=config.initial_threshold if config.train_target == "policy" else None,
        block_length=config.block_length or None,
        temperature=config.temperature,
        cache=config.cache,
        stop_at_eos=True,
        sample_threshold=True,
    )


def compute_rewards(task, problems, texts, num_generations, device):
    """What each completion earns, and 1 where it solves its problem: (B,), (B,)."""
    rows = distributed.local_rows(len(texts), num_generations)
    scores = mixture.score_completions(task, problems[rows], texts[rows])
    scores = torch.tensor(scores, dtype=torch.float32, device=device)  # (b, 2)
    reward, solved = distributed.all_gather_rows(scores, rows, len(texts)).unbind(dim=1)
    return reward, solved


def update_denoiser(config, policy, reference, optimizer, rollout, advantage, updates):
    """mu optimisation steps on one batch of rollouts. Returns the mean of their metrics.

    First everything that does not change is scored, before the weights move; then each update
    scores the new policy, micro-batch by micro-batch, and takes a step.
    """
    B = len(advantage)
    local = distributed.local_rows(B, config.num_generations)
    # A row that two processes scored would count twice in the summed gradients.
    assert distributed.all_reduce_sum(local.stop - local.start) == B
    size = config.micro_batch_size
    if size > config.num_generations:  # whole groups: what a group shares is run once
        size -= size % config.num_generations
    micro_batches = [
        slice(start, min(start + size, local.stop))
        for start in range(local.start, local.stop, size)
    ]

    def score(scorer, update, rows, mask_prompt=True):
        """The surrogate's log-probs of some rows, (b, L)."""
        masked_prompt = None
        if mask_prompt and update.masked_prompt is not None:
            masked_prompt = update.masked_prompt[rows]
        # One dropout mask for old, new and weight, or their ratios would be noise.
        gpus = [advantage.device] if advantage.is_cuda else []
        with torch.random.fork_rng(gpus):
            torch.manual_seed(update.dropout_seed + rows.start)
            return likelihood.surrogate_logp(
                scorer, rollout.rows(rows), update.boundaries[rows], masked_prompt
            )

    @torch.no_grad()
    def score_all(scorer, update, mask_prompt=True):
        """The same for the whole batch, without gradient, (B, L)."""
        logp = torch.cat([score(scorer, update, rows, mask_prompt) for rows in micro_batches])
        return distributed.all_gather_rows(logp, local, B)

    health.assert_finite("a drawn token's log-prob", rollout.behaviour_logp, rollout)
    policy.denoiser.train()  # gradient checkpointing, dropout

    # Scores needed before the weights change. At the first update the new policy still is the old
    # one, so its score serves for both. The weight compares with what was drawn from, so its
    # numerator masks nothing of the prompt; if no prompt is masked, it is the old score. Without
    # weights (C = 0) it would be scored for the log alone.
    all_scores = []
    for i, update in enumerate(updates):
        all_scores.append(
            FixedScores(
                old=score_all(policy, update) if i > 0 else None,
                for_weight=(
                    score_all(policy, update, mask_prompt=False)
                    if update.masked_prompt is not None and config.importance_weight_cap > 0
                    else None
                ),
                reference=score_all(reference, update) if reference is not None else None,
            )
        )

    history = []
    for update, scores in zip(updates, all_scores, strict=True):
        optimizer.zero_grad()
        logp_new = []
        for rows in micro_batches:
            logp = score(policy, update, rows)  # (b, L), with gradient
            loss, _ = objective(
                config,
                rollout=rollout.rows(rows),
                advantage=advantage[rows],
                logp_new=logp,
                scores=scores.rows(rows),
            )
            (loss * len(logp) / B).backward()  # each row weighs 1/B
            logp_new.append(logp.detach())
        distributed.all_reduce_gradients(policy.denoiser)

        # Without gradient, for the log only: loss and metrics of the whole batch.
        logp_new = distributed.all_gather_rows(torch.cat(logp_new), local, B)  # (B, L)
        loss, metrics = objective(config, rollout, advantage, logp_new, scores)
        health.assert_finite("the loss", loss, rollout)
        grad_norm = distributed.clip_grad_norm(policy.denoiser, config.max_grad_norm)
        health.assert_finite("the gradient", grad_norm, rollout)
        optimizer.step()

        old = logp_new if scores.old is None else scores.old
        for_weight = old if scores.for_weight is None else scores.for_weight
        if update.masked_prompt is None or scores.for_weight is not None:
            metrics |= weight_metrics(
                for_weight,
                rollout.behaviour_logp,
                cap=config.importance_weight_cap,
                token_mask=rollout.token_mask,
                has_unit_weight=likelihood.unit_weight_tokens(
                    rollout.unmask_step, update.boundaries
                ),
            )
        metrics["grad_norm"] = grad_norm.item()
        history.append(metrics)
    policy.denoiser.eval()
    return {name: sum(metrics[name] for metrics in history) / len(history) for name in history[0]}


def objective(config, rollout, advantage, logp_new, scores):
    """The loss of some rows: diffpo_loss and, if beta is above 0, the KL to the base model.

    advantage (b,), logp_new (b, L), scores: FixedScores of the same rows. Returns (loss, metrics).
    """
    logp_old = logp_new.detach() if scores.old is None else scores.old
    logp_for_weight = logp_old if scores.for_weight is None else scores.for_weight
    loss, metrics = diffpo_loss(
        logp_new=logp_new,
        logp_old=logp_old,
        advantage=advantage,
        weights=importance_weights(
            logp_for_weight, rollout.behaviour_logp, cap=config.importance_weight_cap
        ),
        token_mask=rollout.token_mask,
        epsilon=config.epsilon,
        normalise_by=config.normalise_by,
    )
    if scores.reference is not None:
        kl = reference_kl(logp_new, scores.reference, rollout.token_mask, config.normalise_by)
        loss = loss + config.beta * kl
        metrics["reference_kl"] = kl.item()
    return loss, metrics


def update_threshold(config, policy, optimizer, rollout, advantage):
    """mu clipped steps of the threshold head, by the same advantages. Returns the last metrics."""
    for _ in range(config.num_iterations):
        distribution = policy.threshold_head(rollout.prompt_state)
        loss, metrics = threshold_loss(
            logp_new=distribution.log_prob(rollout.threshold),
            logp_old=rollout.threshold_logp,
            advantage=advantage,
            epsilon=config.threshold_epsilon,
        )
        health.assert_finite("the threshold's loss", loss.detach(), rollout)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return metrics


# ---- the loop ------------------------------------------------------------------------------------


def training_loop(config, task, run_dir, policy, interrupt):
    """From the first step, or the last checkpoint, to the last step. Changes `policy` in place.

    Raises KeyboardInterrupt, once the step is saved, if `interrupt` was asked to stop.
    """
    reference = None
    if config.beta > 0:
        reference = run_folder.reference_policy(config, policy)
    if config.gradient_checkpointing:
        policy.denoiser.gradient_checkpointing_enable({"use_reentrant": False})
    optimizers = [
        torch.optim.AdamW(
            policy.denoiser.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
            # One weight at a time if some are split over processes and some are not.
            foreach=False if config.shard else None,
        ),
        torch.optim.Adam(policy.threshold_head.parameters(), lr=config.threshold_learning_rate),
    ]
    first_step = checkpoint.load_state(run_dir, optimizers)
    is_main = distributed.is_main_process()
    track = open_tracker(config.report_to if is_main else "none", run_dir, config)
    history = read_metrics(run_dir)
    warned = set()
    bar = tqdm(
        range(first_step, config.steps),
        desc=config.train_target,
        total=config.steps,
        initial=first_step,
        disable=None if is_main else True,  # None: hidden only if the output is a pipe
    )
    for step in bar:
        warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
        for group in optimizers[0].param_groups:
            group["lr"] = config.learning_rate * warmup
        try:
            metrics, samples = diffpo_step(config, task, policy, reference, optimizers, step)
            health.assert_finite_weights(policy.denoiser)
        except health.NotFinite as error:
            raise health.save_bad_batch(error, run_dir, step + 1) from None
        # Every process has to stop at the same step.
        stop_signal = distributed.all_reduce_max(interrupt.signal_number)
        if is_main:
            log_step(run_dir, step + 1, metrics, samples)
            track(metrics, step + 1)
            bar.set_postfix_str(
                f"reward {metrics['reward_mean']:.3f}, NFE {metrics['nfe_mean']:.2f}"
            )
            history = [*history, metrics][-health.STEPS_LOOKED_BACK :]
            for warning in health.new_warnings(history, warned):
                bar.write(f"step {step + 1}: {warning}")
            print_progress(run_dir, bar, step + 1)
        is_last = step + 1 == config.steps
        if (step + 1) % config.save_every == 0 or is_last or stop_signal:
            checkpoint.save_checkpoint(run_dir, policy, optimizers, step + 1)
        if stop_signal:
            raise KeyboardInterrupt(stop_signal)


# ---- what surrounds it ---------------------------------------------------------------------------


def measure_at(config, policy, task, problems, name, step, gammas):
    """Measure a policy on held-out problems, greedily: a row of evaluate.evaluate for each gamma.

    name: "base" or "trained". gammas: in nats; None is each prompt's own.
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

    def on_batch(places, outcomes):
        if distributed.is_main_process():
            progress.add(len(places))

    with policy.remembering_states():  # many canvases come at several thresholds
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
    """How held-out problems are completed; gamma None is each prompt's own."""
    return Decoder(
        rule="eb",
        level=gamma,
        block_length=config.block_length or None,
        temperature=0.0,
        cache=config.cache,
        stop_at_eos=True,
        sample_threshold=False,
    )


def complete_first(config, policy, task, problems, name, step, gamma):
    """What a policy writes for the first three problems: rows of completions.json."""
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
    """Write what was measured so far; the main process does.

    completions  what each model wrote for the first problems
    frontier     a row for each model and gamma
    table        the rows of the summary's table. Its file is written last: if it says that a model
                 was measured, all of it is there.
    """
    if distributed.is_main_process():
        files.write_json(run_dir / "completions.json", completions)
        files.write_json(run_dir / "frontier.json", frontier)
        files.write_json(run_dir / "eval.json", table)


def measure_base(config, policy, task, problems, run_dir):
    """Measure the base before the first step, at the starting gamma alone: training waits for it.

    Its other gammas are measured at the end, by measure_trained.
    """
    base = run_folder.untrained_policy(config, policy, run_dir)
    gamma = config.initial_threshold
    rows = measure_at(config, base, task, problems, name="base", step=0, gammas=[gamma])
    print(describe_base(rows[0]), flush=True)
    completions = complete_first(config, base, task, problems, name="base", step=0, gamma=gamma)
    write_results(run_dir, completions=completions, frontier=rows, table=rows)


def measure_trained(config, policy, task, problems, run_dir):
    """Measure the trained model and, for the frontier, the base at the gammas that it still lacks.

    Each is on file once it is measured, so a run that is killed here goes on from there.
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
        table.append(rows[1] | {"name": "trained at the starting γ"})
    write_results(
        run_dir,
        completions=base_completions + completions,
        frontier=base_frontier + rows,
        table=base_table + table,
    )


def run(config, run_dir, resume, export):
    """Measure the base, train, measure the trained model, and print the results."""
    policy, task, problems = run_folder.prepare(config, run_dir, resume, export)
    if distributed.all_reduce_max(not has_results(run_dir)):
        measure_base(config, policy, task, problems, run_dir)
    with files.GracefulInterrupt() as interrupt:
        training_loop(config, task, run_dir, policy, interrupt)
    is_main = distributed.is_main_process()
    measured_step = read_results(run_dir, "eval")[-1]["step"] if is_main else 0
    if distributed.all_reduce_max(measured_step) != config.steps:
        measure_trained(config, policy, task, problems, run_dir)
    if not is_main:
        return
    print_summary(
        rows=read_results(run_dir, "eval"),
        frontier=read_results(run_dir, "frontier"),
        completions=read_results(run_dir, "completions"),
    )
    if export:
        from models.export import export_model

        with files.atomic_write(Path(export)) as folder:
            export_model(policy.denoiser, policy.tokenizer, folder)
        print(f"exported to {export}")
    print("pictures:", *draw_pictures(config, run_dir))  # last: nothing is lost if one fails
    command = f"python evaluate.py {shlex.quote(str(run_dir))}{inputs.task_flag(config.task)}"
    print(f"to view completions: {command} --trace 2")
    print(run_dir)


def draw_pictures(config, run_dir):
    """curves.png and, if it was measured, frontier.png. Returns their paths."""
    from evaluation.plots import plot_curves, plot_frontier  # matplotlib takes a while to import

    path = run_dir / "curves.png"
    with files.atomic_write(path) as aside:
        plot_curves(
            rows=read_metrics(run_dir),
            measured=read_results(run_dir, "eval"),
            title=run_dir.name,
            path=aside,
        )
    paths = [path]
    if config.frontier:
        path = run_dir / "frontier.png"
        with files.atomic_write(path) as aside:
            plot_frontier(read_results(run_dir, "frontier"), aside, title=run_dir.name)
        paths.append(path)
    return paths


def main(arguments=None):
    """The program. Returns its exit status: 0, 1 (out of memory), 2 (bad input), 128 + signal."""
    config = None
    run_dir = None
    try:
        flags = parse_flags(arguments)
        distributed.init()
        config, run_dir, resume, export = run_folder.resolve_config(flags)
        is_main = distributed.is_main_process()
        lock = files.run_lock(run_dir) if is_main else nullcontext()
        with lock, distributed.reraise_lost_peer():
            run(config, run_dir, resume, export)
            distributed.finish()
        return 0
    except KeyboardInterrupt as interrupt:
        hint = " before the first step: nothing was saved"
        if run_dir and (run_dir / "config.json").exists():
            hint = f"; go on with: {inputs.resume_command(run_dir, config.task)}"
        print(f"\nstopped{hint}")
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    except (ValueError, OSError) as error:
        print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        lower = "".join(
            f"--{name} ({getattr(config, name, '')}), "
            for name in (
                "micro_batch_size",
                "prompts_per_step",
                "num_generations",
                "max_completion_length",
            )
        )
        lower += (
            "or set --rollout_batch_size 1, --gradient_checkpointing true, --lora_rank 128, "
            "--cache none"
        )
        print(f"train.py: {describe_out_of_memory(error, lower)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
