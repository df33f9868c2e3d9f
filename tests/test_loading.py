"""Loading checkpoints: equal logits, the right tokens, and what is refused."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from checkpoints import (
    END_TOKEN,
    FAMILIES,
    LAYERS,
    MASK_TOKEN,
    edit_config,
    ids_and_mask,
    reference_logits,
    style_of,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file
from toy import random_tiny
from transformers import LlamaForCausalLM, PreTrainedModel

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


def test_attention_is_not_cudnns():
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


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
        (lambda f: edit_config(f, vocab_size=50), "tokens up to 111, but .* embedding has 50 rows"),
        (lambda f: edit_config(f, vocab_size=120), r"embed_tokens.weight is \(120, .* and \(112,"),
        (lambda f: edit_config(f, hidden_size=[]), "config.json is not understood"),
        (lambda f: edit_config(f, rms_norm_eps="x"), "config.json is not understood"),
        (lambda f: edit_config(f, eos_token_id={}), "config.json is not understood"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json cannot be read"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "an adapter needs its own folder"),
        (lambda f: edit_config(f, num_hidden_layers=10**7), "10000000 layers"),
        (
            drop_weight,
            r"layers.2.mlp.up_proj.weight is \(.*\) in the model and missing in the files",
        ),
        (add_weight, r"model.stranger is unknown in the model and \(3,\) in the files"),
        (truncate, "model.safetensors is missing, broken or incomplete: download it again"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
        (lambda f: edit_config(f, model_type="gpt2"), "gpt2 is not supported"),
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
    (remove_shard, "index.json names 'model-00002.*which is not a file beside it"),
    (truncate_shard, "model-00002.* is missing, broken or incomplete"),
    (empty_shard, "model-00001.* is missing, broken or incomplete"),
    (break_index, "index.json cannot be read"),
    (drop_embedding, r"model.transformer.wte.weight is \(320, 32\) in the model and missing"),
    (add_unexpected_weight, r"model.transformer.novelty is unknown in the model and \(2,\)"),
]


@pytest.mark.parametrize(("damage", "message"), SHARD_DAMAGES)
def test_damaged_shards_are_refused_in_one_line(tmp_path, damage, message):
    write_checkpoint(tmp_path, "llada")
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_denoiser(str(tmp_path))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["../llada/model-00001-of-00002.safetensors", "", ".", "..", 3])
def test_an_index_that_names_no_file_beside_it_is_refused(tmp_path, name):
    write_checkpoint(tmp_path / "llada", "llada")
    file = tmp_path / "llada" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    first_weight = next(iter(index["weight_map"]))
    index["weight_map"][first_weight] = name
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="which is not a file beside it") as error:
        load_denoiser(str(tmp_path / "llada"))
    assert f"{file} names {name!r}" in str(error.value)


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
    "runs/a",
    "bases/tinny",  # bases is a folder here
]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_is_no_folder_is_never_asked_of_the_hub(path, monkeypatch):
    def fail(*args, **options):
        pytest.fail("a stranger could own that name")

    monkeypatch.chdir(Path(__file__).parent.parent)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ValueError, match="tiny") as error:
        load_denoiser(path)
    assert "\n" not in str(error.value)


def test_a_subfolder_of_the_hub_says_how_to_get_it_and_is_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked"))
    advice = "hf download someone/adapters --include 'gsm8k/last/.' --local-dir DIR"
    with pytest.raises(ValueError, match=advice):
        loading.model_folder("someone/adapters/gsm8k/last")
    with pytest.raises(ValueError, match="is not a folder here and not a hub name"):
        loading.model_folder("runs/a/checkpoint")
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="though runs is one, so the hub is not asked"):
        loading.model_folder("runs/a/checkpoint")


def test_a_hub_that_cannot_be_reached_names_the_way_out(monkeypatch):
    def fail(*args, **options):
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(
        ValueError, match=f"{loading.LLADA}.*as its folder; tiny needs none"
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


def change_weight(folder, name, change):
    """Replaces a weight in the files by change(weight), and removes it if that is None."""
    file = next(file for file in folder.glob("*.safetensors") if name in load_file(file))
    weights = load_file(file)
    changed = change(weights.pop(name))
    if changed is not None:
        weights[name] = changed
    save_file(weights, file, metadata={"format": "pt"})


def add_to_first_shard(folder, added):
    change_weights(shards(folder)[0], lambda weights: weights | added)


def remove(weight):
    return None


def narrow(weight):
    return weight[..., :-2].contiguous()


def shorten(weight):
    return weight[:-2].contiguous()


Q = "model.transformer.blocks.0.q_proj.weight"
HEAD = "model.transformer.ff_out.weight"
QKV = "model.layers.0.attention.query_key_value.weight"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
EXPERT_OUTPUT = "model.layers.1.mlp.experts.2.down_proj.weight"
MISFITS = [
    ("sdar_moe", EXPERT, remove, "is (48, 32) in the model and missing in the files"),
    ("llada-moe", EXPERT_OUTPUT, remove, "is (32, 48) in the model and missing in the files"),
    ("llada2_moe", EXPERT, remove, "is (48, 32) in the model and missing in the files"),
    ("sdar_moe", EXPERT, narrow, "is (48, 32) in the model and (48, 30) in the files"),
    ("llada2_moe", EXPERT_OUTPUT, shorten, "is (32, 48) in the model and (30, 48) in the files"),
    ("llada", Q, remove, "is (32, 32) in the model and missing in the files: config.json and"),
    ("llada", Q, narrow, "is (32, 32) in the model and (32, 30) in the files: config.json and"),
    ("llada", Q, lambda w: w[None].contiguous(), "is (32, 32) in the model and (1, 32, 32) in"),
    ("llada", "model.transformer.wte.weight", shorten, "is (320, 32) in the model and (318, 32)"),
    ("dream", "model.layers.1.self_attn.q_proj.bias", shorten, "is (32,) in the model and (30,)"),
    ("llada2_moe", QKV, remove, "is (32, 32) in the model and missing in the files, and 2 more"),
    ("llada2_moe", QKV, narrow, "is (32, 32) in the model and (32, 30) in the files, and 2 more"),
    ("llada2_moe", QKV, shorten, "v_proj.weight in " + QKV + " is (32, 32) in the model and (30,"),
    ("llada2_moe", QKV, lambda w: torch.tensor(1.0), "is unknown in the model and () in the files"),
    ("llada", HEAD, remove, "the embedding, config.json has to say so (tie_word_embeddings; in a"),
    ("llada", Q, torch.Tensor.long, "is stored as I64, but only floating-point numbers"),
    ("sdar_moe", EXPERT, lambda w: w > 0, "is stored as BOOL, but only floating-point"),
    ("llada", Q, lambda w: w.to(torch.float8_e4m3fn), "is stored as F8_E4M3, but only"),
]


@pytest.mark.parametrize(("family", "name", "change", "message"), MISFITS)
def test_a_weight_that_does_not_fit_is_named_before_any_is_loaded(
    tmp_path, monkeypatch, family, name, change, message
):
    write_checkpoint(tmp_path, family)
    change_weight(tmp_path, name, change)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_denoiser(str(tmp_path))
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_layers_behind_the_last_one_are_refused_in_llada2_too(tmp_path):
    """transformers leaves out what GLM-4.5 has in its layer 46."""
    write_checkpoint(tmp_path, "llada2_moe")
    add_to_first_shard(tmp_path, {"model.layers.46.input_layernorm.weight": torch.ones(32)})
    with pytest.raises(
        ValueError, match="layers.46.input_layernorm.weight is unknown in the model"
    ):
        load_denoiser(str(tmp_path))


def test_a_weight_in_two_files_is_refused(tmp_path):
    """The last one won, without a word."""
    weights, _ = write_checkpoint(tmp_path, "llada")
    for shard in shards(tmp_path):
        change_weights(shard, lambda saved: saved | {Q: weights[Q] + 1})
    with pytest.raises(ValueError, match=f"00002-of-00002.safetensors: {Q} is in another file"):
        load_denoiser(str(tmp_path))


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path):
    weights, _ = write_checkpoint(tmp_path, "llada-tied")
    add_to_first_shard(tmp_path, {HEAD: weights["model.transformer.wte.weight"] + 1})
    with pytest.raises(ValueError, match=r"two differ: config.json has to .*\(tie_word_embeddings"):
        load_denoiser(str(tmp_path))


def with_infinity(weight):
    weight[-1, -1] = torch.inf
    return weight


def with_nan(weight):
    weight[-1, -1] = torch.nan
    return weight


NON_FINITE = [
    ("llada", Q, with_nan),
    ("llada", Q, with_infinity),
    ("llada", "model.transformer.wte.weight", with_nan),  # of a token that nothing has used yet
    ("sdar_moe", EXPERT, with_nan),
    ("llada2_moe", QKV, with_infinity),
]


@pytest.mark.parametrize(("family", "name", "change"), NON_FINITE)
def test_a_weight_that_is_not_finite_is_named(tmp_path, family, name, change):
    """It was said of some that left padding changes the model's logits, and nothing of others."""
    write_checkpoint(tmp_path, family)
    change_weight(tmp_path, name, change)
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinity: its file is broken"):
        load_denoiser(str(tmp_path))


def test_a_model_whose_logits_are_not_finite_is_refused(tiny):
    """4 bits hide which weight it is."""
    denoiser = copy.deepcopy(tiny[0])
    denoiser.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="the logits of this model are NaN or infinite"):
        check_attention(denoiser)


def merge_experts(folder):
    """Each mixture's experts as one tensor, as transformers' own classes have them."""
    weights = {}
    for shard in shards(folder):
        weights |= load_file(shard)
        shard.unlink()
    for layer in range(LAYERS):
        experts = f"model.layers.{layer}.mlp.experts"
        count = sum(name.startswith(f"{experts}.") for name in weights) // 3
        gate_up = []
        down = []
        for i in range(count):
            gate = weights.pop(f"{experts}.{i}.gate_proj.weight")
            up = weights.pop(f"{experts}.{i}.up_proj.weight")
            gate_up.append(torch.cat([gate, up]))
            down.append(weights.pop(f"{experts}.{i}.down_proj.weight"))
        if count:  # LLaDA2's first layer is dense
            weights[f"{experts}.gate_up_proj"] = torch.stack(gate_up)
            weights[f"{experts}.down_proj"] = torch.stack(down)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def add_tied_head(folder):
    embedding = load_file(shards(folder)[0])["model.embed_tokens.weight"]
    add_to_first_shard(folder, {"lm_head.weight": embedding.clone()})


def keep_tied_head_alone(folder):  # as safetensors.torch.save_model leaves it
    add_tied_head(folder)
    change_weight(folder, "model.embed_tokens.weight", remove)


def add_rotary_frequencies(folder):
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    add_to_first_shard(folder, frequencies)


HARMLESS = [
    ("sdar_moe", merge_experts),
    ("llada2_moe", merge_experts),
    ("a2d-qwen3", add_tied_head),
    ("a2d-qwen3", keep_tied_head_alone),
    ("dream", add_rotary_frequencies),
    ("llada", lambda folder: change_weight(folder, Q, torch.Tensor.double)),
    ("llada", lambda f: save_file({"x": torch.ones(1)}, f / "consolidated.safetensors")),
]


@pytest.mark.parametrize(("family", "change"), HARMLESS)
def test_what_changes_nothing_is_no_reason_to_refuse(tmp_path, family, change):
    write_checkpoint(tmp_path, family)
    ids, _ = ids_and_mask()
    expected = load_denoiser(str(tmp_path))[0](input_ids=ids).logits
    change(tmp_path)
    logits = load_denoiser(str(tmp_path))[0](input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llada", "a2d-qwen3"])  # the second norms q and k as well
def test_a_fused_norm_is_transformers_own(tmp_path, family, dtype):
    """In float32 to the last bit, in bfloat16 up to rounding; under autocast too, as in a run."""
    write_checkpoint(tmp_path, family)
    denoiser, _ = load_denoiser(tmp_path, dtype=dtype)
    norms = [m for m in denoiser.modules() if type(m).__name__.endswith("RMSNorm")]
    assert len(norms) > 2 * denoiser.config.num_hidden_layers
    for norm in norms:
        assert norm.forward.__func__ is loading._rms_norm
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        x = torch.randn(3, 5, len(norm.weight), dtype=dtype, requires_grad=True)
        results = []
        for forward in (norm.forward, type(norm).forward.__get__(norm)):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = forward(x)
            assert y.dtype == dtype
            results.append((y, *torch.autograd.grad(y.float().square().sum(), x)))
        for fused, own in zip(*results, strict=True):
            tolerance = 0 if dtype == torch.float32 else 2**-5 * own.abs().max().item()
            torch.testing.assert_close(fused, own, rtol=0, atol=tolerance)
