"""The checks of doctor.py that need the packages: GPU, decoders, Java, disk, memory, models, data."""

import math
import os
import shlex
import shutil
import time
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, VJEPA2Config, VJEPA2Model

import captioner
import evaluate
import optim
import train
from checkpoint import read_checkpoint
from dataset import TRAIN, VALIDATION, encode_caption, load_records, loader, shared_bytes
from encoder import FAMILIES, VideoEncoder, family_of, preprocessor_file
from qformer import QFormer
from runtime import cli, devices, hub
from runtime.caption_tokens import tokenize
from runtime.errors import UserError
from runtime.feature_cache import Settings, load_manifest, require_features, with_scale
from runtime.names import list_files, visible
from tools.doctor_children import gpu_properties, missing_decoders
from tools.findings import INSTALL, LIMIT, MISSING, NOTE, OK, Finding, in_child

SHARED = "/dev/shm"

# to compute the size of SSv2's cache: the settings for each --pool, with ViT-L's tokens in int8
CLIPS = 168_913 + 24_777  # training and validation
STORED = {pool: Settings(grid=(16, 16 // pool, 16 // pool)) for pool in (1, 2, 4)}
# Memory that the defaults need, in bytes. GPU: 13.7 GB, measured with micro-batches of 32 clips with 2
# captions each (results/gpu.md), plus the CUDA context. RAM: 16 GB (estimate), minus what the system
# reserves.
GPU_MEMORY, MEMORY = 14e9, 0.95 * 16e9


def everything(args, torch_range):
    """Run all checks. args: the flags of doctor.py. torch_range: the requirement, such as torch>=2.10."""
    findings = [check_gpu(torch_range), check_decoders(), check_java()]
    return findings + check_machine(args.features) + check_models(args) + check_data(args)


def check_gpu(torch_range):
    """Check that a GPU is present and usable. torch_range: the requirement, such as torch>=2.10."""
    found, why = in_child(gpu_properties)
    if why:
        return Finding(MISSING, "CUDA", f"torch cannot use the GPU: {why}", "nvidia-smi")
    if not found["name"]:
        if devices.hidden():
            return Finding(NOTE, "CUDA", "CUDA_VISIBLE_DEVICES hides every GPU")
        if not devices.has_nvidia_gpu():
            return Finding(NOTE, "CUDA", "no NVIDIA GPU; a CPU is only enough for the toy world")
        if found["built_for"]:
            text = f"the NVIDIA driver does not support torch's CUDA {found['built_for']}"
            return Finding(MISSING, "CUDA", text, "nvidia-smi")
        fix = f"{INSTALL} --force-reinstall '{torch_range}'"
        text = "this machine has an NVIDIA GPU, but torch is built for CPUs"
        return Finding(MISSING, "CUDA", text, fix)
    text = f"{found['count']} x {found['name']}, {found['bytes'] / 1e9:.0f} GB"
    step, why = in_child(try_step, "cuda")
    if why:
        return Finding(MISSING, "CUDA", f"{text}; a training step of tiny models failed: {why}")
    text += f"; a training step of tiny models took {step[0]:.1f} s and {step[1] / 1e6:.0f} MB"
    if not found["bf16"]:
        return Finding(NOTE, "CUDA", f"{text}, no bfloat16", "python train.py --dtype float32")
    if found["bytes"] < GPU_MEMORY:
        fix = "python train.py --batch-size 8 --grad-accum 8"
        text += "; train.py needs 14 GB with its defaults, 7 GB with the following flags"
        return Finding(NOTE, "CUDA", text, fix)
    return Finding(OK, "CUDA", f"{text}, bfloat16")


def try_step(device):
    """Encode clips, train one step and generate captions, with tiny random models.

    It calls the same functions as the scripts. Returns (seconds, peak GPU memory in bytes).
    """
    device, dtype = devices.resolve(device, "auto")
    began = time.perf_counter()
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = {f"pred_{k}": v for k, v in sizes.items()} | {"pred_num_mask_tokens": 1}
    config = VJEPA2Config(crop_size=64, frames_per_clip=8, **sizes, **small)
    settings = Settings(size=64, grid=(4, 4, 4))
    encoder = VideoEncoder(VJEPA2Model(config).to(dtype), settings, device)
    clips = torch.randint(0, 256, (4, 8, 48, 80, 3), dtype=torch.uint8)
    stored = encoder.stored(list(clips))

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": len(tokenizer)}
    lm = Qwen2ForCausalLM(Qwen2Config(**sizes)).to(device, dtype)
    shape = {"num_queries": 8, "width": 64, "video_width": 64, "grid": (4, 4, 4)}
    qformer = QFormer(**shape, num_blocks=1, num_heads=4, dropout=0.1).to(device)
    model = captioner.VideoCaptioner(qformer, lm, tokenizer)
    captioner.check_lm(model, "(tiny, random)")

    pairs = [encode_caption(tokenizer, style, "moving a cup") for style in ("label", "sentence")]
    items = [{"id": str(n), **with_scale(s), "captions": pairs} for n, s in enumerate(stored)]
    batches = list(loader(items, 2, 0, device))
    optimizer = optim.make_optimizer(qformer, 1e-3, 0.03)
    loss, tokens, _ = train.accumulate(model.train(), batches)
    norm = optim.average_and_clip(qformer, tokens, 1.0)
    optimizer.step()
    model.eval()
    for beams in (1, 2):
        model.captions(evaluate.to_device(batches[0], device), "label", 4, beams)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise RuntimeError(f"the loss is {loss} and the gradient norm is {norm}")
    return time.perf_counter() - began, devices.peak_memory(device)[0]


def check_decoders():
    """Check which video formats PyAV can decode."""
    missing, why = in_child(missing_decoders)
    if not missing and not why:
        return Finding(OK, "decoders", "VP9, H.264, AV1")
    fix = f"{INSTALL} --force-reinstall --only-binary av av"
    return Finding(NOTE, "decoders", why or f"PyAV cannot decode {', '.join(missing)}", fix)


def check_java():
    """Check that Java, which METEOR needs too, can run the PTB tokenizer on a caption."""
    _, tokenizer, why = tokenize(["A cup."], time_limit=LIMIT)
    if tokenizer == "ptb":
        return Finding(OK, "Java", f"{shutil.which('java')} runs the PTB tokenizer")
    fix = None if shutil.which("java") else "sudo apt-get install openjdk-17-jre-headless"
    return Finding(NOTE, "Java", f"{why}; METEOR is skipped", fix)


# ---- the machine ---------------------------------------------------------------------------


def check_machine(features):
    """Compare disk space, memory and shared memory with what SSv2 needs."""
    folder = Path(features).absolute()
    folder = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(folder).free
    sizes = {pool: CLIPS * settings.clip_bytes for pool, settings in STORED.items()}
    text = f"{free / 1e12:.2f} TB free in {folder}; SSv2's cache takes {sizes[1] / 1e12:.2f} TB, "
    text += " or ".join(f"{sizes[pool] / 1e12:.2f} with --pool {pool}" for pool in (2, 4))
    flags = next((f"--pool {pool}" for pool in sizes if sizes[pool] < free), "--features FOLDER")
    fix = None if sizes[1] < free else f"python preprocess_ssv2.py {flags}"
    findings = [Finding(NOTE if fix else OK, "disk", f"{text} (computed)", fix)]
    if hasattr(os, "sysconf"):  # not on Windows
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        text = f"{memory / 1e9:.0f} GB" + (
            "" if memory > MEMORY else "; 16 GB recommended (estimate)"
        )
        findings.append(Finding(OK if memory > MEMORY else NOTE, "memory", text))
    if os.path.isdir(SHARED):
        scoring, free = evaluate.parse_args([]), shutil.disk_usage(SHARED).free
        used = shared_bytes(STORED[1], scoring.batch_size, scoring.workers)
        text = f"{free / 1e9:.1f} GB free; train.py and evaluate.py use up to {used / 1e9:.1f} GB"
        text += f" on SSv2 with --workers {scoring.workers} (computed)"
        fix = None if used < free else "python train.py --workers 0"
        findings.append(Finding(NOTE if fix else OK, SHARED, text, fix))
    return findings


# ---- models and data -----------------------------------------------------------------------


def check_models(args):
    """Check the encoder, the language model, the checkpoint, and the checkpoint's models if different."""
    encoder, lm = check_model("encoder", args.encoder), check_model("lm", args.lm)
    findings = [encoder[0], lm[0]]
    path = Path(args.checkpoint)
    if hub.is_id(args.checkpoint):
        finding, _ = check_model("checkpoint", args.checkpoint)
        if finding.state == MISSING:
            return [*findings, finding]
        path, _ = hub.look_here(args.checkpoint, "--checkpoint")
    if not path.exists():
        run = path.parent if path.suffix == ".pt" else path
        fix = command(args, "train.py", "annotations", "features", "lm", output=run)
        return [*findings, Finding(MISSING, "checkpoint", f"{path} does not exist", fix)]
    try:
        checkpoint = read_checkpoint(path)
    except UserError as error:
        return [*findings, Finding(MISSING, "checkpoint", str(error))]
    findings.append(Finding(OK, "checkpoint", f"{path}, after step {checkpoint['step']:,}"))
    info, settings = checkpoint["manifest"].info, checkpoint["manifest"].settings
    findings += check_cache_settings(settings, args.features)
    trained_lm = checkpoint["lm"]
    for what, name, expected, found in [
        ("checkpoint's encoder", info["encoder"], settings.encoder_fingerprint, encoder[1]),
        ("checkpoint's lm", trained_lm["name"], trained_lm["fingerprint"], lm[1]),
    ]:
        if found != expected:
            finding, fingerprint = check_model(what, name)
            if fingerprint and fingerprint != expected:
                text = f"{name} is not the model that the checkpoint was trained with ({expected})"
                finding = Finding(MISSING, what, text)
            elif finding.state == MISSING:  # without `fix`: a folder's name may look like a Hub id
                flag = f"--{what.split()[-1]} FOLDER"
                text = f"{finding.found}; if it is elsewhere, pass {flag}"
                finding = Finding(MISSING, what, text)
            findings.append(finding)
    return findings


def check_cache_settings(settings, features):
    """Return a list with a finding if the cache does not fit a checkpoint with these settings."""
    try:
        found = load_manifest(features).settings
    except UserError:
        return []  # `check_data` reports it
    try:
        settings.check_same(found, f"the cache {features}")
    except UserError as error:
        return [Finding(MISSING, "checkpoint's features", str(error))]
    return []


def check_model(what, name):
    """Look for a model. Returns (a finding, the model's fingerprint or None)."""
    local = os.path.isdir(name)
    fix = None if local else f"hf download {shlex.quote(name)}"
    try:
        folder, missing = hub.look_here(name, f"--{what.split()[-1]}")
        if folder and not missing:
            if what == "encoder":
                family_of(folder, name)
                preprocessor_file(folder, name)
            kind = hub.read_config(folder).get("model_type")
            if what.endswith("lm") and kind in tuple(FAMILIES):
                return Finding(MISSING, what, f"{name} is an encoder of type {kind}"), None
            size = sum(path.stat().st_size for path in list_files(folder, ".safetensors"))
            return Finding(OK, what, f"{name}, {size / 1e6:,.0f} MB"), hub.fingerprint(folder)
    except UserError as error:
        return Finding(MISSING, what, str(error)), None
    except (OSError, ValueError) as error:  # for example an invalid config.json
        return Finding(MISSING, what, f"{name} cannot be read: {error}", fix), None
    text = f"is incomplete: {missing} is missing" if folder else "is not on this machine"
    return Finding(MISSING, what, f"{name} {text}", fix), None


def check_data(args):
    """Check the labels, clips, annotations and features."""
    records = {}

    def folder(path):
        if not os.path.isdir(path) or not visible(path):
            raise UserError(
                f"{path} is empty or does not exist; to download SSv2, see docs/ssv2.md"
            )
        return path

    def annotations():
        records.update({s: load_records(args.annotations, s) for s in (TRAIN, VALIDATION)})
        counts = ", ".join(f"{split} {len(clips):,}" for split, clips in records.items())
        return f"{args.annotations}: {counts} clips"

    def features():
        settings = load_manifest(args.features).settings
        for split, clips in records.items():
            require_features(args.features, split, clips)
        extent = "complete" if records else "not compared with annotations"
        return f"{args.features}: {settings.store}, pool {settings.pool}, {extent}"

    prepare = command(args, "prepare_annotations.py", "labels", output=args.annotations)
    encode = command(args, "preprocess_ssv2.py", "videos", "annotations", "features", "encoder")
    findings = []
    for what, check, fix in [
        ("labels", lambda: folder(args.labels), None),
        ("videos", lambda: folder(args.videos), None),
        ("annotations", annotations, prepare),
        ("features", features, encode),
    ]:
        try:
            findings.append(Finding(OK, what, check()))
        except UserError as error:
            findings.append(Finding(MISSING, what, str(error), fix))
    return findings


def command(args, script, *flags, output=None):
    """Return a script's command line with --output and `flags`, omitting default values."""
    values = {flag: getattr(args, flag) for flag in flags}
    values = {flag: v for flag, v in values.items() if v != getattr(cli, flag.upper())}
    if output and str(output) not in (cli.ANNOTATIONS, str(Path(cli.CHECKPOINT).parent)):
        values["output"] = str(output)
    return " ".join(["python", script, *(f"--{k} {shlex.quote(v)}" for k, v in values.items())])
