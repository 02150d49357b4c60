"""Speed, memory and disk, side by side with the original's arithmetic. No data, no download.

    python -m bench.speed                     (about 3 minutes on two cores)
    python -m bench.speed --preset full       (the real shapes, on a CUDA GPU; not yet timed)

Random weights and synthetic inputs. Each variant is first shown to compute what the reference
computes; then both are timed in the same run, turn by turn after a warm-up. The table goes to stdout,
bench.json and bench.md to results/bench/<device>/.

The reference is the original's arithmetic: keys and values of all video tokens written down by
nn.MultiheadAttention, logits at every position, one caption per pass of a clip, float features read
with torch.load, clips encoded one at a time, captions generated eight at a time by `generate`. It must
compute the same function as ours, so standardisation and positions, which the original lacks, are in it.

Shapes: B clips, N = T*H*W video tokens, E video width, Q queries, D and V width and vocabulary of the
language model, A heads, K captions per clip, L text tokens, M text tokens that carry loss.
"""

import runtime.start

import copy
import math
import os
import platform
import random
import re
import tempfile
import time
from contextlib import nullcontext
from functools import cache, partial
from importlib.metadata import version
from itertools import accumulate, chain, cycle
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

import train
from bench.data import (
    PROMPT,
    Words,
    bench_features,
    bench_preprocess,
    dequantised,
    make_clips,
)
from bench.timing import (
    Place,
    check,
    device_name,
    difference,
    inspect,
    left_out,
    markdown,
    matmul_peak,
    measure,
    summary,
)
from captioner import VideoCaptioner, chunked_cross_entropy
from dataset import collate
from evaluate import to_device
from qformer import QFormer
from runtime import cli, devices
from runtime.cli import note
from runtime.errors import UserError
from runtime.files import read_json, write_atomic, write_json

# The shapes above, and: layers, mlp, lm_heads of the language model; tokens of a caption, at most; clips
# captioned at once, at most; videos to decode; the V-JEPA 2 encoder's (layers, heads, pixels, frames), its width is E;
# seconds for one comparison. The style prompt has as many tokens as "a video showing:".
REAL = {"grid": (16, 16, 16), "E": 1024, "Q": 64, "A": 4, "encoder": (24, 16, 256, 32)}  # ViT-L
REAL |= {"D": 1536, "V": 151936, "layers": 28, "mlp": 8960, "lm_heads": 12}  # Qwen2-1.5B
REAL |= {"B": 8, "tokens": 16, "clips": 256, "videos": 32, "seconds": 12}
# A quarter of the widths and queries, half the tokens, a seventh of the layers, a small vocabulary
SMALL = REAL | {"grid": (8, 16, 16), "E": 256, "Q": 16, "encoder": (2, 4, 64, 16), "D": 384}
SMALL |= {"V": 8192, "layers": 4, "mlp": 2240, "lm_heads": 6, "videos": 16, "seconds": 5}
# For float64 and for tests
TINY = SMALL | {"grid": (4, 2, 6), "E": 24, "Q": 6, "D": 32, "V": 130, "mlp": 64, "lm_heads": 4}
TINY |= {"B": 3, "tokens": 8, "clips": 64, "videos": 4, "seconds": 0}
PRESETS = {"cpu": SMALL, "full": REAL}
CARD = 24e9  # bytes of the GPU that the real run is meant for


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="shapes")
    parser.add_argument(
        "--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="fewer: no files written"
    )
    parser.add_argument("--output", default="results/bench", help="results go to <output>/<device>")
    parser.add_argument(
        "--table", nargs="+", metavar="FILE", help="print the README's table of these bench.json"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda for --preset full)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.table:
        print(summary([read_result(path) for path in args.table]))
        return
    # the profiler that counts a CPU's bytes has much to say; torch reads this when it is imported
    os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    asked = args.device or {"cpu": "cpu", "full": "auto"}[args.preset]
    device, _ = devices.resolve(asked, "auto")
    if args.preset == "full" and not devices.on_gpu(device):
        raise UserError("--preset full needs a CUDA GPU: on a CPU one step takes minutes")
    name = device_name(device)
    folder = Path(args.output, re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))
    cli.output_folder(folder, "--output").mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    result = {
        "device": name,
        "preset": args.preset,
        "command": f"python -m bench.speed --preset {args.preset}",
        "versions": {name: version(name) for name in ("torch", "transformers", "av", "numpy")}
        | {"python": platform.python_version()},
        "shapes": PRESETS[args.preset],
        "matmul_flops": matmul_peak(device),
        "equal": equalities(device),
        "rows": [],
    }
    # on the disk that the results are on: a temporary folder may be memory
    with tempfile.TemporaryDirectory(dir=folder) as files:
        try:
            for group in [g for g in GROUPS if g in args.groups]:
                began = time.perf_counter()
                place = Place(PRESETS[args.preset], device, Path(files), result["matmul_flops"])
                result["rows"] += [{"group": group, **row} for row in GROUPS[group](place)]
                note(f"{group:<11} {time.perf_counter() - began:4.0f} s")
        finally:  # also of a run that a failed check ends
            print(markdown(result))
    if set(args.groups) == set(GROUPS):
        write_json(folder / "bench.json", result)
        write_atomic(folder / "bench.md", markdown(result) + "\n")
        note(f"written to {folder}/bench.json and bench.md")


def read_result(path):
    result = read_json(path, "bench result")
    if not isinstance(result, dict) or not {"device", "preset", "rows"} <= result.keys():
        raise UserError(f"{path} was not written by bench/speed.py")
    return result


# ---- the reference: the original's arithmetic ----------------------------------------------------


def written_down(qformer):
    """A (self-attention, cross-attention) pair of nn.MultiheadAttention per block, same weights."""
    pairs = []
    for block in qformer.blocks:
        pair = []
        for w, b, out in (
            (block.qkv.weight, block.qkv.bias, block.out),
            (
                torch.cat([m.weight for m in (block.cross.q, block.cross.k, block.cross.v)]),
                torch.cat([block.cross.q.bias, 0 * block.cross.q.bias, block.cross.v.bias]),
                block.cross.out,
            ),
        ):
            mha = torch.nn.MultiheadAttention(
                w.shape[1], block.num_heads, batch_first=True, device=w.device, dtype=w.dtype
            )
            mha.load_state_dict(
                {
                    "in_proj_weight": w,
                    "in_proj_bias": b,
                    "out_proj.weight": out.weight,
                    "out_proj.bias": out.bias,
                }
            )
            pair.append(mha)
        pairs.append(pair)
    return pairs


def reference_qformer(qformer, attention, features):
    """features: float (B, N, E) -> soft prompts (B, Q, D)"""
    t, h, w = qformer.pos
    pos = (t[:, None, None] + h[None, :, None] + w).flatten(0, 2)  # (N, D)
    kv = qformer.project((features - qformer.mean) / qformer.std) + pos  # (B, N, D)
    x = qformer.queries.expand(len(features), -1, -1)  # (B, Q, D)
    for block, (inner, cross) in zip(qformer.blocks, attention, strict=True):
        y = block.norm_self(x)
        x = x + inner(y, y, y, need_weights=False)[0]
        x = x + cross(block.norm_cross(x), kv, kv, need_weights=False)[0]
        x = x + block.mlp(block.norm_mlp(x))
    return F.layer_norm(x, x.shape[-1:]) * qformer.gain


def reference_loss(lm, soft, captions, cross_entropy=None):
    """Summed cross-entropy, logits at every position. captions: B token lists, one per clip.

    cross_entropy: (head, hidden (M, D), targets (M,)) -> loss, in place of that.
    """
    rows = [PROMPT + c for c in captions]
    length = max(map(len, rows))
    ids = torch.tensor([r + [0] * (length - len(r)) for r in rows])
    labels = torch.full((len(rows), soft.shape[1] + length), -100)
    for row, c in zip(labels, captions, strict=True):
        row[soft.shape[1] + len(PROMPT) :][: len(c)] = torch.tensor(c)
    targets = labels[:, 1:].flatten()
    words = lm.get_input_embeddings()(ids.to(soft.device))  # (B, L, D)
    hidden = lm.base_model(inputs_embeds=torch.cat([soft, words], 1), use_cache=False)
    hidden, head = hidden.last_hidden_state[:, :-1].flatten(0, 1), lm.get_output_embeddings()
    if cross_entropy:
        where = (targets != -100).nonzero()[:, 0]
        return cross_entropy(head, hidden[where.to(soft.device)], targets[where].to(soft.device))
    logits = head(hidden)  # (B*(Q+L-1), V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets.to(soft.device), ignore_index=-100, reduction="sum")


def reference_captions(lm, qformer, attention, features, tokens):
    """Token lists of clips, eight at a time. features: float16 (B, N, E), in the host's memory."""
    out, device = [], qformer.queries.device
    words = lm.get_input_embeddings()(torch.tensor([PROMPT], device=device))
    for some in features.split(8):
        with devices.autocast(device):
            soft = reference_qformer(qformer, attention, some.to(device)).to(words.dtype)
        embeds = torch.cat([soft, words.expand(len(soft), -1, -1)], 1)  # (8, Q+L, D)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=device)
        out += lm.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        ).tolist()
    return out


# ---- weights and inputs ----------------------------------------------------------------------------


def make_qformer(s, device, dtype=None):
    qformer = QFormer(
        num_queries=s["Q"],
        width=s["D"],
        video_width=s["E"],
        grid=s["grid"],
        num_blocks=1,
        num_heads=s["A"],
    )
    for norm in (m for m in qformer.modules() if isinstance(m, torch.nn.LayerNorm)):
        torch.nn.init.normal_(norm.bias, std=0.1)  # zeros would hide a mistake
    return qformer.to(device, dtype)


def make_lm(s, device, dtype):
    config = Qwen2Config(
        vocab_size=s["V"],
        hidden_size=s["D"],
        intermediate_size=s["mlp"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["lm_heads"],
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.05,  # further from uniform logits, so fewer near ties
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.device(device):
        return Qwen2ForCausalLM(config).to(dtype).eval().requires_grad_(False)


def make_captions(s, count, per_clip):
    """Token lists without 0, which ends each: count x per_clip."""
    rng = random.Random(0)

    def one():
        return [rng.randrange(1, s["V"]) for _ in range(rng.randint(s["tokens"] // 2, s["tokens"]))]

    return [[[*one(), 0] for _ in range(per_clip)] for _ in range(count)]


def as_items(stored, captions):
    """Clips with their token lists as the dataset gives them to `collate`."""
    return [
        {
            "id": str(i),
            **{k: v[i] for k, v in stored.items()},
            "captions": [(PROMPT, c) for c in texts],
        }
        for i, texts in enumerate(captions)
    ]


def as_floats(stored):
    """The float16 (B, N, E) that the original stores, exactly the same values."""
    return {"features": dequantised(stored, stored["scale"].dtype).half()}


def standardise(qformer, floats):
    """By the statistics of float16 clips (B, N, E)."""
    x = floats.float()
    qformer.standardise(x.mean((0, 1)), x.std((0, 1)))


def in_host_memory(device, batch):
    """A batch as the loader delivers it: pinned for a GPU."""
    return {
        k: v.pin_memory() if devices.on_gpu(device) and k != "ids" else v for k, v in batch.items()
    }


# ---- equality --------------------------------------------------------------------------------------


def gradient(qformer, attention=None):
    """The Q-Former's gradient as one vector; of the reference's, where its attention is given."""
    grads = {name: p.grad for name, p in qformer.named_parameters()}
    for i, (inner, cross) in enumerate(attention or ()):
        at = f"blocks.{i}."
        for kind in ("weight", "bias"):
            grads[f"{at}qkv.{kind}"] = getattr(inner, f"in_proj_{kind}").grad
            grads[f"{at}out.{kind}"] = getattr(inner.out_proj, kind).grad
            parts = getattr(cross, f"in_proj_{kind}").grad.chunk(3)
            for part, grad in zip("qkv", parts, strict=True):
                grads[f"{at}cross.{part}.{kind}"] = grad
            grads[f"{at}cross.out.{kind}"] = getattr(cross.out_proj, kind).grad
    return torch.cat([grads[name].flatten() for name, _ in qformer.named_parameters()])


def gradient_of(loss, qformer, attention=None):
    """Backward of `loss()` from clean gradients -> (value, gradient)."""
    modules = [qformer, *(m for pair in attention or () for m in pair)]
    for module in modules:
        module.zero_grad()
    value = loss()
    value.backward()
    found = gradient(qformer, attention).clone()
    for module in modules:
        module.zero_grad()
    return value.item(), found


def equalities(device):
    """What ours and the reference compute, in float64, float32 and bfloat16, on tiny shapes.

    Returns [{"what", "found", "allowed"}]; raises UserError where they differ. bfloat16 is compared
    by errors against float64: ours may be 1.5 times the reference's.
    """
    s, lines = TINY, []
    stored = make_clips(s, s["B"])
    x = dequantised(stored, torch.float32)
    qformer = make_qformer(s, "cpu")
    qformer.standardise(x.mean((0, 1)), x.std((0, 1)))
    direction = torch.randn(s["B"], s["Q"], s["D"])
    captions = make_captions(s, s["B"], 3)
    lm = make_lm(s, "cpu", torch.float32)

    def line(what, found, allowed):
        lines.append({"what": what, "found": check(what, found, allowed), "allowed": allowed})

    def both(dtype, cast=nullcontext, where="cpu"):
        """(soft prompts, gradient) of ours and of the reference."""
        q = copy.deepcopy(qformer).to(where, dtype)
        attention = written_down(q)
        args = (
            stored["features"].to(where),
            *(stored[k].to(where, dtype) for k in ("scale", "offset")),
        )
        features = dequantised(dict(zip(stored, args, strict=True)), dtype)
        out = []
        for soft, pairs in (
            (lambda: q(*args), None),
            (lambda: reference_qformer(q, attention, features), attention),
        ):

            def loss(soft=soft):
                with cast():
                    return (soft() * direction.to(where, dtype)).sum()

            _, grad = gradient_of(loss, q, pairs)
            with cast(), torch.no_grad():
                out.append((soft().double().cpu(), grad.double().cpu()))
        return out

    exact = None
    for dtype, allowed in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        ours, reference = both(dtype)
        exact = exact or reference
        for what, a, b in zip(("soft prompts", "gradient"), ours, reference, strict=True):
            line(f"Q-Former, {what}, {str(dtype)[6:]}", difference(a, b), allowed)
    where = device.type
    ours, reference = both(torch.float32, lambda: torch.autocast(where, torch.bfloat16), device)
    for what, a, b, want in zip(("soft prompts", "gradient"), ours, reference, exact, strict=True):
        a, b = ((v - want).norm() / want.norm() for v in (a, b))
        line(f"Q-Former, {what}, error in bfloat16 over the reference's", (a / b).item(), 1.5)

    for dtype, allowed in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        q = copy.deepcopy(qformer).to(dtype)
        model = VideoCaptioner(q, copy.deepcopy(lm).to(dtype), Words())
        attention = written_down(q)
        args = stored["features"], stored["scale"].to(dtype), stored["offset"].to(dtype)
        features = dequantised(dict(zip(stored, args, strict=True)), dtype)
        batch = collate(as_items(stored, captions))

        def ours(model=model, args=args, batch=batch):
            text = batch["input_ids"], batch["positions"], batch["targets"]
            return model.loss(model.prefix(*args), *text)

        def passes(model=model, q=q, attention=attention, features=features):
            return sum(
                reference_loss(model.lm, reference_qformer(q, attention, features), one)
                for one in zip(*captions, strict=True)
            )

        (a, grad_a), (b, grad_b) = gradient_of(ours, q), gradient_of(passes, q, attention)
        name = str(dtype)[6:]
        line(f"3 captions behind one prefix, loss, {name}", abs(a / b - 1), allowed)
        line(f"3 captions behind one prefix, gradient, {name}", difference(grad_a, grad_b), allowed)
    return lines


# ---- the groups ------------------------------------------------------------------------------------


def bench_qformer(place):
    """Forward and backward of the Q-Former from features on the device, a micro-batch of clips."""
    s, device = place.shapes, place.device
    qformer = make_qformer(s, device)
    stored = {k: v.to(device) for k, v in make_clips(s, s["B"]).items()}
    features = dequantised(stored, torch.float32)
    qformer.standardise(features.mean((0, 1)), features.std((0, 1)))
    attention = written_down(qformer)
    direction = torch.randn(s["B"], s["Q"], s["D"], device=device)

    def reference():
        return reference_qformer(qformer, attention, features)

    def absorbed():
        return qformer(**stored)

    def step(soft, precision="highest"):
        torch.set_float32_matmul_precision(precision)
        with devices.autocast(device):
            loss = (soft() * direction).sum()
        loss.backward()
        torch.set_float32_matmul_precision("highest")

    with torch.no_grad():
        found = check("soft prompts", difference(absorbed(), reference()), 1e-5)
    _, a = gradient_of(lambda: (absorbed() * direction).sum(), qformer)
    _, b = gradient_of(lambda: (reference() * direction).sum(), qformer, attention)
    check("the Q-Former's gradient", difference(a, b), 1e-4)
    variants = {"reference": partial(step, reference), "absorbed": partial(step, absorbed)}
    if devices.on_gpu(device):
        # measured for comparison: TF32 is exact for int8, but not for the small matrices
        variants["absorbed_tf32"] = partial(step, absorbed, "high")
    variants = {name: (run, s["B"]) for name, run in variants.items()}
    yield from measure(place, "clips/s", variants, lambda _: {"absorbed": found})


def bench_loss(place):
    """Output projection and cross-entropy of 24 captions, forward and backward, at as many places as
    in a run: 64 soft prompts before each."""
    s, device = place.shapes, place.device
    dtype = torch.bfloat16 if devices.on_gpu(device) else torch.float32
    prefix, captions = 64, [c[0] for c in make_captions(s, 24, 1)]
    length = prefix + len(PROMPT) + max(map(len, captions))
    head = torch.nn.Linear(s["D"], s["V"], bias=False, device=device, dtype=dtype)
    head.requires_grad_(False)
    hidden = torch.randn(24, length, s["D"], device=device, dtype=dtype, requires_grad=True)
    labels = torch.full((24, length), -100)
    for row, c in zip(labels, captions, strict=True):
        row[prefix + len(PROMPT) :][: len(c)] = torch.tensor(c)
    targets = labels[:, 1:].flatten().to(device)
    positions = (targets != -100).nonzero()[:, 0]  # in a run the collate function knows them
    labelled = targets[positions]

    def reference():
        logits = head(hidden[:, :-1].flatten(0, 1)).float()
        return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")

    def chunked():
        picked = hidden[:, :-1].flatten(0, 1).index_select(0, positions)
        return chunked_cross_entropy(head, picked, labelled)

    def step(loss):
        hidden.grad = None
        value = loss()
        value.backward()
        return value.item(), hidden.grad

    (a, grad_a), (b, grad_b) = step(chunked), step(reference)
    allowed = 2e-2 if devices.on_gpu(device) else 1e-5
    check("the loss in chunks", abs(a / b - 1), allowed)
    found = check("its gradient", difference(grad_a, grad_b), allowed)
    variants = {f.__name__: (partial(step, f), len(captions)) for f in (reference, chunked)}
    rows = list(measure(place, "captions/s", variants, lambda _: {"chunked": found}))
    yield rows[0]
    yield rows[1] | {"memory_factor": rows[0]["peak_bytes"] / rows[1]["peak_bytes"]}


def bench_train(place):
    """A micro-batch from the host's memory to gradients; each row adds one technique to the last."""
    s, device = place.shapes, place.device
    captions, stored = make_captions(s, s["B"], 8), make_clips(s, s["B"])
    floats, ints = (in_host_memory(device, b) for b in (as_floats(stored), stored))
    ours = {k: [c[:k] for c in captions] for k in (1, 2, 4, 8)}
    ours = {k: in_host_memory(device, collate(as_items(stored, c))) for k, c in ours.items()}
    floats, qformer = floats["features"], make_qformer(s, device)
    standardise(qformer, floats)
    attention = written_down(qformer)
    lm = make_lm(s, device, torch.bfloat16 if devices.on_gpu(device) else torch.float32)
    model = VideoCaptioner(qformer, lm, Words())

    def soft_from(name):
        """Soft prompts of the reference, of the same float16 features absorbed, of int8 ones."""
        if name == "reference":
            return reference_qformer(qformer, attention, floats.to(device, non_blocking=True))
        if name == "absorbed":
            one = torch.ones(s["B"], s["E"], device=device)
            return qformer(floats.to(device, non_blocking=True), one, 0 * one)
        return qformer(**to_device(ints, device))

    def plain(soft, k=0, lm=lm, cast=devices.autocast, cross_entropy=None):
        with cast(device):
            loss = reference_loss(lm, soft_from(soft), [c[k] for c in captions], cross_entropy)
        loss.backward()

    def bfloat16():
        with devices.autocast(device):
            soft = soft_from("int8")
        first = [c[0] for c in captions]
        reference_loss(lm, soft.to(lm.dtype), first, chunked_cross_entropy).backward()

    def micro_step(k, model=model):
        train.accumulate(model, [ours[k]])

    # name: (callable, captions a clip, whose gradient counts)
    variants = {
        "reference": (partial(plain, "reference"), 1, attention),
        "absorbed": (partial(plain, "absorbed"), 1, None),
        "int8": (partial(plain, "int8"), 1, None),
        "chunked": (partial(plain, "int8", cross_entropy=chunked_cross_entropy), 1, None),
    }
    variants |= {"bfloat16": (bfloat16, 1, None)} if devices.on_gpu(device) else {}
    variants |= {f"captions_{k}": (partial(micro_step, k), k, None) for k in ours}

    # the reference's gradient in float32, summed over 1 to 8 passes of the clips
    exact_lm = copy.deepcopy(lm).float()
    float32 = partial(plain, "reference", lm=exact_lm, cast=lambda _: nullcontext())
    passes = [after(partial(float32, k), qformer, attention, attention) for k in range(8)]
    exact = dict(enumerate(accumulate(passes), 1))
    del exact_lm, float32, passes

    def error(name, qformer=qformer):
        run, k, pairs = variants[name]
        found = after(run, qformer, attention, pairs)
        return ((found - exact[k]).norm() / exact[k].norm()).item()

    own = error("reference")  # on a GPU what autocast costs, on a CPU nothing
    found = {}
    for name in variants.keys() - {"reference"}:
        # with the language model's sums in bfloat16 too, a factor more: the table says how much
        factor = 1.5 if name in ("absorbed", "int8", "chunked") else 6
        found[name] = check(f"the gradient of {name}", error(name), max(1e-4, factor * own))
    skipped = {} if devices.on_gpu(device) else NOT_ON_A_CPU
    if devices.on_gpu(device):
        compiled = VideoCaptioner(copy.deepcopy(qformer), lm, Words())
        compiled.qformer.compile()
        variants["compile"] = partial(micro_step, 4, compiled), 4, None
        try:
            found["compile"] = check("compiled", error("compile", compiled.qformer), 6 * own)
        except torch._dynamo.exc.TorchDynamoException as failure:
            del variants["compile"]
            skipped = {"compile": f"it failed: {type(failure).__name__}"}

    work = {name: (run, s["B"] * k) for name, (run, k, _) in variants.items()}
    for row in measure(place, "captions/s", work, lambda _: found):
        row["ms_per_caption"] = 1e3 / row["median"]
        row["ms_per_clip"] = row["ms_per_caption"] * variants[row["name"]][1]
        if devices.on_gpu(device) and row["name"] in ("reference", "captions_4"):
            step = partial(step_of, row["name"], model, attention, stored, captions)
            row |= largest_batch(step, qformer, lm, device)
        yield row
    yield from (left_out(name, why) for name, why in skipped.items())


def after(run, qformer, attention, pairs):
    """The gradient that `run` leaves, as one vector; of the reference's attention, if `pairs`."""
    for module in (qformer, *chain(*attention)):
        module.zero_grad()
    run()
    return gradient(qformer, pairs)


NOT_ON_A_CPU = {
    "bfloat16": "most CPUs compute it slower than float32",
    "compile": "on a CPU it takes a minute and gains nothing",
}


def step_of(name, model, attention, stored, captions, count):
    """A training step of `count` clips, the given ones again and again."""
    rows = torch.arange(count) % len(captions)
    clips, texts = {k: v[rows] for k, v in stored.items()}, [captions[i][:4] for i in rows]
    if name == "reference":
        floats = as_floats(clips)["features"].to(model.device)
        with devices.autocast(model.device):
            soft = reference_qformer(model.qformer, attention, floats)
            loss = reference_loss(model.lm, soft, [c[0] for c in texts])
        loss.backward()
    else:
        batch = in_host_memory(model.device, collate(as_items(clips, texts)))
        train.accumulate(model, [batch])


def largest_batch(step, qformer, lm, device, card=CARD):
    """The largest micro-batch for a 24 GB card, weights and optimizer included, by trying."""

    def weights(module):
        return sum(p.numel() * p.element_size() for p in module.parameters())

    fixed = 4 * weights(qformer) + weights(lm)  # with gradient and Adam's two moments

    @cache
    def held(clips):
        try:
            return fixed + inspect(partial(step, clips), device)[2]
        except torch.OutOfMemoryError:
            return math.inf

    fits, over = 0, 1
    while held(over) <= card:
        fits, over = over, 2 * over
    while over - fits > 1:
        middle = (fits + over) // 2
        fits, over = (middle, over) if held(middle) <= card else (fits, middle)
    return {"largest_micro_batch": fits, "bytes_at_8": held(8)}


def bench_evaluate(place):
    """Greedy captions from features in the host's memory."""
    s, device = place.shapes, place.device
    stored = make_clips(s, 32)
    floats = in_host_memory(device, as_floats(stored))["features"]
    qformer = make_qformer(s, device).requires_grad_(False)
    standardise(qformer, floats)
    lm = make_lm(s, device, torch.bfloat16 if devices.on_gpu(device) else torch.float32)
    model, attention = VideoCaptioner(qformer, lm, Words()).eval(), written_down(qformer)
    for module in chain(*attention):
        module.requires_grad_(False)
    sizes = [n for n in (8, 64, 256) if n <= s["clips"]]
    batches = {n: {k: v[torch.arange(n) % 32] for k, v in stored.items()} for n in sizes}
    batches = {n: in_host_memory(device, batch) for n, batch in batches.items()}

    def reference(count=16):
        with torch.inference_mode():
            rows = reference_captions(lm, qformer, attention, floats[:count], s["tokens"])
        return [" ".join(map(str, row[: row.index(0)] if 0 in row else row)) for row in rows]

    def ours(count):
        return model.captions(to_device(batches[count], device), "label", s["tokens"])

    variants = {"reference": (reference, 16)}
    variants |= {f"shared_prefix_{n}": (partial(ours, n), n) for n in sizes}
    same = {}

    def verify(said):
        theirs = reference(32)
        if len(set(theirs)) < 8:  # equality would mean little
            raise UserError("the random language model writes the same for all clips", code=1)
        for name, captions in said.items():
            pairs = list(zip(captions, cycle(theirs), strict=False))
            same[name] = sum(a == b for a, b in pairs) / len(pairs)
            if not devices.on_gpu(device):
                check(f"share of other captions in {name}", 1 - same[name], 0.0)
        return {}

    for row in measure(place, "captions/s", variants, verify):
        yield row | {"identical_captions": same[row["name"]]}


GROUPS = {
    "qformer": bench_qformer,
    "loss": bench_loss,
    "train": bench_train,
    "evaluate": bench_evaluate,
    "features": bench_features,
    "preprocess": bench_preprocess,
}


if __name__ == "__main__":
    cli.run(main)
