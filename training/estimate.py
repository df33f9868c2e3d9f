"""Estimates by arithmetic how much GPU memory a training run needs, meant to be within 15%.

`python -m training.memory` prints the estimate. In a step of LLaDA-8B's recipe, with prompts of 141
tokens, an H200 allocated 40.2 GiB at most; the estimate is 43.2, plus an allowance of 1.9.
"""

import math

CHUNK = 2**27  # the number of logits that denoiser.py computes at once on a GPU


def count_parameters(model_config):
    """The numbers of weights, {kind: int}, of the model that a configuration describes."""
    import torch
    from transformers import AutoModelForCausalLM  # imported here, so that --help answers at once

    from models.families import adaptable_matrices

    with torch.device("meta"):  # shapes without memory
        model = AutoModelForCausalLM.from_config(model_config)
    layers = model.get_decoder().layers
    matrices = [module for module in layers.modules() if isinstance(module, torch.nn.Linear)]
    kinds = adaptable_matrices(model_config)
    adapted = [module for name, module in layers.named_modules() if name.split(".")[-1] in kinds]
    return {
        "total": model.num_parameters(),
        "layers": sum(weight.numel() for weight in layers.parameters()),
        "matrices": sum(matrix.weight.numel() for matrix in matrices),  # only these can be 4-bit
        "rank_1": sum(matrix.in_features + matrix.out_features for matrix in adapted),  # of LoRA
    }


def describe_size(model_config):
    """A model's number of weights in words: "8.0 billion parameters", "42.3 million parameters"."""
    total = count_parameters(model_config)["total"]
    if total < 1e8:
        return f"{total / 1e6:.1f} million parameters"
    return f"{total / 1e9:.1f} billion parameters"


def least_step_seconds(config, seconds_of_a_call, block_size=0):
    """The least time that a training step can take, in seconds.

    seconds_of_a_call  the time of one call with one row
    block_size         that of a block-causal denoiser; 0 for others

    A completion takes at least one call per block; with a block-causal denoiser's cache, at least
    the work of one call in total. Then each of the mu updates scores the canvases of all rows,
    where a group shares the first stage's. Running a canvas forward and backward is the work of
    three calls, and gradient checkpointing adds a fourth.
    """
    rows = config.prompts_per_step * config.num_generations
    blocks = 1
    if config.block_length and not (block_size and config.cache != "none"):
        blocks = math.ceil(config.max_completion_length / config.block_length)
    canvases = config.prompts_per_step + rows * (config.num_stages - 1)
    passes = 0 if config.train_target == "sampler" else config.num_iterations * canvases
    calls_of_a_pass = 4 if config.gradient_checkpointing else 3
    return seconds_of_a_call * (rows * blocks + calls_of_a_pass * passes)


def describe_time(seconds):
    """A time in the unit that fits: "0.31 s", "42 s", "7.5 minutes", "3.2 hours", "1.4 days"."""
    for unit, size in (("days", 24 * 3600), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def estimate_gib(model_config, config, prompt_tokens=200, processes=1):
    """Each process's memory, {part: GiB}. "peak" includes the larger of rollout and update.

    model_config   transformers' configuration of the model
    config         the run's Config
    prompt_tokens  tokens of a prompt
    """
    count = count_parameters(model_config)
    layers = model_config.num_hidden_layers
    D = model_config.hidden_size
    mlp = model_config.intermediate_size
    head_dim = getattr(model_config, "head_dim", None) or D // model_config.num_attention_heads
    queries = head_dim * model_config.num_attention_heads
    keys = head_dim * model_config.num_key_value_heads
    L = config.max_completion_length
    S = prompt_tokens + L
    batch = math.ceil(config.prompts_per_step / processes) * config.num_generations
    split = processes if config.shard else 1
    is_float32 = config.dtype == "float32" or (config.dtype == "auto" and not config.lora_rank)
    size = 4 if is_float32 else 2  # bytes of a number

    matrix_size = 0.516 if config.dtype == "4bit" else size  # NF4 with its scales
    layer_weights = matrix_size * count["matrices"] + size * (count["layers"] - count["matrices"])
    weights = size * (count["total"] - count["layers"]) + layer_weights / split
    # Trained weights (all, or an adapter's in float32) have a gradient and AdamW's two moments.
    learned = 4 * config.lora_rank * count["rank_1"] / split or weights
    adapter_and_optimizer = 4 * learned if config.lora_rank else 3 * learned
    if config.beta and not config.lora_rank:
        weights *= 2  # the reference is a second model
    if config.shard:
        weights += 3 * layer_weights / layers  # the layers that are whole while they run

    # A rollout needs one layer's activations or the logits of open positions, plus the layers'
    # cache.
    rows = min(config.rollout_batch_size or batch, batch)
    logits = min(CHUNK, rows * (config.block_length or L) * model_config.vocab_size)
    rollout = max(size * rows * S * 4 * (D + mlp), 12 * logits)
    if config.cache != "none":
        rollout += size * rows * S * 2 * keys * layers
    # An update needs the layers' activations or, with checkpointing, their inputs, plus logits.
    rows = min(config.micro_batch_size, batch)
    canvases = math.ceil(rows / config.num_generations) + rows * (config.num_stages - 1)
    if getattr(model_config, "block_size", None):  # its canvases contain the completions
        canvases = rows * config.num_stages
        S += L + model_config.block_size
    layer = size * canvases * S * (6 * D + 6 * queries + 4 * mlp + S)
    logits = min(CHUNK, rows * L * model_config.vocab_size)
    # Bytes per logit: under a frozen last layer, logits become probabilities in place, and then
    # bfloat16.
    logits = (6 if config.lora_rank else 16) * logits + 8 * canvases * S * D
    update = layers * layer + logits
    if config.gradient_checkpointing:
        update = layers * size * canvases * S * D + max(layer, logits)
    update = max(update, learned)  # AdamW's step makes a copy of the trained weights

    parts = {
        "weights": weights,
        "adapter_and_optimizer": adapter_and_optimizer,
        "rollout": rollout,
        "update": update,
        "allowance": 0.75 * 2**30 + 0.05 * max(rollout, update),  # CUDA context, fragmentation
    }
    parts["peak"] = sum(parts.values()) - min(rollout, update)
    return {name: size / 2**30 for name, size in parts.items()}
