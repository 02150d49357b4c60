"""Which language models work with soft prompts, and which are refused before a run begins."""

import json
import shutil

import pytest
import torch
import transformers as hf
from conftest import CharTokenizer, train_flags
from safetensors.torch import load_file, save_file
from test_captioner import CAPTIONS, EXACT, loss_and_gradient

import captioner as module
import train
from captioner import VideoCaptioner, check_lm, check_room
from checkpoint import fixed_state
from dataset import STYLES
from encoder import VideoEncoder
from research import embeddings, words
from runtime import devices, hub
from runtime.errors import UserError
from runtime.feature_cache import Manifest, Settings

TINY = {"vocab_size": 130, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = TINY | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
LLAMA |= {"initializer_range": 0.3, "pad_token_id": 0}
GPT2 = TINY | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
GPT2 |= {"initializer_range": 0.3}
OPT = TINY | {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT |= {"max_position_embeddings": 256, "word_embed_proj_dim": 16, "init_std": 0.3}
BERT = {k: v for k, v in LLAMA.items() if k in hf.BertConfig().to_dict()}

GOOD = {
    "Qwen2": (hf.Qwen2Config, LLAMA),
    "Qwen3": (hf.Qwen3Config, LLAMA | {"head_dim": 8}),
    "Llama": (hf.LlamaConfig, LLAMA),
    "Llama, tied": (hf.LlamaConfig, LLAMA | {"tie_word_embeddings": True}),
    "SmolLM3": (hf.SmolLM3Config, LLAMA),
    "Mistral, window shorter than the prefix": (hf.MistralConfig, LLAMA | {"sliding_window": 4}),
    "GPT-2": (hf.GPT2Config, GPT2),
    "OPT, projected": (hf.OPTConfig, OPT),
    "Phi-3": (hf.Phi3Config, LLAMA),
    "Gemma": (hf.GemmaConfig, LLAMA | {"head_dim": 8}),
    "Gemma 3": (hf.Gemma3TextConfig, LLAMA | {"head_dim": 8, "sliding_window": 4}),
    "OLMo2": (hf.Olmo2Config, LLAMA),
}
HYBRID = {"layer_types": ["conv", "full_attention"]}
REFUSED = {
    "Gemma2, capped logits": (hf.Gemma2Config, LLAMA | {"head_dim": 8}, "modifies the logits"),
    "Cohere, scaled logits": (hf.CohereConfig, LLAMA, "modifies the logits"),
    "Granite, scaled logits": (
        hf.GraniteConfig,
        LLAMA | {"logits_scaling": 8.0},
        "modifies the logits",
    ),
    "LFM2, convolutions": (hf.Lfm2Config, LLAMA | HYBRID, "cached prefix"),
    "Mamba, no key/value cache": (hf.MambaConfig, TINY | {"hidden_size": 32}, "Mamba"),
    "BERT, sees later tokens": (hf.BertConfig, BERT, "Bert"),
}


def make(config, flags, tokenizer, bos=None):
    """Return a captioner with a tiny random language model in float64."""
    lm = hf.AutoModelForCausalLM.from_config(config(**flags)).double().eval()
    width = module.embedding_table(lm).shape[1]
    sizes = {"num_queries": 6, "video_width": 24, "grid": (4, 3, 5), "num_blocks": 1}
    qformer = module.QFormer(width=width, num_heads=4, **sizes).double()
    return VideoCaptioner(qformer, lm, tokenizer, bos)


def full_pass(model, soft, ids):
    """Return the language model's logits for [bos] + soft prompts + ids in one pass.

    If it is an encoder-decoder, they are the decoder's for its start token and ids.
    """
    if model.lm.config.is_encoder_decoder:
        ids = torch.tensor([[model.lm.config.decoder_start_token_id, *ids]])
        return model.lm(inputs_embeds=soft, decoder_input_ids=ids, use_cache=False).logits[0]
    embed = model.lm.get_input_embeddings()
    bos = [] if model.bos is None else [embed(torch.tensor([[model.bos]]))]
    rows = torch.cat([*bos, soft, embed(torch.tensor([ids]))], 1)
    return model.lm(inputs_embeds=rows, use_cache=False).logits[0]


def check_against_plain_passes(model, make_batch, make_clips):
    """Check that loss, gradient and greedy captions with a shared prefix equal those of full passes."""
    clips = make_clips(len(CAPTIONS))
    total, grads = loss_and_gradient(model, make_batch(CAPTIONS, clips))
    model.zero_grad()
    x, scale, offset = clips
    encode, eos, plain = model.tokenizer, model.tokenizer.eos_token_id, 0
    soft = model.qformer(x, scale.double(), offset.double())
    for i, texts in enumerate(CAPTIONS):
        for style, text in texts:
            target = [*encode(" " + text)["input_ids"], eos]
            ids = encode(STYLES[style])["input_ids"] + target
            log_probs = full_pass(model, soft[i : i + 1], ids)[:-1].log_softmax(-1)
            rows = log_probs[-len(target) :]
            plain = plain - rows[torch.arange(len(target)), torch.tensor(target)].sum()
    plain.backward()
    torch.testing.assert_close(total, plain.detach(), **EXACT)
    for grad, p in zip(grads, model.qformer.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-5, atol=1e-5)

    cache = model.prefix(x, scale.double(), offset.double())
    captions = model.generate(cache, "label", max_new_tokens=5)
    for i, caption in enumerate(captions):
        ids, written = encode(STYLES["label"])["input_ids"], []
        while len(written) < 5 and eos not in written:
            with torch.no_grad():
                logits = full_pass(model, soft[i : i + 1], ids + written)
            written.append(logits[-1].argmax().item())
        text = model.tokenizer.batch_decode([[t for t in written if t != eos]])[0]
        assert caption == " ".join(text.split())


@pytest.mark.parametrize("name", GOOD)
def test_supported_models_equal_plain_passes(name, tokenizer, make_batch, make_clips):
    model = make(*GOOD[name], tokenizer)
    check_lm(model, name)
    check_against_plain_passes(model, make_batch, make_clips)
    beams = model.generate(model.prefix(*(t.double() for t in make_clips(2))), "label", 5, 2)
    assert len(beams) == 2


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_unsupported_models_are_refused(name, tokenizer):
    """Training silently used wrong logits, or ended in a traceback and left a run folder."""
    config, flags, why = REFUSED[name]
    with pytest.raises(UserError, match=f"--lm tiny.*{why}|has no key/value cache"):
        check_lm(make(config, flags, tokenizer), "tiny")


def test_a_model_that_is_wrong_only_after_a_prefix_is_refused(tokenizer):
    """Such a model raises no error, and its output without a prefix is right."""
    model = make(*GOOD["Qwen2"], tokenizer)

    def off_by_one(module, args, kwargs, out):
        if kwargs.get(model.cache_name) is not None and kwargs.get("input_ids") is not None:
            out.last_hidden_state = out.last_hidden_state.roll(1, 1)

    model.lm.base_model.register_forward_hook(off_by_one, with_kwargs=True)
    with pytest.raises(UserError, match=r"cached prefix .*\(\d\.\d+\)"):
        check_lm(model, "tiny")


def test_weights_that_overflow_are_named(tokenizer):
    model = make(*GOOD["Qwen2"], tokenizer)
    model.lm.base_model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="the logits are not finite"):
        check_lm(model, "tiny")


def test_an_ignored_cache_is_an_error(tokenizer, make_batch, monkeypatch):
    """transformers renamed the argument. From 5.40 on, models accept the old name in **kwargs and
    ignore it: every clip gets the same caption, and training ends in an autograd error."""
    model = make(*GOOD["Qwen2"], tokenizer)
    model.cache_name = "forgotten"
    with pytest.raises(UserError, match="does not fill the key/value cache"):
        loss_and_gradient(model, make_batch(CAPTIONS))
    monkeypatch.setattr(module, "cache_name", lambda lm: "forgotten")
    with pytest.raises(UserError, match="does not fill the key/value cache"):
        check_lm(make(*GOOD["Qwen2"], tokenizer), "tiny")


def test_both_names_of_the_cache_are_known():
    class Old:
        def forward(self, input_ids=None, past_key_values=None, **kwargs): ...

    class New:
        def forward(self, input_ids=None, cache=None, **kwargs): ...

    lm = torch.nn.Module()
    for base, name in ((Old, "past_key_values"), (New, "cache")):
        lm.base_model = base()
        assert module.cache_name(lm) == name


# ---- tokenizers and embeddings -------------------------------------------------------------------


class WithBos(CharTokenizer):
    bos_token_id = 2

    def __call__(self, text, add_special_tokens=True, return_tensors=None):
        out = super().__call__(text, return_tensors=return_tensors)
        return {"input_ids": [2, *out["input_ids"]]} if add_special_tokens else out


def test_bos_precedes_the_soft_prompts(make_batch, make_clips, tokenizer):
    """Llama's tokenizers put a bos before each text. Without it, the first soft prompt would be at the
    position where such a model expects the bos."""
    assert module.first_token(tokenizer) is None
    assert module.first_token(WithBos()) == 2
    model = make(*GOOD["Llama"], tokenizer, bos=2)
    check_lm(model, "tiny")
    check_against_plain_passes(model, make_batch, make_clips)
    assert model.prefix(*(t.double() for t in make_clips(2))).get_seq_length() == 7
    manifest = Manifest(Settings(), {})
    assert fixed_state(model, manifest, "tiny", "abc", [], [])["lm"]["bos"] == 2
    assert (
        "bos"
        not in fixed_state(make(*GOOD["Llama"], tokenizer), manifest, "tiny", "abc", [], [])["lm"]
    )
    stored = dict(zip(("features", "scale", "offset"), make_clips(2), strict=True))
    assert embeddings.embed(model.float(), **stored)["hidden"].shape == (2, 32)
    table = words.Corpus(model, ["abc"]).table(model.soft_prompts(*make_clips(1)), 3)
    assert len(table) == 6


def test_norms_are_those_of_the_embedding_layers_output(tokenizer):
    """Gemma 3's layer multiplies its weight by sqrt(D). Soft prompts started with a sixth of that norm."""
    lm = make(*GOOD["Gemma 3"], tokenizer).lm
    weight = lm.get_input_embeddings().weight
    torch.testing.assert_close(module.embedding_table(lm).detach(), weight.detach() * 32**0.5)


def test_captions_must_fit_the_positions(tokenizer):
    """GPT-2 has 1,024 learned positions. A longer caption ended the run in a traceback at its step."""
    model = make(hf.GPT2Config, GPT2 | {"n_positions": 100}, tokenizer)
    room = 100 - 6 - len(STYLES["sentence"])  # one token per character
    check_room(model, "tiny", ["a" * (room - 2)])  # plus a leading space and eos
    with pytest.raises(UserError, match=f"leave {room} for a caption, but 'a+' needs {room + 1}"):
        check_room(model, "tiny", ["short", "a" * (room - 1)])
    with pytest.raises(UserError, match="generation may need 50"):
        check_room(make(hf.GPT2Config, GPT2 | {"n_positions": 50}, tokenizer), "tiny", [])


def test_max_new_tokens_must_fit_the_positions(tokenizer, make_clips):
    model = make(hf.GPT2Config, GPT2 | {"n_positions": 60}, tokenizer)
    room = 60 - 6 - len(STYLES["label"])
    clips = [t.double() for t in make_clips(1)]
    with pytest.raises(UserError, match=f"--max-new-tokens {room + 1} is .* room for {room} "):
        model.generate(model.prefix(*clips), "label", room + 1)
    model.generate(model.prefix(*clips), "label", room)


# ---- folders -------------------------------------------------------------------------------------


def save(folder, world, config, **flags):
    """Save a tiny model with the toy world's tokenizer and return its folder."""
    tokenizer = {p.name: p for p in (world / "lm").iterdir() if "token" in p.name}
    folder.mkdir()
    for path in tokenizer.values():
        shutil.copy(path, folder)
    rows = (
        max(json.loads((world / "lm" / "tokenizer.json").read_text())["model"]["vocab"].values())
        + 2
    )
    ids = {"vocab_size": rows, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    hf.AutoModelForCausalLM.from_config(config(**flags | ids)).save_pretrained(folder)
    return folder


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", {"format": "pt"})


def rename_a_layer(weights):
    return {k.replace("layers.1.mlp", "layers.1.ffn"): v for k, v in weights.items()}


def compiled(weights):
    return {f"_orig_mod.{k}": v for k, v in weights.items()}


def cut(weights):
    return {k: v[:5].clone() if k.endswith("norm.weight") else v for k, v in weights.items()}


def quantise(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))


def remove_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()


def unset_positions(folder):
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": None}
    (folder / "config.json").write_text(json.dumps(config))


def another_eos(folder):
    """Set an eos that is not in the vocabulary. AutoTokenizer adds it after the last id."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|elsewhere|>"}))


FOLDERS = {
    "one id too many": (hf.Qwen2Config, another_eos, "token ids up to .* from different models"),
    "a config without a number": (hf.Qwen2Config, unset_positions, "max_position_embeddings"),
    "Gemma2": (hf.Gemma2Config, lambda f: None, "modifies the logits"),
    "no room": (hf.GPT2Config, lambda f: None, r"context of 40 tokens: .* for a caption"),
    "quantised": (hf.Qwen2Config, quantise, "is quantised"),
    "damaged": (
        hf.Qwen2Config,
        lambda f: (f / "config.json").write_text("{"),
        "cannot be read|JSON",
    ),
    "no tokenizer": (hf.Qwen2Config, remove_tokenizer, "tokenizer|cannot be loaded"),
    "a renamed layer": (
        hf.Qwen2Config,
        lambda f: change_weights(f, rename_a_layer),
        r"are missing \(3, .*layers\.1\.mlp.*unexpected.*layers\.1\.ffn",
    ),
    "torch.compile": (
        hf.Qwen2Config,
        lambda f: change_weights(f, compiled),
        r"are missing .*_orig_mod",
    ),
    "another shape": (hf.Qwen2Config, lambda f: change_weights(f, cut), "have the wrong shape"),
}


def test_special_tokens_without_an_embedding_are_accepted(world, tmp_path):
    """gemma-3-1b's tokenizer has an image token after the last row of its embeddings."""
    folder = save(tmp_path / "lm", world, hf.Qwen2Config, **LLAMA)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<{n}>" for n in range(9)]})
    assert len(tokenizer) > rows
    tokenizer.save_pretrained(folder)
    lm, _, _ = module.load_lm(str(folder), torch.device("cpu"), torch.float32)
    assert lm.get_input_embeddings().num_embeddings == rows


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_cannot_be_used(name, world, prepared, tmp_path):
    """Each gets one message before the run folder is created. Weights with other keys stayed random,
    with only a log line: the same infer command gave three different captions in three runs."""
    config, damage, why = FOLDERS[name]
    flags = GPT2 | {"n_positions": 40} if config is hf.GPT2Config else LLAMA | {"head_dim": 8}
    folder = save(tmp_path / "lm", world, config, **flags)
    damage(folder)
    with pytest.raises(UserError, match=f"{folder}.*({why})"):
        train.main(train_flags(world, prepared, tmp_path / "run", "--lm", folder))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("file", "change", "why"),
    [
        ("tokenizer_config.json", {"model_max_length": "long"}, "cannot encode 'moving'"),
        ("model.safetensors.index.json", {"weight_map": {"a": "x" * 300}}, "has no usable"),
        ("model.safetensors.index.json", {"weight_map": {"a": None}}, "has no usable"),
        ("config.json", [1], "must contain a JSON object"),
    ],
)
def test_a_model_folder_with_other_values_is_refused(file, change, why, world, tmp_path):
    """Each ended in a traceback."""
    path = shutil.copytree(world / "lm", tmp_path / "lm") / file
    if isinstance(change, dict) and path.exists():
        change = json.loads(path.read_text()) | change
    path.write_text(json.dumps(change))
    with pytest.raises(UserError, match=why):
        module.load_lm(str(path.parent), torch.device("cpu"), torch.float32)


def test_an_encoder_with_other_keys_is_refused(world, tmp_path):
    folder = shutil.copytree(world / "encoder", tmp_path / "encoder")
    change_weights(
        folder, lambda w: {k.replace("layer.0.norm1", "layer.0.norm_1"): v for k, v in w.items()}
    )
    with pytest.raises(UserError, match=r"--encoder .*VJEPA2Model are missing .*layer\.0\.norm1"):
        device = devices.resolve("cpu", "auto")
        VideoEncoder.from_pretrained(str(folder), *device, 16, "bin_centres", "squash", 1, "int8")


@pytest.mark.parametrize("error", [ImportError, AttributeError, ZeroDivisionError, Exception])
def test_errors_while_loading_become_one_message(error, tmp_path):
    """A damaged tokenizer.json ended in a traceback, since tokenizers raises Exception itself."""

    class Auto:
        @staticmethod
        def from_pretrained(*_, **__):
            raise error("no module named somewhere\nand more")

    with pytest.raises(UserError, match=r"--lm .* cannot be loaded: .*no module named"):
        hub.load(Auto, tmp_path, "--lm")


def test_code_in_a_models_folder_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoTokenizer": "code.T"}
    (tmp_path / "model").mkdir()
    config = {"model_type": "unknown", "architectures": ["M"], "auto_map": names}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "code.py").write_text("open('ran', 'w')")
    save_file({"weight": torch.zeros(1)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UserError, match=r"--lm .*model cannot be loaded"):
        module.load_lm(str(tmp_path / "model"), torch.device("cpu"), torch.float32)
    assert not (tmp_path / "ran").exists()
