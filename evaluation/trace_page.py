"""Traces as a self-contained web page (trace.html) and as an animation (trace.gif)."""

from base64 import b64encode
from html import escape
from io import BytesIO

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps

from evaluation.outputs import verify_replaceable
from evaluation.plots import draw_token, no_missing_glyphs, plot_two_stages, shade
from evaluation.tables import shorten

PAGE = "trace.html"
ANIMATION = "trace.gif"
STAGES = "two_stages.png"
HEADING = "Two stages: what training scores"  # every page has it


def verify_folder(folder):
    """Raises ValueError if `write` would replace files in a folder that it did not write."""
    pictures = [folder / ANIMATION, folder / STAGES]
    verify_replaceable(folder / PAGE, pictures, content=HEADING)


def write(traces, stages, folder, title):
    """Write trace.html, trace.gif and two_stages.png into a folder. Returns their paths.

    traces: list of traces.Trace; the first three are animated. stages: traces.TwoStages.
    """
    page_path = folder / PAGE
    animation_path = folder / ANIMATION
    stages_path = folder / STAGES
    animate(traces[:3], animation_path)
    plot_two_stages(stages, stages_path)
    image = b64encode(stages_path.read_bytes()).decode()
    page_path.write_text(page(traces, stages, image, title), encoding="utf-8")
    return [page_path, animation_path, stages_path]


# ---- the page ------------------------------------------------------------------------------------

STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff; overflow-wrap: anywhere }
h2 { border-top: 1px solid #ccc; padding-top: 1rem; font: bold 1.3rem ui-monospace, monospace }
.reason { color: #444; margin: .8rem 0 .2rem }
.boxes { display: flex; flex-wrap: wrap; gap: 6px }
.box { min-width: 4.4rem; text-align: center; font-size: .75rem; color: #444 }
.box b { display: block; position: relative; line-height: 2.6rem; padding: 0 1.1rem 0 .5rem;
  height: 2.6rem; font: bold .95rem/2.6rem ui-monospace, monospace; border-radius: 6px;
  border: 2px solid transparent }
.box small { position: absolute; top: -.75rem; right: .25rem; font-weight: normal }
.box .mask { background: #f4f4f4; border: 2px dashed #bbb; color: #bbb }
.now b { border: 2px solid #000; box-shadow: 0 0 0 2px #fff, 0 0 0 4px #000 }
.now { color: #000; font-weight: bold }
.bar { display: block; height: 5px; margin: 6px auto 0; background: #bbb }
.now .bar { background: #222 }
.call[hidden], .controls[hidden] { display: none }
button { font: inherit; padding: .1rem 1rem } input { vertical-align: middle; width: 16rem }
img { max-width: 100%; margin-top: 1rem }
"""

SCRIPT = """\
for (const section of document.querySelectorAll("section")) {
  const calls = [...section.querySelectorAll(".call")];
  const play = section.querySelector("button");
  const slider = section.querySelector("input");
  const caption = section.querySelector("output");
  let timer = null;
  const show = k => {
    slider.value = k;
    calls.forEach((call, i) => call.hidden = k < calls.length && i != k);
    caption.textContent = k < calls.length ? `call ${k + 1} of ${calls.length}` : "all calls";
  };
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "play"; };
  slider.oninput = () => { stop(); show(+slider.value); };
  play.onclick = () => {
    if (timer) return stop();
    show(0);
    play.textContent = "stop";
    timer = setInterval(() => {
      show(+slider.value + 1);
      if (slider.value == calls.length) stop();
    }, 1000);
  };
  section.querySelector(".controls").hidden = false;
  show(calls.length);
}
"""


def page(traces, stages, image, title):
    """The page as a string. Without JavaScript it shows all calls; JavaScript only hides some.

    image: two_stages.png in base64. All text is escaped, since a completion can contain anything.
    """
    probabilities = "; ".join(
        f"{token} drawn {drawn:.2f}, scored {scored:.2f}"
        for token, drawn, scored in zip(stages.tokens, stages.drawn, stages.scored, strict=True)
    )
    alternative_text = escape(f"{stages.prompt}: {probabilities}")
    title = escape(title)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>
{STYLE}</style>
<h1>{title}: completions, call by call</h1>
<p>A completion starts as masks, the dashed boxes. Each call of the model fills some of them. A
token's shade and the number in its corner say which call. Tokens filled by the current call have a
black frame. The number below a box is what the rule read there: for the entropy-bounded rule
(&gamma;) the entropy in nats, otherwise the best token's probability. With &gamma;, the masks are
sorted by entropy, lowest first, and each is taken while the entropies before it sum to at most
&gamma;.</p>
{"".join(section(trace) for trace in traces)}
<h2>{HEADING}</h2>
<p>Training scores a token from the state at the last boundary before it, not from the state that it
was drawn from. The importance weight corrects for this.</p>
<img alt="{alternative_text}" src="data:image/png;base64,{image}">
<script>
{SCRIPT}</script>
"""


def section(trace):
    """One completion: a row of boxes for each call, and controls that need JavaScript."""
    highest = highest_reading(trace)
    calls = ""
    for t in range(1, trace.nfe + 1):
        boxes = "".join(box(trace, i, t, highest) for i in range(len(trace.tokens)))
        calls += (
            f'<div class="call"><p class="reason"><b>call {t}</b> {escape(trace.explain(t))}</p>'
            f'<div class="boxes">{boxes}</div></div>'
        )
    return (
        f"<section><h2>{escape(trace.prompt)}</h2><p>{escape(trace.summary())}</p>"
        '<p class="controls" hidden><button>play</button> '
        f'<input type="range" min="0" max="{trace.nfe}" aria-label="call"> <output></output></p>'
        f"{calls}<p>answer: <code>{escape(trace.text)}</code></p></section>\n"
    )


def box(trace, i, t, highest):
    """Position i after call t: its token or a mask, and what the rule read there.

    highest: the reading whose bar is as wide as the box; other bars are in proportion.
    """
    step = trace.unmask_step[i]
    reading = trace.readings[t - 1][i]
    content = '<b class="mask">mask</b>'
    if step <= t:
        background, ink = (css_colour(rgb) for rgb in shade(step, trace.nfe))
        content = (
            f'<b style="background:{background};color:{ink}">'
            f"{escape(trace.tokens[i])}<small>{step}</small></b>"
        )
    if reading is not None:
        width = 100 * reading / max(highest, 1e-9)
        content += f'<span class="bar" style="width:{width:.0f}%"></span>{reading:.2f}'
    taken_now = " now" if step == t else ""
    return f'<div class="box{taken_now}">{content}</div>'


def css_colour(rgb):
    red, green, blue = (round(255 * x) for x in rgb)
    return f"rgb({red},{green},{blue})"


def highest_reading(trace):
    return max(reading for row in trace.readings for reading in row if reading is not None)


# ---- the animation -------------------------------------------------------------------------------


def animate(traces, path, columns=10):
    """trace.gif: one completion after the other, a second per call and three for the last one."""
    frames = []
    milliseconds = []
    for trace in traces:
        frames += [frame(trace, t, columns) for t in range(trace.nfe + 1)]
        milliseconds += [1000] * trace.nfe + [3000]
    height = max(image.height for image in frames)
    frames = [
        ImageOps.pad(image, (image.width, height), color="white", centering=(0, 0)).quantize()
        for image in frames
    ]
    frames[0].save(
        path,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=milliseconds,
        loop=0,
    )


def frame(trace, t, columns):
    """An image, 800 pixels wide, of the completion after call t and what t read. t = 0: masks."""
    T = trace.nfe
    lines = -(-len(trace.tokens) // columns)
    height = 62 + 92 * lines + 64
    figure = Figure((8, height / 100), dpi=100)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, 800), ylim=(height, 0))  # y counts from the top
    axis.axis("off")
    axis.text(
        24,
        32,
        shorten(trace.prompt, 42),
        size=17,
        weight="bold",
        va="center",
        family="monospace",
        parse_math=False,
    )
    axis.text(776, 32, f"call {t} of {T}" if t else "all [MASK]", size=15, ha="right", va="center")

    pitch = 752 / columns
    for i, token in enumerate(trace.tokens):
        x = 24 + pitch * (i % columns)
        y = 62 + 92 * (i // columns)
        draw_token(axis, x, y, width=pitch - 8, token=token, step=trace.unmask_step[i], t=t, T=T)
        reading = trace.readings[t - 1][i] if t else None
        if reading is not None:
            draw_reading(
                axis,
                x,
                y + 53,
                width=pitch - 8,
                reading=reading,
                highest=highest_reading(trace),
                is_taken=trace.unmask_step[i] == t,
            )

    if t == 0:
        axis.text(
            24,
            height - 30,
            "A completion starts as masks. Each call of the model fills some of them.",
            size=11,
            va="center",
            color="0.35",
        )
    elif trace.rule == "eb":
        draw_budget(axis, trace, t, y=height - 44)
    if t == T:
        verdict = "✓ solved" if trace.solved else "✗ not solved"
        axis.text(776, height - 40, verdict, size=15, weight="bold", ha="right", va="center")
        axis.text(776, height - 17, trace.summary(), size=9, ha="right", va="center", color="0.35")
    with BytesIO() as file, no_missing_glyphs():
        figure.savefig(file, format="png")
        return Image.open(file).convert("RGB")


def draw_reading(axis, x, y, width, reading, highest, is_taken):
    """A bar for what the rule read, with the number below it. x, y, width: in pixels."""
    axis.add_patch(Rectangle((x, y), width, 6, color="0.93"))
    length = width * reading / max(highest, 1e-9)
    axis.add_patch(Rectangle((x, y), length, 6, color="black" if is_taken else "0.6"))
    axis.text(
        x + width / 2,
        y + 16,
        f"{reading:.2f}",
        size=10,
        weight="bold" if is_taken else "normal",
        color="black" if is_taken else "0.45",
        ha="center",
        va="center",
    )


def draw_budget(axis, trace, t, y):
    """The entropies that call t read as bars, end to end, lowest first, with gamma in the middle.

    Positions whose bar starts before gamma were taken. y: pixels from the top.
    """
    left = 24
    width = 300
    gamma = max(trace.level, 1e-9)
    pixels_per_nat = width / 2 / gamma
    background, _ = shade(t, trace.nfe)
    for i, nats_before in trace.nats_before(t).items():
        nats_after = nats_before + trace.readings[t - 1][i]
        start = min(nats_before * pixels_per_nat, width)
        end = min(nats_after * pixels_per_nat, width)
        axis.add_patch(
            Rectangle(
                (left + start, y),
                end - start,
                14,
                facecolor=background if trace.unmask_step[i] == t else "0.94",
                edgecolor="white",
            )
        )
    axis.add_patch(Rectangle((left, y), width, 14, fill=False, edgecolor="0.6", linewidth=0.8))
    middle = left + width / 2
    axis.plot([middle, middle], [y - 5, y + 19], color="black", linewidth=2)
    axis.text(middle, y - 7, f"γ = {gamma:.2g} nats", size=10, ha="center", va="bottom")
    axis.text(
        left,
        y + 22,
        "number: entropy, nats. End to end, lowest first: taken if it starts before γ",
        size=9,
        va="top",
        color="0.35",
    )
