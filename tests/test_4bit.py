"""A base in 4 bits: loaded, trained under an adapter, exported. On bitsandbytes' CPU kernels."""

import json

import pytest
import torch
from checkpoints import LAYERS, random_adapter, reference_logits, write_checkpoint
from safetensors.torch import load_file, save_file
from toy import metrics_of

import train
from models.export import export_model
from models.loading import dtype_of, load_denoiser
from models.lora import load_lora, lora_layers, save_adapter

pytest.importorskip("bitsandbytes", reason="bitsandbytes, which is optional, is not installed")

pytestmark = pytest.mark.usefixtures("no_pictures")

IDS = torch.arange(40).view(2, 20) * 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder, "llada")
    return folder


def test_the_layers_matrices_take_half_a_byte_and_compute_what_they_were_rounded_to(folder):
    from bitsandbytes.functional import dequantize_4bit

    llada_name = {
        "q_proj": "q_proj",
        "k_proj": "k_proj",
        "v_proj": "v_proj",
        "o_proj": "attn_out",
        "gate_proj": "ff_proj",
        "up_proj": "up_proj",
        "down_proj": "ff_out",
    }
    denoiser, _ = load_denoiser(str(folder), dtype="4bit")
    assert dtype_of(denoiser) == "4bit"
    assert denoiser.lm_head.weight.dtype == torch.float32
    weights, config = write_checkpoint(folder.parent / "same", "llada")
    rounded = dict(weights)
    bits = 0
    for name, p in denoiser.named_parameters():  # model.layers.0.mlp.up_proj.weight
        if p.dtype == torch.uint8:
            bits += 8 * p.numel()
            layer = name.split(".")[2]
            matrix = llada_name[name.split(".")[-2]]
            values = dequantize_4bit(p.data, p.quant_state).float()
            rounded[f"model.transformer.blocks.{layer}.{matrix}.weight"] = values
    matrices = [w for name, w in weights.items() if "blocks" in name and w.dim() > 1]
    assert bits == 4 * sum(w.numel() for w in matrices)

    logits = denoiser(input_ids=IDS).logits
    expected = reference_logits("llada", rounded, config, IDS)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)
    assert (logits - reference_logits("llada", weights, config, IDS)).abs().max() > 0.1


def test_an_export_merges_the_adapter_into_the_base_as_it_was_before(folder, tmp_path):
    denoiser, tokenizer = load_denoiser(str(folder), dtype="4bit")
    model = random_adapter(denoiser)
    assert len(lora_layers(model)) == 7 * LAYERS
    assert dtype_of(model) == "4bit"
    save_adapter(model, tmp_path / "adapter")
    export_model(model, tokenizer, tmp_path / "out")
    base, _ = load_denoiser(str(folder), dtype=torch.bfloat16)
    expected = load_lora(base, tmp_path / "adapter").merge_and_unload()(input_ids=IDS).logits
    exported, _ = load_denoiser(str(tmp_path / "out"), dtype=torch.bfloat16)
    assert torch.equal(exported(input_ids=IDS).logits, expected)
    shard = next((tmp_path / "out").glob("*.safetensors"))
    assert {w.dtype for w in load_file(shard).values()} == {torch.bfloat16}


def test_a_matrix_of_another_width_is_refused_although_4_bits_have_no_shape(tmp_path):
    """It was loaded, and failed when it was first used."""
    weights, _ = write_checkpoint(tmp_path, "llada")
    name = "model.transformer.blocks.0.q_proj.weight"
    file = next(file for file in tmp_path.glob("*.safetensors") if name in load_file(file))
    narrow = {name: weights[name][:, :-2].contiguous()}
    save_file(load_file(file) | narrow, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} is \(32, 32\) in the model and \(32, 30\) in"):
        load_denoiser(str(tmp_path), dtype="4bit")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_matrix_that_is_not_finite_is_refused_by_name_before_it_is_rounded(tmp_path, value):
    """Of a NaN nothing was said but that the logits are none."""
    weights, _ = write_checkpoint(tmp_path, "llada")
    name = "model.transformer.blocks.0.q_proj.weight"
    file = next(file for file in tmp_path.glob("*.safetensors") if name in load_file(file))
    weights[name][3, 4] = value
    save_file(load_file(file) | {name: weights[name]}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"\({name} holds NaN or infinity: its file is broken"):
        load_denoiser(str(tmp_path), dtype="4bit")


FLAGS = (
    "--model {model} --run_dir {run_dir} --steps {steps} --lora_rank {lora_rank} --dtype 4bit "
    "--task countdown --prompts_per_step 2 --num_generations 2 --num_iterations 2 "
    "--max_completion_length 4 --block_length 4 --eval_problems 1 --frontier false"
)


def flags(model, run_dir, steps, lora_rank=2):
    return FLAGS.format(model=model, run_dir=run_dir, steps=steps, lora_rank=lora_rank).split()


def test_a_run_on_a_4_bit_base_learns_resumes_and_is_measured_as_it_was_trained(folder, tmp_path):
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    assert train.main(flags(folder, whole, steps=2)) == 0
    assert train.main(flags(folder, parts, steps=1)) == 0
    assert train.main(["--resume", "--run_dir", str(parts), "--steps", "2"]) == 0
    assert metrics_of(whole) == metrics_of(parts)
    assert len(metrics_of(whole)) == 2
    rows = json.loads((whole / "eval.json").read_text())
    assert {row["dtype"] for row in rows} == {"4bit"}


def test_4_bit_without_an_adapter_or_without_bitsandbytes_gets_one_line(
    folder, tmp_path, capsys, monkeypatch
):
    with pytest.raises(SystemExit) as end:
        train.main(flags(folder, tmp_path / "run", steps=1, lora_rank=0))
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "give a --lora_rank above 0" in error
    assert error.count("\n") == 1
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        load_denoiser(str(folder), dtype="4bit")
