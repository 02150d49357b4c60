"""The frozen language model, the shared prefix, the loss, generation, checkpoints."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

import captioner as module
import optim
import train
from captioner import VideoCaptioner, inverse_cdf, length_limit, nucleus
from checkpoint import fixed_state, load_captioner, read_checkpoint
from dataset import STYLES, encode_caption
from optim import uniforms
from runtime.errors import UserError
from runtime.feature_cache import Manifest

CAPTIONS = [
    [("label", "moving red ball"), ("sentence", "A ball.")],
    [("label", "up"), ("sentence", "Somebody lifts a very heavy box over the edge.")],
    [("label", "dropping it"), ("sentence", "It falls down.")],
]


@pytest.fixture
def captioner(make_qformer, lm, tokenizer):
    return VideoCaptioner(make_qformer(), lm, tokenizer).double()


def double(batch):
    return {k: v.double() if k in ("scale", "offset") else v for k, v in batch.items()}


# Qwen2's norms compute in float32 whatever the model's dtype: in float64 the rest agrees to 1e-7
EXACT = {"rtol": 1e-6, "atol": 1e-6}


def loss_and_gradient(captioner, batch):
    """Compute the summed loss and the Q-Former's gradient through one shared prefix."""
    batch = double(batch)
    captioner.zero_grad()
    cache = captioner.prefix(batch["features"], batch["scale"], batch["offset"])
    total = captioner.loss(cache, batch).sum()
    total.backward()
    return total.detach(), [p.grad.clone() for p in captioner.qformer.parameters()]


def plain_loss(captioner, features, scale, offset, style, text):
    """Compute the cross-entropy of one caption from its definition, in one pass over all logits."""
    soft = captioner.qformer(features, scale.double(), offset.double())  # (1, Q, D)
    prompt = captioner.tokenizer(STYLES[style])["input_ids"]
    target = [*captioner.tokenizer(" " + text)["input_ids"], captioner.tokenizer.eos_token_id]
    words = captioner.lm.get_input_embeddings()(torch.tensor([prompt + target]))
    logits = captioner.lm(inputs_embeds=torch.cat([soft, words], 1)).logits[0]
    first = soft.shape[1] + len(prompt)
    log_probs = logits[first - 1 : -1].log_softmax(-1)
    return -log_probs[torch.arange(len(target)), torch.tensor(target)].sum()


@pytest.mark.parametrize(
    "captions",
    [CAPTIONS, [CAPTIONS[0], CAPTIONS[1][:1], CAPTIONS[2] + CAPTIONS[1][1:]]],
    ids=["2 each", "2, 1 and 3"],
)
def test_shared_prefix_equals_separate_passes(captioner, make_batch, make_clips, captions):
    """The captions after one prefix give the loss and gradient of as many full passes. So padding, style
    prompt and prefix have no loss, and no row depends on another row's text. The label of a clip without
    paraphrases was once computed K times to fill a rectangle."""
    clips = make_clips(3)
    batch = make_batch(captions, clips)
    total, grads = loss_and_gradient(captioner, batch)
    captioner.zero_grad()
    plain = sum(
        plain_loss(captioner, *(t[i : i + 1] for t in clips), style, text)
        for i, texts in enumerate(captions)
        for style, text in texts
    )
    plain.backward()
    torch.testing.assert_close(total, plain.detach(), **EXACT)
    for grad, p in zip(grads, captioner.qformer.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-5, atol=1e-5)
    lengths = [len(text) + 2 for texts in captions for _, text in texts]  # leading space, eos
    assert len(batch["targets"]) == sum(lengths)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_bfloat16_on_a_cpu_computes_from_float32_weights(
    make_qformer, lm, tokenizer, make_batch, num_beams
):
    """--dtype bfloat16 on a CPU means autocast: norms and sums stay in float32."""
    model = VideoCaptioner(make_qformer(), lm, tokenizer, autocast_lm=True)
    module.check_lm(model, "tiny")
    batch = make_batch(CAPTIONS)
    clips = batch["features"], batch["scale"], batch["offset"]
    cache = model.prefix(*clips)
    assert model.logits(torch.randn(2, 32)).dtype == torch.bfloat16
    rough = model.loss(cache, batch)
    rough.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.qformer.parameters())
    exact = VideoCaptioner(model.qformer, lm, tokenizer)
    exact = exact.loss(exact.prefix(*clips), batch)
    assert 0 < (rough - exact).abs().max() < 0.3
    assert len(model.eval().captions(batch, "label", 5, num_beams)) == 3


@pytest.mark.parametrize("num_beams", [1, 2])
def test_captions_that_reach_the_limit_are_counted(captioner, make_batch, num_beams):
    """Scores were computed on captions cut at 50 tokens, without a note."""
    batch, eos = double(make_batch(CAPTIONS)), captioner.tokenizer.eos_token_id
    head = captioner.lm.get_output_embeddings()
    captioner.captions(batch, "label", 3, num_beams)
    assert captioner.cut_captions == 3
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features, dtype=torch.float64))
    head.bias.data[eos] = 1e4
    captioner.captions(batch, "label", 3, num_beams)
    assert captioner.cut_captions == 3


def test_the_limit_is_that_of_the_training_captions(tokenizer):
    """All captions were cut at 50 tokens, however long those of the data set were."""
    short = [f"moving it {n}" for n in range(3000)]
    assert length_limit(tokenizer, short) == 50
    assert length_limit(tokenizer, [*short, "x" * 90]) == 50  # one in 3,001
    assert length_limit(tokenizer, [*short, *["x" * 90] * 9]) == 90 + 2  # a space and eos


def test_chunked_logits_give_the_same_loss(captioner, make_batch, monkeypatch):
    batch = make_batch(CAPTIONS)
    whole = loss_and_gradient(captioner, batch)
    monkeypatch.setattr(module, "LOGITS_CHUNK", 7)
    chunked = loss_and_gradient(captioner, batch)
    torch.testing.assert_close(whole, chunked, **EXACT)


def test_the_loss_does_not_depend_on_other_captions_in_the_batch(captioner, make_batch, make_clips):
    """The original trained on padding, so a loss depended on the longest caption in the batch."""
    clips = make_clips(2)

    def loss_of_first(second):
        batch = double(make_batch([[("label", "up")], [("label", second)]], clips))
        first = len(" up") + 1  # targets of the first caption
        cache = captioner.prefix(batch["features"], batch["scale"], batch["offset"])
        return captioner.loss(cache, batch)[:first]

    torch.testing.assert_close(loss_of_first("down"), loss_of_first("d" * 60), **EXACT)


def test_the_language_model_stays_frozen(captioner, make_batch):
    """`.train()` must not activate its dropout, and a step must not change its weights."""
    captioner.train()
    assert captioner.qformer.training and not captioner.lm.training
    assert not any(m.training for m in captioner.lm.modules())
    before = {n: p.clone() for n, p in captioner.lm.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in captioner.parameters() if p.requires_grad], lr=1.0)
    a = loss_and_gradient(captioner, make_batch(CAPTIONS))
    optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in captioner.lm.named_parameters())
    assert all(p.grad is None for p in captioner.lm.parameters())
    b = loss_and_gradient(captioner, make_batch(CAPTIONS))
    assert a[0] != b[0]


def test_generate_equals_a_naive_argmax_loop(captioner, make_clips):
    x, scale, offset = make_clips(5)
    batch = {"features": x, "scale": scale.double(), "offset": offset.double()}
    fast = captioner.captions(batch, "sentence", max_new_tokens=12)
    for i in range(5):
        soft = captioner.qformer(
            x[i : i + 1], batch["scale"][i : i + 1], batch["offset"][i : i + 1]
        )
        ids = captioner.tokenizer(STYLES["sentence"])["input_ids"]
        tokens = []
        for _ in range(12):
            words = captioner.lm.get_input_embeddings()(torch.tensor([ids + tokens]))
            logits = captioner.lm(inputs_embeds=torch.cat([soft, words], 1)).logits[0, -1]
            token = int(logits.argmax())
            if token == captioner.tokenizer.eos_token_id:
                break
            tokens.append(token)
        text = captioner.tokenizer.batch_decode([tokens])[0]
        assert fast[i] == " ".join(text.split())
    assert len(set(fast)) > 1, "the video must matter for this test to mean anything"


def test_beams_ignore_the_models_generation_config(captioner, make_clips):
    """A model's generation_config may enable sampling and penalties. Beams then depended on the seed."""
    x, scale, offset = make_clips(3)
    batch = {"features": x, "scale": scale.double(), "offset": offset.double()}
    plain = captioner.captions(batch, "label", 10, 3)
    config = captioner.lm.generation_config
    config.do_sample, config.temperature, config.repetition_penalty = True, 5.0, 1.9
    assert captioner.captions(batch, "label", 10, 3) == plain


@pytest.mark.parametrize("num_beams", [1, 3])
def test_batched_captions_equal_those_of_single_clips(
    captioner, make_clips, num_beams, monkeypatch
):
    """Beams need the cache repeated per beam, not only the ids. In inference the Q-Former reads a few
    clips at a time, here three and then one."""
    monkeypatch.setattr(module, "READ_CHUNK", 3)
    x, scale, offset = make_clips(4)
    batch = {"features": x, "scale": scale.double(), "offset": offset.double()}
    together = captioner.captions(batch, "label", 10, num_beams)
    alone = [
        captioner.captions({k: v[i : i + 1] for k, v in batch.items()}, "label", 10, num_beams)[0]
        for i in range(4)
    ]
    assert together == alone


def test_generation_stops_at_eos(captioner, make_clips):
    """A finished row stays finished while other rows continue."""
    head = captioner.lm.get_output_embeddings()
    x, scale, offset = make_clips(2)
    batch = {"features": x, "scale": scale.double(), "offset": offset.double()}
    head.weight.data[0] = head.weight.data[0] * 0  # eos scores 0
    texts = captioner.captions(batch, "label", 8)
    assert all(chr(0) not in t for t in texts)
    head.weight.data *= 0  # all tokens tie, and argmax takes the first, eos
    assert captioner.captions(batch, "label", 8) == ["", ""]


def test_validation_shares_the_prefix(captioner, make_batch):
    """Generation after the loss must continue from the prefix, not from the text of the loss."""
    batch = double(make_batch([[c[0]] for c in CAPTIONS]))
    total, tokens, texts = captioner.validation(batch, "label", 9)
    assert texts == captioner.captions(batch, "label", 9)
    want, _ = loss_and_gradient(captioner, batch)
    assert tokens == len(batch["targets"])
    assert total == pytest.approx(float(want), rel=1e-6)


SETTINGS = {"format_version": 1, "num_frames": 8, "size": 64, "pool": 1, "width": 24} | {
    "grid": [4, 3, 5],
    "store": "int8",
    "compute_dtype": "float32",
    "encoder_fingerprint": "x",
    "sampling": "still",
    "resize": "pad",
}


def checkpoint_of(captioner, manifest=None):
    manifest = Manifest.parse(manifest or {"settings": SETTINGS, "info": {"encoder": "toy"}})
    state = fixed_state(captioner, manifest, "toy", "f" * 16, [], ["label"])
    return state | {"qformer": captioner.qformer.state_dict(), "step": 0}


def test_checkpoint_round_trip(captioner, lm, tokenizer, tmp_path, monkeypatch, make_clips):
    captioner = captioner.float()
    state = checkpoint_of(captioner) | {"step": 3}
    torch.save(state, tmp_path / "best.pt")
    monkeypatch.setattr("checkpoint.load_lm", lambda name, *_: (lm, tokenizer, "f" * 16))
    again = load_captioner(read_checkpoint(tmp_path), torch.device("cpu"), torch.float32)
    x, scale, offset = make_clips(2)
    batch = {"features": x, "scale": scale, "offset": offset}
    assert again.captions(batch, "label", 9) == captioner.eval().captions(batch, "label", 9)
    frozen = sum(p.numel() * 4 for p in lm.parameters())
    assert (tmp_path / "best.pt").stat().st_size < frozen + 4 * sum(
        p.numel() for p in captioner.qformer.parameters()
    )
    assert not any(key.startswith("lm.") for key in state["qformer"])
    monkeypatch.setattr("checkpoint.load_lm", lambda name, *_: (lm, tokenizer, "0" * 16))
    with pytest.raises(UserError, match="fingerprint"):
        load_captioner(state, torch.device("cpu"), torch.float32)


class Bomb:
    """Unpickling it would create a file."""

    def __reduce__(self):
        return (open, ("bomb_went_off", "w"))


@pytest.mark.parametrize("content", ["missing", "empty", "text", "cut", "foreign", "bomb"])
def test_invalid_checkpoints_are_refused(captioner, tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "best.pt"
    torch.save(checkpoint_of(captioner), path)
    whole = path.read_bytes()
    if content == "missing":
        path.unlink()
    elif content in ("foreign", "bomb"):
        torch.save({"foreign": {"a": torch.zeros(3)}, "bomb": Bomb()}[content], path)
    else:
        path.write_bytes({"empty": b"", "text": b"hello", "cut": whole[: len(whole) // 2]}[content])
    with pytest.raises(UserError, match=r"checkpoint .*best\.pt"):
        read_checkpoint(path)
    assert not (tmp_path / "bomb_went_off").exists()


def check_accumulation(captioner, make_batch, make_clips, clips, micro, tolerance):
    """Check that micro-batches of `micro` clips give the same optimizer step as one batch of `clips`."""
    features = make_clips(clips)
    texts = [[("label", "x" * (1 + 3 * i % 17)), ("sentence", "Y" * (i + 1))] for i in range(clips)]
    after = []
    for size in (micro, clips):
        qformer = copy.deepcopy(captioner.qformer)
        model = VideoCaptioner(qformer, captioner.lm, captioner.tokenizer).train()
        optimizer = torch.optim.AdamW(optim.parameter_groups(model.qformer, 0.03), lr=1e-2)
        window = [
            double(make_batch(texts[i : i + size], tuple(t[i : i + size] for t in features)))
            for i in range(0, clips, size)
        ]
        loss, tokens, _ = train.accumulate(model, window)
        optim.average_and_clip(model.qformer, tokens, 1.0)
        optimizer.step()
        after.append((loss, tokens, [p.detach() for p in model.qformer.parameters()]))
    assert after[0][1] == after[1][1]
    assert after[0][0] == pytest.approx(after[1][0], rel=1e-6)
    # Adam's first step is lr * g/|g|: compare gradients' signs through the parameters
    for a, b in zip(after[0][2], after[1][2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("clips", [16, 11])
def test_accumulated_micro_batches_equal_one_batch(captioner, make_batch, make_clips, clips):
    """8 x 2 clips equal 1 x 16 after an optimizer step, also with an incomplete last step and with
    captions of different lengths. The original always divided by 16."""
    check_accumulation(captioner, make_batch, make_clips, clips, micro=2, tolerance=1e-6)


def test_loss_is_the_mean_over_real_tokens(captioner, make_batch):
    """The logged loss equals torch's own mean cross-entropy over the same tokens."""

    batch = double(make_batch(CAPTIONS))
    total, tokens, by_style = train.accumulate(captioner.eval(), [batch])
    cache = captioner.prefix(batch["features"], batch["scale"], batch["offset"])
    cache.batch_repeat_interleave(2)
    cached = {captioner.cache_name: cache}
    logits = captioner.lm(input_ids=batch["input_ids"], **cached).logits
    mean = F.cross_entropy(logits.flatten(0, 1)[batch["positions"]], batch["targets"])
    assert total / tokens == pytest.approx(mean.item(), rel=1e-6)
    losses = F.cross_entropy(
        logits.flatten(0, 1)[batch["positions"]], batch["targets"], reduction="none"
    )
    of_style = [losses[batch["styles"] == n].mean().item() for n in range(2)]
    assert by_style == {s: pytest.approx(x) for s, x in zip(STYLES, of_style, strict=True)}


def test_a_parameter_that_the_loss_does_not_reach_is_an_error(captioner, make_batch):
    """A process without a micro-batch has zero gradients. Zeros also replaced missing gradients in
    other processes, which hid a broken graph."""

    batch = double(make_batch(CAPTIONS))
    train.accumulate(captioner, iter([]))
    assert all((p.grad == 0).all() for p in captioner.qformer.parameters())
    captioner.zero_grad()
    captioner.qformer.gain.requires_grad_(False)
    with pytest.raises(AssertionError, match="no gradient for gain"):
        train.accumulate(captioner, [batch])


def test_a_clip_without_reference_is_still_captioned(captioner, make_batch):
    """One clip without a paraphrase in its batch ended the evaluation of sentences."""
    batch = double(make_batch([[CAPTIONS[0][1]], []]))
    total, _, texts = captioner.validation(batch, "sentence", 9)
    assert total is None and len(texts) == 2


def test_log_likelihoods_equal_those_of_each_text_alone(captioner, make_clips, tokenizer):
    """The mean log-probability of a text's tokens and eos, from one pass over the whole sequence."""
    clips, texts = make_clips(2), ["a cup", "putting a rather long thing down", "x"] * 20
    batch = double(dict(zip(("features", "scale", "offset"), clips, strict=True)))
    clips = list(batch.values())
    with torch.no_grad():
        cache = captioner.prefix(*clips)
        length = cache.get_seq_length()
        got = captioner.log_likelihoods(cache, "label", texts)
        soft, expected = captioner.qformer(*clips), torch.empty(2, 3)
        embed = captioner.lm.get_input_embeddings()
        for n, text in enumerate(texts[:3]):
            _, prompt, target = encode_caption(tokenizer, "label", text)
            ids = torch.tensor([prompt + target])
            for clip in range(2):
                x = torch.cat([soft[clip : clip + 1], embed(ids)], 1)
                log_p = captioner.lm(inputs_embeds=x).logits.log_softmax(-1)[0]
                first = soft.shape[1] + len(prompt) - 1  # predicts the caption's first token
                log_probs = [log_p[first + i, t] for i, t in enumerate(target)]
                expected[clip, n] = torch.stack(log_probs).mean()
    assert torch.allclose(got, expected.repeat(1, 20), atol=1e-5)
    assert cache.get_seq_length() == length  # the cache can still be used
    assert captioner.generate(cache, "label") == captioner.captions(batch, "label")


def test_reading_a_checkpoint_does_not_affect_loading_it(captioner, make_qformer, tmp_path):
    """The check of the sizes made a later load replace a model's parameters. The optimizer of a resumed
    run then updated parameters that were no longer in use."""
    torch.save(checkpoint_of(captioner.float()), tmp_path / "best.pt")
    weights = read_checkpoint(tmp_path)["qformer"]
    qformer = make_qformer()
    before = list(qformer.parameters())
    qformer.load_state_dict(weights)
    assert all(a is b for a, b in zip(before, qformer.parameters(), strict=True))


# ---- sampling ------------------------------------------------------------------------------------


def sampled(captioner, batch, names, count=4, top_p=0.95, temperature=0.7):
    """Sample captions of up to 9 tokens."""
    numbers = uniforms(names, count, 9, seed=0)
    with torch.no_grad():
        cache = captioner.prefix(batch["features"], batch["scale"], batch["offset"])
    return captioner.sample(cache, "label", numbers, top_p, temperature)


def test_samples_do_not_depend_on_the_batch(captioner, make_clips):
    x, scale, offset = make_clips(7)
    batch = {"features": x, "scale": scale, "offset": offset}
    captioner.float()
    names = [f"clip{i}" for i in range(7)]
    texts, scores = sampled(captioner, batch, names)
    assert len({text for row in texts for text in row}) > 14, "the numbers must matter"
    for part in (slice(0, 5), slice(5, 7)):
        some = {k: v[part] for k, v in batch.items()}
        again, other = sampled(captioner, some, names[part])
        assert again == texts[part]
        torch.testing.assert_close(other, scores[part], rtol=0, atol=1e-5)


def test_samples_fit_the_context_of_the_language_model(captioner, make_clips, monkeypatch):
    """Only `generate` checked it. GPT-2 and OPT have no position after their context."""
    x, scale, offset = make_clips(1)
    monkeypatch.setattr("captioner.max_positions", lambda lm: 16)
    with pytest.raises(UserError, match=r"--max-new-tokens 9 is too large"):
        sampled(captioner.float(), {"features": x, "scale": scale, "offset": offset}, ["a"])


def test_scores_of_samples_are_those_of_one_pass_over_all_tokens(
    captioner, make_clips, monkeypatch
):
    """The mean log-probability of the tokens and eos, without temperature and nucleus."""
    x, scale, offset = make_clips(2)
    batch = {"features": x, "scale": scale.double(), "offset": offset.double()}
    head = captioner.lm.get_output_embeddings()
    eos = captioner.tokenizer.eos_token_id
    monkeypatch.setattr(captioner, "decoded", lambda rows: rows)
    bias = torch.zeros(len(head.weight), dtype=torch.float64)
    bias[eos] = 4  # so that captions end
    monkeypatch.setattr(captioner, "logits", lambda hidden: head(hidden) + bias)
    rows, scores = sampled(captioner, batch, ["a", "b"], 6, top_p=0.9, temperature=0.8)
    with torch.no_grad():
        soft = captioner.qformer(*batch.values())
    prompt, embed = captioner.prompt("label")[0].tolist(), captioner.lm.get_input_embeddings()
    lengths = set()
    for clip, sample in itertools.product(range(2), range(6)):
        ids = rows[clip][sample]
        ids = ids[: ids.index(eos) + 1] if eos in ids else ids
        lengths.add(len(ids))
        words = torch.cat([soft[clip : clip + 1], embed(torch.tensor([prompt + ids]))], 1)
        log_p = (captioner.lm(inputs_embeds=words).logits + bias).log_softmax(-1)[0]
        first = soft.shape[1] + len(prompt) - 1  # predicts the first token
        expected = torch.stack([log_p[first + i, t] for i, t in enumerate(ids)]).mean()
        assert scores[clip, sample].item() == pytest.approx(expected.item(), abs=1e-5)
    assert len(lengths) > 2 and max(lengths) <= 9


def test_a_nucleus_of_one_token_is_greedy(captioner, make_clips):
    x, scale, offset = make_clips(3)
    batch = {"features": x, "scale": scale.double(), "offset": offset.double()}
    texts, _ = sampled(captioner, batch, "abc", 2, top_p=1e-6)
    greedy = captioner.captions(batch, "label", 9)
    assert texts == [[text, text] for text in greedy]


def test_of_equal_logits_a_nucleus_of_one_token_takes_the_first():
    """bfloat16 logits are often equal. --scores then scored another caption than greedy search writes."""
    logits = torch.randn(50, 5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    top = logits.max(-1, keepdim=True).values
    logits[:, ::7] = top  # many equal ones
    assert torch.equal(nucleus(logits.float(), 1e-9).argmax(-1), logits.argmax(-1))


def test_tokens_are_sampled_with_their_probabilities():
    """The nucleus of .5, .3, .15, .05 with .7 is .5, .3. Zero probabilities are never chosen."""
    p = torch.tensor([[0.05, 0.5, 0.15, 0.3]]).log()
    kept = nucleus(p, 0.7)
    torch.testing.assert_close(kept, torch.tensor([[0, 0.5, 0, 0.3]], dtype=torch.float64))
    numbers = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens = inverse_cdf(kept.expand(1000, -1), numbers)
    assert tokens.bincount(minlength=4).tolist() == [0, 625, 0, 375]
    assert inverse_cdf(kept, torch.tensor([1 - 1e-16]))[0] == 3
    assert nucleus(p, 1.0).sum() == pytest.approx(1)
    a, b = uniforms(["x"], 2, 3, 0)[0].tolist()
    assert a != b and uniforms(["y", "x"], 1, 2, 0)[1, 0].tolist() == a[:2]
    assert uniforms(["x"], 1, 3, 1)[0, 0].tolist() != a
