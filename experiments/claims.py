"""The paper's claims, measured: is the surrogate's gradient right, how wrong is its likelihood, and
does it matter in the end?

    python -m experiments.claims gradient tiny --task countdown sudoku  cosines
    python -m experiments.claims gradient runs/A --batches 48  the same for a trained model
    python -m experiments.claims surrogate tiny runs/A --task countdown  KL and weights
    python -m experiments.claims compare runs/A-0 runs/A-1 runs/B-0  learning curves and frontiers
    python -m experiments.claims threshold runs/A  the learned gamma by difficulty

The first two look at one state of a model, so no seed of training is in them. Their batches of
rollouts are made as train.py makes them: its prompts, groups, rewards and thresholds. Tables are
printed. A picture and the figures behind it go to the folder --out.
"""

import sys
from math import isfinite
from pathlib import Path

from evaluation.flags import parse_claims_flags

if __name__ == "__main__":  # --help answers here: what follows takes seconds to import
    parse_claims_flags()

import torch
from tqdm import tqdm

import likelihood
from config import RECIPES, Config, config_from_json
from diffpo_loss import group_advantages
from evaluate import revision
from evaluation.metrics import bootstrap_weights
from evaluation.tables import print_columns
from experiments import charts, compare, gradients, thresholds
from models.checkpoints import find_checkpoint, load_policy, read_json, reads_compact_prompts
from models.device import device_name
from models.prompting import decode_completions, encode_prompts
from sampler import ThresholdHead
from tasks import registry
from train import rollout_decoder
from training import files

# ---- states, and their rollouts ------------------------------------------------------------------


class State:
    """A model as it is at some point of training, and how training would draw from it there."""

    def __init__(self, path, task_name, prompts=None):
        """Raises ValueError for a model without a task, or a task that it cannot do."""
        folder, compact = Path(path), reads_compact_prompts(path)
        if find_checkpoint(folder) != folder:
            file = folder / "config.json"
            self.settings = config_from_json(read_json(file), file)
        else:
            recipe = RECIPES.get(task_name if compact else "LLaDA", {})
            self.settings = Config(**recipe | {"task": task_name, "model": str(path)})
        self.task = registry.find_task(self.settings.task)
        self.task = registry.compact_form(self.task) if compact else self.task
        self.length = self.settings.max_completion_length or self.task.length
        self.prompts = prompts or self.settings.prompts_per_step
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.policy = load_policy(path, device, torch.float32)
        if hasattr(self.policy.denoiser, "disable_adapter"):  # base and run have the same weights
            self.policy.denoiser = self.policy.denoiser.merge_and_unload()
        self.policy.denoiser.requires_grad_(True)
        size = self.policy.denoiser.config.hidden_size
        if self.policy.threshold_head is None:
            self.policy.threshold_head = ThresholdHead(size, self.settings.initial_threshold).to(
                device
            )
        step = revision(folder, self.policy.denoiser)
        self.name = f"{self.settings.task}, {f'after step {step}' if step else 'base'}"
        self.about = {"path": str(path), "task": self.settings.task, "step": step or 0}
        self.about |= {"prompts": self.prompts, "num_generations": self.settings.num_generations}
        self.about |= {"device": device_name(device), "dtype": "float32"}

    def batch(self, seed):
        """(rollout of B = P * G rows, advantages (B,), generator) of one batch, as in training."""
        G, L, policy = self.settings.num_generations, self.length, self.policy
        generator = torch.Generator(policy.denoiser.device).manual_seed(seed)
        problems = self.task.problems("train", self.prompts, f"claims {seed}")
        problems = [problem for problem in problems for _ in range(G)]
        prompts = encode_prompts(policy, [self.task.prompt(problem) for problem in problems], L)
        rollout = policy.rollout(*prompts, L, rollout_decoder(self.settings), generator)
        pairs = zip(problems, decode_completions(policy, rollout), strict=True)
        reward = torch.tensor([self.task.reward(*pair) for pair in pairs]).to(rollout.nfe.device)
        reward = reward * (1 - self.settings.nfe_penalty * rollout.nfe / L)
        return rollout, group_advantages(reward, G, self.settings.scale_rewards), generator


def states_of(paths, task_names, prompts):
    """A State for each run, and for each base and task. Raises ValueError."""
    for path in paths:
        is_run = find_checkpoint(path) != Path(path)
        if not is_run and not task_names:
            raise ValueError(f"{path} is no run, which would know its task: give a --task")
        for name in [None] if is_run else task_names:
            yield State(path, name, prompts)


# ---- the gradient --------------------------------------------------------------------------------


def gradient(state, batches, seed):
    """{"about", "rows", "compared"}: gradients.summarise of `batches` batches at one state."""
    found, calls = {}, {}
    for b in tqdm(range(batches), state.name, disable=None):
        rollout, advantage, generator = state.batch(seed * 10_000 + b)
        if not advantage.any():
            why = "all rewards of a batch are equal, so there is no gradient"
            raise ValueError(f"{state.name}: {why}: give more --prompts")
        new, spent = gradients.batch_gradients(state.policy, rollout, advantage, generator)
        for key, value in new.items():
            found.setdefault(key, []).append(value)
        for m, rows in spent.items():
            calls[m] = calls.get(m, 0) + rows / batches
    rows, compared = gradients.summarise({k: torch.stack(v) for k, v in found.items()}, calls)
    return {"about": state.about | {"name": state.name}, "rows": rows, "compared": compared}


def tell_gradient(found):
    """The table of one state, and what is above what."""
    about, rows = found["about"], found["rows"]
    n = rows[0]["batches"]
    print(
        f"\n{about['name']}: {n} batches of {about['prompts']} prompts x {about['num_generations']}"
    )
    table = [["", "calls", "cosine", "error", "bias", "noise", "to the true one", "two batches"]]
    for row in rows:
        cells = [name_of(row["stages"], row["weights"]), f"{row['calls']:.2f}"]
        cells.append(f"{row['cosine']:.3f} ({in_words(row, 'cosine')})")
        cells.append(f"{row['relative_error']:.3f}")
        if isfinite(row["bias_cosine"] + row["noise"]):
            cells += [f"{row[name]:.3f}" for name in ("bias_cosine", "noise")]
            cells.append(f"{row['true_cosine']:.3f} ({in_words(row, 'true_cosine')})")
        else:  # the batches' means have no length but noise
            cells += ["-", "-", "no signal"]
        table.append([*cells, f"{row['split_half']:.3f}"])
    print_columns(table)
    said = {"cosine": "cosine", "true_cosine": "cosine with the true gradient"}
    for row in found["compared"]:
        one, other = name_of(*row["of"]), name_of(*row["against"])
        print(f"{said[row['quantity']]} of {one}: {verdict(row['interval'])} {other}, by", end=" ")
        print(f"{row['difference']:+.3f} ({in_words(row)})")
    by = charts.key_of(rows)
    where = gradients.better_from(by[2, "C = 1"], by[1, "no weights"], about["prompts"])
    print(f"m = 2, C = 1 points closer to the true gradient than m = 1, no weights: {where}")


def name_of(m, weights):
    return f"m = {m}, {weights}" if m in gradients.STAGES else str(m)


def in_words(row, name=""):
    """The interval of a row's quantity; a signal that the noise hides has none."""
    low, high = row[f"{name}_interval" if name else "interval"]
    return "no signal" if low is None else f"{low:.3f} to {high:.3f}"


def verdict(interval):
    low, high = interval
    if low is None or low <= 0 <= high:
        return "undecided against"
    return "above" if low > 0 else "below"


# ---- the likelihood ------------------------------------------------------------------------------


@torch.no_grad()
def surrogate(state, batches, seed):
    """By unmasking step and m: KL(true || surrogate), nats a token, and the weights' spread.

    A token's log(true / surrogate) is an unbiased estimate of that KL at its place.
    """
    step, group, logs = [], [], {m: [] for m in gradients.STAGES}
    for b in tqdm(range(batches), state.name, disable=None):
        rollout, _, generator = state.batch(seed * 10_000 + b)
        row, position = rollout.token_mask.nonzero(as_tuple=True)
        step.append(rollout.unmask_step[row, position])
        group.append(row // state.settings.num_generations + b * state.prompts)
        for m in logs:
            boundaries = likelihood.draw_boundaries(rollout.nfe, m, generator)
            logp = likelihood.surrogate_logp(state.policy, rollout, boundaries)
            logs[m].append((logp - rollout.behaviour_logp)[row, position])
    step, group = torch.cat(step).cpu(), torch.cat(group).cpu()
    rows = []
    for m, parts in logs.items():
        rows += by_step(step, group, torch.cat(parts).double().cpu(), m)
    return {"about": state.about | {"name": state.name, "batches": batches}, "rows": rows}


def by_step(step, group, log_weight, m):
    """One row for each step that at least 1 in 200 tokens has, and one, step 0, for all tokens.

    step, group (N,): of each token its step and its prompt; log_weight (N,). Intervals come from a
    bootstrap over prompts.
    """
    T, groups = int(step.max()) + 1, int(group.max()) + 1
    sums, counts = torch.zeros(2, groups, T, dtype=torch.double)
    sums.index_put_((group, step), -log_weight, accumulate=True)
    counts.index_put_((group, step), torch.ones_like(log_weight), accumulate=True)
    draws = bootstrap_weights(groups, 1000)  # (draws, groups)
    totals, sizes = draws @ sums, draws @ counts  # (draws, T)
    rows = []
    for t in range(T):
        here = step == t if t else step > 0
        if here.double().mean() < 0.005:
            continue
        kl = totals[:, t] / sizes[:, t] if t else totals.sum(1) / sizes.sum(1)
        row = {"stages": m, "step": t, "tokens": int(here.sum())}
        row |= {"kl": -log_weight[here].mean().item(), "kl_interval": gradients.interval(kl)}
        weight = log_weight[here].exp()
        for name in ("C = 1", "C = 2", "C = 5", "no cap"):
            used = weight.clamp(max=gradients.CAPS[name])
            row[f"ess, {name}"] = (used.mean().square() / used.square().mean()).item()
        if t == 0:
            edges = torch.linspace(-6, 3, 37, dtype=torch.double)  # of log2 w
            inside = (log_weight / torch.tensor(2.0).log()).clamp(-6, 3)
            row["histogram"] = torch.histogram(inside, edges).hist.div(len(inside)).tolist()
            row["edges"] = edges.tolist()
            row["slope"], row["slope_interval"] = slope(sums, counts, draws)
        rows.append(row)
    return rows


def slope(sums, counts, draws):
    """Nats by which the KL of a token grows with its step, by least squares, and its interval."""

    def fitted(sums, counts):  # (..., T) -> (...)
        t = torch.arange(sums.shape[-1], dtype=sums.dtype)
        centred = t - (t * counts).sum(-1, keepdim=True) / counts.sum(-1, keepdim=True)
        return (centred * sums).sum(-1) / (centred.square() * counts).sum(-1)

    value = fitted(sums.sum(0), counts.sum(0)).item()
    return value, gradients.interval(fitted(draws @ sums, draws @ counts))


def half(interval):
    low, high = interval
    return "" if low is None else f"±{(high - low) / 2:.3f}"


def tell_surrogate(found):
    """The tables of one state: KL by step and stages, and what capping costs."""
    about, rows = found["about"], found["rows"]
    n = about["batches"]
    print(
        f"\n{about['name']}: {n} batches of {about['prompts']} prompts x {about['num_generations']}"
    )
    table = [["step", "tokens", *(f"KL, m = {m}" for m in gradients.STAGES), "ESS, m = 1", "m = 2"]]
    for t in sorted({row["step"] for row in rows}):
        here = {row["stages"]: row for row in rows if row["step"] == t}
        kls = [f"{row['kl']:.3f} {half(row['kl_interval'])}" for row in here.values()]
        ess = [f"{here[m]['ess, no cap']:.0%}, C = 1: {here[m]['ess, C = 1']:.0%}" for m in (1, 2)]
        table.append([str(t) if t else "all", str(here[1]["tokens"]), *kls, *ess])
    print_columns(table)
    print("KL(true || surrogate), nats a token. ESS: effective sample, no cap and C = 1.")
    for row in rows:
        if row["step"] == 0:
            low, high = row["slope_interval"]
            said = "grows" if low > 0 else "falls" if high < 0 else "neither grows nor falls"
            print(f"m = {row['stages']}: the KL of a token {said} with its step, by", end=" ")
            print(f"{row['slope']:+.4f} ({low:+.4f} to {high:+.4f}) nats a step")


# ---- what is asked for ---------------------------------------------------------------------------


def measure(given, out):
    """gradient or surrogate: states one by one, told, kept and drawn."""
    which = {"gradient": (gradient, tell_gradient, charts.plot_gradients)}
    which["surrogate"] = (surrogate, tell_surrogate, charts.plot_surrogates)
    make, tell, plot = which[given["what"]]
    states, found = list(states_of(given["paths"], given["task"], given["prompts"])), []
    out.mkdir(parents=True, exist_ok=True)
    for state in states:
        found.append(make(state, given["batches"], given["seed"]))
        tell(found[-1])
        files.write_json(out / f"{given['what']}.json", found)  # what is done is kept
    plot(found, out / f"{given['what']}.png")
    print(f"\nwritten: {out}/{given['what']}.json, .png")


def main(arguments=None):
    given = parse_claims_flags(arguments)
    out, what = Path(given["out"]), given["what"]
    try:
        if what == "compare":
            compare.compare(given["paths"], out)
        elif what == "threshold":
            if len(given["paths"]) > 1:
                raise ValueError("threshold looks at one run: give one folder")
            thresholds.thresholds(given["paths"][0], out)
        else:
            measure(given, out)
    except (ValueError, OSError) as error:
        print(f"claims.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped")
        return 130
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
