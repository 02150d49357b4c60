"""The absorbed cross-attention equals textbook cross-attention in values and gradients."""

from pathlib import Path

import pytest
import torch

from qformer import CrossAttention

ROOT = Path(__file__).parent.parent


def textbook(cross, x, video, need_weights=False):
    """Compute what the absorbed `CrossAttention.forward` must equal."""
    return cross.textbook(x, video.tokens()), None


def both_ways(qformer, clips, monkeypatch):
    """Return soft prompts and parameter gradients with absorbed and with textbook attention."""
    results = []
    for forward in (CrossAttention.forward, textbook):
        monkeypatch.setattr(CrossAttention, "forward", forward)
        torch.manual_seed(1)  # the same dropout masks
        qformer.zero_grad()
        out = qformer(*clips)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        results.append((out.detach(), {n: p.grad.clone() for n, p in qformer.named_parameters()}))
    return results


@pytest.mark.parametrize("store", ["int8", "fp16"])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_absorbed_equals_textbook(
    make_qformer, make_clips, monkeypatch, store, batch, dropout, num_blocks
):
    """With positions, standardisation, scale and offset. With dropout, row sums differ from one."""
    qformer = make_qformer(dropout=dropout, num_blocks=num_blocks).double()
    x, scale, offset = make_clips(batch, store=store)
    (a, grads_a), (b, grads_b) = both_ways(
        qformer, (x, scale.double(), offset.double()), monkeypatch
    )
    assert a.shape == (batch, 6, 32)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    for name, grad in grads_b.items():
        torch.testing.assert_close(grads_a[name], grad, rtol=1e-8, atol=1e-9, msg=name)
    assert all(g.abs().max() > 0 for g in grads_b.values()), "a parameter without a gradient"


def test_outlier_channels_survive_bfloat16(make_qformer, make_clips, monkeypatch):
    """A channel far from zero is a small difference of large numbers. In bfloat16 the pooled vector had
    an error of 11 %, so the absorbed path computes it in float32 even under autocast."""
    qformer = make_qformer()
    x, scale, offset = make_clips(4)
    offset[:, :3] += 300.0  # massive activations, as vision transformers have
    qformer.standardise(offset.mean(0), torch.full((24,), 1.5))
    exact = make_qformer().double()
    exact.load_state_dict(qformer.state_dict())
    want = exact(x, scale.double(), offset.double())
    with torch.autocast("cpu", torch.bfloat16):
        absorbed = qformer(x, scale, offset)
        monkeypatch.setattr(CrossAttention, "forward", textbook)
        written_out = qformer(x, scale, offset)

    def error(got):
        return (got.double() - want).norm() / want.norm()

    assert error(absorbed) < 0.02
    assert error(absorbed) <= 1.5 * error(written_out)


def test_positions_tell_left_from_right(make_qformer, make_clips):
    """Without positions a clip and its mirror image are the same bag of tokens."""
    qformer = make_qformer(grid=(2, 3, 4))
    x, scale, offset = make_clips(1, tokens=24)
    mirrored = x.view(1, 2, 3, 4, 24).flip(3).reshape(1, 24, 24)
    assert (qformer(x, scale, offset) - qformer(mirrored, scale, offset)).abs().max() > 1e-3
    torch.nn.init.zeros_(qformer.pos[2])
    same = qformer(x, scale, offset) - qformer(mirrored, scale, offset)
    assert same.abs().max() < 1e-5


def test_a_clip_does_not_depend_on_its_batch(make_qformer, make_clips):
    qformer = make_qformer(num_blocks=2).double()
    x, scale, offset = make_clips(3)
    whole = qformer(x, scale.double(), offset.double())
    alone = qformer(x[1:2], scale[1:2].double(), offset[1:2].double())
    torch.testing.assert_close(whole[1:2], alone, rtol=0, atol=1e-12)


def test_soft_prompts_start_with_the_norm_of_embeddings(make_qformer, make_clips):
    """A plain LayerNorm of width 1536 has norm 39, but the model's embeddings have about 1."""
    out = make_qformer(output_norm=0.9)(*make_clips(2))
    torch.testing.assert_close(out.norm(dim=-1), torch.full((2, 6), 0.9), rtol=1e-3, atol=0)


def test_default_size_is_the_published_one():
    """39.5 million parameters, counted in the model that train.py's defaults build for SSv2."""
    from transformers import Qwen2Config, VJEPA2Config

    import train
    from qformer import QFormer

    args = train.parse_args([])
    qwen = {"hidden_size": 1536}  # Qwen2-1.5B's; Qwen2Config's own default is another model
    video = VJEPA2Config()  # ViT-L
    with torch.device("meta"):
        qformer = QFormer(
            num_queries=args.num_queries,
            width=Qwen2Config(**qwen).hidden_size,
            video_width=video.hidden_size,
            grid=(16, 16, 16),
            num_blocks=args.num_blocks,
            num_heads=args.num_heads,
        )
    count = sum(p.numel() for p in qformer.parameters())
    assert round(count / 1e6, 1) == 39.5
    assert f"{count:,} trained parameters" in (ROOT / "docs" / "first-day.md").read_text()
