"""One completion on its way from [MASK] to text, call by call: recorded, and drawn three ways.

`python evaluate.py RUN --trace 3` prints it, and writes trace.html and trace.gif. A token has the
shade of the call at which it appeared, and that call's number. So it can be read without colour.

Shapes: T denoiser calls, L completion tokens, D wide.
"""

from base64 import b64encode
from dataclasses import dataclass, replace
from html import escape
from io import BytesIO
from itertools import accumulate

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from evaluation.plots import (
    draw_box,
    draw_budget,
    draw_number,
    no_missing_glyphs,
    plot_two_stages,
    shade,
)
from evaluation.tables import printable, shorten
from likelihood import latent_at, surrogate_logp
from models.prompting import decode_completions, encode_prompts


@dataclass
class Trace:
    """What call t saw and did, as plain lists. Calls count from 1, so call t is at index t - 1."""

    prompt: str
    words: list  #       (L,) as they end up
    step: list  #        (L,) the call at which each appeared
    read: list  #        (T, L) what the rule read before call t: entropies in nats; for other rules
    #                    than eb the best token's probability. None where a position was not open.
    rule: str
    level: float  #      gamma of this prompt, tau or k
    answer: str
    solved: bool

    def before(self, t):
        """{position: nats that come before it}, lowest entropy first: the sum that gamma bounds."""
        read = self.read[t - 1]
        ranked = [i for i, nats in enumerate(read) if nats is not None]
        ranked.sort(key=read.__getitem__)
        return dict(zip(ranked, accumulate((read[i] for i in ranked), initial=0.0), strict=False))

    def reason(self, t):
        """Why call t took what it took, in a line."""
        taken = [i for i, step in enumerate(self.step) if step == t]
        if self.rule != "eb":
            what = f"the {self.level:g} surest" if self.rule == "top_k" else f"p > {self.level:g}"
            return f"takes {len(taken)}: {what}" + ", or the best one" * (self.rule != "top_k")
        before = self.before(t)
        last = max(before[i] for i in taken)
        said = f"takes {len(taken)}: {last:.3f} of {self.level:.3f} nats before the last"
        rest = [nats for i, nats in before.items() if i not in taken]
        return said + (f"; {min(rest):.3f} before the next" if rest else "")


def summary(trace):
    name = {"eb": "γ", "top_k": "k", "confidence": "τ"}[trace.rule]
    T = len(trace.read)
    calls = f"{sum(step <= T for step in trace.step)} tokens in {T} call{'s' * (T > 1)}"
    return f"{name} = {trace.level:.2g}, {calls}, {'solved' if trace.solved else 'not solved'}"


def visible(word):
    """A token as it can be shown, a blank or an end of line too."""
    return printable((word.strip(" ") or "␣").replace("\n", "⏎"))


@torch.no_grad()
def record(policy, task, problem, decoder, length, seed=0):
    """Complete one problem and look at each call again. -> Trace

    A second pass over the states z_0 to z_{T-1} gives what the rule read, so rollouts need not
    keep it. With a block cache they are the exact ones, not those of the stale states.
    """
    prompt, mask = encode_prompts(
        policy, [task.prompt(problem)], length
    )  # (1, P): nothing is padded
    generator = torch.Generator(prompt.device).manual_seed(seed)
    rollout = policy.rollout(prompt, mask, length, decoder, generator)
    (T,), P = rollout.nfe.tolist(), prompt.shape[1]
    done = torch.arange(T, device=prompt.device)  # (T,) calls before each
    step = rollout.unmask_step.expand(T, -1)
    state = latent_at(rollout.completion.expand(T, -1), step, done, policy.mask_id)  # (T, L)
    ids = torch.cat([prompt.expand(T, -1), state], dim=1)
    hidden = torch.cat([policy.hidden(part)[:, P:] for part in ids.split(32)])  # (T, L, D)
    open_ = decoder.open_positions((step > done.unsqueeze(1)).cpu()).to(prompt.device)
    read = torch.full((T, length), torch.nan, device=prompt.device)
    read[open_] = policy.entropy_and_confidence(hidden[open_], decoder.rule)[decoder.rule != "eb"]
    read = [[None if x != x else x for x in row] for row in read.tolist()]
    (text,), level = decode_completions(policy, rollout), decoder.level
    if decoder.rule == "eb":
        level = rollout.threshold.item()
    words = [visible(policy.tokenizer.decode([i])) for i in rollout.completion[0].tolist()]
    steps = rollout.unmask_step[0].tolist()
    how = (decoder.rule, level, visible(text), task.solved(problem, text))
    return Trace(visible(task.prompt(problem)), words, steps, read, *how)


def two_stages(policy, task, problem, decoder, length, seed=0):
    """One sampled completion with the state each token is scored from: for plot_two_stages.

    The boundary tau is the middle call. Greedy completions have no likelihood, so temperature 1.
    -> {prompt, words, step, scored_from, drawn, scored, tau}, lists over the text's tokens
    """
    prompts = encode_prompts(policy, [task.prompt(problem)], length)
    generator = torch.Generator(prompts[0].device).manual_seed(seed)
    decoder = replace(decoder, temperature=1.0, stop_at_eos=True)
    rollout = policy.rollout(*prompts, length, decoder, generator)
    tau = (rollout.nfe // 2).clamp(min=1).unsqueeze(1)  # (1, 1)
    with torch.no_grad():
        scored = surrogate_logp(policy, rollout, tau)
    text = rollout.token_mask[0]
    step, ids = rollout.unmask_step[0][text], rollout.completion[0][text].tolist()
    return {
        "prompt": visible(task.prompt(problem)), "tau": tau.item(), "step": step.tolist(),
        "words": [visible(policy.tokenizer.decode([i])) for i in ids],
        "scored_from": torch.where(step > tau[0], tau[0], 0).tolist(),
        "drawn": rollout.behaviour_logp[0][text].exp().tolist(),
        "scored": scored[0][text].exp().tolist(),
    }  # fmt: skip


# ---- the terminal --------------------------------------------------------------------------------


def paint(text, t, T):
    """Text with the shade of call t, in a terminal's 256 colours."""
    codes = [16 + sum(round(5 * x) * 6**k for x, k in zip(c, (2, 1, 0), strict=True))
             for c in shade(t, T)]  # fmt: skip
    return f"\x1b[48;5;{codes[0]};38;5;{codes[1]}m{text}\x1b[0m"


def printed(trace, colour, width=80):
    """A trace as text: each call's tokens, and below them what the rule read.

    A token carries its call's number; * is what this call took.
    """
    T = len(trace.read)
    cells = [max(len(f"{word}·{s}"), 6) for word, s in zip(trace.words, trace.step, strict=True)]
    rows, used = [[]], 0  # positions side by side
    for i, cell in enumerate(cells):
        if rows[-1] and used + cell + 1 > width:
            rows, used = [*rows, []], 0
        rows[-1].append(i)
        used += cell + 1
    said = ["", f"prompt  {trace.prompt}", summary(trace)]
    for t in range(1, T + 1):
        said += ["", f"call {t}  {trace.reason(t)}"]
        for row in rows:
            top = bottom = ""
            for i in row:
                step, h = trace.step[i], trace.read[t - 1][i]
                word = f"{trace.words[i]}·{step}" if step <= t else "░░░"
                word = word.center(cells[i])
                top += (paint(word, step, T) if colour and step <= t else word) + " "
                number = "" if h is None else f"{h:.2f}" + "*" * (step == t)
                bottom += number.center(cells[i]) + " "
            said += [line.rstrip() for line in (top, bottom) if line.strip()]
    return "\n".join([*said, "", f"answer  {trace.answer}"])


# ---- the page ------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff; overflow-wrap: anywhere }}
h2 {{ border-top: 1px solid #ccc; padding-top: 1rem; font: bold 1.3rem ui-monospace, monospace }}
.reason {{ color: #444; margin: .8rem 0 .2rem }}
.boxes {{ display: flex; flex-wrap: wrap; gap: 6px }}
.box {{ min-width: 4.4rem; text-align: center; font-size: .75rem; color: #444 }}
.box b {{ display: block; position: relative; line-height: 2.6rem; padding: 0 1.1rem 0 .5rem;
  height: 2.6rem; font: bold .95rem/2.6rem ui-monospace, monospace; border-radius: 6px;
  border: 2px solid transparent }}
.box small {{ position: absolute; top: -.75rem; right: .25rem; font-weight: normal }}
.box .mask {{ background: #f4f4f4; border: 2px dashed #bbb; color: #bbb }}
.now b {{ border: 2px solid #000; box-shadow: 0 0 0 2px #fff, 0 0 0 4px #000 }}
.now {{ color: #000; font-weight: bold }}
.bar {{ display: block; height: 5px; margin: 6px auto 0; background: #bbb }}
.now .bar {{ background: #222 }}
.call[hidden], .controls[hidden] {{ display: none }}
button {{ font: inherit; padding: .1rem 1rem }} input {{ vertical-align: middle; width: 16rem }}
img {{ max-width: 100%; margin-top: 1rem }}
</style>
<h1>{title}: completions, call by call</h1>
<p>A completion starts as masks, the dashed boxes. Each call of the model fills some of them. A
token's corner and shade say which call. What a call took has a black frame. The number below a box
is what the rule read there: for the entropy-bounded rule (&gamma;) the entropy in nats, else the
best token's probability. With &gamma;, the masks are sorted by entropy, lowest first. Each is taken
while the entropies before it sum to at most &gamma;.</p>
{traces}
<h2>Two stages: what training scores</h2>
<p>Training scores a token from the last kept state before it, not from the one that it was drawn
from. The importance weight corrects for that.</p>
<img alt="{alt}" src="data:image/png;base64,{image}">
<script>
for (const part of document.querySelectorAll("section")) {{
  const calls = [...part.querySelectorAll(".call")], play = part.querySelector("button");
  const slider = part.querySelector("input"), said = part.querySelector("output");
  let timer = null;
  const show = k => {{
    slider.value = k;
    calls.forEach((call, i) => call.hidden = k < calls.length && i != k);
    said.textContent = k < calls.length ? `call ${{k + 1}} of ${{calls.length}}` : "all calls";
  }};
  const stop = () => {{ clearInterval(timer); timer = null; play.textContent = "play"; }};
  slider.oninput = () => {{ stop(); show(+slider.value); }};
  play.onclick = () => {{
    if (timer) return stop();
    show(0);
    play.textContent = "stop";
    timer = setInterval(() => {{
      show(+slider.value + 1);
      if (slider.value == calls.length) stop();
    }}, 1000);
  }};
  part.querySelector(".controls").hidden = false;
  show(calls.length);
}}
</script>
"""


def write(traces, stages, folder, title):
    """trace.html, trace.gif and two_stages.png into a folder. -> their paths"""
    paths = [folder / name for name in ("trace.html", "trace.gif", "two_stages.png")]
    animate(traces[:3], paths[1])
    plot_two_stages(stages, paths[2])
    image = b64encode(paths[2].read_bytes()).decode()
    paths[0].write_text(page(traces, stages, image, title), encoding="utf-8")
    return paths


def page(traces, stages, image, title):
    """A web page that needs nothing else. It shows all without JavaScript, which only hides calls.

    image: two_stages.png in base64. All text is escaped: a completion can say anything.
    """
    numbers = zip(*(stages[key] for key in ("words", "drawn", "scored")), strict=True)
    said = "; ".join(f"{word} drawn {p:.2f}, scored {q:.2f}" for word, p, q in numbers)
    sections = "".join(map(section, traces))
    text = {"title": escape(title), "alt": escape(f"{stages['prompt']}: {said}")}
    return PAGE.format(traces=sections, image=image, **text)


def section(trace):
    """One completion: a row of boxes for each call, and the controls that JavaScript shows."""
    T = len(trace.read)
    highest = max(h for row in trace.read for h in row if h is not None)
    said = f"<section><h2>{escape(trace.prompt)}</h2><p>{escape(summary(trace))}</p>"
    said += '<p class="controls" hidden><button>play</button> '
    said += f'<input type="range" min="0" max="{T}" aria-label="call"> <output></output></p>'
    for t in range(1, T + 1):
        said += f'<div class="call"><p class="reason"><b>call {t}</b> {escape(trace.reason(t))}</p>'
        boxes = zip(trace.words, trace.step, trace.read[t - 1], strict=True)
        said += f'<div class="boxes">{"".join(box(*x, t, T, highest) for x in boxes)}</div></div>'
    return f"{said}<p>answer: <code>{escape(trace.answer)}</code></p></section>\n"


def box(word, step, h, t, T, highest):
    """A position at call t: its token, or a mask, and below it what the rule read there."""
    if step > t:
        said = '<b class="mask">mask</b>'
    else:
        back, ink = (f"rgb({','.join(str(round(255 * x)) for x in c)})" for c in shade(step, T))
        said = f'<b style="background:{back};color:{ink}">{escape(word)}<small>{step}</small></b>'
    if h is not None:
        said += (
            f'<span class="bar" style="width:{100 * h / max(highest, 1e-9):.0f}%"></span>{h:.2f}'
        )
    return f'<div class="box{" now" if step == t else ""}">{said}</div>'


# ---- the animation -------------------------------------------------------------------------------


def animate(traces, path, columns=10):
    """trace.gif: a second a call, the end held for three; the completions one after another."""
    frames, seconds = [], []
    for trace in traces:
        T = len(trace.read)
        frames += [frame(trace, t, columns) for t in range(T + 1)]
        seconds += [1.0] * T + [3.0]
    height = max(image.height for image in frames)
    frames = [ImageOps.pad(f, (f.width, height), color="white", centering=(0, 0)) for f in frames]
    frames = [image.quantize() for image in frames]
    how = {"duration": [int(1000 * s) for s in seconds], "loop": 0, "format": "GIF"}
    frames[0].save(path, save_all=True, append_images=frames[1:], **how)


def frame(trace, t, columns):
    """The canvas after call t as an image 800 pixels wide, with what t read."""
    T, rows = len(trace.read), -(-len(trace.words) // columns)
    height = 62 + 92 * rows + 64
    figure = Figure((8, height / 100), dpi=100)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, 800), ylim=(height, 0))
    axis.axis("off")
    how = dict(size=17, weight="bold", va="center", family="monospace", parse_math=False)
    axis.text(24, 32, shorten(trace.prompt, 42), **how)
    said = f"call {t} of {T}" if t else "all [MASK]"
    axis.text(776, 32, said, size=15, ha="right", va="center")
    seen = trace.read[t - 1] if t else [None] * len(trace.words)
    highest = max(h for row in trace.read for h in row if h is not None)
    for i, word in enumerate(trace.words):
        x, y = 24 + 752 / columns * (i % columns), 62 + 92 * (i // columns)
        draw_box(axis, (x, y, 752 / columns - 8), word, trace.step[i], t, T)
        if seen[i] is not None:
            draw_number(axis, (x, y + 53, 752 / columns - 8), seen[i], highest, trace.step[i] == t)
    if t and trace.rule == "eb":
        draw_budget(axis, trace, t, height - 44)
    if t == T:
        said = "✓ solved" if trace.solved else "✗ not solved"
        axis.text(776, height - 40, said, size=15, weight="bold", ha="right", va="center")
        axis.text(776, height - 17, summary(trace), size=9, ha="right", va="center", color="0.35")
    if t == 0:
        said = "A completion starts as masks. Each call of the model fills some of them."
        axis.text(24, height - 30, said, size=11, va="center", color="0.35")
    with BytesIO() as file, no_missing_glyphs():
        figure.savefig(file, format="png")
        return Image.open(file).convert("RGB")
