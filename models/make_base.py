"""How the tiny model's base is made: two lessons, and the command that gives them."""

import hashlib
import json
import math
import random
import re
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, pad
from tqdm import tqdm

from models.tiny import DEVICE, tiny_denoiser, tiny_tokenizer


def told(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Recipe:
    """The defaults are for one's own task; SHIPPED is that of bases/tiny."""

    steps: int = told(400, "of the first lesson, on good demonstrations")
    habit_steps: int = told(100, "of the second, on mostly careless ones, at a tenth of the rate")
    careless: float = told(0.6, "their share in the second lesson")
    batch: int = told(256, "B, demonstrations a step")
    learning_rate: float = told(3e-3, "peak of AdamW; Muon's is five times it")
    seed: int = told(0, "of everything that is drawn")


def encode(tokenizer, pairs, length):
    """N (prompt, completion) texts as tokens: (N, P) and its padding mask (N, P), (N, L).

    Prompts are padded on the left, completions by [EOS] up to `length`. Raises ValueError for a
    text that has no tokens or no room.
    """
    prompts, texts = map(list, zip(*pairs, strict=True))
    try:
        prompt = tokenizer(prompts, padding=True, return_tensors="pt")
        rows = tokenizer(texts).input_ids
    except Exception:  # tokenizers raises bare ones
        what = "tiny has no tokens for a demonstration: it reads 0 to 99, +-*/()= and <answer> tags"
        raise ValueError(what) from None
    if (longest := max(map(len, rows))) > length:
        raise ValueError(f"a demonstration has {longest} tokens, its task's length is {length}")
    rows = [row + [tokenizer.eos_token_id] * (length - len(row)) for row in rows]
    return prompt.input_ids, prompt.attention_mask, torch.tensor(rows)


def masked_loss(denoiser, prompt, prompt_mask, completion, mask_id, generator):
    """The masked-diffusion loss of B demonstrations, as LLaDA itself was trained.

    Each completion token is masked with probability t, and t is uniform in (0, 1). The loss is the
    masked tokens' cross-entropy times 1/t: an upper bound of the negative log-likelihood.
    """
    (B, L), options = completion.shape, {}
    t = (torch.arange(B) + torch.rand(B, generator=generator)) / B  # one in each B-th of (0, 1)
    t = t.clamp(min=1e-3).unsqueeze(1).expand(-1, L)  # (B, L)
    masked = (torch.rand((B, L), generator=generator) < t).to(completion.device)
    t = t.to(completion.device)
    ids = torch.cat([prompt, completion.masked_fill(masked, mask_id)], dim=1)  # (B, P + L)
    if not prompt_mask.all():
        mask = pad(prompt_mask, (0, L), value=1)  # (B, P + L)
        options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    logits = denoiser(input_ids=ids, use_cache=False, **options).logits[:, -L:]
    nats = cross_entropy(logits[masked], completion[masked], reduction="none")
    return (nats / t[masked]).sum() / (B * L)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal (Jordan et al. 2024): a quarter fewer steps.

    torch.optim.Muon multiplies in bfloat16, which is 15 times slower on a CPU without it.
    """

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                momentum = state.setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(0.95).add_(p.grad)
                scale = max(1, p.shape[0] / p.shape[1]) ** 0.5
                p.sub_(orthogonal(p.grad + 0.95 * momentum), alpha=group["lr"] * scale)


def orthogonal(matrix):
    """Its singular values become about 1, by five steps of the quintic Newton-Schulz iteration."""
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if len(matrix) > len(matrix.T) else x
    for _ in range(5):
        xx = x @ x.T
        x = 3.4445 * x + (2.0315 * xx @ xx - 4.7750 * xx) @ x
    return x.T if len(matrix) > len(matrix.T) else x


class Training:
    """Both lessons: `step` after `step`, and between any two of them `state` can be kept."""

    def __init__(self, tasks, recipe):
        """tasks take turns, a step each: objects with prompt, length and demonstrations."""
        self.tasks, self.recipe, self.tokenizer, self.done = tasks, recipe, tiny_tokenizer(), 0
        self.denoiser, parts = tiny_denoiser(self.tokenizer, recipe.seed), {True: [], False: []}
        self.denoiser.to(DEVICE)
        for name, p in self.denoiser.named_parameters():
            parts["layers" in name and p.ndim == 2].append(p)  # the layers' matrices, and the rest
        how = {"lr": 0.0, "betas": (0.9, 0.95), "weight_decay": 0.0}
        self.optimizers = [Muon(parts[True], 0.0), torch.optim.AdamW(parts[False], **how)]

    def step(self):
        """One step on B fresh demonstrations. All its chance comes from (seed, step) alone."""
        recipe, step = self.recipe, self.done
        habit = step >= recipe.steps  # learned from each task alike
        careless = recipe.careless if habit else 0.0
        tasks = [*dict.fromkeys(self.tasks)] if habit else self.tasks
        task = tasks[step % len(tasks)]
        shown = task.demonstrations(recipe.batch, f"{recipe.seed} {step}", careless)
        pairs = [(task.prompt(problem), text) for problem, text in shown]
        chance = random.Random(f"{recipe.seed} {step}").getrandbits(63)
        generator = torch.Generator().manual_seed(chance)
        batch = [x.to(DEVICE) for x in encode(self.tokenizer, pairs, task.length)]
        loss = masked_loss(self.denoiser, *batch, self.tokenizer.mask_token_id, generator)
        self.denoiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
        # A warm-up of 50 steps, then a cosine to a tenth, at which the habit is learned.
        cosine = 0.55 + 0.45 * math.cos(math.pi * min(1, step / recipe.steps))
        rate = recipe.learning_rate * min(1, (step + 1) / 50) * cosine
        for optimizer, factor in zip(self.optimizers, (5, 1), strict=True):
            optimizer.param_groups[0]["lr"] = factor * rate
            optimizer.step()
        self.done += 1
        return loss.item()

    def state(self):
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"done": self.done, "model": self.denoiser.state_dict(), "optimizers": optimizers}

    def load(self, state):
        self.done = state["done"]
        self.denoiser.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def make(out, tasks, recipe, about, save_every=200):
    """Train a base for some tasks, which take turns, into the folder `out`.

    Until it is done its state is in out.training, and the same call goes on from there. `about`,
    a dict, is what made.json says of it besides.
    """
    training, total, seconds = Training(tasks, recipe), recipe.steps + recipe.habit_steps, 0.0
    about = about | {"recipe": asdict(recipe), "torch": str(torch.__version__), "device": DEVICE}
    kept = out.with_name(f"{out.name}.training")
    if kept.exists():
        saved = torch.load(kept, DEVICE, weights_only=True)
        if saved["about"] != about:
            raise ValueError(f"{kept} is of another recipe: remove it to begin anew")
        training.load(saved)
        seconds = saved["seconds"]
    out.parent.mkdir(parents=True, exist_ok=True)
    began, losses = time.perf_counter() - seconds, []
    bar = tqdm(range(training.done, total), "base", total, initial=training.done)
    for step in bar:
        losses.append(training.step())
        if (step + 1) % save_every == 0 or step + 1 == total:
            seconds, losses = time.perf_counter() - began, losses[-save_every:]
            bar.set_postfix_str(f"loss {sum(losses) / len(losses):.3f}")
            aside = out.with_name(f"{out.name}.tmp")
            torch.save(training.state() | {"about": about, "seconds": seconds}, aside)
            aside.replace(kept)
    aside = out.with_name(f"{out.name}.made")
    training.denoiser.to(torch.bfloat16).save_pretrained(aside)  # half the size
    training.tokenizer.save_pretrained(aside)
    weights = hashlib.sha256((aside / "model.safetensors").read_bytes()).hexdigest()
    about |= {"minutes": round(seconds / 60, 1), "threads": torch.get_num_threads()}
    text = json.dumps(about | {"sha256": weights}, indent=1)
    (aside / "made.json").write_text(text + "\n", encoding="utf-8")
    aside.rename(out)
    kept.unlink()


SHIPPED = Recipe(steps=8000, habit_steps=600, careless=0.7, batch=128)  # of bases/tiny
SHIPPED_TASKS, SHIPPED_TURNS = "countdown,sudoku", "5,1"  # countdown is harder


def main(arguments=None):
    from config import FlagParser

    parser = FlagParser(description="Makes a base for the embedded model.")
    parser.add_argument("--out", required=True, type=Path, help="the folder to make")
    parser.add_argument("--task", default=SHIPPED_TASKS, help="names or FILE.py:NAME, with commas")
    parser.add_argument("--turns", help="steps of each task in turn, such as 5,1; default 1 each")
    for f in fields(Recipe):
        said = f"{f.metadata['help']} [{f.default}; bases/tiny {getattr(SHIPPED, f.name)}]"
        parser.add_argument(f"--{f.name}", type=f.type, metavar=f.type.__name__.upper(), help=said)
    options = vars(parser.parse_args(arguments))
    out, task, turns = (options.pop(name) for name in ("out", "task", "turns"))
    shipped = task == SHIPPED_TASKS
    changed = {name: value for name, value in options.items() if value is not None}
    recipe = replace(SHIPPED if shipped else Recipe(), **changed)
    names, turns = task.split(","), turns or (SHIPPED_TURNS if shipped else None)
    try:
        if out.exists():
            raise ValueError(f"{out} is there already")
        from tasks.registry import compact_form, find_task

        turns = turns or ",".join("1" for _ in names)
        if not re.fullmatch(",".join(r"[1-9]\d?" for _ in names), turns):
            raise ValueError(f"turns {turns}: a number of 1 to 99 for each task, with commas")
        counts = [int(n) for n in turns.split(",")]
        if min(recipe.steps, recipe.batch) < 1 or recipe.habit_steps < 0:
            raise ValueError("steps and batch are at least 1, habit_steps at least 0")
        if not 0 <= recipe.careless <= 1:
            raise ValueError(f"careless = {recipe.careless}: it is a share of 0 to 1")
        found = [compact_form(find_task(name)) for name in names]
        in_turn = [task for task, n in zip(found, counts, strict=True) for _ in range(n)]
        make(out, in_turn, recipe, {"task": task, "turns": counts})
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped; the same command goes on\n")
    except (ValueError, OSError) as error:
        parser.exit(2, f"make_base: {error}\n")
    print(f"{out} is made. Train it: python train.py --model {out} --task {names[0]}")


if __name__ == "__main__":
    sys.exit(main())
