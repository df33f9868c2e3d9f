"""Train a masked-diffusion language model to reason better and faster.

    python train.py --task countdown --model tiny     on a laptop: no GPU, no download
    python train.py --task countdown,sudoku           both tasks with one model (tasks/mixture.py)
    python train.py --task my_task.py:MyTask          your own task (tasks/task.py)
    python train.py --resume --run_dir runs/NAME      resume after Ctrl-C, a kill or a power cut
    python train.py --task gsm8k --model GSAI-ML/LLaDA-8B-Instruct     on a GPU of 24 GB or more
    torchrun --nproc_per_node 4 train.py --task countdown --run_dir runs/a     in four processes

DiFFPO is GRPO with four changes:
    1. the policy is a diffusion process: each step unmasks several tokens      diffusion_policy.py
    2. its likelihood is a surrogate, scored from two states instead of all     likelihood.py
    3. so learning is off-policy, and tokens get importance weights             diffpo_loss.py
    4. how much to unmask at once is learned too, from the same rewards         sampler.py

The first half of this file is the algorithm, the second the loop and the program. Supporting code
(run folder, checkpoints, several processes, logs, evaluation before and after) is in training/.

Shapes: P prompts per step, G completions each, B = P * G rows, L completion tokens, m stages.
"""

import random
import shlex
import signal
import sys
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
from evaluation.summary import has_results, print_summary, read_results
from models import inputs
from models.device import describe_out_of_memory, settings_to_lower
from models.prompting import decode_completions, encode_prompts
from sampler import Decoder
from tasks import mixture
from training import checkpoint, distributed, files, health, run_folder
from training.logging import (
    StepCost,
    log_step,
    open_tracker,
    print_progress,
    read_metrics,
    rollout_metrics,
    sample_rows,
)
from training.measure import draw_pictures, measure_base, measure_trained

# ---- the algorithm -------------------------------------------------------------------------------


@dataclass
class InnerUpdate:
    """The random draws of one of a step's mu updates, shared by new, old and reference policy."""

    boundaries: torch.Tensor  #            (B, m-1), the steps between stages
    masked_prompt: torch.Tensor | None  #  (B, P) bool, prompt tokens to mask while scoring
    dropout_seed: int


@dataclass
class FixedScores:
    """The log-probs, (B, L) each, that do not change during one inner update.

    old         the old policy's. None at the first update, when the new policy is still the old one
    for_weight  the importance weight's numerator. None if `old` is the numerator, or if C = 0: then
                there are no weights
    reference   the base model's. None if beta = 0
    """

    old: torch.Tensor | None
    for_weight: torch.Tensor | None
    reference: torch.Tensor | None

    def for_rows(self, rows, logp_new):
        """The scores of some rows, with `old` and `for_weight` filled in if they are None.

        logp_new (b, L): the new policy's log-probs, used as `old` at the first update.
        """
        old = logp_new.detach() if self.old is None else self.old[rows]
        return FixedScores(
            old=old,
            for_weight=old if self.for_weight is None else self.for_weight[rows],
            reference=None if self.reference is None else self.reference[rows],
        )


def diffpo_step(config, task, policy, reference, optimizers, step):
    """One step of DiFFPO, numbered like the algorithm in the README.

    Returns the step's metrics and a few sampled completions, as dicts for JSON.
    """
    cost = StepCost(policy, reference)
    G = config.num_generations
    # With several tasks, each step trains on one of them, with that task's own length.
    step_task, L = mixture.task_for_step(task, step, config.max_completion_length)
    # All randomness is derived from (seed, step), so resuming is deterministic.
    step_seed = random.Random(f"{config.seed} {step}").getrandbits(63)
    generator = torch.Generator(policy.denoiser.device).manual_seed(step_seed)

    # 1. Draw P prompts c, and repeat each G times.
    problems = step_task.problems("train", config.prompts_per_step, f"{config.seed} {step}")
    problems = [problem for problem in problems for _ in range(G)]  # B = P * G
    prompts = [step_task.prompt(problem) for problem in problems]
    prompt_ids, prompt_mask = encode_prompts(policy, prompts, room=L)  # (B, P), (B, P)

    # 2. Complete them with the true policy. The threshold gamma decides how much each call unmasks;
    #    the probability of what is drawn is recorded.
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
    cost.end_rollout()

    # 3. Score the answers. Speed multiplies the reward: a wrong answer gains nothing from being
    #    fast, and a partial reward is scaled in the same way. [OUR CHOICE]
    reward, solved = compute_rewards(
        step_task, problems, texts, num_generations=G, device=prompt_ids.device
    )  # (B,), (B,)
    speed_reward = reward * (1 - config.nfe_penalty * rollout.nfe / L)  # (B,)

    # 4. Compare each completion with its group.
    advantage = group_advantages(speed_reward, G, config.scale_rewards)  # (B,)

    # 5. For each of the mu inner updates draw fresh stage boundaries and, if p_mask_prompt is above
    #    0, prompt tokens to mask, as d1 does.
    updates = []
    for i in range(config.num_iterations):
        boundaries = likelihood.draw_boundaries(rollout.nfe, config.num_stages, generator)
        masked_prompt = None
        if config.p_mask_prompt > 0:
            masked_prompt = likelihood.draw_masked_prompt(
                prompt_mask, G, config.p_mask_prompt, generator
            )
        updates.append(InnerUpdate(boundaries, masked_prompt, dropout_seed=step_seed + i))

    # 6. Score, and ascend the corrected, clipped objective: the model through its tokens, the
    #    sampler through its gamma. We treat the selected positions as given, which neglects a term:
    #    since gamma is drawn from a density, the probability that exactly these positions are
    #    selected depends on theta too. (With a fixed gamma there is no such term.) [OUR CHOICE]
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
    metrics |= cost.metrics(rollout)
    return metrics, sample_rows(problems, texts, rollout, reward)


def rollout_decoder(config):
    """The entropy-bounded rule; its gamma is learned or, if only the policy learns, fixed."""
    return Decoder(
        rule="eb",
        level=config.initial_threshold if config.train_target == "policy" else None,
        block_length=config.block_length or None,
        temperature=config.temperature,
        cache=config.cache,
        sample_threshold=True,
    )


def compute_rewards(task, problems, texts, num_generations, device):
    """Each completion's reward in [0, 1], and 1.0 or 0.0 for solved or not: (B,), (B,)."""
    rows = distributed.local_rows(len(texts), num_generations)
    scores = mixture.score_completions(task, problems[rows], texts[rows])
    scores = torch.tensor(scores, dtype=torch.float32, device=device)  # (b, 2)
    reward, solved = distributed.all_gather_rows(scores, rows, len(texts)).unbind(dim=1)
    return reward, solved


def update_denoiser(config, policy, reference, optimizer, rollout, advantage, updates):
    """Makes mu updates (optimiser steps) on one batch of rollouts. Returns their mean metrics.

    Scores that stay fixed are computed first, before the weights change. Then each update scores
    the new policy, micro-batch by micro-batch, and takes a step.
    """
    B = len(advantage)
    local = distributed.local_rows(B, config.num_generations)
    size = config.micro_batch_size
    if size > config.num_generations:  # whole groups, whose common canvases are run only once
        size -= size % config.num_generations
    micro_batches = [
        slice(start, min(start + size, local.stop))
        for start in range(local.start, local.stop, size)
    ]

    def score(scorer, update, rows, mask_prompt=True):
        """The surrogate log-probs of some rows under the policy `scorer`, (b, L)."""
        masked_prompt = None
        if mask_prompt and update.masked_prompt is not None:
            masked_prompt = update.masked_prompt[rows]
        # The same dropout mask for old, new and weight: otherwise their ratios would be noise.
        gpus = [advantage.device] if advantage.is_cuda else []
        with torch.random.fork_rng(gpus):
            torch.manual_seed(update.dropout_seed + rows.start)
            return likelihood.surrogate_logp(
                scorer, rollout.rows(rows), update.boundaries[rows], masked_prompt
            )

    @torch.no_grad()
    def score_all(scorer, update, mask_prompt=True):
        """The same for the whole batch, without gradient: (B, L)."""
        logp = torch.cat([score(scorer, update, rows, mask_prompt) for rows in micro_batches])
        return distributed.all_gather_rows(logp, local, B)

    health.assert_finite("a drawn token's log-prob", rollout.behaviour_logp, rollout)
    policy.denoiser.train()  # gradient checkpointing, dropout

    # Scores needed before the weights change.
    fixed_scores = []
    for i, update in enumerate(updates):
        fixed = FixedScores(old=None, for_weight=None, reference=None)
        if i > 0:  # before the first update the new policy is the old one
            fixed.old = score_all(policy, update)
        # The importance weight is relative to the sampling policy, which saw the whole prompt, so
        # its numerator is scored without prompt masking. With C = 0 there are no weights, so this
        # pass is skipped.
        if update.masked_prompt is not None and config.importance_weight_cap > 0:
            fixed.for_weight = score_all(policy, update, mask_prompt=False)
        if reference is not None:
            fixed.reference = score_all(reference, update)
        fixed_scores.append(fixed)

    history = []
    for update, fixed in zip(updates, fixed_scores, strict=True):
        optimizer.zero_grad()
        logps = []
        for rows in micro_batches:
            logp = score(policy, update, rows)  # (b, L), with gradient
            loss, _ = objective(
                config,
                rollout=rollout.rows(rows),
                advantage=advantage[rows],
                logp_new=logp,
                scores=fixed.for_rows(rows, logp),
            )
            (loss * len(logp) / B).backward()  # each row weighs 1/B
            logps.append(logp.detach())
        distributed.all_reduce_gradients(policy.denoiser)

        # For the log only, without gradient: the loss and metrics of the whole batch.
        logp_new = distributed.all_gather_rows(torch.cat(logps), local, B)  # (B, L)
        scores = fixed.for_rows(slice(0, B), logp_new)
        loss, metrics = objective(config, rollout, advantage, logp_new, scores)
        health.assert_finite("the loss", loss, rollout)
        grad_norm = distributed.clip_grad_norm(policy.denoiser, config.max_grad_norm)
        health.assert_finite("the gradient", grad_norm, rollout)
        optimizer.step()

        numerator_saw_whole_prompt = update.masked_prompt is None or fixed.for_weight is not None
        if numerator_saw_whole_prompt:  # otherwise the weights would reflect the prompt masking
            metrics |= weight_metrics(
                scores.for_weight,
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

    advantage (b,), logp_new (b, L), scores: the same rows' FixedScores, from for_rows. Returns
    (loss, metrics).
    """
    loss, metrics = diffpo_loss(
        logp_new=logp_new,
        logp_old=scores.old,
        advantage=advantage,
        weights=importance_weights(
            scores.for_weight, rollout.behaviour_logp, cap=config.importance_weight_cap
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
    """Makes mu clipped updates of the threshold head. Returns the metrics of the last one."""
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
    """Trains from the first step, or the last checkpoint, to the last step, in place.

    If `interrupt`, a files.GracefulInterrupt, has received a signal, saves the current step and
    raises KeyboardInterrupt.
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
            # With --shard, some weights are split over processes and some are not: AdamW then has
            # to update one at a time.
            foreach=False if config.shard else None,
        ),
        torch.optim.Adam(policy.threshold_head.parameters(), lr=config.threshold_learning_rate),
    ]
    first_step = checkpoint.load_state(run_dir, optimizers)
    is_main = distributed.is_main_process()
    track = open_tracker(config.report_to if is_main else "none", run_dir, config, first_step)
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
            print_progress(run_dir, bar, step + 1, metrics)
        is_last = step + 1 == config.steps
        if (step + 1) % config.save_every == 0 or is_last or stop_signal:
            checkpoint.save_checkpoint(run_dir, policy, optimizers, step + 1)
        if stop_signal:
            raise KeyboardInterrupt(stop_signal)


# ---- the program ---------------------------------------------------------------------------------


def run(config, run_dir, resume, export):
    """Measure the base, train, measure the trained model, and print the results."""
    policy, task, problems = run_folder.prepare(config, run_dir, resume, export)
    if distributed.all_reduce_max(not has_results(run_dir)):
        measure_base(config, policy, task, problems, run_dir)
    with files.GracefulInterrupt() as interrupt:
        training_loop(config, task, run_dir, policy, interrupt)
    is_main = distributed.is_main_process()
    # Unless the model is already measured after its last step. (A finished run may have been
    # resumed with more steps.)
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
    print("plots:", *draw_pictures(config, run_dir))  # last, so that nothing is lost if one fails
    command = f"python evaluate.py {shlex.quote(str(run_dir))}{inputs.task_flag(config.task)}"
    print(f"to view completions: {command} --trace 2")
    print(run_dir)


def resume_command(config, run_dir):
    """The command that resumes this run with the same number of processes."""
    return inputs.resume_command(run_dir, config.task, processes=distributed.world_size())


def main(arguments=None):
    """The program. Returns its exit status: 0, 1 (out of memory), 2 (bad input), 128 + signal."""
    config = None
    run_dir = None
    try:
        flags = parse_flags(arguments)
        distributed.init(run_folder.device_flag(flags))
        with distributed.reraise_lost_peer():
            config, run_dir, resume, export = run_folder.resolve_config(flags)
            with files.run_lock(run_dir) if distributed.is_main_process() else nullcontext():
                run(config, run_dir, resume, export)
                distributed.finish()
        return 0
    except KeyboardInterrupt as interrupt:
        hint = " before the first step: nothing was saved"
        if run_dir and (run_dir / "config.json").exists():
            hint = f"; resume with: {resume_command(config, run_dir)}"
        print(f"\nstopped{hint}")
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    except (ValueError, OSError) as error:
        print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        has_checkpoint = bool(run_dir) and (run_dir / "checkpoint").exists()
        lower = settings_to_lower(config, has_checkpoint)
        message = describe_out_of_memory(error, lower)
        if has_checkpoint:
            message += f"; resume with: {resume_command(config, run_dir)}"
        print(f"train.py: {message}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
