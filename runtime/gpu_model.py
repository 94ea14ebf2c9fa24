"""The decoder on a GPU: decode as one CUDA graph for each number of rows, prompts layer by layer. As `runtime.model`.

What the engine sees is the same: batches in, logits on the host out. A decode step is one replay: inputs, as the host
has written them, attention, predictor, neurons out of slots or main memory, the head and the way of the logits to the
host are all in the graph. Over a home on disk a step is a graph for each layer, with the host between them. On a CPU
the same code runs without graphs and streams (Triton's interpreter), which is how it is tested.
Shapes: B rows of a bucket, N rows of a batch, D hidden, H heads, d head size, V vocabulary, P blocks of a table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from runtime.batch import Batch, ModelCounters, SequenceView
from runtime.config import ModelConfig
from runtime.gpu_errors import device_checked
from runtime.gpu_ffn import GpuFFN, Wanted, product
from runtime.gpu_masks import Norm
from runtime.kernels.triton_attention import Splits, attend
from runtime.kernels.triton_inputs import FIELDS, inputs
from runtime.kernels.triton_matvec import MOST_ROWS, matvec
from runtime.kernels.triton_neurons import ACTIVE, PREDICTED
from runtime.kv_cache import KVCache
from runtime.model import LayerWeights, ModelWeights, apply_rope, rms_norm, rope_tables

_BESIDE = 2  # streams that rank slots while the layers go on: a ranking takes longer than a layer


@dataclass(frozen=True, slots=True)
class GpuLayer:
    """A layer's resident tensors: qkv one below the other."""

    input_layernorm: torch.Tensor  # [D]
    qkv: torch.Tensor  # [(H + 2 Hkv) d, D]
    qkv_bias: torch.Tensor | None
    o_proj: torch.Tensor  # [D, H d]
    o_bias: torch.Tensor | None
    ffn_norm: Norm

    @classmethod
    def of(cls, w: LayerWeights, eps: float, device: torch.device) -> GpuLayer:
        biases = [b for b in (w.q_bias, w.k_bias, w.v_bias) if b is not None]
        return cls(
            w.input_layernorm.to(device),
            torch.cat([w.q_proj.to(device), w.k_proj.to(device), w.v_proj.to(device)]),
            torch.cat(biases).float().to(device) if biases else None,
            w.o_proj.to(device),
            None if w.o_bias is None else w.o_bias.float().to(device),
            Norm(w.post_attention_layernorm.to(device), eps),
        )


Graphs = list[tuple[Callable[[], None], Wanted | None]]  # replays of a step, and what the host then sees to


class _Bucket:
    """The fixed tensors of a decode step of up to B rows, and its graph."""

    def __init__(self, rows: int, width: int, vocab_size: int, device: torch.device) -> None:
        pin = device.type == "cuda"
        self.rows = rows
        self.given = torch.zeros(rows, FIELDS + width, dtype=torch.int64, pin_memory=pin)  # token, position, slot, live
        self.fields = self.given.numpy()  # of the same memory: a few numbers are written faster so
        self.logits = torch.empty(rows, vocab_size, dtype=torch.float32, device=device)
        self.answer = torch.empty(rows, vocab_size, dtype=torch.float32, pin_memory=pin)
        self.graphs: dict[int | None, Graphs] = {}  # by which layers' slots are ranked again


class GpuModel:
    """weights may be anywhere, and are copied to the FFN's device. buckets: row counts that decode is captured for."""

    def __init__(
        self, config: ModelConfig, weights: ModelWeights, ffn: GpuFFN, max_model_len: int, buckets: Sequence[int]
    ) -> None:
        self.config, self._ffn, self._device = config, ffn, ffn.slots.device
        self._layers = [GpuLayer.of(w, config.rms_norm_eps, self._device) for w in weights.layers]
        self._embed = torch.as_tensor(weights.embed_tokens).to(self._device)
        tied = weights.lm_head is weights.embed_tokens
        self._norm, self._head = (
            weights.norm.to(self._device),
            self._embed if tied else weights.lm_head.to(self._device),
        )
        self._cos, self._sin = (t.to(self._device) for t in rope_tables(config, max_model_len))
        self._scale, self._sizes = config.head_dim**-0.5, tuple(sorted(buckets))
        self._max_model_len = max_model_len
        self._buckets: dict[int, _Bucket] = {}
        self._steps: Counter[str] = Counter(sparse=0, dense=0, prefill=0)
        self._rows = 0
        cuda = self._device.type == "cuda"
        self._beside = [torch.cuda.Stream(self._device) for _ in range(_BESIDE if cuda else 0)]  # type: ignore[no-untyped-call]
        self._own = torch.cuda.Stream(self._device) if cuda else None  # type: ignore[no-untyped-call]
        self._splits = Splits.make(self._sizes[-1], config.num_attention_heads, config.head_dim, self._device)

    def counters(self) -> ModelCounters:
        """As the last decode step that is done left them; waits for nothing."""
        seen, masks = self._ffn.slots.seen(), self._ffn.masks
        whole = (
            0 if masks is None else self._rows // len(self._layers) * masks.num_whole * self.config.intermediate_size
        )
        predicted = seen[PREDICTED] + whole  # the kernels count masks
        return ModelCounters(dict(self._steps), seen[ACTIVE], predicted, self._ffn.overflow, self._rows, 0)

    def forward(self, batch: Batch, kv: KVCache, check: Callable[[], None]) -> torch.Tensor | None:
        """As `forward_together`, of one batch."""
        return self.forward_together((batch,), kv, check)[0]

    @torch.inference_mode()
    def forward_together(
        self, batches: Sequence[Batch], kv: KVCache, check: Callable[[], None]
    ) -> list[torch.Tensor | None]:
        """As `runtime.model.Model.forward_together`; `check` is called before each graph and between the layers of a
        prompt. The logits of a decode batch that is the only one are lent, until the next call. Raises DeviceLostError.
        """
        with device_checked(self._device):
            return self._together(batches, kv, check)

    def _together(self, batches: Sequence[Batch], kv: KVCache, check: Callable[[], None]) -> list[torch.Tensor | None]:
        alone = sum(b.kind == "decode" for b in batches) == 1
        prompts = [b for b in batches if b.kind != "decode"]
        logits = iter(self._prompts(prompts, kv, check) if prompts else ())
        out: list[torch.Tensor | None] = []
        for batch in batches:
            if batch.kind != "decode":
                out.append(next(logits))
                continue
            logits_of = self._decode(batch, kv, check)
            out.append(logits_of if alone or logits_of is None else logits_of.clone())
        for kind in {"prefill" if b.kind == "prefill" else self._sparse_kind() for b in batches}:
            self._steps[kind] += 1
        return out

    def _sparse_kind(self) -> str:
        return "dense" if self._ffn.masks is None else "sparse"

    # --- decode ---

    def _decode(self, batch: Batch, kv: KVCache, check: Callable[[], None]) -> torch.Tensor | None:
        """Logits fp32 [N, V] on the host, the bucket's own where one step is enough."""
        most = self._sizes[-1]
        num, starts = len(batch.sequences), range(0, len(batch.sequences), most)
        if num <= most:
            parts = [self._decode_rows(batch, kv, check)]
        else:
            parts = [self._decode_rows(_rows_of(batch, i, i + most), kv, check).clone() for i in starts]
        self._rows += num * len(self._layers) if self._ffn.masks is not None else 0
        if batch.logits == "none":
            return None
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode_rows(self, batch: Batch, kv: KVCache, check: Callable[[], None]) -> torch.Tensor:
        num, size = len(batch.sequences), kv.block_size
        bucket = self._bucket(next(b for b in self._sizes if b >= num), kv)
        fields = bucket.fields
        if num < bucket.rows:
            fields[num:, :FIELDS] = 0, 0, -1, 0  # padding
        fields[:num, 0], fields[:num, 1], fields[:num, 3] = batch.token_ids.numpy(), batch.positions.numpy(), 1
        for row, view in enumerate(batch.sequences):  # the GPU waits meanwhile: no arrays are made
            block, place = divmod(view.start, size)
            fields[row, 2] = int(view.blocks[block]) * size + place
            width = min(len(view.blocks), fields.shape[1] - FIELDS)
            fields[row, FIELDS : FIELDS + width] = view.blocks[:width]
        self._run(bucket, kv, check)
        self._ffn.slots.stepped()
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self._ffn.settle()
        return bucket.answer[:num]

    def _run(self, bucket: _Bucket, kv: KVCache, check: Callable[[], None]) -> None:
        """bucket.answer of bucket.given, by its graphs where there are some."""
        check()
        turn = self._ffn.slots.turn
        for wanted in self._step(bucket, kv, turn) if not bucket.graphs else self._replayed(bucket.graphs[turn]):
            check()
            self._ffn.visit(wanted)

    def _replayed(self, graphs: Graphs) -> Iterator[Wanted]:
        for replay, wanted in graphs:
            replay()
            if wanted is not None:
                yield wanted

    def capture(self, kv: KVCache) -> None:
        """Graphs of all buckets, before the first request: compiling and capturing take seconds."""
        for rows in self._sizes:
            self._bucket(rows, kv)

    @torch.inference_mode()
    def _bucket(self, rows: int, kv: KVCache) -> _Bucket:
        if rows in self._buckets:
            return self._buckets[rows]
        width = -(-self._max_model_len // kv.block_size)
        bucket = _Bucket(rows, width, self.config.vocab_size, self._device)
        bucket.given[:, 2] = -1  # padding alone: nothing is written while it is captured
        if self._device.type == "cuda":
            self._warm(bucket, kv)
            pool = torch.cuda.graph_pool_handle()
            for turn in self._ffn.slots.turns:
                bucket.graphs[turn] = self._captured(bucket, kv, turn, pool)
        self._buckets[rows] = bucket
        return bucket

    def _warm(self, bucket: _Bucket, kv: KVCache) -> None:
        """Compiles, and makes the libraries' workspaces."""
        stream = self._own
        assert stream is not None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            list(self._step(bucket, kv, None))
            if self._ffn.slots.ranks:
                self._ffn.slots.rank(0, decay=1.0)
        torch.cuda.current_stream().wait_stream(stream)

    def _captured(self, bucket: _Bucket, kv: KVCache, turn: int | None, pool: Any) -> Graphs:
        step, graphs = self._step(bucket, kv, turn), Graphs()
        while not graphs or graphs[-1][1] is not None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=self._own):  # torch's may be one of those beside
                wanted = next(step, None)
            graphs.append((graph.replay, wanted))
        return graphs

    def _step(self, bucket: _Bucket, kv: KVCache, turn: int | None) -> Iterator[Wanted]:
        """bucket.answer of bucket.given; hands out what the host has to see to before it goes on. turn: whose slots are
        ranked again, each beside the layers after it, which leave the link idle at times."""
        rows, width = bucket.rows, bucket.given.shape[1] - FIELDS
        fields = torch.empty(FIELDS, rows, dtype=torch.int64, device=self._device)
        tables = torch.empty(rows, width, dtype=torch.int64, device=self._device)
        x = torch.empty(rows, self.config.hidden_size, device=self._device)
        inputs(bucket.given, self._embed, fields, tables, x)
        _, positions, slots, live = fields
        ranking: list[torch.cuda.Stream] = []
        norms = [w.ffn_norm for w in self._layers]
        for layer, (w, following) in enumerate(zip(self._layers, (*norms[1:], None), strict=True)):
            self._attended(layer, w, x, tokens=(positions, slots), tables=tables, kv=kv)
            wanted = self._ffn.ask(layer, x, w.ffn_norm, live, following)
            if self._ffn.visited:
                yield wanted
            self._ffn.answer(wanted)
            if self._ffn.slots.has_turn(layer, turn):
                self._rank(layer, ranking)
        if rows <= MOST_ROWS:
            matvec(x, self._head, bucket.logits, self._norm, self.config.rms_norm_eps)
        else:
            bucket.logits.copy_(self._logits(x))
        bucket.answer.copy_(bucket.logits, non_blocking=True)
        for stream in ranking:
            torch.cuda.current_stream().wait_stream(stream)
        self._ffn.slots.note()

    def _rank(self, layer: int, ranking: list[torch.cuda.Stream]) -> None:
        """On one of the streams beside, in turn; ranking: those that are in use so far."""
        if not self._beside:
            self._ffn.slots.rank(layer)
            return
        stream = self._beside[0]
        self._beside.append(self._beside.pop(0))
        if stream not in ranking:
            ranking.append(stream)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._ffn.slots.rank(layer)

    def _attended(
        self,
        layer: int,
        w: GpuLayer,
        x: torch.Tensor,
        tokens: tuple[torch.Tensor, torch.Tensor],
        tables: torch.Tensor,
        kv: KVCache,
    ) -> None:
        """Adds attention's output to rows x fp32 [B, D], each at its own position of its own sequence."""
        c, (positions, slots), few = self.config, tokens, x.shape[0] <= MOST_ROWS
        if few:
            qkv = torch.empty(x.shape[0], w.qkv.shape[0], device=x.device)
            matvec(x, w.qkv, qkv, w.input_layernorm, c.rms_norm_eps, w.qkv_bias)
        else:
            qkv = self._qkv(w, x)
        out = torch.empty(x.shape[0], c.num_attention_heads, c.head_dim, device=x.device)
        attend(
            qkv.view(x.shape[0], -1, c.head_dim), self._cos, self._sin, positions, slots, kv.keys[layer],
            kv.values[layer], tables, self._splits, out, self._scale,
        )  # fmt: skip
        if few:
            matvec(out.flatten(1), w.o_proj, x, bias=w.o_bias, added=True)
        else:
            x += self._projected(w, out)

    def _qkv(self, w: GpuLayer, x: torch.Tensor) -> torch.Tensor:
        """fp32 [N, H + 2 Hkv, d], before rotation."""
        out = linear(rms_norm(x, w.input_layernorm, self.config.rms_norm_eps), w.qkv)
        return (out if w.qkv_bias is None else out + w.qkv_bias).view(x.shape[0], -1, self.config.head_dim)

    def _projected(self, w: GpuLayer, attended: torch.Tensor) -> torch.Tensor:
        out = linear(attended.flatten(1), w.o_proj)
        return out if w.o_bias is None else out + w.o_bias

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        return linear(rms_norm(x, self._norm, self.config.rms_norm_eps), self._head)

    # --- prompts, and texts that are scored ---

    def _prompts(self, batches: Sequence[Batch], kv: KVCache, check: Callable[[], None]) -> list[torch.Tensor | None]:
        rows = [_Prompt(b, self._embed, kv) for b in batches]
        dense = [r for r in rows if r.batch.kind == "prefill" or self._ffn.masks is None]
        sparse = [r for r in rows if r not in dense]
        if dense:
            self._ffn.begin()
        for layer, w in enumerate(self._layers):
            check()
            for part in rows:
                part.x = part.x + self._attended_together(layer, w, part, kv)
            hs = [rms_norm(r.x, w.ffn_norm.weight, w.ffn_norm.eps) for r in dense]
            for part, out in zip(dense, self._ffn.prefill(layer, hs) if hs else (), strict=True):
                part.x = part.x + out
            for part in sparse:
                self._scored(layer, w, part)
        self._ffn.slots.note()
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self._ffn.settle()
        return [self._wanted(part) for part in rows]

    def _scored(self, layer: int, w: GpuLayer, part: _Prompt) -> None:
        """The FFN of rows under the sparse semantics, as many at a time as decode takes."""
        size = self._sizes[-1]
        for start in range(0, part.x.shape[0], size):
            x = part.x[start : start + size]
            padded = torch.zeros(size, x.shape[1], device=x.device)
            padded[: x.shape[0]] = x
            live = (torch.arange(size, device=x.device) < x.shape[0]).long()
            self._ffn.decode(layer, padded, w.ffn_norm, live)
            part.x[start : start + size] = padded[: x.shape[0]]
        if layer == 0:
            self._rows += part.x.shape[0] * len(self._layers)

    def _attended_together(self, layer: int, w: GpuLayer, part: _Prompt, kv: KVCache) -> torch.Tensor:
        c, view = self.config, part.batch.sequences[0]
        q, k, v = torch.split(
            self._qkv(w, part.x), [c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads], dim=1
        )
        cos, sin = self._cos[part.positions], self._sin[part.positions]
        kv.write(layer, part.slots, apply_rope(k, cos, sin), v)
        keys, values = kv.gather(layer, view.blocks, view.start + view.length)
        out = attend_rows(apply_rope(q, cos, sin).to(keys.dtype), keys, values, view.start, self._scale)
        return self._projected(w, out.float())

    def _wanted(self, part: _Prompt) -> torch.Tensor | None:
        if part.batch.logits == "none":
            return None
        return self._logits(part.x[-1:] if part.batch.logits == "last" else part.x).cpu()


class _Prompt:
    """A batch on its way through the layers."""

    def __init__(self, batch: Batch, embed: torch.Tensor, kv: KVCache) -> None:
        self.batch = batch
        self.x = embed[batch.token_ids.to(embed.device)].float()  # [N, D]
        self.positions = batch.positions.to(embed.device)
        self.slots = kv.slots(batch).to(embed.device)


def _rows_of(batch: Batch, start: int, stop: int) -> Batch:
    """Some rows of a decode batch."""
    views: tuple[SequenceView, ...] = batch.sequences[start:stop]
    return replace(batch, token_ids=batch.token_ids[start:stop], positions=batch.positions[start:stop], sequences=views)


def attend_rows(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, scale: float) -> torch.Tensor:
    """Causal attention of one sequence's rows from position `start` on: q [N, H, d], keys and values [T, Hkv, d] of one
    dtype, T = start + N; [N, H, d]. Heads that share keys become rows, since with a mask torch's own grouping would
    write keys and values out for every head."""
    (num, heads, size), kv_heads = q.shape, keys.shape[1]
    group, places = heads // kv_heads, torch.arange(keys.shape[0], device=q.device)
    mask = (places[None, :] <= places[start:, None]).repeat(group, 1)  # [group N, T]
    grouped = q.view(num, kv_heads, group, size).permute(1, 2, 0, 3).reshape(1, kv_heads, group * num, size)
    out = F.scaled_dot_product_attention(
        grouped, keys.transpose(0, 1)[None], values.transpose(0, 1)[None], attn_mask=mask, scale=scale
    )
    return out.view(kv_heads, group, num, size).permute(2, 0, 1, 3).reshape(num, heads, size)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x fp32 [N, D] times weight [M, D] transposed, fp32; x is rounded to the weight's dtype."""
    return product(x.to(weight.dtype), weight)
