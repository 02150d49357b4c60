"""Q-Former: learned queries attend to a video's features and become soft prompts.

Shapes: B clips, N = T*H*W video tokens, E video width, Q queries, D model width, A heads.
The idea of the querying transformer is BLIP-2's (Li et al. 2023, arXiv:2301.12597).
"""

import torch
import torch.nn.functional as F
from torch import nn


class StoredFeatures:
    """A batch of features as they are stored, and what turns them into tokens for the Q-Former:

        token = W_p (scale * feature + offset - mean) / std + position

    features: int8, float16 or float (B, N, E); scale, offset: (B, E); mean, std: (E,); project: the
    Linear layer W_p; pos: one table per axis of the grid, (T, D), (H, D), (W, D).
    """

    def __init__(self, features, scale, offset, mean, std, project, pos):
        self.features, self.scale, self.offset = features, scale, offset
        self.mean, self.std, self.project, self.pos = mean, std, project, pos
        self.grid = tuple(len(table) for table in pos)

    def projected(self):
        """All tokens without their positions, (B, N, D), in the dtype of mean and std."""
        x = self.features.to(self.mean.dtype) * self.scale[:, None] + self.offset[:, None]
        return self.project((x - self.mean) / self.std)

    def positions(self):
        """(N, D)"""
        t, h, w = self.pos
        return (t[:, None, None] + h[None, :, None] + w[None, None, :]).flatten(0, 2)

    def tokens(self):
        """All tokens written out, (B, N, D)."""
        return self.projected() + self.positions()


class CrossAttention(nn.Module):
    """Queries attend to the tokens of `StoredFeatures`, which are never written down.

    With few queries it is cheaper to fold the key and value projections into the queries than to
    project every token: q·(W_k W_p x) = (W_p^T W_k^T q)·x, and the weighted sum commutes with the
    projections likewise. `textbook` computes the same and is what the tests compare with.
    """

    def __init__(self, width, num_heads, dropout):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.q, self.v, self.out = (nn.Linear(width, width) for _ in range(3))
        self.k = nn.Linear(width, width, bias=False)  # a bias would cancel in the softmax

    def heads(self, x):
        """(B, L, D) -> (B, A, L, D/A)"""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def per_head(self, x):
        """Split the output dimension: (D, ...) -> (A, D/A, ...)"""
        return x.unflatten(0, (self.num_heads, -1))

    def textbook(self, x, tokens):
        """x: queries (B or 1, Q, D); tokens: (B, N, D) -> (B, Q, D)"""
        q, k, v = self.heads(self.q(x)), self.heads(self.k(tokens)), self.heads(self.v(tokens))
        scores = q @ k.mT / k.shape[-1] ** 0.5  # (B, A, Q, N)
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    def forward(self, x, video, need_weights=False):
        """x: queries (B or 1, Q, D); video: `StoredFeatures` -> (B, Q, D), weights (B, A, Q, N) or None.

        The weights are those before dropout. Computed in at least float32: the pooled vector is a small
        difference where a channel is far from zero, and bfloat16 would lose it.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            x, features = x.to(dtype), video.features.to(dtype)  # (B, N, E)
            w_p, b_p = video.project.weight.to(dtype), video.project.bias.to(dtype)  # (D, E), (D,)
            w_k, w_v = (self.per_head(m.weight).to(dtype) for m in (self.k, self.v))  # (A, D/A, D)

            # scores: mean, offset and b_p shift a query's scores alike and cancel in the softmax
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

            # pooled features, dequantised and standardised; r is 1 unless dropout is on
            r = weights.sum(-1, keepdim=True)  # (B, A*Q, 1)
            pooled = (weights @ features) * video.scale[:, None]  # (B, A*Q, E)
            pooled = (pooled + r * (video.offset - video.mean)[:, None]) / video.std
            pooled = F.linear(pooled, w_p) + r * b_p  # (B, A*Q, D)
            weights = weights.unflatten(-1, video.grid)
            for axes, table in zip(((-1, -2), (-1, -3), (-2, -3)), video.pos, strict=True):
                pooled = pooled + weights.sum(axes) @ table.to(dtype)

            # values of each head
            pooled = pooled.unflatten(1, (self.num_heads, -1))  # (B, A, Q, D)
            out = pooled @ w_v.mT  # (B, A, Q, D/A)
            out = out + r.unflatten(1, (self.num_heads, -1)) * self.per_head(self.v.bias)[:, None]
        out = self.out(out.transpose(1, 2).flatten(2))  # (B, Q, D)
        return out, before_dropout.unflatten(1, (self.num_heads, -1)) if need_weights else None


class Block(nn.Module):
    """Pre-norm: self-attention among the queries, cross-attention to the video, MLP."""

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
        """x: (B or 1, Q, D) -> (B, Q, D), and the cross-attention's weights (B, A, Q, N) or None."""
        x = x + self.self_attention(self.norm_self(x))
        y, weights = self.cross(self.norm_cross(x), video, need_weights)
        x = x + y
        return x + self.mlp(self.norm_mlp(x)), weights


class QFormer(nn.Module):
    """Maps a clip's stored features (B, N, E) to `num_queries` soft prompts (B, Q, D).

    grid: (T, H, W) of the features; output_norm: norm that the soft prompts start with, the mean norm
    of the language model's embeddings. Tokens have no order of their own outside the encoder (its
    positions are rotary), so learned tables for time, height and width are added to keys and values.
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
        """All initialisation in one place."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # As large as a standardised token; with 0.02 the toy model attends to the video much later
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
        """features int8 or float (B, N, E), scale and offset (B, E) -> soft prompts (B, Q, D)."""
        video = self.stored(features, scale, offset)
        # Before it has seen the video a query is the same for every clip: the first block's
        # self-attention (and its dropout) runs once per step on a batch of one, and broadcasts.
        x = self.queries[None]  # (1, Q, D)
        for block in self.blocks:
            x, _ = block(x, video)  # (B, Q, D)
        return F.layer_norm(x, x.shape[-1:]) * self.gain

    @torch.inference_mode()
    def attention(self, features, scale, offset):
        """Weights (B, blocks, A, Q, T, H, W) of every cross-attention; arguments as of `forward`.

        Those of one query and head sum to 1.
        """
        video, x, all_weights = self.stored(features, scale, offset), self.queries[None], []
        for block in self.blocks:
            x, weights = block(x, video, need_weights=True)
            all_weights.append(weights)
        return torch.stack(all_weights, 1).unflatten(-1, self.grid)
