"""Pipeline parallelism: the layers are divided into stages, and the micro-batches of a step pass through them.

A stage is a decoder with some of the layers, under their global names; the first embeds the tokens, the last has the
head. All ranks of a pipeline read the same rows; only hidden states and their gradients travel. The order of the passes
is that of `torch.distributed.pipelining`: "1F1B" (arXiv:1806.03377), one stage per rank, or "interleaved"
(arXiv:2104.04473), several of them per rank, for a smaller bubble.

A tied table is on the first and on the last stage: its gradients are summed over the two, so both copies stay equal.

Axes: B batch, T position in the row, C hidden size.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from torchxihe.config.options import Config, Model, Parallelism
from torchxihe.data.loader import Batch
from torchxihe.model.decoder import Decoder
from torchxihe.model.flops import head_in_layers
from torchxihe.parallelisms.dims import ParallelDims
from torchxihe.utils.distributed import local_part

TABLE = "embed_tokens.weight"


def stage_layers(model: Model, seq_len: int, stages: int) -> list[range]:
    """The layers of each stage: at least one each, so that the slowest stage has the least work, the head counted."""
    counts, work = [1] * stages, [1.0] * stages
    work[-1] += head_in_layers(model, seq_len)
    for _ in range(model.num_hidden_layers - stages):
        least = work.index(min(work))
        counts[least] += 1
        work[least] += 1
    ends = [sum(counts[: i + 1]) for i in range(stages)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def describe_stages(layers: list[range], parallelism: Parallelism) -> str:
    """For the log: "1F1B, layers 0-6 | 7-11 + head"."""
    parts = [f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in layers]
    return f"{parallelism.pp_schedule}, layers {' | '.join(parts)} + head"


def keep_stage(model: Decoder, stage: int, layers: list[range]) -> None:
    """Reduce a model on `meta` to one stage, in place; what is left keeps its name."""
    model.first, model.last = stage == 0, stage == len(layers) - 1
    for i in range(len(model.layers)):
        if i not in layers[stage]:
            del model.layers._modules[str(i)]  # `del model.layers[i]` would renumber the rest
    tied = model.config.tie_word_embeddings
    if not model.first and not (model.last and tied):
        del model.embed_tokens
    if not model.last:
        del model.norm
        if not tied:
            del model.lm_head


class Pipeline(nn.ModuleList):
    """This rank's stages, a decoder each, and their schedule."""

    def __init__(self, parts: list[Decoder], config: Config, dims: ParallelDims) -> None:
        super().__init__(parts)
        self._config, self._dims, group = config.parallelism, dims, dims.group("pp")
        assert group is not None
        self._group = group
        self._micro_batches, self._schedule = 0, cast("Any", None)
        self._batches: list[Batch] = []
        self._tokens, self._losses = torch.ones(()), dict[int, Tensor]()
        self._sent: tuple[dist.Work | None, Tensor | None] = None, None
        table = dict(self.named_parameters()).get(TABLE)
        self._tied = table if parts[0].config.tie_word_embeddings else None
        for part in parts:
            # First of all hooks: FSDP2's would move the number of a micro-batch to the GPU, and the host would wait.
            part.register_forward_pre_hook(self._insert_batch, prepend=True, with_kwargs=True)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:  # type: ignore[override]
        """The parameters of all parts by their global names, as those of a decoder."""
        for part in self:
            yield from part.named_parameters(*args, **kwargs)

    @property
    def copied(self) -> frozenset[str]:
        """Names of the parameters here that are copies of an earlier stage's."""
        return frozenset(name for name, _ in self.named_parameters() if name == TABLE and self._dims.rank("pp"))

    def forward_backward(self, batches: list[Batch], tokens: Tensor) -> list[Tensor]:
        """All passes of a step, with the loss divided by `tokens` (float32 scalar); sums the gradients over `batches`.

        Returns the losses of each micro-batch by row (float32 [B]) on the ranks with the last stage, nothing on others.
        """
        if len(batches) != self._micro_batches:
            self._micro_batches, self._schedule = len(batches), self._build(batches[0], len(batches))
        self._batches, self._tokens, self._losses = batches, tokens, {}
        index = torch.arange(len(batches))  # the schedule divides it: each pass is called with its batch's number
        try:
            self._schedule.step(mb=index, target=index, return_outputs=False)
        except RuntimeError as error:  # the schedule's "failed to run forward", around what has happened
            raise error.__cause__ or error from None
        self._sum_tied_gradients()
        return [self._losses[i] for i in sorted(self._losses)]

    def _build(self, batch: Batch, micro_batches: int) -> Any:
        """The schedule of steps of so many micro-batches."""
        hidden = self._hidden(batch.tokens, "meta").requires_grad_()
        outputs = torch.empty((), device="meta", requires_grad=True), torch.empty(len(batch.tokens), device="meta")
        count, rank = len(self) * self._dims.pp, self._dims.rank("pp")
        stages: list[Any] = [
            PipelineStage(
                part,
                rank + i * self._dims.pp,
                count,
                batch.tokens.device,
                group=self._group,
                input_args=() if part.first else hidden,
                output_args=outputs if part.last else hidden,
            )
            for i, part in enumerate(self)
        ]
        options: dict[str, Any] = {"loss_fn": self._loss, "scale_grads": False}
        if self._config.pp_schedule == "1F1B":
            return Schedule1F1B(stages[0], micro_batches, **options)
        return ScheduleInterleaved1F1B(stages, micro_batches, **options)

    def _insert_batch(self, part: Decoder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace the number of a micro-batch, which is all that the schedule knows of it, by its tensors."""
        if "mb" not in kwargs:
            return None
        batch = self._batches[int(kwargs["mb"])]
        inputs = {"x_BTC": args[0]} if args else {}
        return (batch.tokens, batch.targets, batch.cu_seqlens, batch.positions), inputs

    def _loss(self, output: tuple[Tensor, Tensor], index: Tensor) -> Tensor:
        loss, self._losses[int(index)] = output
        return loss / self._tokens

    def _hidden(self, tokens: Tensor, device: torch.device | str) -> Tensor:
        """Memory for what passes between two stages: [B, T, C], of tensor parallelism this rank's tokens [n, C]."""
        part: Decoder = self[0]  # type: ignore[assignment]
        n, width, tp = tokens.numel(), part.config.hidden_size, self._dims.tp
        shape = (*tokens.shape, width) if tp == 1 or n % tp else (n // tp, width)
        return torch.empty(shape, dtype=part.dtype, device=device)

    @torch.no_grad()
    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions_T: Tensor | None = None,
    ) -> Any:
        """As `Decoder.forward`, through all stages, without gradients; called on all ranks of the pipeline together.

        With targets, ranks without the last stage return (None, None); without, all return the logits.
        """
        pp, rank = self._dims.pp, self._dims.rank("pp")
        out: Any = None
        for part in self:
            x = None
            if not part.first:
                x = self._hidden(tokens_BT, tokens_BT.device)
                dist.recv(x, group=self._group, group_src=(rank - 1) % pp)
            out = part(tokens_BT, targets_BT, cu_seqlens, positions_T, x)
            if not part.last:
                self._send(out, (rank + 1) % pp)
        last: Decoder = self[-1]  # type: ignore[assignment]
        if targets_BT is not None:
            return out if last.last else (None, None)
        if last.last:
            out = out.contiguous()  # a broadcast would send the memory of a view's first elements
        else:
            out = tokens_BT.new_empty(*tokens_BT.shape, last.config.vocab_size, dtype=last.dtype)
        dist.broadcast(out, group=self._group, group_src=pp - 1)
        return out

    def _send(self, x: Tensor, to: int) -> None:
        """Send to a rank of the pipeline; returns while that is under way."""
        work, _ = self._sent
        if work is not None:
            work.wait()
        x = x.contiguous()
        self._sent = dist.isend(x, group=self._group, group_dst=to), x

    def _sum_tied_gradients(self) -> None:
        """Add the gradient of the other copy of a tied table to this one's."""
        if self._tied is None:
            return
        assert self._tied.grad is not None
        peer = 0 if self._dims.rank("pp") else self._dims.pp - 1
        mine = local_part(self._tied.grad)
        other = torch.empty_like(mine)
        exchange = [
            dist.P2POp(dist.isend, mine, group=self._group, group_peer=peer),
            dist.P2POp(dist.irecv, other, group=self._group, group_peer=peer),
        ]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        mine += other
