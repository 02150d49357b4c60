"""Encoder-decoder language models: T5, Flan-T5 (whose head is neither tied nor scaled) and BART."""

import itertools
import json
import re

import pytest
import torch
import transformers as hf
from conftest import CharTokenizer, train_flags
from safetensors.torch import load_file
from test_captioner import CAPTIONS, double, loss_and_gradient, sampled
from test_language_models import check_against_plain_passes, full_pass

import captioner as module
import infer
import train
from captioner import VideoCaptioner, check_lm, check_room
from dataset import STYLES
from research import embeddings, words
from runtime.errors import UserError

START = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
T5 = START | {"vocab_size": 130, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}
T5 |= {"num_layers": 3, "num_decoder_layers": 2}  # transformers cannot cache a deeper decoder
FLAN = T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
BART = START | {"vocab_size": 130, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2}
BART |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "init_std": 0.3, "max_position_embeddings": 100}
BART |= {"bos_token_id": 2, "forced_eos_token_id": None, "scale_embedding": True}
MODELS = {"T5": (hf.T5Config, T5), "Flan-T5": (hf.T5Config, FLAN), "BART": (hf.BartConfig, BART)}


class Tokenizer(CharTokenizer):
    """As in T5, token 0 is padding and the decoder's start token, and token 1 is the end of text."""

    eos_token_id = 1

    def batch_decode(self, rows, skip_special_tokens=True):
        return super().batch_decode([[t for t in row if t > 1] for row in rows])


@pytest.fixture
def tokenizer():
    return Tokenizer()


def make_lm(name, **flags):
    config, sizes = MODELS[name]
    lm = hf.AutoModelForSeq2SeqLM.from_config(config(**sizes | flags))
    if name == "Flan-T5":  # transformers ties a new model's head, but loads checkpoints as they are
        lm.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn_like(lm.lm_head.weight))
    return lm.eval()


@pytest.fixture(params=MODELS)
def model(request, tokenizer, make_qformer):
    return VideoCaptioner(make_qformer(), make_lm(request.param), tokenizer).double()


@pytest.fixture
def clips(make_clips):
    return double(dict(zip(("features", "scale", "offset"), make_clips(4), strict=True)))


def test_equal_to_plain_passes(model, make_batch, make_clips):
    """Loss, gradient and greedy captions equal those of one forward of transformers for each caption.
    T5's dropout must be inactive, and T5's head, unlike Flan-T5's, divides by the root of the width."""
    check_lm(model, "tiny")
    check_against_plain_passes(model, make_batch, make_clips)
    assert all(p.grad is None for p in model.lm.parameters())


def test_the_encoder_runs_once_per_clip(model, make_batch):
    """The captions of a clip share the encoder's output and the keys and values computed from it."""
    rows = {"encoder": [], "keys": []}
    attention = "EncDecAttention.k", "encoder_attn.k_proj"
    parts = [m for n, m in model.lm.named_modules() if n.endswith(attention)]
    for name, part in (("encoder", model.lm.get_encoder()), ("keys", parts[0])):
        part.register_forward_hook(lambda m, x, out, name=name: rows[name].append(out))
    loss_and_gradient(model, make_batch(CAPTIONS))  # six captions
    assert [len(out[0]) for out in rows["encoder"]] == [3]
    assert [out.shape[:2] for out in rows["keys"]] == [(3, 6)]


def test_beams_equal_those_of_transformers(model, clips):
    """The reference is generate() from the soft prompts, the start token and the style prompt."""
    found = model.captions(clips, "label", 10, 3)
    soft = model.soft_prompts(**clips).detach()
    ids = torch.tensor([[0, *model.tokenizer(STYLES["label"])["input_ids"]]] * 4)
    limits = {"num_beams": 3, "max_new_tokens": 10, **START}
    out = model.lm.generate(inputs_embeds=soft, decoder_input_ids=ids, **limits)
    assert found == model.decoded(out[:, ids.shape[1] :].tolist())
    one = {k: v[2:3] for k, v in clips.items()}
    assert model.captions(one, "label", 10, 3) == found[2:3]
    assert len(set(found)) > 1, "the video must matter"


def test_samples_and_their_scores(model, clips, monkeypatch):
    """Samples do not depend on the batch. A score is the mean log-probability of a caption's tokens."""
    head, bias = model.kind.logits, torch.zeros(130, dtype=torch.float64)
    bias[1] = 3  # so that captions end
    monkeypatch.setattr(model, "logits", lambda hidden: head(hidden) + bias)
    monkeypatch.setattr(model, "decoded", lambda rows: rows)
    rows, scores = sampled(model, clips, "abcd", 3)
    again, _ = sampled(model, {k: v[1:3] for k, v in clips.items()}, "bc", 3)
    soft, prompt = model.soft_prompts(**clips), model.prompt("label")[0].tolist()

    def ended(row):
        return row[: row.index(1) + 1] if 1 in row else row

    for clip, n in itertools.product(range(4), range(3)):
        ids = ended(rows[clip][n])
        assert clip not in (1, 2) or ended(again[clip - 1][n]) == ids
        log_p = (full_pass(model, soft[clip : clip + 1], prompt + ids) + bias).log_softmax(-1)
        log_p = log_p[-len(ids) - 1 : -1].gather(1, torch.tensor(ids)[:, None])
        assert scores[clip, n].item() == pytest.approx(log_p.mean().item(), abs=1e-5)
    assert len({len(ended(row)) for row in itertools.chain(*rows)}) > 2


def test_log_likelihoods_are_mean_losses(model, clips):
    texts = ["a cup", "moving a rather long thing", "x"]
    with torch.no_grad():
        cache = model.prefix(**clips)
        found = model.log_likelihoods(cache, "label", texts)
        soft = model.soft_prompts(**clips)
        for clip, n in itertools.product(range(2), range(3)):
            prompt, target = (
                model.tokenizer(t)["input_ids"] for t in (STYLES["label"], " " + texts[n])
            )
            target.append(1)
            log_p = full_pass(model, soft[clip : clip + 1], prompt + target).log_softmax(-1)
            log_p = log_p[-len(target) - 1 : -1].gather(1, torch.tensor(target)[:, None])
            assert found[clip, n].item() == pytest.approx(log_p.mean().item(), abs=1e-5)
    assert model.generate(cache, "label", 9) == model.captions(clips, "label", 9)


def test_bfloat16_on_a_cpu(make_qformer, tokenizer, make_batch):
    model = VideoCaptioner(make_qformer(), make_lm("Flan-T5"), tokenizer, autocast_lm=True)
    check_lm(model, "tiny")
    batch = make_batch(CAPTIONS)
    cache = model.prefix(batch["features"], batch["scale"], batch["offset"])
    model.loss(cache, batch).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.qformer.parameters())
    assert model.lm.dtype == torch.float32


def test_unsupported_models_are_refused(make_qformer, tokenizer):
    def check(lm):
        check_lm(VideoCaptioner(make_qformer(), lm, tokenizer), "tiny")

    lm = make_lm("BART")
    lm.final_logits_bias += torch.randn(130)
    with pytest.raises(UserError, match=r"Bart.* modifies the logits after its output head"):
        check(lm)
    with pytest.raises(UserError, match=r"T5.* has no decoder_start_token_id"):
        check(make_lm("T5", decoder_start_token_id=None))
    lm = make_lm("T5")
    attention = lm.decoder.block[0].layer[1]  # cause an error that occurs only with a cache
    attention.register_forward_hook(
        lambda m, x, out: (out[0] * 2, *out[1:]) if out[0].shape[1] == 8 else out
    )
    with pytest.raises(UserError, match=r"cached prefix .*\(\d\.\d+\)"):
        check(lm)


def test_soft_prompts_take_no_positions_of_the_decoder(make_qformer, tokenizer, clips):
    model = VideoCaptioner(make_qformer(), make_lm("BART"), tokenizer).double()
    room = 100 - 1 - len(STYLES["sentence"])
    check_room(model, "tiny", ["a" * (room - 2)])
    with pytest.raises(UserError, match=rf"the prefix \(1\) .* leave {room} for a caption"):
        check_room(model, "tiny", ["a" * (room - 1)])
    room = 100 - 1 - len(STYLES["label"])
    with pytest.raises(UserError, match=f"room for {room} tokens"):
        model.captions(clips, "label", room + 1)


def test_research_reads_the_encoder(model, clips):
    """`hidden` is the encoder's last state, `prompted` the decoder's. Words are compared in the encoder."""
    found = embeddings.embed(model, **clips)
    soft = model.soft_prompts(**clips)
    ids = torch.tensor([[0, *model.tokenizer(STYLES["label"])["input_ids"]]] * 4)
    out = model.lm(inputs_embeds=soft, decoder_input_ids=ids, output_hidden_states=True)
    wanted = {"hidden": out.encoder_last_hidden_state, "prompted": out.decoder_hidden_states[-1]}
    for kind, rows in wanted.items():
        rows = torch.nn.functional.normalize(rows[:, -1].float(), dim=-1)
        torch.testing.assert_close(found[kind], rows, rtol=1e-5, atol=1e-5)
    assert len(words.Corpus(model, ["abc", "de"]).table(soft[:1], 3)) == 6


# ---- a folder ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """A tiny Flan-T5 with a T5 tokenizer, in the format of Google's files."""
    text = (world / "labels" / "train.json").read_text() + " ".join(STYLES.values())
    pieces = {*text} - {" "} | {f"▁{word}" for word in re.findall("[A-Za-z]+", text)}
    pieces = ["<pad>", "</s>", "<unk>", "▁", *sorted(pieces)]
    tokenizer = hf.T5Tokenizer(vocab=[(piece, -10 / len(piece)) for piece in pieces], extra_ids=2)
    folder = tmp_path_factory.mktemp("flan")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    make_lm("Flan-T5", vocab_size=len(tokenizer)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    del config["scale_decoder_outputs"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_is_loaded_as_it_is(folder):
    """If the head was tied, it would replace the trained head in the file."""
    lm, tokenizer, _ = module.load_lm(str(folder), torch.device("cpu"), torch.float32)
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(lm.lm_head.weight, weights["lm_head.weight"])
    assert not torch.equal(lm.lm_head.weight, lm.shared.weight)
    norms = module.embedding_table(lm).norm(dim=1)  # the scale of the soft prompts
    torch.testing.assert_close(norms, weights["shared.weight"].norm(dim=1))
    assert tokenizer.batch_decode([tokenizer(" moving it")["input_ids"]], skip_special_tokens=True)


def test_the_scripts(folder, world, prepared, tmp_path, quick_meteor, capsys):
    """train.py trains with an encoder-decoder, and infer.py captions with the result."""
    run = tmp_path / "run"
    flags = ["--lm", folder, "--epochs", "1", "--limit", "16"]
    assert not train.main(train_flags(world, prepared, run, *flags))
    [first, *_] = json.loads((run / "predictions_validation.json").read_text())
    capsys.readouterr()
    clip = world / "videos" / f"{first['image_id']}.webm"
    flags = ["--checkpoint", run, "--workers", "0", "--scores", "--format", "jsonl"]
    assert not infer.main([*map(str, [clip, *flags])])
    [window] = json.loads(capsys.readouterr().out)["windows"]
    assert window["caption"] == first["caption"] and window["samples"][0]["score"] < 0
