"""Blocks and models on tokens."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.odenets.adapting.styles.skeleton import Residual, mlp


class Attention(nn.Module):
    """Two heads, with rotations of queries and keys, and a bias for relative positions; both are additions."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.randn(2, 31))

    def forward(self, x, context=None):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        if context is not None:
            k, v = self.qkv(context).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)[1:]
        q, k = rotated(q), rotated(k)
        distance = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
        scores = q @ k.transpose(-1, -2) * 0.5 + self.bias[:, distance + 15]
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def rotated(x):
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    a, b = x.chunk(2, -1)
    return (x * cos) + (torch.cat((-b, a), -1) * sin)


class PreNorm(nn.Module):
    """The usual block."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp, self.drop = Attention(), mlp(), nn.Dropout(0.2)

    def forward(self, x):
        x = x + self.drop(self.attn(x))
        return x + self.drop(self.mlp(x))

    def by_hand(self, x):
        y = x + self.drop(self.attn(x))
        z = y + self.drop(self.mlp(y))
        return z, [(x, y), (y, z)]


class Parallel(PreNorm):
    """Attention and MLP of one state are one step."""

    def forward(self, x):
        return x + self.attn(x) + self.mlp(x)

    def by_hand(self, x):
        y = x + self.attn(x) + self.mlp(x)
        return y, [(x, y)]


class ParallelBranchesFirst(Parallel):
    def forward(self, x):
        return self.attn(x) + self.mlp(x) + x


class ParallelInPlace(Parallel):
    def forward(self, x):
        residual = x
        x = self.attn(residual)
        x += self.mlp(residual)
        return torch.add(x, residual)


class PostNorm(nn.Module):
    """BERT's: the addition stands in a module of its own, beside the norm; arguments go by name."""

    class Output(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.dense, self.LayerNorm, self.dropout = nn.Linear(width, 8), nn.LayerNorm(8), nn.Dropout(0.1)

        def forward(self, hidden_states, input_tensor):
            hidden_states = self.dropout(self.dense(hidden_states))
            return self.LayerNorm(hidden_states + input_tensor)

    def __init__(self):
        super().__init__()
        self.attention, self.intermediate = Attention(), nn.Linear(8, 16)
        self.self_output, self.output = self.Output(8), self.Output(16)

    def forward(self, hidden_states):
        attended = self.self_output(hidden_states=self.attention(hidden_states), input_tensor=hidden_states)
        return self.output(F.gelu(self.intermediate(attended)), input_tensor=attended)

    def by_hand(self, x):
        one, two = self.self_output, self.output
        a = x + one.dropout(one.dense(self.attention(x)))
        b = one.LayerNorm(a)
        c = b + two.dropout(two.dense(F.gelu(self.intermediate(b))))
        return two.LayerNorm(c), [(x, a), (b, c)]


class Conditioned(nn.Module):
    """DiT's: shift, scale and gate of each branch come from a condition."""

    def __init__(self):
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(8, elementwise_affine=False), Attention(), mlp()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(4, 48))

    def forward(self, x, c):
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        x = x + gate.unsqueeze(1) * self.attn(modulate(self.norm(x), shift, scale))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm(x), shift2, scale2))

    def by_hand(self, x, c):
        m = self.modulation(c)[:, None].unflatten(-1, (6, 8)).unbind(2)
        y = x + m[2] * self.attn(F.layer_norm(x, (8,)) * (1 + m[1]) + m[0])
        z = y + m[5] * self.mlp(F.layer_norm(y, (8,)) * (1 + m[4]) + m[3])
        return z, [(x, y), (y, z)]


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class LowRank(Residual):
    """LoRA beside a linear layer is no step, an adapter within the branch neither: the step is the outermost."""

    def __init__(self):
        super().__init__(nn.Linear(8, 8))
        self.a, self.b = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.norm, self.adapter = nn.LayerNorm(8), mlp()

    def forward(self, x):
        y = self.norm(x)
        y = F.relu(self.branch(y) + 0.5 * self.b(self.a(y)))
        return x + (y + self.adapter(y))

    def by_hand(self, x):
        y = self.norm(x)
        y = (y @ (self.branch.weight + 0.5 * self.b.weight @ self.a.weight).T + self.branch.bias).relu()
        x1 = x + y + self.adapter(y)
        return x1, [(x, x1)]


class Experts(nn.Module):
    """A weighted sum of experts, collected in a tensor of zeros."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 3), nn.ModuleList(mlp() for _ in range(3))

    def forward(self, x):
        weights, out = self.gate(x).softmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out += weights[..., i : i + 1] * expert(x)
        return x + out

    def by_hand(self, x):
        w = self.gate(x).softmax(-1)
        x1 = x + (torch.stack([expert(x) for expert in self.experts], -1) * w.unsqueeze(2)).sum(-1)
        return x1, [(x, x1)]


class DelayedAdditions(nn.Module):
    """Mamba's: each block adds the branch of the one before it, and hands branch and residual on as a pair."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mixer = nn.LayerNorm(8), mlp()

        def forward(self, hidden, residual=None):
            residual = hidden if residual is None else hidden + residual
            return self.mixer(self.norm(residual)), residual

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, x):
        hidden, residual = self.embed(x), None
        for block in self.blocks:
            hidden, residual = block(hidden, residual)
        return self.head(self.norm(hidden + residual)).mean(1)

    def expected(self, x):
        x, steps = self.embed(x), []
        for block in self.blocks:
            x0, x = x, x + block.mixer(block.norm(x))
            steps.append(("", x0, x))
        return self.head(self.norm(x)).mean(1), steps


class WideResidual(DelayedAdditions):
    """The state is float32 in a network of bfloat16."""

    def forward(self, x):
        x = self.embed(x).float()
        for block in self.blocks:
            x = x + block.mixer(block.norm(x.bfloat16())).float()
        return self.head(self.norm(x.bfloat16())).mean(1)

    def expected(self, x):
        x, steps = self.embed(x).float(), []
        for block in self.blocks:
            x0, x = x, x + block.mixer(block.norm(x.to(torch.bfloat16)))
            steps.append(("", x0, x))
        return self.head(self.norm(x.to(torch.bfloat16))).mean(1), steps


class SequenceFirst(nn.Module):
    """Tokens of images, ``(T, B, D)``, with torch's own attention."""

    def __init__(self):
        super().__init__()
        self.stem, self.attn = nn.Conv2d(3, 8, 2, 2), nn.MultiheadAttention(8, 2, dropout=0.1)
        self.norm1, self.norm2, self.fc, self.head = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, image):
        x = self.stem(image).flatten(2).permute(2, 0, 1)
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        x = x + F.gelu(self.fc(self.norm2(x)))
        return self.head(x.mean(0))

    def expected(self, image):
        x = self.stem(image).permute(2, 3, 0, 1).flatten(0, 1)
        y = self.norm1(x)
        a = x + self.attn(y, y, y, need_weights=False)[0]
        b = a + F.gelu(self.fc(self.norm2(a)))
        return self.head(b.mean(0)), [("", x, a), ("", a, b)]


class LanguageModel(nn.Module):
    """Takes identifiers of tokens; torch's own layers, of which the second puts the norm behind the addition."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Embedding(11, 8), nn.Embedding(16, 8)
        options = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "batch_first": True, "dropout": 0.1}
        self.one = nn.TransformerEncoderLayer(**options, norm_first=True)
        self.two = nn.TransformerEncoderLayer(**options)

    def forward(self, ids):
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1]))
        return self.two(self.one(x)) @ self.embed.weight.T

    def expected(self, ids):
        x, m, n = self.embed(ids) + self.position.weight[: ids.shape[1]], self.one, self.two
        y = m.norm1(x)
        a = x + m.dropout1(m.self_attn(y, y, y, need_weights=False)[0])
        b = a + m.dropout2(m.linear2(m.dropout(m.linear1(m.norm2(a)).relu())))
        c = b + n.dropout1(n.self_attn(b, b, b, need_weights=False)[0])
        y = n.norm1(c)
        d = y + n.dropout2(n.linear2(n.dropout(n.linear1(y).relu())))
        return n.norm2(d) @ self.embed.weight.T, [("one", x, a), ("one", a, b), ("two", b, c), ("two", y, d)]


class Latents(nn.Module):
    """Perceiver's: a state that no input enters but by attention; behind it a class token that attends to the rest."""

    def __init__(self):
        super().__init__()
        self.latents, self.cls = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(1, 1, 8))
        self.cross, self.mlp, self.of_class, self.head = Attention(), mlp(), Attention(), nn.Linear(8, 5)

    def forward(self, x):
        z = self.latents.expand(len(x), -1, -1)
        z = z + self.cross(z, context=x)
        z = z + self.mlp(z)
        cls = self.cls.repeat(len(x), 1, 1)
        cls = cls + self.of_class(cls, context=torch.cat([cls, z], 1))
        return self.head(cls[:, 0])

    def expected(self, x):
        a = self.latents.repeat(len(x), 1, 1)
        b = a + self.cross(a, x)
        c = b + self.mlp(b)
        d = self.cls.expand(len(x), 1, 8)
        e = d + self.of_class(d, torch.cat([d, c], 1))
        return self.head(e.squeeze(1)), [("", a, b), ("", b, c), ("", d, e)]


class EncoderDecoder(nn.Module):
    """Two sequences of their own lengths; the decoder's block looks at the encoder's state."""

    def __init__(self):
        super().__init__()
        self.encoder, self.attn, self.cross, self.mlp = PreNorm(), Attention(), Attention(), mlp()

    def forward(self, source, target):
        memory = self.encoder(source)
        target = target + self.attn(target)
        target = target + self.cross(target, context=memory)
        return target + self.mlp(target)

    def expected(self, source, target):
        memory, pairs = self.encoder.by_hand(source)
        a = target + self.attn(target)
        b = a + self.cross(a, memory)
        c = b + self.mlp(b)
        return c, [*(("encoder", *pair) for pair in pairs), ("", target, a), ("", a, b), ("", b, c)]
