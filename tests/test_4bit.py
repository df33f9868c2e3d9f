"""A base in 4 bit: loaded, trained under an adapter, exported. On bitsandbytes' CPU kernels."""

import json

import pytest
import torch
from checkpoints import LAYERS, reference_logits, write_checkpoint
from safetensors.torch import load_file
from toy import metrics_of

import train
from models import loading
from models.export import export_model
from models.loading import dtype_of, load_denoiser
from models.lora import add_lora, load_lora, lora_layers

pytest.importorskip("bitsandbytes", reason="bitsandbytes, which is optional, is not installed")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(train, "plot_curves", lambda run_dir: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder, "llada")
    return folder


def trained_adapter(denoiser):
    model, generator = add_lora(denoiser, 3, 6), torch.Generator().manual_seed(0)
    for layer in lora_layers(model).values():
        weight = layer.lora_B["default"].weight
        weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


IDS = torch.arange(40).view(2, 20) * 6


def test_the_layers_matrices_take_half_a_byte_and_compute_what_they_were_rounded_to(folder):
    from bitsandbytes.functional import dequantize_4bit

    denoiser, _ = load_denoiser(str(folder), dtype="4bit")
    weights, config = write_checkpoint(folder.parent / "same", "llada")
    rounded, bits = dict(weights), 0
    for name, p in denoiser.named_parameters():
        if p.dtype == torch.uint8:
            bits += 8 * p.numel()
            i, kind = name.split(".")[2], name.split(".")[-2]
            ours = {"o_proj": "attn_out", "gate_proj": "ff_proj", "down_proj": "ff_out"}
            there = f"model.transformer.blocks.{i}.{ours.get(kind, kind)}.weight"
            rounded[there] = dequantize_4bit(p.data, p.quant_state).float()
    assert bits == 4 * sum(
        w.numel() for name, w in weights.items() if "blocks" in name and w.dim() > 1
    )
    assert dtype_of(denoiser) == "4bit" and denoiser.lm_head.weight.dtype == torch.float32
    logits = denoiser(input_ids=IDS).logits
    expected = reference_logits("llada", rounded, config, IDS)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)
    assert (logits - reference_logits("llada", weights, config, IDS)).abs().max() > 0.1


def test_an_export_merges_the_adapter_into_the_base_as_it_was_before(folder, tmp_path):
    denoiser, tokenizer = load_denoiser(str(folder), dtype="4bit")
    model = trained_adapter(denoiser)
    assert len(lora_layers(model)) == 7 * LAYERS and dtype_of(model) == "4bit"
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    export_model(model, tokenizer, tmp_path / "out")
    base, _ = load_denoiser(str(folder), dtype=torch.bfloat16)
    expected = load_lora(base, tmp_path / "adapter").merge_and_unload()(input_ids=IDS).logits
    merged, _ = load_denoiser(str(tmp_path / "out"), dtype=torch.bfloat16)
    assert torch.equal(merged(input_ids=IDS).logits, expected)
    shard = next((tmp_path / "out").glob("*.safetensors"))
    assert {w.dtype for w in load_file(shard).values()} == {torch.bfloat16}


FLAGS = (
    "--model {} --task countdown --dtype 4bit --steps {} --prompts_per_step 2 --num_generations 2"
    " --max_completion_length 4 --block_length 4 --num_iterations 2 --eval_problems 1"
    " --frontier false --lora_rank 2 --run_dir {}"
)


def test_a_run_on_a_4_bit_base_learns_resumes_and_is_measured_as_it_was_trained(folder, tmp_path):
    for run, steps in (("whole", 2), ("parts", 1)):
        assert train.main(FLAGS.format(folder, steps, tmp_path / run).split()) == 0
    again = ["--resume", "--run_dir", str(tmp_path / "parts"), "--steps", "2"]
    assert train.main(again) == 0
    whole, parts = (metrics_of(tmp_path / run) for run in ("whole", "parts"))
    assert whole == parts and len(whole) == 2
    rows = json.loads((tmp_path / "whole" / "eval.json").read_text())
    assert {row["dtype"] for row in rows} == {"4bit"}


def test_4_bit_without_an_adapter_or_without_bitsandbytes_gets_one_line(
    folder, tmp_path, capsys, monkeypatch
):
    flags = FLAGS.format(folder, 1, tmp_path / "run").replace("lora_rank 2", "lora_rank 0").split()
    assert train.main(flags) == 2
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        loading.load_denoiser(str(folder), dtype="4bit")
    said = capsys.readouterr().err
    assert "give a --lora_rank above 0" in said and said.count("\n") == 1
