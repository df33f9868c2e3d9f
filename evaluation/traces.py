"""Recording and printing one completion call by call, from [MASK] to text.

`python evaluate.py RUN --trace 3` prints it; trace_page.py turns it into a web page and an
animation. A token has the shade of the call that unmasked it and, to be legible without colour,
that call's number.

Shapes: T denoiser calls, L completion tokens, P prompt tokens, D hidden size.
"""

from dataclasses import dataclass, replace
from math import isnan

import torch

from evaluation.tables import WIDTH, printable
from likelihood import latent_at, surrogate_logp
from models.prompting import decode_completions, encode_prompts

# ---- recording -----------------------------------------------------------------------------------


@dataclass
class Trace:
    """What each call saw and did, as plain lists. Calls count from 1: call t is at index t - 1."""

    prompt: str
    tokens: list  #       (L,) str, the final tokens
    unmask_step: list  #  (L,) int, the call that unmasked each
    readings: list  #     (T, L) what the rule read in call t: the entropy in nats or, unless it is
    #                     eb, the best token's probability. None: the position was not open
    rule: str
    level: float  #       this prompt's gamma, or tau or k
    text: str
    solved: bool

    @property
    def nfe(self):
        """T, the number of calls."""
        return len(self.readings)

    def positions_taken(self, t):
        """The positions that call t unmasked."""
        return [i for i, step in enumerate(self.unmask_step) if step == t]

    def nats_before(self, t):
        """{position: the sum of the entropies before it}, lowest entropy first. Gamma bounds it."""
        readings = self.readings[t - 1]
        is_open = [i for i, nats in enumerate(readings) if nats is not None]
        sums = {}
        total = 0.0
        for i in sorted(is_open, key=lambda i: readings[i]):
            sums[i] = total
            total += readings[i]
        return sums

    def explain(self, t):
        """A line that says why call t unmasked these positions.

        Gamma bounds the sum of their entropies without the highest, the last one's.
        """
        taken = self.positions_taken(t)
        n = len(taken)
        if self.rule == "top_k":
            return f"unmasks {n}: the {self.level:g} surest"
        if self.rule == "confidence":
            return f"unmasks {n}: all with p > {self.level:g}, and at least the surest"
        entropies = sorted(self.readings[t - 1][i] for i in taken)
        surest = "the surest has" if n == 2 else f"the {n - 1} surest sum to"
        bounded = f"{surest} {sum(entropies[:-1]):.3f} nats (γ = {self.level:.3f})"
        num_open = sum(nats is not None for nats in self.readings[t - 1])
        if n == num_open:
            return f"unmasks the remaining {n}: {bounded}" if n > 1 else "unmasks the remaining one"
        if n == 1:
            return f"unmasks 1: it has {entropies[0]:.3f} nats (γ = {self.level:.3f})"
        together = "both sum" if n == 2 else f"all {n}"
        return f"unmasks {n}: {bounded}, {together} to {sum(entropies):.3f}"

    def summary(self):
        """A line with the level, the tokens and calls, and whether the answer is right."""
        name = {"eb": "γ", "top_k": "k", "confidence": "τ"}[self.rule]
        num_tokens = sum(step <= self.nfe for step in self.unmask_step)
        calls = "1 call" if self.nfe == 1 else f"{self.nfe} calls"
        verdict = "solved" if self.solved else "not solved"
        return f"{name} = {self.level:.2g}, {num_tokens} tokens in {calls}, {verdict}"


@torch.no_grad()
def record(policy, task, problem, decoder, length, seed=0) -> Trace:
    """Complete one problem, and record each call.

    length: L. seed: of the draws, if the decoder's temperature is above 0.

    A second pass over the states z_0 to z_{T-1} recomputes what the rule read, so that rollouts
    need not keep it. With a block cache, this pass reads the exact states, not the stale ones from
    which tokens were drawn.
    """
    prompt_ids, prompt_mask = encode_prompts(policy, [task.prompt(problem)], room=length)  # (1, P)
    generator = torch.Generator(prompt_ids.device).manual_seed(seed)
    rollout = policy.rollout(prompt_ids, prompt_mask, length, decoder, generator)
    T = int(rollout.nfe)
    P = prompt_ids.shape[1]

    # All states, as the rows of one batch. A single prompt has no padding, so no mask is needed.
    calls_before = torch.arange(T, device=prompt_ids.device)  # (T,)
    unmask_step = rollout.unmask_step.expand(T, -1)  # (T, L)
    state = latent_at(rollout.completion.expand(T, -1), unmask_step, calls_before, policy.mask_id)
    canvases = torch.cat([prompt_ids.expand(T, -1), state], dim=1)  # (T, P + L)
    hidden = torch.cat([policy.hidden(some)[:, P:] for some in canvases.split(32)])  # (T, L, D)

    is_masked = unmask_step > calls_before.unsqueeze(1)  # (T, L)
    first_row = torch.zeros(T, dtype=torch.long)  # all T states belong to row 0
    is_open = policy.make_window(decoder, prompt_mask, length).open_positions(
        first_row, is_masked.cpu()
    )
    entropy, confidence = policy.entropy_and_confidence(hidden[is_open], decoder.rule)  # (N,)
    readings = torch.full((T, length), torch.nan, device=prompt_ids.device)
    readings[is_open] = entropy if decoder.rule == "eb" else confidence
    [text] = decode_completions(policy, rollout)
    return Trace(
        prompt=visible(task.prompt(problem)),
        tokens=token_texts(policy, rollout.completion[0]),
        unmask_step=rollout.unmask_step[0].tolist(),
        readings=[[None if isnan(x) else x for x in row] for row in readings.tolist()],
        rule=decoder.rule,
        level=rollout.threshold.item() if decoder.rule == "eb" else decoder.level,
        text=visible(text),
        solved=task.solved(problem, text),
    )


@dataclass
class TwoStages:
    """A sampled completion and the state from which each token is scored. The text has n tokens."""

    prompt: str
    tau: int  #           the boundary between the stages, a call
    solved: bool
    tokens: list  #       (n,) str
    unmask_step: list  #  (n,) int
    scored_from: list  #  (n,) int, the step of the state that scores it: 0 or tau
    drawn: list  #        (n,) float, its probability when it was drawn
    scored: list  #       (n,) float, its probability in the state that scores it


@torch.no_grad()
def two_stages(policy, task, problem, decoder, length, seed=0, samples=8) -> TwoStages:
    """Sample a completion and score it in two stages, with the middle call as the boundary tau.

    The temperature is 1, since a greedy completion has no likelihood. Of `samples` completions we
    take the one with the most calls, among those that solve the problem if any does.
    """
    prompts = [task.prompt(problem)] * samples
    prompt_ids, prompt_mask = encode_prompts(policy, prompts, room=length)
    generator = torch.Generator(prompt_ids.device).manual_seed(seed)
    decoder = replace(decoder, temperature=1.0, stop_at_eos=True)
    rollout = policy.rollout(prompt_ids, prompt_mask, length, decoder, generator)
    texts = decode_completions(policy, rollout)
    solved = [bool(task.solved(problem, text)) for text in texts]
    nfe = rollout.nfe.tolist()
    best = max(range(samples), key=lambda row: (solved[row], nfe[row]))

    rollout = rollout.rows(slice(best, best + 1))
    tau = max(1, nfe[best] // 2)
    boundaries = torch.full_like(rollout.nfe, tau).unsqueeze(1)  # (1, 1)
    logp = surrogate_logp(policy, rollout, boundaries)  # (1, L)
    is_text = rollout.token_mask[0]  # (L,)
    unmask_step = rollout.unmask_step[0][is_text].tolist()
    return TwoStages(
        prompt=visible(prompts[0]),
        tau=tau,
        solved=solved[best],
        tokens=token_texts(policy, rollout.completion[0][is_text]),
        unmask_step=unmask_step,
        scored_from=[tau if step > tau else 0 for step in unmask_step],
        drawn=rollout.behaviour_logp[0][is_text].exp().tolist(),
        scored=logp[0][is_text].exp().tolist(),
    )


def token_texts(policy, ids):
    """The tokens of a completion as printable texts. (L,) long -> list of str"""
    return [visible(policy.tokenizer.decode([i])) for i in ids.tolist()]


def visible(text):
    """A token or text in printable form; blank tokens and line ends get visible signs."""
    return printable((text.strip(" ") or "␣").replace("\n", "⏎"))


# ---- the terminal --------------------------------------------------------------------------------


def describe_trace(trace, colour):
    """A trace as text: for each call the tokens so far, and below them what the rule read.

    A token is followed by its call's number; a reading is marked * if this call took the position.
    colour: whether to use the terminal's colours. Lines fit into WIDTH columns.
    """
    widths = [
        max(len(f"{token}·{step}"), 6)
        for token, step in zip(trace.tokens, trace.unmask_step, strict=True)
    ]
    lines = ["", f"prompt  {trace.prompt}", trace.summary()]
    for t in range(1, trace.nfe + 1):
        lines += ["", f"call {t}  {trace.explain(t)}"]
        for positions in fit_into_lines(widths):
            upper = ""
            lower = ""
            for i in positions:
                upper += token_cell(trace, i, t, widths[i], colour) + " "
                lower += reading_cell(trace, i, t).center(widths[i]) + " "
            lines += [line.rstrip() for line in (upper, lower) if line.strip()]
    lines += ["", f"answer  {trace.text}"]
    return "\n".join(lines)


def fit_into_lines(widths):
    """Lists of the positions whose cells fit side by side into WIDTH columns."""
    lines = [[]]
    used = 0
    for i, width in enumerate(widths):
        if lines[-1] and used + width + 1 > WIDTH:
            lines.append([])
            used = 0
        lines[-1].append(i)
        used += width + 1
    return lines


def token_cell(trace, i, t, width, colour):
    """Position i after call t: its token and call, or a mask."""
    step = trace.unmask_step[i]
    if step > t:
        return "░░░".center(width)
    cell = f"{trace.tokens[i]}·{step}".center(width)
    return in_shade(cell, step, trace.nfe) if colour else cell


def reading_cell(trace, i, t):
    """What the rule read at position i before call t; empty if the position was not open."""
    reading = trace.readings[t - 1][i]
    if reading is None:
        return ""
    mark = "*" if trace.unmask_step[i] == t else ""
    return f"{reading:.2f}{mark}"


def in_shade(text, t, T):
    """Text with the shade of call t, in a terminal's 256 colours."""
    from evaluation.plots import shade  # matplotlib takes a while to import

    background, ink = (colour_code(rgb) for rgb in shade(t, T))
    return f"\x1b[48;5;{background};38;5;{ink}m{text}\x1b[0m"


def colour_code(rgb):
    """The nearest of a terminal's 6 x 6 x 6 colours. rgb: three numbers in [0, 1]."""
    red, green, blue = (round(5 * x) for x in rgb)
    return 16 + 36 * red + 6 * green + blue
