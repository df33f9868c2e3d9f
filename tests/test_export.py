"""Exports: whole models in the layout of their source, which the other tools of its family read."""

import json
import stat

import pytest
import torch
from checkpoints import FAMILIES, drop_field, ids_and_mask, random_adapter, write_checkpoint
from safetensors.torch import load_file

from models.export import export_model
from models.loading import load_denoiser
from models.tiny import tiny_denoiser, tiny_tokenizer


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
