"""What a new GPU is asked first: `bash tests/gpu.sh`. On a CPU the same at small shape.

    precision   bfloat16 at real depth: importance weights that must be 1, and rollouts with
                attention's kernel for no mask against its kernel for a mask of padding
    run 0.6b    train.py on random weights in Qwen3-0.6B's exact shape and layout: seconds to the
                first step, seconds a step, peak memory beside memory.py's
    stop        the same, stopped between its two steps: whether it goes on exactly
    main job    python train.py --task countdown --model tiny: minutes, and what came of it
    benchmark   benchmark.py's rows

One table is printed, and gpu.json has the same with device, commit and versions. With 80 GB:

    python tests/gpu.py --shape 8b --parts run "run 4bit"
                LLaDA-8B's shape, layout and recipe, one step of 2 inner updates; its base in NF4,
                128 tokens, 24 rows at once
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from checkpoints import edit_config
from checkpoints import write_checkpoint as write_small
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import memory  # noqa: E402

from config import Config  # noqa: E402
from diffusion_policy import DiffusionPolicy  # noqa: E402
from likelihood import draw_boundaries, scored_as_drawn, surrogate_logp  # noqa: E402
from models.checkpoints import load_policy  # noqa: E402
from models.device import device_name  # noqa: E402
from models.families import read_config  # noqa: E402
from sampler import Decoder  # noqa: E402
from tasks.registry import TASKS  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SHAPES = {  # V, D, MLP, layers, heads, key-value heads, width of a head; those of LLaDA have five
    "0.6b": (151936, 1024, 3072, 28, 16, 8, 128),
    "8b": (126464, 4096, 12288, 32, 32),
    "small": (2000, 128, 384, 6, 4, 2, 32),
    "small llada": (2000, 128, 384, 6, 4),
}
RUN = "--cache dual --num_iterations 2 --micro_batch_size 12 --lora_rank 16"
RUNS = {  # flags of train.py; those of 8b are LLaDA's recipe but for the inner updates
    "0.6b": f"{RUN} --prompts_per_step 8 --num_generations 6 --max_completion_length 128"
    " --block_length 32",
    "8b": "--num_iterations 2 --steps 1",
    "small": f"{RUN} --prompts_per_step 2 --num_generations 2 --max_completion_length 16"
    " --block_length 8",
}
RUNS["small llada"] = RUNS["small"]
IN_4_BITS = [
    "--dtype",
    "4bit",
    "--max_completion_length",
    "128",
    "--rollout_batch_size",
    "24",
    "--steps",
    "1",
]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(folder, special, **words):
    """Byte pairs of this project's own texts, behind the special tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(word, special=True, normalized=False) for word in special]
    letters = pre_tokenizers.ByteLevel.alphabet()
    how = {"special_tokens": special, "initial_alphabet": letters, "show_progress": False}
    trainer = BpeTrainer(vocab_size=1900, **how)
    tokenizer.train([str(ROOT / "README.md"), str(ROOT / "EXPERIMENTS.md")], trainer)
    words["pad_token"] = special[0].content
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **words)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return fast


def write_llada(folder, shape):
    """Random weights as GSAI-ML published LLaDA: its sizes, names and configuration."""
    V, D, MLP, layers, heads = SHAPES[shape]
    write_small(folder, "llada")  # for its config.json
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mdm_mask|>"]
    fast = write_tokenizer(folder, special, eos_token=special[0])
    end, mask = fast.eos_token_id, fast.convert_tokens_to_ids("<|mdm_mask|>")
    edit_config(
        folder, embedding_size=V, vocab_size=V, d_model=D, mlp_hidden_size=MLP, n_layers=layers,
        n_heads=heads, n_kv_heads=heads, max_sequence_length=4096, mask_token_id=mask,
        eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.manual_seed(0)

    def matrix(*shape):
        return (torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) * 1.28 / D**0.5).cpu()

    norm, inside = torch.ones(D, dtype=torch.bfloat16), {"ff_proj": (MLP, D), "up_proj": (MLP, D)}
    inside |= {f"{name}_proj": (D, D) for name in "qkv"} | {"attn_out": (D, D), "ff_out": (D, MLP)}
    where = {}
    for i in range(layers + 1):
        if i < layers:
            names = {f"blocks.{i}.{name}": matrix(*shape) for name, shape in inside.items()}
            names |= {f"blocks.{i}.attn_norm": norm.clone(), f"blocks.{i}.ff_norm": norm.clone()}
        else:
            names = {"wte": matrix(V, D), "ff_out": matrix(V, D), "ln_f": norm}
        names = {f"model.transformer.{name}.weight": w for name, w in names.items()}
        file = f"model-{i + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(names, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    index = json.dumps({"metadata": {}, "weight_map": where})
    (folder / "model.safetensors.index.json").write_text(index)


def write_checkpoint(folder, shape):
    """Random weights as dllm's converter writes a Qwen3: its sizes, names and configuration."""
    if len(SHAPES[shape]) == 5:
        return write_llada(folder, shape)
    V, D, MLP, layers, heads, kv_heads, head_dim = SHAPES[shape]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
    fast = write_tokenizer(folder, special, eos_token="<|im_end|>", mask_token="<|mask|>")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=V, hidden_size=D, intermediate_size=MLP, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        max_position_embeddings=4096, tie_word_embeddings=True, rope_theta=1e6, dtype="bfloat16",
        eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id, bos_token_id=None,
        mask_token_id=fast.mask_token_id, initializer_range=1.28 / D**0.5,
    )  # fmt: skip
    with DEVICE:
        model = Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    file = folder / "config.json"
    said = json.loads(file.read_text()) | {"model_type": "a2d-qwen3"}
    file.write_text(json.dumps(said | {"architectures": ["A2DQwen3LMHeadModel"]}, indent=2))


@torch.no_grad()
def precision(folder):
    """bfloat16's own error bar, on 32 rows of equally long prompts."""
    policy = load_policy(folder, DEVICE, torch.bfloat16)
    chance = torch.Generator(DEVICE).manual_seed(0)
    P, L, V = (64, 64, 1900) if GPU else (16, 16, 1900)
    ids = torch.randint(300, V, (32, P), generator=chance, device=DEVICE)
    chance = torch.Generator(DEVICE).manual_seed(1)
    drawn = policy.rollout(ids, ids > 0, L, Decoder("top_k", 4), chance)
    boundaries = draw_boundaries(drawn.nfe, 2, torch.Generator(DEVICE).manual_seed(2))
    logp = surrogate_logp(policy, drawn, boundaries)
    unit = scored_as_drawn(drawn.unmask_step, boundaries) & drawn.token_mask
    error = (logp - drawn.behaviour_logp)[unit]
    # The same prompts beside one that is a token longer: now they are padded, and there is a mask.
    # Greedy, since a row more draws other random numbers.
    padded = torch.nn.functional.pad(ids, (1, 0))
    padded = torch.cat([padded, torch.full_like(padded[:1], 300)])
    greedy = Decoder("top_k", 4, temperature=0.0)
    one, other = (policy.rollout(x, x > 0, L, greedy) for x in (ids, padded))
    assert len(other.nfe) == len(ids) + 1 and not other.prompt_mask.all()
    other = other.rows(slice(0, len(ids)))
    first = one.unmask_step == 1
    same = (one.unmask_step == other.unmask_step) & (one.completion == other.completion)
    return {
        "log weights that must be 0, sd": error.std().item(),
        "the same, largest": error.abs().max().item(),
        "same first tokens with a mask": same[first].float().mean().item(),
        "same tokens with a mask": same.float().mean().item(),
    }


def train(*flags):
    """(seconds, lines) of a run of train.py."""
    command, began = [sys.executable, "-u", str(ROOT / "train.py"), *map(str, flags)], time.time()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1][:300])
    return time.time() - began, done.stdout.splitlines()


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def stopped_run(flags, work):
    """The metrics of two steps with a stop between them that differ from those of random_run."""
    train(*flags, "--steps", 1, "--run_dir", work / "parts")
    train("--resume", "--run_dir", work / "parts", "--steps", 2)
    whole, parts = rows_of(work / "whole"), rows_of(work / "parts")
    same = {key for key in whole[0] if "second" not in key and "memory" not in key}
    differ = [k for a, b in zip(whole, parts, strict=True) for k in same if a[k] != b[k]]
    return {"metrics that differ": len(differ), "which": " ".join(sorted({*differ}))}


def random_run(flags, work, name="whole"):
    """A step or two."""
    seconds, lines = train(*flags, "--run_dir", work / name)
    [began] = [line for line in lines if "begins after" in line]
    whole = rows_of(work / name)
    step = [row["seconds_rollout"] + row["seconds_update"] for row in whole]
    tokenizer, task = PreTrainedTokenizerFast.from_pretrained(work / "model"), TASKS["countdown"]
    prompt, config = task.prompt(task.problems("train", 1, 0)[0]), read_config(work / "model")[0]
    reader = DiffusionPolicy(SimpleNamespace(config=config, device="cpu"), tokenizer)
    P = reader.encode([prompt])[0].shape[1]
    settings = Config(**json.loads((work / name / "config.json").read_text()))
    calls = whole[-1]["nfe_mean"]
    flop = memory.work(config, settings, P, calls)
    parts = memory.budget(config, settings, P, DEVICE.type)
    speeds = [speed for key, speed in memory.SPEEDS.items() if key in device_name(DEVICE)]
    return {
        "seconds to the first step": float(began.split()[-2]), "seconds, all": seconds,
        "seconds, first step": step[0], "seconds, last step": step[-1],
        "of it rollout": whole[-1]["seconds_rollout"], "TFLOP of it": flop / 1e12,
        "MFU": flop / (step[-1] * 1e12 * speeds[0]) if speeds else None,
        "tokens/s": whole[-1]["tokens_per_second"], "prompt tokens": P, "calls": calls,
        "peak GiB": whole[-1]["peak_memory_gib"],
        "predicted GiB, less the allowance": parts["peak"] - parts["allowance"],
    }  # fmt: skip


def main_job(work):
    more = () if GPU else ("--steps", 3, "--eval_problems", 32)
    seconds, lines = train(
        "--task", "countdown", "--model", "tiny", "--run_dir", work / "tiny", *more
    )
    rows = rows_of(work / "tiny")
    said = next((line.strip() for line in lines if line.startswith("Accuracy")), "")
    mean = sum(row["seconds_rollout"] + row["seconds_update"] for row in rows) / len(rows)
    return {"minutes": seconds / 60, "seconds a step": mean, "what came of it": said}


def benchmark():
    command = [sys.executable, "-m", "experiments.benchmark", *([] if GPU else ["--shape", "tiny"])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return {line[:16].strip(): line[16:].strip() for line in done.stdout.splitlines()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="gpu.json")
    parser.add_argument("--shape", choices=SHAPES, default="0.6b" if GPU else "small")
    parser.add_argument("--parts", nargs="+", help="default: all but `run 4bit`")
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    )
    found = {
        "device": device_name(DEVICE), "commit": commit.stdout.strip(), "torch": torch.__version__,
        "python": platform.python_version(), "cuda": torch.version.cuda if GPU else None,
    }  # fmt: skip
    print(" ".join(f"{name} {value}," for name, value in found.items()).rstrip(","))
    work = Path(tempfile.mkdtemp())
    write_checkpoint(work / "model", options.shape)
    flags = ["--task", "countdown", "--eval_problems", "2", "--frontier", "false", "--steps", "2"]
    flags += [*RUNS[options.shape].split(), "--model", work / "model"]
    parts = {
        "precision": lambda: precision(work / "model"),
        "run": lambda: random_run(flags, work), "stop": lambda: stopped_run(flags, work),
        "run 4bit": lambda: random_run([*flags, *IN_4_BITS], work, "4bit"),
        "main job": lambda: main_job(work), "benchmark": benchmark,
    }  # fmt: skip
    for name in options.parts or [name for name in parts if name != "run 4bit"]:
        began = time.time()
        try:
            found[name] = parts[name]()
        except Exception as error:  # the others are still worth their time
            found[name] = {"failed": " ".join(f"{type(error).__name__}: {error}".split())}
        title = name if name in ("main job", "benchmark") else f"{name} {options.shape}"
        print(f"\n{title} ({time.time() - began:.0f} s)")
        for key, value in found[name].items():
            value = f"{value:.4g}" if isinstance(value, float) else value
            print(f"  {key:36}{value}")
        Path(options.out).write_text(json.dumps(found, indent=1) + "\n")  # what a stop leaves
    shutil.rmtree(work)
    return int(any("failed" in found.get(name, {}) for name in parts))


if __name__ == "__main__":
    sys.exit(main())
