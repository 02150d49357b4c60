"""Q-Former: learned queries attend to a video's features and become soft prompts.

Shapes: B clips, N = T*H*W video tokens, E video width, Q queries, D model width, A heads.
The idea of the querying transformer is BLIP-2's (Li et al. 2023, arXiv:2301.12597).
"""

import torch
import torch.nn.functional as F
from torch import nn


class StoredFeatures:
    """A batch of features as they are stored, with the parameters that map them to tokens:

        token = W_p ((scale * feature + offset - mean) / std) + position

    features: (B, N, E), int8, float16 or float. scale, offset: (B, E). mean, std: (E,).
    project: the Linear layer W_p. pos: one table per axis of the grid, (T, D), (H, D) and (W, D).
    """

    def __init__(self, features, scale, offset, mean, std, project, pos):
        self.features, self.scale, self.offset = features, scale, offset
        self.mean, self.std, self.project, self.pos = mean, std, project, pos
        self.grid = tuple(len(table) for table in pos)

    def projected(self):
        """Compute all tokens without their positions, (B, N, D), in the dtype of mean and std."""
        x = self.features.to(self.mean.dtype) * self.scale[:, None] + self.offset[:, None]
        return self.project((x - self.mean) / self.std)

    def positions(self):
        """Compute the positions of all tokens, (N, D)."""
        t, h, w = self.pos
        return (t[:, None, None] + h[None, :, None] + w[None, None, :]).flatten(0, 2)

    def tokens(self):
        """Compute all tokens, (B, N, D)."""
        return self.projected() + self.positions()


class CrossAttention(nn.Module):
    """Cross-attention from queries to the tokens of `StoredFeatures`, which are never materialised.

    If there are few queries, projecting every token to keys and values is wasteful. The key projection is
    folded into the queries, q·(W_k W_p x) = (W_p^T W_k^T q)·x, and the value projection is applied to the
    weighted sum of the stored features. `textbook` is the reference implementation for the tests.
    """

    def __init__(self, width, num_heads, dropout):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.q, self.v, self.out = (nn.Linear(width, width) for _ in range(3))
        self.k = nn.Linear(width, width, bias=False)  # a bias would cancel in the softmax

    def heads(self, x):
        """Split the width into heads: (B, L, D) -> (B, A, L, D/A)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def per_head(self, x):
        """Split the output dimension of a weight into heads: (D, ...) -> (A, D/A, ...)."""
        return x.unflatten(0, (self.num_heads, -1))

    def textbook(self, x, tokens):
        """Attend from queries x (B or 1, Q, D) to tokens (B, N, D). Returns (B, Q, D)."""
        q, k, v = self.heads(self.q(x)), self.heads(self.k(tokens)), self.heads(self.v(tokens))
        scores = q @ k.mT / k.shape[-1] ** 0.5  # (B, A, Q, N)
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    def forward(self, x, video, need_weights=False):
        """Attend from queries x (B or 1, Q, D) to a `StoredFeatures`.

        Returns (B, Q, D) and, if `need_weights`, the weights (B, A, Q, N) before dropout, else None. All is
        computed in float32 or wider: if the values of a channel are far from zero, the pooled vector is a
        small difference of large numbers, which bfloat16 cannot resolve.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            x, features = x.to(dtype), video.features.to(dtype)  # (B, N, E)
            w_p, b_p = video.project.weight.to(dtype), video.project.bias.to(dtype)  # (D, E), (D,)
            w_k, w_v = (self.per_head(m.weight).to(dtype) for m in (self.k, self.v))  # (A, D/A, D)

            # scores; mean, offset and b_p add the same to all scores of a query and cancel in the softmax
            q = self.heads(F.linear(x, self.q.weight.to(dtype), self.q.bias.to(dtype)))
            q = (q / q.shape[-1] ** 0.5) @ w_k  # (B, A, Q, D)
            to_tokens = (q @ w_p).flatten(1, 2) * (video.scale / video.std)[:, None]  # (B, A*Q, E)
            scores = (to_tokens @ features.mT).unflatten(-1, video.grid)  # (B, A*Q, T, H, W)
            for axis, table in enumerate(video.pos):
                shape = [1, 1, 1]
                shape[axis] = -1
                scores = scores + (q @ table.to(dtype).mT).flatten(1, 2).unflatten(-1, shape)
            weights = scores.flatten(2).softmax(-1)  # (B, A*Q, N)
            before_dropout = weights
            weights = F.dropout(weights, self.dropout, self.training)

            # pooled features, dequantised and standardised; r, the sum of the weights, is 1 without dropout
            r = weights.sum(-1, keepdim=True)  # (B, A*Q, 1)
            pooled = (weights @ features) * video.scale[:, None]  # (B, A*Q, E)
            pooled = (pooled + r * (video.offset - video.mean)[:, None]) / video.std
            pooled = F.linear(pooled, w_p) + r * b_p  # (B, A*Q, D)
            weights = weights.unflatten(-1, video.grid)
            for axes, table in zip(((-1, -2), (-1, -3), (-2, -3)), video.pos, strict=True):
                pooled = pooled + weights.sum(axes) @ table.to(dtype)

            # the value projection, for each head
            pooled = pooled.unflatten(1, (self.num_heads, -1))  # (B, A, Q, D)
            out = pooled @ w_v.mT  # (B, A, Q, D/A)
            out = out + r.unflatten(1, (self.num_heads, -1)) * self.per_head(self.v.bias)[:, None]
        out = self.out(out.transpose(1, 2).flatten(2))  # (B, Q, D)
        return out, before_dropout.unflatten(1, (self.num_heads, -1)) if need_weights else None


class Block(nn.Module):
    """Self-attention among the queries, cross-attention to the video and an MLP, all pre-norm."""

    def __init__(self, width, num_heads, dropout):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.norm_self, self.norm_cross, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.cross = CrossAttention(width, num_heads, dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def self_attention(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (self.cross.heads(t) for t in (q, k, v))  # (B, A, Q, D/A)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, x, video, need_weights=False):
        """Map queries x (B or 1, Q, D) to (B, Q, D). Returns them and the weights of `CrossAttention`."""
        x = x + self.self_attention(self.norm_self(x))
        y, weights = self.cross(self.norm_cross(x), video, need_weights)
        x = x + y
        return x + self.mlp(self.norm_mlp(x)), weights


class QFormer(nn.Module):
    """Maps a clip's stored features (B, N, E) to `num_queries` soft prompts (B, Q, D).

    grid: (T, H, W) of the features. output_norm: the norm of the soft prompts at initialisation, usually
    the mean norm of the language model's embeddings. V-JEPA 2's positions are rotary and not part of its
    output. Learned tables for time, height and width are therefore added to the tokens, and so to
    keys and values.
    """

    def __init__(
        self,
        *,
        num_queries,
        width,
        video_width,
        grid,
        num_blocks,
        num_heads,
        dropout=0.0,
        output_norm=1.0,
    ):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a width of {width}")
        self.sizes = {
            "num_queries": num_queries,
            "width": width,
            "video_width": video_width,
            "grid": list(grid),
            "num_blocks": num_blocks,
            "num_heads": num_heads,
            "dropout": dropout,
            "output_norm": output_norm,
        }
        self.grid = tuple(grid)
        self.queries = nn.Parameter(torch.empty(num_queries, width))
        self.project = nn.Linear(video_width, width)
        self.pos = nn.ParameterList(nn.Parameter(torch.empty(n, width)) for n in self.grid)
        self.blocks = nn.ModuleList(Block(width, num_heads, dropout) for _ in range(num_blocks))
        self.gain = nn.Parameter(torch.empty(width))
        self.register_buffer("mean", torch.zeros(video_width))
        self.register_buffer("std", torch.ones(video_width))
        self.initialise(output_norm)

    @torch.no_grad()
    def initialise(self, output_norm):
        """Initialise all parameters."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # about as large as a standardised token; with 0.02 the toy model learns to attend much later
        for table in (self.queries, *self.pos):
            nn.init.normal_(table, std=0.5)
        self.gain.fill_(output_norm / self.gain.numel() ** 0.5)  # LayerNorm's norm is sqrt(D)

    def standardise(self, mean, std):
        """Set the channel statistics (E,) of the training features."""
        self.mean.copy_(mean)
        self.std.copy_(std)

    def stored(self, features, scale, offset):
        return StoredFeatures(
            features, scale, offset, self.mean, self.std, self.project, tuple(self.pos)
        )

    def forward(self, features, scale, offset):
        """Map features (B, N, E), int8 or float, with scale and offset (B, E) to soft prompts (B, Q, D)."""
        video = self.stored(features, scale, offset)
        # The queries are the same for all clips until the first cross-attention, so the first
        # self-attention (with its dropout) runs on a batch of one, and its output is broadcast.
        x = self.queries[None]  # (1, Q, D)
        for block in self.blocks:
            x, _ = block(x, video)  # (B, Q, D)
        return F.layer_norm(x, x.shape[-1:]) * self.gain

    @torch.inference_mode()
    def attention(self, features, scale, offset):
        """Return the weights (B, blocks, A, Q, T, H, W) of all cross-attentions.

        The arguments are those of `forward`. The weights of one query and head sum to 1.
        """
        video, x, all_weights = self.stored(features, scale, offset), self.queries[None], []
        for block in self.blocks:
            x, weights = block(x, video, need_weights=True)
            all_weights.append(weights)
        return torch.stack(all_weights, 1).unflatten(-1, self.grid)
