"""Loading checkpoints: equal logits, the right tokens, and what is refused."""

import json

import pytest
import torch
from checkpoints import (
    END_TOKEN,
    FAMILIES,
    MASK_TOKEN,
    edit_config,
    ids_and_mask,
    reference_logits,
    style_of,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file
from toy import random_tiny
from transformers import LlamaForCausalLM

from models import loading
from models.block_causal import make_policy
from models.loading import check_attention, load_denoiser
from models.prompting import end_token_ids
from models.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tiny():
    return random_tiny()


@pytest.fixture
def folder(tiny, tmp_path):
    """The checkpoint of a random tiny model, in transformers' own format."""
    denoiser, tokenizer = tiny
    denoiser.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_saved_model_is_loaded_with_equal_logits_and_tokens(tiny, folder):
    saved_denoiser, saved_tokenizer = tiny
    denoiser, tokenizer = load_denoiser(str(folder))
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(denoiser(input_ids=ids).logits, saved_denoiser(input_ids=ids).logits)
    text = "3 14 99 = 7 <answer>( 3 + 14 ) * 5</answer>[EOS][MASK][PAD]"
    assert tokenizer(text).input_ids == saved_tokenizer(text).input_ids
    assert tokenizer.mask_token == "[MASK]"
    assert tokenizer.eos_token == "[EOS]"
    assert tokenizer.pad_token == "[PAD]"


def test_weights_that_are_split_later_wait_on_the_host_in_the_dtype_of_their_device(tmp_path):
    write_checkpoint(tmp_path, "llada")
    for path, dtype in ((tmp_path, torch.bfloat16), ("tiny", torch.float32)):
        denoiser, _ = load_denoiser(str(path), "cuda", on_host=True)
        for p in denoiser.parameters():
            assert p.device.type == "cpu"
            assert p.dtype == dtype


# ---- attention -----------------------------------------------------------------------------------


def test_the_first_position_sees_the_last_one_with_and_without_padding(tiny):
    denoiser, _ = tiny
    check_attention(denoiser)
    ids = torch.tensor([[5, 6, 7, 8]])

    def gradient(mask):  # of position 1's logits, by the position that they see
        embedded = denoiser.get_input_embeddings()(ids).detach().requires_grad_()
        denoiser(inputs_embeds=embedded, attention_mask=mask).logits[0, 1].sum().backward()
        return embedded.grad[0].abs().sum(-1)  # (4,)

    assert (gradient(mask=None) > 0).all()
    padded = gradient(mask=torch.tensor([[0, 1, 1, 1]]))
    assert padded[0] == 0
    assert (padded[1:] > 0).all()


class NoPaddingMask(LlamaForCausalLM):
    def forward(self, *args, attention_mask=None, **options):
        return super().forward(*args, **options)


class ColumnPositions(LlamaForCausalLM):
    """Adds an embedding of the column, whatever position ids it is given."""

    def forward(self, input_ids, **options):
        columns = torch.arange(input_ids.shape[1]).unsqueeze(-1)  # (S, 1)
        embedded = self.get_input_embeddings()(input_ids) + 0.1 * columns
        return super().forward(inputs_embeds=embedded, **options)


@pytest.mark.parametrize("model_class", [NoPaddingMask, ColumnPositions])
def test_a_model_that_left_padding_changes_is_refused(tiny, model_class):
    denoiser, _ = tiny
    with pytest.raises(ValueError, match="padding") as error:
        check_attention(model_class(denoiser.config).eval())
    assert "\n" not in str(error.value)


def test_such_a_model_is_refused_when_it_is_loaded(folder, monkeypatch):
    monkeypatch.setitem(loading.PLAIN, "llama", NoPaddingMask)
    with pytest.raises(ValueError, match="padding"):
        load_denoiser(str(folder))


# ---- damaged checkpoints -------------------------------------------------------------------------


def change_weights(file, change):
    """Replaces the weights in a file by change(weights), both {name: tensor}."""
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def drop_weight(folder):
    dropped = "model.layers.2.mlp.up_proj.weight"
    change_weights(
        folder / "model.safetensors",
        lambda weights: {name: w for name, w in weights.items() if name != dropped},
    )


def add_weight(folder):
    change_weights(
        folder / "model.safetensors",
        lambda weights: weights | {"model.stranger": torch.zeros(3)},
    )


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit_config(f, is_causal=True), "causal"),
        (lambda f: edit_config(f, vocab_size=50), "tokens up to 111, and the embedding.* 50 rows"),
        (lambda f: edit_config(f, vocab_size=120), "mismatched|size"),
        (lambda f: edit_config(f, hidden_size=[]), "config.json is not understood"),
        (lambda f: edit_config(f, rms_norm_eps="x"), "config.json is not understood"),
        (lambda f: edit_config(f, eos_token_id={}), "config.json is not understood"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json cannot be read"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "an adapter needs a folder"),
        (lambda f: edit_config(f, num_hidden_layers=10**7), "10000000 layers"),
        (drop_weight, "missing"),
        (add_weight, "unexpected"),
        (truncate, "cannot be loaded"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
        (lambda f: edit_config(f, model_type="gpt2"), "gpt2 is not known"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded.*model.safetensors"),
        (lambda f: (f / "tokenizer.json").write_text("[]"), "cannot be loaded"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        load_denoiser(str(folder))
    assert "\n" not in str(error.value)


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def remove_shard(folder):
    shards(folder)[1].unlink()


def truncate_shard(folder):
    shard = shards(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def empty_shard(folder):
    shards(folder)[0].write_bytes(b"")


def break_index(folder):
    (folder / "model.safetensors.index.json").write_text("{}")


def drop_embedding(folder):
    change_weights(
        shards(folder)[0],
        lambda weights: {name: w for name, w in weights.items() if "wte" not in name},
    )


def add_unexpected_weight(folder):
    name = "model.transformer.novelty"
    shard = shards(folder)[0]
    change_weights(shard, lambda weights: weights | {name: torch.ones(2)})
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"][name] = shard.name
    index_file.write_text(json.dumps(index))


SHARD_DAMAGES = [
    remove_shard,
    truncate_shard,
    empty_shard,
    break_index,
    drop_embedding,
    add_unexpected_weight,
]


@pytest.mark.parametrize("damage", SHARD_DAMAGES)
def test_damaged_shards_are_refused_in_one_line(tmp_path, damage):
    write_checkpoint(tmp_path, "llada")
    damage(tmp_path)
    with pytest.raises(ValueError, match=str(tmp_path.name)) as error:
        load_denoiser(str(tmp_path))
    assert "\n" not in str(error.value)


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path):
    write_checkpoint(tmp_path / "llada", "llada")
    file = tmp_path / "llada" / "model.safetensors.index.json"
    file.write_text(file.read_text().replace("model-00001", "../llada/model-00001"))
    with pytest.raises(ValueError, match="names '../llada/model-00001.*not a file beside it"):
        load_denoiser(str(tmp_path / "llada"))


def test_weights_in_a_pickle_are_not_read(tmp_path):
    write_checkpoint(tmp_path, "llada")
    weights = {}
    for shard in shards(tmp_path):
        weights |= load_file(shard)
        shard.unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        load_denoiser(str(tmp_path))


def test_no_code_of_a_checkpoint_is_run(tmp_path):
    write_checkpoint(tmp_path, "llada")  # its modeling_llada.py raises
    load_denoiser(str(tmp_path))


# ---- hub names and paths -------------------------------------------------------------------------

PATHS = [
    "no-such-model",
    "/no/such/folder",
    "/gone",
    "./here",
    "../here",
    "runs/a/base",
]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_is_no_folder_is_never_asked_of_the_hub(path, monkeypatch):
    def fail(*args, **options):
        pytest.fail("a stranger could own that name")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ValueError, match="tiny") as error:
        load_denoiser(path)
    assert "\n" not in str(error.value)


def test_a_subfolder_of_the_hub_says_how_to_get_it_and_is_not_asked_for(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked"))
    advice = "hf download someone/adapters --include 'gsm8k/last/.' --local-dir DIR"
    with pytest.raises(ValueError, match=advice):
        loading.model_folder("someone/adapters/gsm8k/last")
    with pytest.raises(ValueError, match="is no folder here and no hub name"):
        loading.model_folder("runs/a/checkpoint")


def test_a_hub_that_cannot_be_reached_names_the_way_out(monkeypatch):
    def fail(*args, **options):
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(
        ValueError, match=f"{loading.LLADA}.*as its folder, and tiny needs none"
    ) as error:
        load_denoiser(loading.LLADA)
    assert "\n" not in str(error.value)


def test_a_hub_name_is_downloaded_without_code_or_pickles_and_loaded(monkeypatch, tmp_path):
    write_checkpoint(tmp_path, "llada")
    downloads = []

    def download(name, allow_patterns):
        downloads.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    denoiser, _ = load_denoiser("someone/LLaDA")
    assert denoiser.source == "someone/LLaDA"
    name, patterns = downloads[0]
    assert name == "someone/LLaDA"
    assert not any(pattern.endswith(("bin", "pt", "*")) for pattern in patterns)


# ---- checkpoints in the hub's layout -------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_published_architecture_with_and_without_left_padding(
    tmp_path, family
):
    weights, config = write_checkpoint(tmp_path, family)
    denoiser, tokenizer = load_denoiser(str(tmp_path))
    assert denoiser.dtype == torch.float32
    assert not denoiser.training
    ids, mask = ids_and_mask()
    expected = reference_logits(family, weights, config, ids)
    policy = make_policy(denoiser, tokenizer)  # reads hidden states: they are shifted too
    logits = denoiser.get_output_embeddings()(policy.hidden(ids))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    if not policy.block_size and not policy.is_shifted:  # mask and shift are the policy's
        logits = denoiser(input_ids=ids).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)

    expected = reference_logits(family, weights, config, ids, mask)
    logits = denoiser.get_output_embeddings()(policy.hidden(ids, mask))
    # The first position behind the padding is left out: Dream predicts it from the padding.
    torch.testing.assert_close(logits[1, 5:], expected[1, 5:], rtol=0, atol=1e-5)


DOUBLES = [
    ("llada", "model.transformer.wte.weight", "model.embed_tokens.weight"),
    ("llada2_moe", "model.word_embeddings.weight", "model.embed_tokens.weight"),
    (
        "llada2_moe",
        "model.layers.0.attention.query_key_value.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ),
]


@pytest.mark.parametrize(("family", "name", "double"), DOUBLES)
def test_a_weight_that_is_there_under_two_names_is_refused(tmp_path, family, name, double):
    """One of the two won, without a word."""
    weights, _ = write_checkpoint(tmp_path, family)
    file = next(file for file in tmp_path.glob("*.safetensors") if name in load_file(file))
    save_file(load_file(file) | {double: weights[name].clone()}, file, metadata={"format": "pt"})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"][double] = file.name
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        load_denoiser(str(tmp_path))
    assert name in str(error.value) and double in str(error.value)
    assert "\n" not in str(error.value)


def test_layers_behind_the_last_one_are_refused_in_llada2_too(tmp_path):
    """transformers leaves out what GLM-4.5 has in its layer 46."""
    weights, _ = write_checkpoint(tmp_path, "llada2_moe")
    file = tmp_path / "model-00001-of-00002.safetensors"
    extra = {"model.layers.46.input_layernorm.weight": torch.ones(32)}
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="unexpected.*layers.46"):
        load_denoiser(str(tmp_path))


def test_fused_rows_of_a_wrong_number_are_named(tmp_path):
    write_checkpoint(tmp_path, "llada2_moe", num_key_value_heads=4)
    with pytest.raises(ValueError, match="query_key_value.weight has .* rows, and q, k and v"):
        load_denoiser(str(tmp_path))


@pytest.mark.parametrize("family", ["sdar", "llada2_moe"])
def test_a_base_behind_a_link_keeps_the_links_name(tmp_path, monkeypatch, family):
    """Its name says how long its blocks are; what a run noted as its base has to say it too."""
    write_checkpoint(tmp_path / "blob", family, block_size=None)
    name = "SDAR-4B-Chat" if family == "sdar" else "LLaDA2.0-mini"
    (tmp_path / name).symlink_to(tmp_path / "blob")
    denoiser, _ = load_denoiser(str(tmp_path / name))
    assert denoiser.source == str(denoiser.hub_folder) == str(tmp_path / name)
    load_denoiser(denoiser.source)
    (tmp_path / name).unlink()
    (tmp_path / "blob").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path / name)
    assert load_denoiser(".")[0].block_length == denoiser.block_length


# ---- tokenizers ----------------------------------------------------------------------------------

END_OF_TURN = {
    "llada": "<|eot_id|>",
    "llada2": "<|role_end|>",
    "dream": "<|im_end|>",
    "qwen": "<|endoftext|>",  # its end token ends a turn too, and this one pads
}


@pytest.mark.parametrize("family", FAMILIES)
def test_mask_end_and_padding_tokens_are_the_checkpoints_own(tmp_path, family):
    write_checkpoint(tmp_path, family)
    _, tokenizer = load_denoiser(str(tmp_path))
    style = style_of(family)
    assert tokenizer.mask_token == MASK_TOKEN[style]
    assert tokenizer.mask_token_id == 260
    assert tokenizer.eos_token == END_TOKEN[style]
    assert tokenizer.pad_token == "<|endoftext|>"
    end_tokens = tokenizer.convert_ids_to_tokens(end_token_ids(tokenizer))
    assert end_tokens == [END_TOKEN[style], END_OF_TURN[style]]
    ids = tokenizer("Grüße, 3 + 4?", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == "Grüße, 3 + 4?"


def test_a_tokenizer_without_a_template_ends_at_eos_alone():
    tokenizer = tiny_tokenizer()
    assert end_token_ids(tokenizer) == [tokenizer.eos_token_id]


def rename_mask(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("[MASK]", "[HOLE]"))


def test_a_mask_token_of_another_name_is_known_by_config_json(folder):
    rename_mask(folder)
    _, tokenizer = load_denoiser(str(folder))
    assert tokenizer.mask_token == "[HOLE]" and tokenizer.mask_token_id == 1


def test_a_tokenizer_without_a_mask_token_is_refused(folder):
    rename_mask(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["mask_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    edit_config(folder, mask_token_id=None)
    with pytest.raises(ValueError, match="config.json has to say which special token is the mask"):
        load_denoiser(str(folder))
    edit_config(folder, mask_token_id=50)  # a number, no special token
    with pytest.raises(ValueError, match="mask_token_id 50"):
        load_denoiser(str(folder))


@pytest.mark.parametrize(
    ("mask_id", "message"),
    [
        (5, "mask_token_id 5"),
        (9999, "mask_token_id 9999"),
        (-1, "mask_token_id -1"),
        (257, "endoftext"),
    ],
)
def test_a_wrong_mask_id_is_refused_and_the_right_one_named(tmp_path, mask_id, message):
    write_checkpoint(tmp_path, "llada", mask_token_id=mask_id)
    with pytest.raises(ValueError, match=f"{message}.*260") as error:
        load_denoiser(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_mask_id_against_the_tokenizers_own_is_refused(folder):
    edit_config(folder, mask_token_id=2)
    with pytest.raises(ValueError, match="mask_token_id 2"):
        load_denoiser(str(folder))
