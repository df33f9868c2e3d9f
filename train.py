"""Train a masked-diffusion language model to reason better and faster.

    python train.py --task countdown                  a laptop, no GPU, no download
    python train.py --task countdown,sudoku           both, by one model (together.py)
    python train.py --task my_task.py:MyTask          your own task (tasks.py says what it needs)
    python train.py --resume --run_dir runs/NAME      go on after Ctrl-C, a kill or a power cut
    python train.py --task gsm8k --model GSAI-ML/LLaDA-8B-Instruct        a GPU of 24 GB or more
    torchrun --nproc_per_node 4 train.py --task countdown --run_dir runs/a      four (processes.py)

DiFFPO is GRPO with four changes:
    1. the policy is a diffusion: each step unmasks several tokens              diffusion_policy.py
    2. its likelihood is a surrogate, scored from two states instead of all     likelihood.py
    3. so learning is off-policy, and tokens carry importance weights           diffpo_loss.py
    4. how much to unmask at once is learned too, by the same rewards           sampler.py

Shapes: P prompts a step, G completions each, B = P * G rows, L completion tokens, m stages.
"""

import random
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

if __name__ == "__main__":  # --help answers here: what follows takes seconds to import
    from config import parse_flags

    # A pipe gets each line at once, and an old terminal a ? for a γ that it cannot show.
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    parse_flags()

import torch
from tqdm import tqdm

import likelihood
from config import parse_flags
from diffpo_loss import (
    diffpo_loss,
    group_advantages,
    importance_weights,
    reference_kl,
    threshold_loss,
    weight_metrics,
)
from evaluation import summary
from evaluation.plots import plot_curves, plot_frontier
from models.checkpoints import read_json
from models.device import describe_out_of_memory
from models.export import export_model
from tasks import mixture
from training import checkpoint, distributed, files, health, run_folder

# ---- the algorithm -------------------------------------------------------------------------------


def diffpo_step(settings, task, policy, reference, optimizers, step):
    """One step of DiFFPO: the README's box. Returns (metrics, completions worth a look)."""
    task, L = mixture.task_for_step(
        task, step, settings.max_completion_length
    )  # several tasks take turns, a step each
    G, began, policy.calls = settings.num_generations, time.perf_counter(), 0
    # All chance depends on (seed, step) alone: a resumed run draws what an unbroken one would have.
    chance = random.Random(f"{settings.seed} {step}").getrandbits(63)
    generator = torch.Generator(policy.denoiser.device).manual_seed(chance)

    # 1. Draw P prompts c, and lay out G rows for each.
    problems = task.problems("train", settings.prompts_per_step, f"{settings.seed} {step}")
    problems = [problem for problem in problems for _ in range(G)]  # B = P * G
    prompt_ids, prompt_mask = policy.encode([task.prompt(problem) for problem in problems], L)

    # 2. Complete them with the true policy: gamma says how much a step, what is drawn is recorded.
    how = (
        L,
        run_folder.rollout_decoder(settings),
        generator,
        G,
    )  # by several processes: each has the whole
    rollout = distributed.rollout(policy, prompt_ids, prompt_mask, *how)
    texts, rolled_out = policy.decode(rollout), time.perf_counter()

    # 3. Verify. Speed multiplies the reward: what earns nothing gains nothing by being fast. (What
    #    earns a part gets more of that part the sooner it comes.) [OUR CHOICE]
    reward, solved = compute_rewards(task, problems, texts, G, prompt_ids.device)  # (B,)
    speed_reward = reward * (1 - settings.nfe_penalty * rollout.nfe / L)  # (B,)

    # 4. Compare each completion with its group.
    advantage = group_advantages(speed_reward, G, settings.scale_rewards)  # (B,)

    # 5. Draw fresh stage boundaries (B, m-1) for each of the mu inner updates, and, as d1 does,
    #    prompt tokens to hide (B, P); a seed for dropout comes along.
    stages, hide = [], settings.p_mask_prompt or None
    for update in range(settings.num_iterations):
        boundaries = likelihood.draw_boundaries(rollout.nfe, settings.num_stages, generator)
        hidden = hide and likelihood.draw_prompt_mask(prompt_mask, G, hide, generator)
        stages.append((boundaries, hidden, chance + update))

    # 6. Ascend the corrected, clipped objective: the model by its tokens, the sampler by its gamma.
    #    A token's score takes the selected positions as given. Under gamma, *which* positions are
    #    selected depends on the model too: that part of the gradient is left out. [OUR CHOICE]
    metrics, one = {}, rollout.rows(slice(0, 1))
    if settings.cache != "none":
        metrics["cache_kl"] = likelihood.cache_kl(policy, one, settings.micro_batch_size)
    if settings.train_target != "sampler":
        how = (rollout, stages, advantage, settings)
        metrics |= update_denoiser(policy, reference, optimizers[0], *how)
    if settings.train_target != "policy":
        metrics |= update_threshold(policy, optimizers[1], rollout, advantage, settings)
    means = {"reward": reward, "speed_reward": speed_reward, "solved": solved}
    metrics |= {f"{name}_mean": value.mean().item() for name, value in means.items()}
    calls = distributed.all_reduce_sum(policy.calls)
    metrics |= summary.batch_metrics(rollout, advantage, calls, began, rolled_out)
    return metrics, summary.sample_rows(problems, texts, rollout, reward)


def compute_rewards(task, problems, texts, num_generations, device):
    """What each completion earns, and 1 where it solves its problem: (B,), (B,)."""
    mine = distributed.local_rows(len(texts), num_generations)
    earned = mixture.score_completions(task, problems[mine], texts[mine])
    earned = torch.tensor(earned, dtype=torch.float32, device=device)  # (b, 2)
    return distributed.all_gather_rows(earned, mine, len(texts)).unbind(1)


def update_denoiser(policy, reference, optimizer, rollout, stages, advantage, settings):
    """mu optimisation steps on one batch of rollouts. Returns the metrics' means over them."""
    B, gpu = len(advantage), [advantage.device] if advantage.is_cuda else []
    size, mine = settings.micro_batch_size, distributed.local_rows(B, settings.num_generations)
    parts = [slice(i, min(i + size, mine.stop)) for i in range(mine.start, mine.stop, size)]
    health.assert_finite("a drawn token's log-prob", rollout.behaviour_logp, rollout)

    def score(scorer, stage, part, hide=True):  # -> (b, L)
        boundaries, hidden, seed = stage
        hidden = hidden[part] if hide and hidden is not None else None
        with torch.random.fork_rng(gpu):  # one dropout for old, new and weight, or ratios are noise
            torch.manual_seed(seed + part.start)
            return likelihood.surrogate_logp(scorer, rollout.rows(part), boundaries[part], hidden)

    def score_all(scorer, stage, hide=True):  # -> (B, L), without gradient
        with torch.no_grad():
            logps = torch.cat([score(scorer, stage, part, hide) for part in parts])
            return distributed.all_gather_rows(logps, mine, B)

    # The old policy is scored under every update's boundaries before anything moves. (Not under the
    # first's: there the new policy still is the old one.) Weights compare with what was drawn from,
    # so their numerator hides nothing of the prompt.
    policy.denoiser.train()  # gradient checkpointing, dropout
    olds = [None] + [score_all(policy, stage) for stage in stages[1:]]
    plains = [None if stage[1] is None else score_all(policy, stage, False) for stage in stages]
    refs = [score_all(reference, stage) if reference else None for stage in stages]
    history = []
    for stage, old, plain, ref in zip(stages, olds, plains, refs, strict=True):
        optimizer.zero_grad()
        new = []
        for part in parts:
            logp_new = score(policy, stage, part)
            logps = [logp_new, *(x if x is None else x[part] for x in (old, plain, ref))]
            loss, _ = objective(logps, rollout.rows(part), advantage[part], settings)
            (loss * len(logp_new) / B).backward()  # a row counts 1/B, whatever the micro-batch
            new.append(logp_new.detach())
        distributed.all_reduce_gradients(policy.denoiser)
        logps = [
            distributed.all_gather_rows(torch.cat(new), mine, B),
            old,
            plain,
            ref,
        ]  # of the whole batch
        loss, metrics = objective(logps, rollout, advantage, settings)
        health.assert_finite("the loss", loss, rollout)
        norm = distributed.clip_grad_norm(policy.denoiser, settings.max_grad_norm)
        health.assert_finite("the gradient", norm, rollout)
        optimizer.step()
        old = logps[0] if old is None else old
        unit = likelihood.scored_as_drawn(rollout.unmask_step, stage[0])
        how = rollout.behaviour_logp, settings.importance_weight_cap, rollout.token_mask, unit
        metrics |= weight_metrics(old if plain is None else plain, *how)
        history.append(metrics | {"grad_norm": norm.item()})
    policy.denoiser.eval()
    return {name: sum(metrics[name] for metrics in history) / len(history) for name in history[0]}


def objective(logps, rollout, advantage, settings):
    """The loss of some rows: diffpo_loss and, with beta, the KL to the base. (loss, metrics)

    logps: new, old (None: the first update, the same as new), the weight's numerator (None: old)
    and the reference's (None: without one), (b, L) each.
    """
    new, old, plain, ref = logps
    old = new.detach() if old is None else old
    true, mask, by = rollout.behaviour_logp, rollout.token_mask, settings.normalise_by
    weights = importance_weights(
        old if plain is None else plain, true, settings.importance_weight_cap
    )
    loss, metrics = diffpo_loss(new, old, advantage, weights, mask, settings.epsilon, by)
    if ref is not None:
        kl = reference_kl(new, ref, mask, by)
        loss, metrics["reference_kl"] = loss + settings.beta * kl, kl.item()
    return loss, metrics


def update_threshold(policy, optimizer, rollout, advantage, settings):
    """mu clipped steps of the threshold head, by the same advantages. -> the last's metrics."""
    eps = settings.threshold_epsilon
    for _ in range(settings.num_iterations):
        logp_new = policy.threshold_head(rollout.prompt_state).log_prob(rollout.threshold)
        loss, metrics = threshold_loss(logp_new, rollout.threshold_logp, advantage, eps)
        health.assert_finite("the threshold's loss", loss.detach(), rollout)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return metrics


def training_loop(settings, task, run_dir, policy, interrupt):
    """From the first step to the last, logged and saved. Changes `policy` in place."""
    reference, rate = None, settings.learning_rate
    if settings.beta:  # the adapter switched off is the base model
        reference = policy.without_adapter()
        if not settings.lora_rank:
            reference = run_folder.base_policy(settings, policy.denoiser.device)
            if settings.shard:
                distributed.shard_model(reference.denoiser, policy.denoiser.device)
    if settings.gradient_checkpointing:
        policy.denoiser.gradient_checkpointing_enable({"use_reentrant": False})
    how = {"lr": rate, "betas": (0.9, 0.99), "weight_decay": settings.weight_decay}
    how["foreach"] = False if settings.shard else None  # one at a time: some are split, some not
    optimizers = [torch.optim.AdamW(policy.denoiser.parameters(), **how)]
    head = {"params": policy.threshold_head.parameters(), "lr": settings.threshold_learning_rate}
    optimizers.append(torch.optim.Adam([head]))
    start = checkpoint.load_state(run_dir, optimizers)
    steps = range(start, settings.steps)
    hidden = None if distributed.is_main_process() else True  # None: in a pipe alone
    bar = tqdm(steps, settings.train_target, settings.steps, initial=start, disable=hidden)
    history, said = files.read_log(run_dir / "metrics.jsonl"), set()
    for step in bar:
        for group in optimizers[0].param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / (settings.warmup_steps + 1))
        try:
            metrics, samples = diffpo_step(settings, task, policy, reference, optimizers, step)
            health.assert_finite_weights(policy.denoiser)
        except health.NotFinite as error:
            raise health.save_bad_batch(error, run_dir, step + 1) from None
        asked = distributed.all_reduce_max(interrupt.asked)
        if distributed.is_main_process():
            summary.log_step(run_dir, bar, step + 1, metrics, samples)
            history = [*history, metrics][-health.BACK :]
            for text in health.new_warnings(history, said):
                bar.write(f"step {step + 1}: {text}")
            summary.print_progress(run_dir, bar, step + 1)
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps or asked:
            checkpoint.save_checkpoint(run_dir, policy, optimizers, step + 1)
        if asked:
            raise KeyboardInterrupt(asked)


# ---- what surrounds it ---------------------------------------------------------------------------


def run(settings, run_dir, resume, export):
    """The base measured, the steps, the trained model measured, and what came of it."""
    policy, task, problems = run_folder.prepare(settings, run_dir, resume, export)
    what, file = (policy, task, problems, settings), run_dir / "eval.json"
    if distributed.all_reduce_max(not file.exists()):
        summary.measure(run_dir, "base", 0, *what)
    with files.GracefulInterrupt() as interrupt:
        training_loop(settings, task, run_dir, policy, interrupt)
    measured = read_json(file)[-1]["step"] if distributed.is_main_process() else 0
    if distributed.all_reduce_max(measured) != settings.steps:  # else it was finished, and measured
        summary.measure(run_dir, "trained", settings.steps, *what)
    if not distributed.is_main_process():
        return
    plot_curves(run_dir)
    if settings.frontier:
        rows = read_json(run_dir / "frontier.json")
        plot_frontier(rows, run_dir / "frontier.png", run_dir.name)
    summary.print_summary(run_dir, settings)
    if export:
        with files.atomic_write(Path(export)) as folder:
            export_model(policy.denoiser, policy.tokenizer, folder)
        print(f"exported to {export}")
    print(run_dir)


def main(arguments=None):
    settings = run_dir = None
    try:
        given = parse_flags(arguments)
        distributed.init()
        settings, run_dir, resume, export = run_folder.resolve_config(given)
        lock = files.run_lock(run_dir) if distributed.is_main_process() else nullcontext()
        with lock, distributed.reraise_lost_peer():
            run(settings, run_dir, resume, export)
        return 0
    except KeyboardInterrupt as stop:
        kept = run_dir and (run_dir / "config.json").exists()
        hint = f"; go on with: python train.py --resume --run_dir {run_dir}"
        print("\nstopped" + (hint if kept else " before the first step: nothing was kept"))
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except (ValueError, OSError) as error:
        print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        names = ("micro_batch_size", "prompts_per_step", "num_generations", "max_completion_length")
        lower = ", ".join(f"--{name} ({getattr(settings, name, '')})" for name in names)
        other = "or set --rollout_batch_size 1, --gradient_checkpointing true, --lora_rank 128"
        other += ", --cache none"
        print(f"train.py: {describe_out_of_memory(error, f'{lower}, {other}')}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
