"""Is the surrogate's gradient the policy's gradient? Cosines, bias and noise, with intervals.

    python -m experiments.gradients tiny --task countdown sudoku --batches 48     at the base
    python -m experiments.gradients runs/A                                     for a trained model

The exact likelihood (likelihood.py with a boundary at every step) gives the policy gradient: noisy,
since a batch is small, but right on average. (The term that joint training neglects is missing from
every estimator.) The other estimators are compared with it on the same rollouts and advantages:

    m = 1, 2, 4, 8 stages, without weights and with weights capped at C = 1, 2, 5 or not at all
    two random steps scored exactly, times T / 2: as expensive as two stages, unbiased, noisier

One batch's gradient g_b differs from the true gradient G = E[exact] in two ways. Bias: E[g] has
another direction, whatever the batch size. Noise: g_b scatters around E[g], less so in large
batches. Products of *different* batches have independent noise, so their mean isolates E[g]:

    E[g].E[h] is estimated by the mean of g_b.h_b' over b != b'                    (a U-statistic)
    bias      cos(E[g], G)                                         what P -> infinity would reach
    noise     r^2 = (E|g|^2 - |E[g]|^2) / |E[g]|^2                 falls as 1/P, P prompts per step
    cosine of a batch of x P prompts with G, about: bias / sqrt(1 + r^2 / x)

The last line assumes that |g_b| is the same in all batches, as it nearly is when the noise is
spread over many parameters. If lengths vary between batches, the mean cosine deviates from it.

Shapes: N batches, D parameters, B rows, L completion tokens, m stages.
"""

# ruff: noqa: E402 (flags are checked before torch is imported, which takes seconds)

import sys
from collections import defaultdict
from dataclasses import replace
from math import isfinite
from pathlib import Path

from experiments.command_line import add_state_flags, exit_status
from models import terminal
from models.command_line import FlagParser


def parse_flags(arguments=None):
    """The flags as a namespace. Bad flags end the program with status 2."""
    parser = FlagParser(
        prog="python -m experiments.gradients",
        usage="%(prog)s RUN ... [flags]",
        description="""\
Is the surrogate's gradient the policy's gradient?

For each model, the gradient of every surrogate likelihood (by stages and
weights) is compared with the exact likelihood's on the same rollouts.""",
        epilog="""\
examples:
  python -m experiments.gradients tiny --task countdown sudoku --batches 48
  python -m experiments.gradients runs/A""",
    )
    add_state_flags(parser, name="gradients")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    terminal.prepare()
    parse_flags()

import torch
from tqdm import tqdm

import likelihood
from diffpo_loss import diffpo_loss, importance_weights
from evaluation.metrics import bootstrap_weights
from evaluation.tables import print_columns
from experiments import charts
from experiments.intervals import interval
from experiments.states import CAPS, EXACT, STAGES, TWO_STEPS, load_states
from training import files

NO_WEIGHTS = {"no weights": 0}

# ---- the gradients of one batch ------------------------------------------------------------------


def flat_gradients(policy, rollout, advantage, boundaries, caps):
    """The gradients of the loss with one surrogate, at ratio 1, for several caps of the weights.

    boundaries  (B, m-1), which define the surrogate
    caps        {name: cap}; cap 0: no weights

    Returns {name: gradient (D,)}. A row's sum is divided by L.
    """
    parameters = [p for p in policy.denoiser.parameters() if p.requires_grad]
    logp = likelihood.surrogate_logp(policy, rollout, boundaries)  # (B, L)
    gradients = {}
    for name, cap in caps.items():
        loss, _ = diffpo_loss(
            logp_new=logp,
            logp_old=logp,
            advantage=advantage,
            weights=importance_weights(logp, rollout.behaviour_logp, cap),
            token_mask=rollout.token_mask,
            epsilon=0.2,
            normalise_by="canvas",
        )
        parts = torch.autograd.grad(loss, parameters, retain_graph=True)
        gradients[name] = torch.cat([part.flatten() for part in parts])
    return gradients


def two_random_steps(rollout, generator):
    """Picks two random steps of each row (or its only one) to be scored exactly.

    Returns boundaries (B, 2), the states before these steps; the tokens of these steps, (B, L)
    bool; and the factor (B,) that makes the gradient unbiased: T / 2, or 1 if T is 1.
    """
    T = rollout.nfe.unsqueeze(1)  # (B, 1)
    device = rollout.nfe.device
    key = torch.rand((len(T), max(2, int(T.max()))), generator=generator, device=device)
    step = torch.arange(1, key.shape[1] + 1, device=device)
    key = key.masked_fill(step > T, -1)
    picked = (key.topk(2, dim=1).indices + 1).minimum(T).sort(dim=1).values  # (B, 2) of 1 to T
    is_picked = (rollout.unmask_step.unsqueeze(-1) == picked.unsqueeze(1)).any(dim=-1)  # (B, L)
    factor = rollout.nfe / rollout.nfe.clamp(max=2)
    return picked - 1, is_picked & rollout.token_mask, factor


def batch_gradients(policy, rollout, advantage, generator):
    """Every estimator's gradient on one batch, and the cost of its scoring.

    Returns {(stages, weights): gradient (D,)} and {stages: denoiser calls per completion}, where
    `stages` is a number of STAGES, EXACT or TWO_STEPS.
    """
    gradients = {}
    calls = {}

    def estimate(stages, boundaries, caps, rollout=rollout, advantage=advantage):
        policy.rows_run = 0
        by_cap = flat_gradients(policy, rollout, advantage, boundaries, caps)
        calls[stages] = policy.rows_run / len(advantage)
        for weights, gradient in by_cap.items():
            gradients[stages, weights] = gradient

    for m in STAGES:
        estimate(m, likelihood.draw_boundaries(rollout.nfe, m, generator), CAPS)
    every_step = torch.arange(1, int(rollout.nfe.max()) + 1, device=rollout.nfe.device)
    estimate(EXACT, every_step.expand(len(advantage), -1), NO_WEIGHTS)
    boundaries, tokens, factor = two_random_steps(rollout, generator)
    estimate(
        TWO_STEPS,
        boundaries,
        NO_WEIGHTS,
        rollout=replace(rollout, token_mask=tokens),
        advantage=advantage * factor,
    )
    return gradients, calls


def measure(state, batches, seed):
    """How good each estimator is at one state, from some batches of rollouts: a dict for JSON.

    Raises ValueError for a batch whose completions all earn the same: its gradient is 0.
    """
    gradients = defaultdict(list)
    calls = defaultdict(float)
    for i in tqdm(range(batches), state.name, disable=None):
        batch = state.sample_batch(seed * 10_000 + i)
        if not batch.advantage.any():
            raise ValueError(
                f"{state.name}: all rewards of a batch are equal, so there is no gradient: "
                "give more --prompts"
            )
        batch_estimates, batch_calls = batch_gradients(
            state.policy, batch.rollout, batch.advantage, batch.generator
        )
        for estimator, gradient in batch_estimates.items():
            gradients[estimator].append(gradient)
        for stages, number in batch_calls.items():
            calls[stages] += number / batches
    gradients = {estimator: torch.stack(rows) for estimator, rows in gradients.items()}  # (N, D)
    rows, comparisons = summarise(gradients, calls)
    return {"state": state.description(), "rows": rows, "comparisons": comparisons}


# ---- statistics ----------------------------------------------------------------------------------


def mean(values, weight):
    """The mean over batches, each as often as a bootstrap drew it. (N,), (..., N) -> (...)"""
    return (weight * values).sum(dim=-1) / weight.sum(dim=-1)


def mean_across(products, weight):
    """The mean of g_b.h_b' over b != b'. products (N, N), weight (..., N) -> (...)"""
    same = (weight.square() * products.diagonal()).sum(dim=-1)
    different = torch.einsum("...b,bc,...c->...", weight, products, weight) - same
    return different / (weight.sum(dim=-1).square() - weight.square().sum(dim=-1))


def statistics(gg, ge, ee, weight):
    """How good an estimator g is, compared with the exact gradient e.

    gg, ge, ee  (N, N) products of the batches' gradients
    weight      (..., N): ones for the sample itself, or bootstrap draws

    Returns {name: (...) tensor}.
    """
    g_square = gg.diagonal()
    e_square = ee.diagonal()
    g_dot_e = ge.diagonal()
    cosine = g_dot_e / (g_square * e_square).sqrt()
    error = (g_square - 2 * g_dot_e + e_square).clamp(min=0)
    between_batches = gg / torch.outer(g_square, g_square).sqrt()
    signal = mean_across(gg, weight)  # |E[g]|^2
    true_signal = mean_across(ee, weight)  # |G|^2
    bias_cosine = mean_across(ge, weight) / (signal * true_signal).sqrt()
    noise = ((mean(g_square, weight) - signal) / signal).sqrt()
    return {
        "cosine": mean(cosine, weight),
        "relative_error": mean((error / e_square).sqrt(), weight),
        "norm_ratio": mean((g_square / e_square).sqrt(), weight),
        "split_half": mean_across(between_batches, weight),
        "bias_cosine": bias_cosine,
        "noise": noise,
        "true_cosine": bias_cosine / (1 + noise.square()).sqrt(),
    }


# The pairs of estimators to compare: (quantity, estimator, the estimator it is compared with).
PAIRS = [("cosine", (2, weights), (1, weights)) for weights in CAPS]
PAIRS += [
    ("cosine", (m, weights), (m, "no weights"))
    for m in (1, 2)
    for weights in CAPS
    if weights != "no weights"
]
PAIRS += [
    ("true_cosine", (2, "C = 1"), (stages, "no weights")) for stages in (1, 2, EXACT, TWO_STEPS)
]
PAIRS += [("true_cosine", (2, "C = 1"), (1, "C = 1"))]


def summarise(gradients, calls):
    """Statistics of each estimator, and comparisons of the PAIRS, as two lists of dicts for JSON.

    gradients  {(stages, weights): (N, D)}
    calls      {stages: denoiser calls per completion}

    A row has each statistic as NAME and its interval as NAME_interval. A comparison is the
    difference between two estimators on the same batches. Intervals are bootstrapped over batches.
    """
    exact = gradients[EXACT, "no weights"]
    N = len(exact)
    ones = torch.ones(N, dtype=torch.double)
    draws = bootstrap_weights(N)
    ee = (exact @ exact.T).double().cpu()  # the bootstrap draws are on the CPU
    values = {}
    spreads = {}
    rows = []
    for estimator, g in gradients.items():
        gg = (g @ g.T).double().cpu()
        ge = (g @ exact.T).double().cpu()
        values[estimator] = statistics(gg, ge, ee, ones)
        spreads[estimator] = statistics(gg, ge, ee, draws)
        stages, weights = estimator
        row = {"stages": stages, "weights": weights, "calls": calls[stages], "batches": N}
        for name, value in values[estimator].items():
            row[name] = value.item()
            row[f"{name}_interval"] = interval(spreads[estimator][name], N)
        rows.append(row)
    comparisons = []
    for name, first, second in PAIRS:
        difference = values[first][name] - values[second][name]
        comparisons.append(
            {
                "quantity": name,
                "of": first,
                "against": second,
                "difference": difference.item(),
                "interval": interval(spreads[first][name] - spreads[second][name], N),
            }
        )
    return rows, comparisons


def better_from(row, other, prompts):
    """At which batch sizes the estimator of `row` points closer to the true gradient than `other`.

    Bias and noise of both are those at `prompts` per step. Returns "always", "never", "above N
    prompts per step" or "below N prompts per step"; "no signal" if noise hides either estimator.
    """
    if not isfinite(row["bias_cosine"] + row["noise"] + other["bias_cosine"] + other["noise"]):
        return "no signal"
    bias = row["bias_cosine"] ** 2
    other_bias = other["bias_cosine"] ** 2
    # Above 0 if `row` has less noise relative to its signal.
    noise_margin = bias * other["noise"] ** 2 - other_bias * row["noise"] ** 2
    if (bias > other_bias) == (noise_margin > 0):
        return "always" if bias > other_bias else "never"
    side = "above" if bias > other_bias else "below"
    crossing = prompts * -noise_margin / (bias - other_bias)
    return f"{side} {crossing:.0f} prompts per step"


# ---- the table -----------------------------------------------------------------------------------

QUANTITIES = {"cosine": "cosine", "true_cosine": "cosine with the true gradient"}


def print_table(result):
    """Prints the table of one state, the comparisons, and what the columns mean."""
    state = result["state"]
    rows = result["rows"]
    print(
        f"\n{state['name']}: {rows[0]['batches']} batches of {state['prompts']} prompts x "
        f"{state['num_generations']}"
    )
    table = [["", "calls", "cosine", "error", "bias", "noise", "to the true one", "two batches"]]
    for row in rows:
        bias = noise = "-"
        to_the_true_one = "no signal"
        if isfinite(row["bias_cosine"] + row["noise"]):  # otherwise the batches' mean is only noise
            bias = f"{row['bias_cosine']:.3f}"
            noise = f"{row['noise']:.3f}"
            true_interval = describe_interval(row["true_cosine_interval"])
            to_the_true_one = f"{row['true_cosine']:.3f} ({true_interval})"
        table.append(
            [
                estimator_name(row["stages"], row["weights"]),
                f"{row['calls']:.2f}",
                f"{row['cosine']:.3f} ({describe_interval(row['cosine_interval'])})",
                f"{row['relative_error']:.3f}",
                bias,
                noise,
                to_the_true_one,
                f"{row['split_half']:.3f}",
            ]
        )
    print_columns(table)
    for row in result["comparisons"]:
        print(
            f"{QUANTITIES[row['quantity']]} of {estimator_name(*row['of'])}: "
            f"{verdict(row['interval'])} {estimator_name(*row['against'])}, "
            f"by {row['difference']:+.3f} ({describe_interval(row['interval'])})"
        )
    by_estimator = charts.by_estimator(rows)
    where = better_from(
        by_estimator[2, "C = 1"], by_estimator[1, "no weights"], prompts=state["prompts"]
    )
    print(f"m = 2, C = 1 points closer to the true gradient than m = 1, no weights: {where}")


COLUMNS = """
cosine: of a batch's gradient with the exact gradient on the same rollouts.
error: the norm of their difference over the exact gradient's norm. bias: the
cosine of the mean gradient with the true one. noise: a batch's scatter over the
mean's length. to the true one: the cosine of a batch's gradient with the true
one, from bias and noise. two batches: the cosine of the gradients of two
batches. In brackets: 95% intervals."""


def estimator_name(stages, weights):
    return f"m = {stages}, {weights}" if stages in STAGES else str(stages)


def describe_interval(edges):
    low, high = edges
    return "no signal" if low is None else f"{low:.3f} to {high:.3f}"


def verdict(edges):
    low, high = edges
    if low is None or low <= 0 <= high:
        return "undecided against"
    return "above" if low > 0 else "below"


def run(options):
    """Measures the states one by one; prints, writes and draws the results. Raises ValueError."""
    states = load_states(options.paths, options.task, options.prompts, options.block_length)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for state in states:
        results.append(measure(state, options.batches, options.seed))
        print_table(results[-1])
        files.write_json(folder / "gradients.json", results)  # after each: a stop loses one state
    print(COLUMNS)
    charts.plot_gradients(results, folder / "gradients.png")
    print(f"\nwritten: {folder}/gradients.json {folder}/gradients.png")


def main(arguments=None):
    """The program. Returns its exit status: 0, 2 (bad input), 130 (Ctrl-C)."""
    options = parse_flags(arguments)
    return exit_status("experiments.gradients", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
