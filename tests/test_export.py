"""Exports: whole models in the layout of their source, which the other tools of its family read."""

import json
import stat
import warnings

import pytest
import torch
from checkpoints import (
    BLOCK_SIZE,
    FAMILIES,
    HIDDEN,
    LAYERS,
    drop_field,
    ids_and_mask,
    random_adapter,
    write_checkpoint,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_lora import MATRIX_SHAPES

from models import export, merge
from models.checkpoints import adapter_base, load_policy
from models.export import export_model, stored_dtype
from models.loading import load_denoiser
from models.lora import load_lora, lora_layers, save_adapter
from models.tiny import tiny_denoiser, tiny_tokenizer
from training.files import write_checksums


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_has_the_sources_layout_and_equal_logits(tmp_path, family, lora):
    source = tmp_path / "source"
    out = tmp_path / "out"
    weights, config = write_checkpoint(source, family)
    denoiser, tokenizer = load_denoiser(str(source))
    model = random_adapter(denoiser) if lora else denoiser
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.1)  # as if trained
    ids, _ = ids_and_mask()
    expected = model(input_ids=ids).logits
    export_model(model, tokenizer, out)

    exported_names = set()
    for shard in out.glob("*.safetensors"):
        exported_names |= load_file(shard).keys()
    assert exported_names == set(weights)
    for name in ("modeling_llada.py", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    exported_config = read_config(out)
    assert set(exported_config) == set(config)
    changed = {name for name in config if exported_config[name] != config[name]}
    dtype_fields = {"torch_dtype", "dtype"} & set(config)
    assert changed == dtype_fields
    assert all(exported_config[name] == "float32" for name in dtype_fields)

    exported, exported_tokenizer = load_denoiser(str(out))
    torch.testing.assert_close(exported(input_ids=ids).logits, expected, rtol=0, atol=2e-5)
    text = "a <|mdm_mask|>"
    assert exported_tokenizer(text).input_ids == tokenizer(text).input_ids
    if not lora:  # a full model's checkpoints are exports, each from what the last one wrote
        export_model(exported, exported_tokenizer, tmp_path / "again")
        again, _ = load_denoiser(str(tmp_path / "again"))
        torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=0, atol=2e-5)


def test_an_export_in_the_sources_dtype_has_its_config_to_the_letter(tmp_path):
    write_checkpoint(tmp_path / "source", "llada", torch_dtype="bfloat16")
    denoiser, tokenizer = load_denoiser(str(tmp_path / "source"), dtype=torch.bfloat16)
    export_model(denoiser, tokenizer, tmp_path / "out")
    source_text = (tmp_path / "source" / "config.json").read_text()
    assert (tmp_path / "out" / "config.json").read_text() == source_text
    assert '"bfloat16"' in source_text


def test_an_exported_a2d_says_that_it_is_bidirectional_whatever_its_folders_name(tmp_path):
    source = tmp_path / "Qwen3-mdlm"
    write_checkpoint(source, "a2d-qwen3")
    drop_field(source, "is_causal")  # as published
    denoiser, tokenizer = load_denoiser(str(source))
    export_model(denoiser, tokenizer, tmp_path / "out")
    assert read_config(tmp_path / "out") == read_config(source) | {
        "dtype": "float32",
        "is_causal": False,
    }
    load_denoiser(str(tmp_path / "out"))


def test_a_model_that_a_run_has_saved_whole_is_exported_without_its_checksums(tmp_path):
    """They are of the run's files. What reads a checkpoint would find that all differ."""
    source = tmp_path / "source"
    write_checkpoint(source, "sdar")
    save_file({"weight": torch.zeros(1)}, source / "threshold_head.safetensors")
    write_checksums(source)
    denoiser, tokenizer = load_denoiser(str(source))
    export_model(denoiser, tokenizer, tmp_path / "out")
    assert load_policy(tmp_path / "out").block_size == BLOCK_SIZE


def test_an_export_under_names_that_no_tool_would_find_is_an_error(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "source", "llada")
    denoiser, tokenizer = load_denoiser(str(tmp_path / "source"))
    save = denoiser.save_pretrained

    def save_under_our_names(*args, **options):
        save(*args, **options, save_original_format=False)

    monkeypatch.setattr(denoiser, "save_pretrained", save_under_our_names)
    with pytest.raises(ValueError, match="requirements.txt") as error:
        export_model(denoiser, tokenizer, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "modeling_llada.py").exists()


@pytest.mark.parametrize("source", ["llada", "tiny"])
def test_whoever_may_read_new_files_may_read_an_export(tmp_path, source):
    if source == "tiny":
        tokenizer = tiny_tokenizer()
        denoiser = tiny_denoiser(tokenizer)
    else:
        write_checkpoint(tmp_path / "source", source)
        denoiser, tokenizer = load_denoiser(str(tmp_path / "source"))
    export_model(denoiser, tokenizer, tmp_path / "out")
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()}
    (tmp_path / "new").touch()
    assert modes == {stat.S_IMODE((tmp_path / "new").stat().st_mode)}


# ---- the command that merges ---------------------------------------------------------------------


@pytest.mark.parametrize("names_base", [True, False])
def test_an_adapter_is_merged_into_its_bases_own_layout_and_dtype(tmp_path, names_base):
    source = tmp_path / "source"
    write_checkpoint(source, "llada")
    for file in source.glob("*.safetensors"):
        weights = {name: w.bfloat16() for name, w in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    adapter = tmp_path / "adapter"
    model = random_adapter(load_denoiser(str(source))[0])
    save_adapter(model, adapter)
    ids, _ = ids_and_mask()
    expected = model(input_ids=ids).logits
    out = tmp_path / "merged"
    words = [str(adapter), str(out)] if names_base else [str(source), str(out)]
    words += [] if names_base else ["--adapter", str(adapter)]
    assert not merge.main(words)
    names = {name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert names == {name for file in source.glob("*.safetensors") for name in load_file(file)}
    assert stored_dtype(out) == "bfloat16" == read_config(out).get("torch_dtype", "bfloat16")
    merged, _ = load_denoiser(str(out))
    error = (merged(input_ids=ids).logits - expected).abs().max()
    assert error < 0.1 * expected.abs().max()  # bfloat16 has three digits
    bare = load_denoiser(str(source))[0](input_ids=ids).logits
    assert (bare - expected).abs().max() > 5 * error
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "merged", "source"}


def test_a_routers_float32_bias_is_exported_as_it_is(tmp_path):
    """Its rounding would choose other experts; and it says nothing of how the model is stored."""
    source = tmp_path / "source"
    write_checkpoint(source, "llada2_moe")
    for file in source.glob("*.safetensors"):
        weights = load_file(file)
        for name, weight in weights.items():
            if "expert_bias" not in name:
                weights[name] = weight.bfloat16()
        save_file(weights, file, metadata={"format": "pt"})
    assert stored_dtype(source) == "bfloat16"
    save_adapter(random_adapter(load_denoiser(str(source))[0]), tmp_path / "adapter")
    merge.main([str(tmp_path / "adapter"), str(tmp_path / "merged")])
    assert stored_dtype(tmp_path / "merged") == "bfloat16"
    before = {}
    after = {}
    for folder, weights in ((source, before), (tmp_path / "merged", after)):
        for file in folder.glob("*.safetensors"):
            weights |= load_file(file)
    assert {name: w.dtype for name, w in before.items()} == {n: w.dtype for n, w in after.items()}
    name = "model.layers.1.mlp.gate.expert_bias"
    assert after[name].dtype == torch.float32
    assert torch.equal(after[name], before[name])


def test_a_merge_removes_nothing_that_lies_beside_its_folder(tmp_path, monkeypatch):
    """Earlier versions took merged.unfinished for their own, and removed it."""
    write_checkpoint(tmp_path / "source", "llada")
    save_adapter(random_adapter(load_denoiser(str(tmp_path / "source"))[0]), tmp_path / "adapter")
    unfinished = tmp_path / "merged.unfinished"
    unfinished.mkdir()
    (unfinished / "essay.txt").write_text("the user's")
    merge.main([str(tmp_path / "adapter"), str(tmp_path / "merged")])
    assert (unfinished / "essay.txt").read_text() == "the user's"
    assert (tmp_path / "merged" / "config.json").is_file()

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(export, "export_model", fail)
    with pytest.raises(SystemExit):
        merge.main([str(tmp_path / "adapter"), str(tmp_path / "again")])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"adapter", "merged", "merged.unfinished", "source"}


class StandIn(torch.nn.Module):
    """The modules of LLaDA's own modelling code, by their names there, without the arithmetic."""

    def __init__(self):
        super().__init__()
        blocks = []
        for _ in range(LAYERS):
            block = torch.nn.Module()
            for name, (rows, columns) in MATRIX_SHAPES.items():
                setattr(block, name, torch.nn.Linear(columns, rows, bias=False))
            blocks.append(block)
        self.model = torch.nn.Module()
        self.model.transformer = torch.nn.Module()
        self.model.transformer.blocks = torch.nn.ModuleList(blocks)
        self.model.transformer.ff_out = torch.nn.Linear(HIDDEN, 10, bias=False)  # the output layer


@pytest.mark.parametrize("names_base", [True, False])
def test_an_adapter_alone_fits_the_modules_of_lladas_own_code(tmp_path, names_base):
    write_checkpoint(tmp_path / "base", "llada")
    model = random_adapter(load_denoiser(str(tmp_path / "base"))[0])
    save_adapter(model, tmp_path / "adapter")
    words = [tmp_path / "adapter", tmp_path / "out", "--adapter_only"]
    if not names_base:
        words = [tmp_path / "base", tmp_path / "out", "--adapter_only"]
        words += ["--adapter", tmp_path / "adapter"]
    assert not merge.main(list(map(str, words)))
    assert adapter_base(tmp_path / "out") == str(tmp_path / "base")

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns of weights that it misses or does not need
        on_stand_in = PeftModel.from_pretrained(StandIn(), tmp_path / "out")
    theirs = lora_layers(on_stand_in)
    ours = lora_layers(model)
    assert len(theirs) == len(ours) == 7 * LAYERS
    our_names = {
        "attn_out": "self_attn.o_proj",
        "ff_proj": "mlp.gate_proj",
        "up_proj": "mlp.up_proj",
        "ff_out": "mlp.down_proj",
    }
    for layer in range(LAYERS):
        for matrix in MATRIX_SHAPES:
            name = f"base_model.model.model.transformer.blocks.{layer}.{matrix}"
            our_name = our_names.get(matrix, f"self_attn.{matrix}")
            own = ours[f"base_model.model.model.layers.{layer}.{our_name}"]
            expected = own.get_delta_weight("default")
            assert expected.abs().max() > 0.01
            assert torch.equal(theirs[name].get_delta_weight("default"), expected)

    # It can be read back.
    loaded = load_lora(load_denoiser(str(tmp_path / "base"))[0], tmp_path / "out")
    ids, _ = ids_and_mask()
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_an_adapter_of_a_base_with_transformers_own_names_is_left_as_it_is(tmp_path, capsys):
    with pytest.raises(SystemExit):
        merge.main(["tiny", str(tmp_path / "out"), "--adapter_only", "--adapter", str(tmp_path)])
    error = capsys.readouterr().err
    assert "tiny has the module names of transformers: its adapters fit as is" in error
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_matrices_that_are_one_in_the_base_is_not_exported_alone(tmp_path, capsys):
    """It would need three times its rank."""
    write_checkpoint(tmp_path / "base", "llada2_moe")
    save_adapter(random_adapter(load_denoiser(str(tmp_path / "base"))[0]), tmp_path / "adapter")
    with pytest.raises(SystemExit):
        merge.main([str(tmp_path / "adapter"), str(tmp_path / "out"), "--adapter_only"])
    assert "merge the whole model, without --adapter_only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_merged_is_told_in_a_line(tmp_path, capsys):
    write_checkpoint(tmp_path / "model", "llada")
    save_adapter(random_adapter(load_denoiser(str(tmp_path / "model"))[0]), tmp_path / "adapter")
    for words, message in (
        (["tiny", tmp_path], "already exists"),
        (
            ["tiny", tmp_path / "out"],
            "tiny is not an adapter that names its base: give an --adapter",
        ),
        (
            [tmp_path / "nope", tmp_path / "out"],
            f"there is no folder {tmp_path / 'nope'}; for a model",
        ),
        ([tmp_path / "nope", tmp_path / "out", "--adapter_only"], "there is no folder"),
        ([tmp_path / "model", tmp_path / "out", "--adapter", tmp_path / "nope"], "nope"),
        (["tiny", tmp_path / "out", "--adapter", tmp_path / "adapter"], "cannot be loaded on tiny"),
    ):
        with pytest.raises(SystemExit) as exit:
            merge.main(list(map(str, words)))
        error = capsys.readouterr().err
        assert exit.value.code == 2 and message in error
        assert not (tmp_path / "out").exists()


def test_the_last_export_of_a_bfloat16_base_on_a_cpu_is_bfloat16(tmp_path):
    source = tmp_path / "source"
    write_checkpoint(source, "llada")
    for file in source.glob("*.safetensors"):
        weights = {name: w.bfloat16() for name, w in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    denoiser, tokenizer = load_denoiser(str(source))
    assert denoiser.dtype == torch.float32
    export_model(random_adapter(denoiser), tokenizer, tmp_path / "out")
    assert stored_dtype(tmp_path / "out") == "bfloat16"
    # Without an adapter the weights themselves have learned, in float32.
    denoiser, tokenizer = load_denoiser(str(source))
    export_model(denoiser, tokenizer, tmp_path / "full")
    assert stored_dtype(tmp_path / "full") == "float32"
