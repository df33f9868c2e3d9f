"""Train a masked-diffusion language model to reason better and faster.

    python train.py --task countdown                  laptop, no GPU, no download: five to ten minutes
    python train.py --task sudoku
    python train.py --resume --run_dir runs/NAME      go on after Ctrl-C, a kill or a power cut
    python train.py --task countdown --num_stages 1 --is_cap 0 --train policy      d1 (diffu-GRPO)
    python train.py --task gsm8k --model GSAI-ML/LLaDA-8B-Instruct                 one 80 GB GPU

DiFFPO is GRPO with four changes:
    1. the policy is a diffusion: completions are unmasked step by step, several tokens a step      diffusion_policy.py
    2. its likelihood is a surrogate, scored from two states of the rollout instead of all          likelihood.py
    3. so learning is off-policy, and tokens carry truncated importance weights                     diffpo_loss.py
    4. how much to unmask at once is learned too: one threshold per prompt, by the same rewards     sampler.py

Shapes: P prompts a step, G completions each, B = P * G rows, L completion tokens, m stages.
"""

import argparse
import hashlib
import inspect
import math
import random
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import models
import runs
import tasks
import tiny
from diffpo_loss import diffpo_loss, group_advantages, importance_weights, threshold_loss, weight_metrics
from diffusion_policy import CACHES
from evaluate import OneLineParser, evaluate, plot_curves, print_table
from likelihood import cache_kl, draw_boundaries, draw_prompt_mask, surrogate_logp
from sampler import Decoder, ThresholdHead


def setting(default, help, low=None, high=None):
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass
class Settings:
    """Every field is a flag. Defaults are what served the tiny model best on countdown; RECIPES lists what others change."""

    task: str = setting("countdown", f"one of {', '.join(tasks.TASKS)}")
    model: str = setting("", "tiny, a hub name of the LLaDA or Dream family, or a folder with a checkpoint; default by hardware")
    data: str = setting("", "a JSON-lines file of problems instead of the task's own; 70% train, 10% validation, 20% test")
    run_dir: str = setting("", "a new folder for this run; default runs/TASK-TRAIN-TIME")
    seed: int = setting(0, "of everything but the warm start")
    train: str = setting("joint", "what learns: policy (the model), sampler (the threshold) or joint")
    steps: int = setting(300, "RL steps, each on a fresh batch of rollouts", 1)
    # rollout
    prompts_per_step: int = setting(32, "P, prompts a step", 1)
    group_size: int = setting(8, "G, completions a prompt", 2)
    length: int = setting(0, "L, tokens a completion; 0 is what the tiny model's form of the task needs", 0)
    prefill: str = setting("", "how every completion is made to begin, e.g. <reasoning>")
    temperature: float = setting(1.0, "of the tokens drawn in rollouts", 0.01)
    block_length: int = setting(0, "tokens a block for semi-autoregressive decoding; 0 is the whole canvas", 0)
    cache: str = setting("none", "block cache of keys and values: none (exact), prefix or dual (fastest)")
    gamma_0: float = setting(0.1, "nats; the base's entropy threshold, where the learned one starts")
    # objective
    num_stages: int = setting(2, "m, stages of the surrogate likelihood: 1 is mean-field (d1), 2 two-stage", 1)
    is_cap: float = setting(2.0, "C, cap of the importance weight; 0 is no weights (d1)", 0)
    clip_eps: float = setting(0.2, "PPO clip range of the ratio; d1 0.5", 1e-6)
    inner_updates: int = setting(1, "mu, optimisation steps per batch of rollouts, each with fresh boundaries; d1 8 to 12", 1)
    scale_by_std: bool = setting(True, "divide advantages by the group's standard deviation (floor 0.1); d1 does not")
    speed_weight: float = setting(0.25, "lambda: the reward is multiplied by 1 - lambda * NFE / L; 0 rewards correctness alone", 0, 1)
    prompt_mask: float = setting(0.0, "probability of hiding a prompt token while scoring; d1 0.15", 0, 1)
    kl_beta: float = setting(0.0, "weight of the KL to the base model; d1 0.04", 0)
    # optimiser
    learning_rate: float = setting(1.5e-4, "AdamW on the denoiser, constant after the warm-up", 0, 1)
    warmup_steps: int = setting(10, "steps over which the learning rate rises from 0", 0)
    grad_clip: float = setting(1.0, "largest norm of the denoiser's gradient", 1e-6)
    weight_decay: float = setting(0.0, "of AdamW on the denoiser; d1 0.1", 0, 1)
    head_learning_rate: float = setting(3e-3, "Adam on the threshold head", 0, 1)
    head_sigma: float = setting(0.5, "spread of log gamma around the head's mean, for exploration", 1e-3)
    head_clip_eps: float = setting(0.2, "PPO clip range of the threshold's ratio", 1e-6)
    # memory
    micro_batch_size: int = setting(256, "rows scored at once: less memory, the same gradient; best a multiple of G", 1)
    lora_rank: int = setting(0, "rank of a LoRA adapter on all of the layers' matrices; 0 trains every weight", 0)
    lora_alpha: float = setting(64.0, "the adapter is scaled by lora_alpha / lora_rank", 0)
    lora_dropout: float = setting(0.0, "of the adapter's inputs while learning", 0, 0.9)
    gradient_checkpointing: bool = setting(False, "make a layer's activations again when its gradient is due: a third more work")
    dtype: str = setting("auto", "float32 or bfloat16; auto: bfloat16 for a LLaDA-class model under an adapter on a GPU")
    # the tiny model's warm start
    warm_steps: int = setting(500, "masked-diffusion steps before RL", 1)
    warm_batch: int = setting(256, "demonstrations a step", 1)
    warm_learning_rate: float = setting(3e-3, "peak of AdamW; Muon's is five times it", 0, 1)
    careless: float = setting(0.7, "share of demonstrations in the base model's diet that are careless (tasks.py says how)", 0, 1)
    warm_seed: int = setting(0, "of the base model: runs that differ in seed alone start from the same base")
    cache_dir: str = setting("cache", "where base models are kept, so that a second run starts at once")
    # measuring and saving
    eval_problems: int = setting(1000, "held-out problems before and after", 1)
    eval_split: str = setting("test", "tune on validation, report test")
    save_every: int = setting(50, "steps between checkpoints", 1)


# Settings with another default. Sudoku's rows are twice as long, so half as many; its rewards are dense (cells, not grids), which
# bears a higher rate and asks for a lower gamma and a higher price of speed. LLaDA-class models take d1's settings where it has
# them, not tuned here: no such model was at hand.
RECIPES = {
    "sudoku": {
        "prompts_per_step": 16,
        "gamma_0": 0.01,
        "speed_weight": 0.35,
        "learning_rate": 2e-4,
        "warm_steps": 400,
        "warm_batch": 160,
        "careless": 0.5,
    },
    "LLaDA": {
        "prompts_per_step": 16,
        "group_size": 6,
        "length": 256,
        "temperature": 0.9,
        "block_length": 32,
        "cache": "dual",
        "clip_eps": 0.5,
        "inner_updates": 8,
        "learning_rate": 3e-6,
        "grad_clip": 0.2,
        "weight_decay": 0.1,
        "micro_batch_size": 12,
        "lora_rank": 128,
        "gradient_checkpointing": True,
        "eval_problems": 256,
    },
}
FREE = ("steps", "run_dir", "cache", "micro_batch_size", "gradient_checkpointing", "save_every")  # what may change on --resume


def check(settings):
    """Raises ValueError for settings that cannot work, in one line that says what to do."""
    allowed = {
        "task": tasks.TASKS, "train": ("policy", "sampler", "joint"), "eval_split": ("test", "validation"),
        "cache": CACHES, "dtype": ("auto", "float32", "bfloat16"),
    }  # fmt: skip
    for name, values in allowed.items():
        if getattr(settings, name) not in values:
            raise ValueError(f"unknown {name} {getattr(settings, name)!r}: choose one of {', '.join(values)}")
    for f in fields(settings):
        value, low, high = getattr(settings, f.name), f.metadata["low"], f.metadata["high"]
        if low is not None and not low <= value < math.inf:
            raise ValueError(f"{f.name} = {value}: it has to be at least {low}")
        if high is not None and value > high:
            raise ValueError(f"{f.name} = {value}: it has to be at most {high}")
    if settings.cache != "none" and not settings.block_length:
        raise ValueError(f"cache = {settings.cache} works block by block: give a block_length, or --cache none")
    ThresholdHead(1, settings.gamma_0)  # raises for a gamma_0 outside its bounds


def base_dtype(settings):
    """Of a LLaDA-class model's weights. Those that learn stay float32: a step of 1e-6 would be rounded away in bfloat16."""
    return getattr(torch, settings.dtype, None) or (None if settings.lora_rank else torch.float32)


def base_model(settings, device):
    """The policy before RL, without an adapter. "tiny" gets its warm start here, once: it is cached by a hash of all that determines it."""
    task = tasks.TASKS[settings.task]
    if settings.model != "tiny":
        return runs.load_policy(settings.model, device, dtype=base_dtype(settings))
    recipe = (settings.task, settings.careless, settings.warm_steps, settings.warm_batch, settings.warm_learning_rate, settings.warm_seed)
    determines = f"{recipe} {torch.__version__} {inspect.getsource(tasks)} {inspect.getsource(tiny)}"
    folder = Path(settings.cache_dir) / f"{settings.task}-{hashlib.sha256(determines.encode()).hexdigest()[:16]}"
    runs.settle(folder)
    if not folder.exists():
        denoiser, tokenizer = models.load_denoiser("tiny", seed=settings.warm_seed, device=device)
        # Demonstrations of mixed quality and a short training: like a real base model, this one knows more than it shows, and
        # solves some problems and not most.
        number = min(60_000, settings.warm_steps * settings.warm_batch)
        pairs = task.demonstrations(number, settings.warm_seed, settings.careless)
        pairs = [(task.prompt(problem, compact=True), text) for problem, text in pairs]
        how = tiny.WarmStart(settings.warm_steps, settings.warm_batch, settings.warm_learning_rate, settings.warm_seed)
        tiny.warm_start(denoiser, tokenizer, pairs, how, partial(tqdm, desc="warm start", unit="step", dynamic_ncols=True))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with runs.replacing(folder) as aside:
            denoiser.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
    return runs.load_policy(folder, device)


def trainable(policy):
    return [p for p in policy.denoiser.parameters() if p.requires_grad]


def update_denoiser(policy, reference, optimizer, rollout, stages, advantage, settings):
    """mu optimisation steps on one batch of rollouts, each with its own stage boundaries. Returns the metrics' means over them."""
    B = len(advantage)
    parts = [slice(i, i + settings.micro_batch_size) for i in range(0, B, settings.micro_batch_size)]

    def score(scorer, boundaries, hidden_prompt, part):
        return surrogate_logp(scorer, rollout.rows(part), boundaries[part], hidden_prompt[part])  # (b, L)

    # The old policy is scored under every update's boundaries before anything moves. (Not under the first's: there the new
    # policy still is the old one, and the ratio is 1.)
    with torch.no_grad():
        logp_old = [None] + [torch.cat([score(policy, *stage, part) for part in parts]) for stage in stages[1:]]  # each (B, L)
        logp_reference = [torch.cat([score(reference, *stage, part) for part in parts]) if reference else None for stage in stages]
    history = []
    policy.denoiser.train()  # the adapter's dropout, gradient checkpointing
    for stage, old, ref in zip(stages, logp_old, logp_reference, strict=True):
        optimizer.zero_grad()
        new = []
        for part in parts:
            logp_new = score(policy, *stage, part)
            logp_part = logp_new.detach() if old is None else old[part]
            weights = importance_weights(logp_part, rollout.behaviour_logp[part], settings.is_cap)
            loss, _ = diffpo_loss(
                logp_new, logp_part, advantage[part], weights, rollout.token_mask[part], settings.clip_eps,
                None if ref is None else ref[part], settings.kl_beta,
            )  # fmt: skip
            (loss * len(logp_new) / B).backward()  # a row counts 1/B, whatever the micro-batch
            new.append(logp_new.detach())
        grad_norm = torch.nn.utils.clip_grad_norm_(trainable(policy), settings.grad_clip)
        optimizer.step()

        logp_new = torch.cat(new)  # once more over the whole batch, for the log
        old = logp_new if old is None else old
        weights = importance_weights(old, rollout.behaviour_logp, settings.is_cap)
        _, metrics = diffpo_loss(logp_new, old, advantage, weights, rollout.token_mask, settings.clip_eps, ref, settings.kl_beta)
        metrics |= weight_metrics(old, rollout.behaviour_logp, settings.is_cap, rollout.token_mask)
        history.append(metrics | {"grad_norm": grad_norm.item()})
    policy.denoiser.eval()
    return {name: sum(metrics[name] for metrics in history) / len(history) for name in history[0]}


def update_threshold(policy, optimizer, rollout, advantage, settings):
    """mu clipped steps of the threshold head, on the same advantages. Returns the last step's metrics."""
    for _ in range(settings.inner_updates):
        distribution = policy.threshold_head(rollout.prompt_state)
        loss, metrics = threshold_loss(distribution.log_prob(rollout.threshold), rollout.threshold_logp, advantage, settings.head_clip_eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return metrics


def train(settings, task, run_dir, policy, saved, interrupt):
    """The algorithm, from the first step to the last. Changes `policy` in place; all else goes to the run folder."""
    device, L = policy.denoiser.device, settings.length
    learn_model, learn_threshold = settings.train != "sampler", settings.train != "policy"
    decoder = Decoder("eb", None if learn_threshold else settings.gamma_0, settings.block_length or None)
    reference = None
    if settings.kl_beta:  # the adapter switched off is the base model
        reference = policy.without_adapter() if settings.lora_rank else base_model(settings, device)
    if settings.gradient_checkpointing:
        policy.denoiser.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(trainable(policy), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay)
    head_optimizer = torch.optim.Adam(policy.threshold_head.parameters(), lr=settings.head_learning_rate)
    start = runs.load_state(run_dir, [optimizer, head_optimizer]) if saved else 0
    bar = tqdm(range(start, settings.steps), initial=start, total=settings.steps, desc=settings.train, unit="step", dynamic_ncols=True)
    for step in bar:
        began = time.perf_counter()
        # All chance of a step depends on (seed, step) alone: a resumed run draws what the unbroken one would have drawn.
        chance = random.Random(f"{settings.seed} {step}").getrandbits(63)
        generator = torch.Generator(device).manual_seed(chance)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / (settings.warmup_steps + 1))

        # 1. Draw P prompts c, and lay out G rows for each.
        problems = task.problems("train", settings.prompts_per_step, f"{settings.seed} {step}", policy.compact)
        problems = [problem for problem in problems for _ in range(settings.group_size)]  # B = P * G
        prompt_ids, prompt_mask = policy.encode([task.prompt(problem, policy.compact) for problem in problems], settings.prefill, L)

        # 2. Complete them with the true policy: gamma says how many tokens a step, and what was drawn is recorded.
        rollout = policy.rollout(
            prompt_ids, prompt_mask, L, decoder, generator, settings.temperature, stop_at_eos=True, cache=settings.cache
        )
        texts = [settings.prefill + text for text in policy.decode(rollout)]
        rolled_out = time.perf_counter()

        # 3. Verify. Speed multiplies the reward: fast but wrong earns nothing. [OUR CHOICE]
        reward = torch.tensor([task.reward(problem, text) for problem, text in zip(problems, texts, strict=True)], device=device)  # (B,)
        solved = [task.solved(problem, text) for problem, text in zip(problems, texts, strict=True)]
        speed_reward = reward * (1 - settings.speed_weight * rollout.nfe / L)  # (B,)

        # 4. Compare each completion with its group.
        advantage = group_advantages(speed_reward, settings.group_size, settings.scale_by_std)  # (B,)

        # 5. Draw fresh stage boundaries for each of the mu inner updates.
        stages = [
            (draw_boundaries(rollout.nfe, settings.num_stages, generator), draw_prompt_mask(prompt_mask, settings.prompt_mask, generator))
            for _ in range(settings.inner_updates)
        ]  # (B, m-1) and (B, P) each

        # 6. Ascend the corrected, clipped objective: the model by its tokens, the sampler by its threshold.
        metrics = {"cache_kl": cache_kl(policy, rollout.rows(slice(0, 1))) if settings.cache != "none" else None}
        if learn_model:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout draws from the global generator
                torch.manual_seed(chance)
                metrics |= update_denoiser(policy, reference, optimizer, rollout, stages, advantage, settings)
        if learn_threshold:
            metrics |= update_threshold(policy, head_optimizer, rollout, advantage, settings)

        times = (began, rolled_out, time.perf_counter())
        runs.log_step(run_dir, bar, step + 1, problems, texts, rollout, reward, solved, speed_reward, metrics, times)
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps or interrupt.asked:
            runs.save_checkpoint(run_dir, policy, [optimizer, head_optimizer], step + 1)
        if interrupt.asked:
            raise KeyboardInterrupt


# ---- flags, and what surrounds the algorithm -------------------------------------------------------------------------------


def true_or_false(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return text.lower() == "true"


def parse(arguments):
    """(settings, run_dir, resume, export) from flags. With --resume the settings are the run's own, but for the few in FREE."""
    parser = OneLineParser(description="DiFFPO: reinforcement learning of a masked-diffusion language model and of its sampler.")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run_dir")
    parser.add_argument("--export", metavar="DIR", default="", help="at the end, write the whole model to DIR, as its base was stored")
    for f in fields(Settings):
        kind = true_or_false if f.type is bool else f.type
        defaults = [f"{f.default}"] + [f"{task} {recipe[f.name]}" for task, recipe in RECIPES.items() if f.name in recipe]
        text = f"{f.metadata['help']} [{', '.join(defaults)}]".replace("%", "%%")
        parser.add_argument(f"--{f.name}", type=kind, default=argparse.SUPPRESS, metavar=f.type.__name__.upper(), help=text)
    given = vars(parser.parse_args(arguments))
    export = given.pop("export")
    if given.pop("resume"):
        if "run_dir" not in given:
            raise ValueError("--resume needs --run_dir, the folder of the run to go on with")
        run_dir = Path(given["run_dir"])
        saved = runs.read_json(run_dir / "config.json")
        changed = [name for name, value in given.items() if name not in FREE and saved.get(name) != value]
        if changed:
            name = changed[0]
            raise ValueError(f"{run_dir} was started with {name} = {saved.get(name)}: start a new run to change it")
        if set(saved) != {f.name for f in fields(Settings)}:
            raise ValueError(f"{run_dir}/config.json is not of this version of train.py: start a new run")
        return Settings(**saved | given), run_dir, True, export
    why = "as asked"
    if not given.get("model"):
        given["model"], why = models.default_model()
    print(f"model: {given['model']} ({why})", flush=True)
    task = given.get("task", Settings.task)
    recipe = RECIPES.get(task, {}) if runs.is_compact(given["model"]) else RECIPES["LLaDA"]
    settings = Settings(**recipe | given)
    return settings, Path(settings.run_dir or f"runs/{task}-{settings.train}-{datetime.now():%Y%m%d-%H%M%S}"), False, export


def prepare(settings, run_dir, resume, export):
    """(policy, task, held-out problems, saved): what to go on with, and whether a checkpoint of this run holds its state.

    Raises ValueError or OSError for all that would otherwise fail hours later.
    """
    check(settings)
    if not resume:
        runs.refuse_used(run_dir)
    if export:
        runs.refuse_used(Path(export))
    task, compact = tasks.TASKS[settings.task], runs.is_compact(settings.model)
    if settings.data:
        task = tasks.FromFile(task, settings.data)
    problems = task.problems(settings.eval_split, settings.eval_problems, 0, compact)  # before 8 billion weights are read
    settings.length = settings.length or (task.compact_length if compact else 0)
    if not settings.length:
        raise ValueError("length = 0: this model's completions need a length, such as --length 256")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs.settle(run_dir / "checkpoint")
    saved = (run_dir / "checkpoint").exists()
    if saved:
        policy = runs.load_policy(run_dir, device, settings.head_sigma, None if compact else base_dtype(settings), trainable=True)
    else:
        policy = base_model(settings, device)
    if settings.lora_rank and not saved:
        policy.denoiser = models.add_lora(policy.denoiser, settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.seed)
    if settings.lora_rank:
        print(models.describe_lora(policy.denoiser), flush=True)
    if policy.threshold_head is None:
        policy.threshold_head = ThresholdHead(policy.denoiser.config.hidden_size, settings.gamma_0, settings.head_sigma).to(device)
    policy.encode([task.prompt(problem, policy.compact) for problem in problems], settings.prefill, settings.length)  # do they fit?
    if not resume:
        runs.create_run(run_dir)
    runs.write_json(run_dir / "config.json", asdict(settings) | {"run_dir": str(run_dir)})
    return policy, task, problems, saved


def main(arguments=None):
    try:
        settings, run_dir, resume, export = parse(arguments)
        policy, task, problems, saved = prepare(settings, run_dir, resume, export)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped before the first step: nothing was kept")
        return 130
    except (MemoryError, RuntimeError) as error:
        print(f"train.py: {runs.out_of_memory(error, runs.what_to_lower(error, settings))}", file=sys.stderr)
        return 1

    def measure(name, gamma):
        decoder = Decoder("eb", gamma, settings.block_length or None)
        batch_size = 256 if policy.compact else settings.prompts_per_step * settings.group_size
        options = {"batch_size": batch_size, "length": settings.length, "cache": settings.cache, "prefill": settings.prefill}
        return {"name": name} | evaluate(policy, task, problems, decoder, **options)

    try:
        if not (run_dir / "eval.json").exists():
            runs.write_json(run_dir / "eval.json", [measure("before", settings.gamma_0)])
        with runs.FinishTheStep() as interrupt:
            train(settings, task, run_dir, policy, saved, interrupt)
        rows = runs.read_json(run_dir / "eval.json")
        if not (export and resume and len(rows) > 1):  # a finished run that is only to be exported was measured already
            rows = rows[:1]
            rows += [measure("after", gamma) for gamma in ([settings.gamma_0] if settings.train == "policy" else [None, settings.gamma_0])]
            runs.write_json(run_dir / "eval.json", rows)
        plot_curves(run_dir)
        print_table(rows)
        if export:
            models.export(policy.denoiser, policy.tokenizer, export)
            print(f"exported to {export}")
    except KeyboardInterrupt:
        print(f"\nstopped; go on with: python train.py --resume --run_dir {run_dir}")
        return 130
    except ValueError as error:  # a prompt of the training data that does not fit, say, or an export that no tool would read
        print(f"\ntrain.py: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        print(f"\ntrain.py: {runs.out_of_memory(error, runs.what_to_lower(error, settings))}", file=sys.stderr)
        return 1
    print(run_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
