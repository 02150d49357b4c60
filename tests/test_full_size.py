"""The real sizes with random weights: ViT-L, 64 queries, Qwen2-1.5B. Run it with pytest -m slow -s."""

import resource
import time

import numpy as np
import pytest
import torch

import optim
import train


@pytest.mark.slow
@pytest.mark.parametrize("lm_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_forward_and_backward_at_full_size(tokenizer, lm_dtype):
    """Without hardware support for bfloat16, one bfloat16 step takes more than ten minutes."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, VJEPA2Config, VJEPA2Model

    from captioner import VideoCaptioner
    from dataset import collate, encode_caption
    from encoder import VideoEncoder
    from qformer import QFormer
    from runtime.feature_cache import Settings

    args = train.parse_args([])
    vitl = VJEPA2Model(VJEPA2Config())  # float32, preprocess_ssv2.py's choice on a CPU
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(lm_dtype)
    try:
        qwen = Qwen2Config(
            vocab_size=151936,
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        lm = Qwen2ForCausalLM(qwen)
    finally:
        torch.set_default_dtype(dtype)
    assert round(sum(p.numel() for p in lm.parameters()) / 1e9, 2) == 1.54
    encoder = VideoEncoder(vitl, Settings(), torch.device("cpu"))
    clip = np.random.default_rng(0).integers(0, 256, (32, 240, 427, 3), dtype=np.uint8)

    began = time.perf_counter()
    (stored,) = encoder.stored([clip])
    encode = time.perf_counter() - began
    print(f"\nencode {encode:.0f} s per clip", flush=True)
    assert stored["features"].shape == (4096, 1024)
    qformer = QFormer(
        num_queries=args.num_queries,
        width=1536,
        video_width=1024,
        grid=(16, 16, 16),
        num_blocks=args.num_blocks,
        num_heads=args.num_heads,
        dropout=args.dropout,
        output_norm=lm.get_input_embeddings().weight.float().norm(dim=1).mean().item(),
    )
    model = VideoCaptioner(qformer, lm, tokenizer).train()
    captions = [("label", "holding a potato"), ("sentence", "A hand holds a potato.")]
    item = {"id": "1", **stored, "captions": [encode_caption(tokenizer, *c) for c in captions]}
    began = time.perf_counter()
    loss, tokens, _ = train.accumulate(model, [collate([item])])
    norm = optim.average_and_clip(model.qformer, tokens, args.clip_grad)
    step = time.perf_counter() - began
    assert all(p.grad is not None and p.grad.isfinite().all() for p in qformer.parameters())
    assert all(p.grad is None for p in lm.parameters())
    assert norm > 0
    # with random weights, all 151,936 tokens are about equally likely
    assert loss / tokens == pytest.approx(np.log(151936), rel=0.1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{sum(p.numel() for p in qformer.parameters()):,} trained parameters;"
        f" forward and backward {step:.0f} s per clip with 2 captions, peak {peak:.1f} GiB"
    )
