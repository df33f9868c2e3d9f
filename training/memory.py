"""What a training run takes on a GPU, part by part, from a model's shape and the settings.

    python -m experiments.benchmark --memory LLaDA-8B --gpu_gib 24 --dtype 4bit    prints it
    python -m experiments.benchmark --check  holds it against this machine

Nothing is loaded: it is arithmetic. Which tensors a phase holds at its peak was found by tracing
torch's allocator on a CPU; an H200's peaks are within 4% of it. All prompts count as equally long,
and as padded, which takes more. Not counted: what lora_dropout keeps. A mixture's experts are
counted exactly, but what a call makes of them is a guess.

Letters: V words, D wide, Q and K wide in queries and keys, I wide in the MLP; b rows, S = P + L
positions each, n = b * S; w bytes a number in a denoiser call.
"""

from dataclasses import replace
from types import SimpleNamespace

from denoiser import CHUNK, SLICE

GIB = 2**30
# Assumed: the CUDA context with cuBLAS's workspace, in bytes; and what the allocator loses between
# its blocks, a share of all that comes and goes. (It keeps more for later while there is room.)
CONTEXT, FRAGMENTED = 0.75 * GIB, 0.05
GATHERED = 3  # split layers that are whole: one runs, one has come, one is in the sending buffer
# NF4 with double quantisation: 4 bits a weight, 8 for the largest of 64, 32 for 256 of those.
NF4 = 4 / 8 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 0.516
# Dense bfloat16 (T4, V100: float16) TFLOP/s by the makers' data sheets; a GPU's name holds the key.
SPEEDS = {
    "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "RTX 3090": 71,
    "RTX A6000": 155, "RTX 6000 Ada": 364, "A10": 125, "L4": 121, "V100": 125, "T4": 65,
}  # fmt: skip
PHASES = (
    ("rollout_cache", "rollout_call", "gathered"),
    ("update_saved", "update_work", "gathered"),
    ("optimizer_step",),
)
RESIDENT = ("base", "reference", "adapter", "gradients", "moments")


def shape_of(config):
    """The letters above, and `matrices`: the Linear ones of a layer, {name: (in, out)}."""
    D, heads, more = config.hidden_size, config.num_attention_heads, {}
    size = getattr(config, "head_dim", None) or D // heads
    Q, K = heads * size, (getattr(config, "num_key_value_heads", None) or heads) * size
    experts = getattr(config, "num_experts", 0)
    if experts:  # no Linear modules; a position passes through a few of them
        inner = config.moe_intermediate_size * config.num_experts_per_tok
    else:
        inner = config.intermediate_size
        more = {"gate_proj": (D, inner), "up_proj": (D, inner), "down_proj": (inner, D)}
    return SimpleNamespace(
        V=config.vocab_size, D=D, Q=Q, K=K, I=inner, layers=config.num_hidden_layers,
        matrices={"q_proj": (D, Q), "k_proj": (D, K), "v_proj": (D, K), "o_proj": (Q, D)} | more,
        experts=experts, size=size, head_norms=2 * size if "qwen3" in config.model_type else 0,
    )  # fmt: skip


def parameters(config):
    """(those of the layers' Linear matrices, all), exactly as transformers' classes have them."""
    m = shape_of(config)
    attention, mlp = [*m.matrices][:4], [*m.matrices][4:]
    biased = attention[:3] if config.model_type == "qwen2" else []
    biased = attention if getattr(config, "attention_bias", False) else biased
    biased = biased + mlp if getattr(config, "mlp_bias", False) else biased
    inside = sum(a * b for a, b in m.matrices.values())
    more = 2 * m.D + m.head_norms + sum(m.matrices[name][1] for name in biased)
    if m.experts:  # three matrices each, and the router
        more += m.experts * (3 * m.D * config.moe_intermediate_size + m.D)
    words = m.V * m.D * (1 if config.tie_word_embeddings else 2)
    return m.layers * inside, m.layers * (inside + more) + m.D + words


def adapter_parameters(config, rank):
    m = shape_of(config)
    return m.layers * rank * sum(a + b for a, b in m.matrices.values())


def precision(config, settings, device):
    """The base's dtype, as runs.base_policy and models.load_denoiser choose it."""
    if settings.dtype != "auto":
        return settings.dtype
    small = device == "cpu" or getattr(config, "compact_prompts", False)
    return "float32" if small or not settings.lora_rank else "bfloat16"


def work(config, settings, prompt_tokens, calls=None):
    """Floating-point operations of one step. calls: of a completion [one for each two tokens].

    2 for each weight and position of a call. A backward pass through a frozen base costs as much as
    a forward pass, through one that learns twice that; checkpointing makes each call once more.
    """
    m, B = shape_of(config), settings.prompts_per_step * settings.num_generations
    L, S = settings.max_completion_length, prompt_tokens + settings.max_completion_length
    block, weights = settings.block_length or L, parameters(config)[0]
    if m.experts:
        weights += m.layers * 3 * m.D * m.I  # those that a position passes through
    part = {"none": S, "prefix": S - prompt_tokens - L // 2, "dual": block}[settings.cache]
    opens = max(1, L // block) if settings.cache != "none" else 0
    calls = L / 2 if calls is None else calls
    rollout = B * (opens * S + (calls - opens) * part)
    canvases = settings.prompts_per_step + B * (settings.num_stages - 1)
    passes = 2 + settings.gradient_checkpointing + (not settings.lora_rank)
    mu = settings.num_iterations  # the old policy is scored for all updates but the first
    return 2 * weights * (rollout + canvases * S * (passes * mu + mu - 1))


def budget(config, settings, prompt_tokens, device="cuda", processes=1):
    """{part: GiB}: the RESIDENT parts, those of each of the PHASES, "allowance", and "peak".

    The phases take turns, so the peak has the largest of them. On a "cpu" a few things differ.
    Of several processes it is what each of them takes.
    """
    m, rank = shape_of(config), settings.lora_rank
    m.device, m.rank, dtype = device, rank, precision(config, settings, device)
    m.w = 4 if dtype == "float32" else 2
    settings = replace(settings, prompts_per_step=-(-settings.prompts_per_step // processes))
    linear, total = parameters(config)
    learned = adapter_parameters(config, rank) if rank else total
    number = 4 if rank else m.w  # bytes of a number that learns: an adapter is float32
    gathered = 0
    if settings.shard:  # of the layers each has its part, and a few of them whole for a while
        inside = total - m.D - m.V * m.D * (1 if config.tie_word_embeddings else 2)
        layer = (m.w * inside + number * learned * bool(rank)) / m.layers
        gathered = GATHERED * layer
        total -= inside - inside / processes
        learned = learned / processes if rank else total
    base = NF4 * linear + 2 * (total - linear) if dtype == "4bit" else m.w * total
    # During a call autocast keeps the adapter in bfloat16 too; 4 bits are unpacked a matrix a time.
    m.copies = 2 * learned if rank and m.w == 2 else 0
    m.unpacked = 2 * max(a * b for a, b in m.matrices.values()) if dtype == "4bit" else 0
    # A CPU multiplies bfloat16 logits in float32: the last layer is copied.
    m.wide = 4 * m.V * m.D if device == "cpu" and m.w == 2 else 0
    parts = {
        "base": base,
        "reference": 0 if rank or not settings.beta else base,  # else the adapter switched off
        "adapter": number * learned if rank else 0,
        "gradients": number * learned,  # kept until the next update
        "moments": 2 * number * learned,
        "gathered": gathered,
    }
    parts |= rollout_parts(m, settings, prompt_tokens) | update_parts(m, settings, prompt_tokens)
    parts["optimizer_step"] = number * learned if device == "cuda" else 0  # all at once: foreach
    comes_and_goes = max(sum(parts[name] for name in phase) for phase in PHASES)
    parts["allowance"] = CONTEXT + FRAGMENTED * comes_and_goes if device == "cuda" else 0
    resident = sum(parts[name] for name in (*RESIDENT, "allowance"))
    parts["peak"] = resident + comes_and_goes
    return {name: size / GIB for name, size in parts.items()}


def rollout_parts(m, settings, prompt_tokens):
    """A rollout's bytes at its largest bucket, when a block's first call runs every position."""
    G, L = settings.num_generations, settings.max_completion_length
    S, block = prompt_tokens + L, settings.block_length or L
    b = G * (max(1, settings.rollout_batch_size // G) if settings.rollout_batch_size else 10**9)
    b = min(b, G * settings.prompts_per_step)
    n, N, w = b * S, b * block, m.w
    # Keys and values of all layers. (BlockCache.keep copies one tensor at a time, between calls.)
    cache = 0 if settings.cache == "none" else 2 * m.layers * w * n * m.K
    # In a layer: the embeddings, the layer's input, its residual, the normed state; in the MLP the
    # gate, up and their product; with an adapter the gate, up, and its share before and after
    # scaling. Once for all layers: the mask and the positions' cosines and sines. The states of
    # the call before are still there.
    last = {"none": S, "prefix": L, "dual": block}[settings.cache]
    inner = 4 if "up_proj" in m.matrices and m.rank else 3
    call = n * (w * (4 * m.D + inner * m.I + 2 * m.size) + S) + w * b * last * m.D
    call += m.copies + m.unpacked
    # Then the states, those of the open positions, and those drawn; the logits of a slice, their
    # exponentials and products; or a chunk's weights and, twice, their sums in float64.
    slices = 12 * N * min(m.V, max(1024, SLICE[m.device] // N))
    drawn = min(N, max(1, CHUNK[m.device] // m.V)) * m.V
    read = w * m.D * (n + 2 * N) + max(slices, 20 * drawn, m.wide + 4 * drawn)
    return {"rollout_cache": cache, "rollout_call": max(call, read)}


def update_parts(m, settings, prompt_tokens):
    """An update's bytes: what a micro-batch's backward pass needs, and what works through it."""
    L, w, G, full = settings.max_completion_length, m.w, settings.num_generations, not m.rank
    S, b = prompt_tokens + L, min(settings.micro_batch_size, G * settings.prompts_per_step)
    # Canvases: one of all [MASK] for each group that the micro-batch meets, and b a later stage.
    groups = 1 if G % b == 0 else b // G if b % G == 0 else (b + G - 2) // G + 1
    n = S * (groups + b * (settings.num_stages - 1))
    # Saved of a layer, bytes a position: the inputs of two norms in float32, normed (all learns:
    # and scaled), queries, keys and values for every head, what attention gives, and its mask; in
    # the MLP gate, up, the activation and the product; r numbers of each adapted matrix.
    position = 8 * m.D + w * (2 * m.D + 4 * m.Q + S + 4 * m.I + m.rank * len(m.matrices))
    position += w * 2 * m.D * full + 4 * (m.Q + m.K) * bool(m.head_norms)
    work = w * (2 * m.I + m.D)  # gradients on their way through the MLP, less what they free
    if settings.gradient_checkpointing:  # each layer's input; the rest of one layer at a time
        saved = n * m.layers * w * m.D
        work += position - (4 * m.D if w == 4 else 0)  # in float32 a norm's input is the layer's
    else:
        saved = n * m.layers * position + m.copies
        work = max(work, 24 * m.D)  # the last norm's gradients
    saved += n * (2 * w * m.size + S)  # once: cosines and sines, the mask
    # Or the logits of a chunk, their exponentials and gradients, with the states that they are of.
    scored = b * L
    chunk = min(scored, max(1, CHUNK[m.device] // m.V)) * m.V
    logits = max(16 * chunk, m.wide + 8 * chunk) + 4 * m.V * m.D * full
    logits += m.D * (n * (4 + w) + scored * w)
    return {"update_saved": saved, "update_work": max(n * work + m.unpacked, logits)}


def largest(config, settings, prompt_tokens, gpu_gib, processes=1):
    """The settings with the largest micro-batch and rollout batch that fit into gpu_gib.

    Only parts of equal size are tried. Raises ValueError, in one line, for what does not fit.
    """
    P, G = settings.prompts_per_step // processes, settings.num_generations

    def first(name, phase, sizes):
        for size in sizes:
            tried = replace(settings, **{name: size})
            parts = budget(config, tried, prompt_tokens, processes=processes)
            stays = sum(parts[part] for part in RESIDENT)
            takes = max(sum(parts[part] for part in phase), parts["optimizer_step"])
            aside = CONTEXT / GIB + FRAGMENTED * takes
            if stays + takes + aside <= gpu_gib:
                return size
        raise ValueError(
            f"{gpu_gib:g} GiB are too few: weights and optimiser take {stays:.1f}, "
            f"{name} = {size} takes {takes:.1f}, and {aside:.1f} are set aside"
        )

    micro = [size for size in range(P * G, 0, -1) if P * G % size == 0]
    rows = [size * G for size in range(P, 0, -1) if P % size == 0]
    found = {"micro_batch_size": first("micro_batch_size", PHASES[1], micro)}
    size = first("rollout_batch_size", PHASES[0], rows)
    return replace(settings, rollout_batch_size=0 if size == P * G else size, **found)
