"""Losses of image-text pairs over all pairs of all ranks: pairwise sigmoid (arXiv:2303.15343) and softmax (CLIP, arXiv:2103.00020).

Gradients have closed forms, so they are summed while the loss is: nothing of size batch x batch is kept for backward, and backward sends
nothing. What is kept is two tensors of the embeddings' size on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize, softplus

from gentrain.methods.base import Group

Exchange = Literal["two_way_ring", "ring", "gather"]

LARGEST_SCALE = 100.0  # of exp(t'), as CLIP has it (arXiv:2103.00020, section 2.5)
_CHUNK = 2**20  # logits computed at once: 4 MiB
_EXACT = 50.0  # softplus(x) = x beyond it, to the last bit of float64


def sigmoid_contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    labels: Tensor | None = None,
    group: Group | None = None,
    chunk_size: int | None = None,
    exchange: Exchange = "two_way_ring",
) -> Tensor:
    """(1 / B) sum_ij softplus(-y_ij l_ij), l_ij = exp(min(t', ln 100)) u_i . v_j + b, i over this rank's B rows, j over all ranks' pairs.

    arXiv:2303.15343, equation 1 (its signs as in the authors' later text: l = t s + b with b < 0). The mean over the ranks is the loss of
    the global batch, and gradients averaged over the ranks are its gradients. A row that is zero stays zero when normalised.

    The texts travel, and bring their gradient home if they have one. The sum is symmetric: where the images have none and the texts do,
    change their places, and the labels' meaning with them, and nothing is brought home.

    Args:
        image, text: [B, D], not normalised; the logits are float32, or float64 when these are. The same B on every rank.
        logit_scale: t', the logarithm of the temperature's inverse; one element. No gradient above ln 100.
        logit_bias: b; one element.
        labels: [B, B * ranks] of this rank's images and all texts in rank order: 1 = match, -1 = none, 0 = left out. None = 1 where the
            pair is one, else -1.
        group: the ranks; None = this process alone.
        chunk_size: rows whose logits are computed at once; None = as many as make 4 MiB of logits.
        exchange: how texts reach the other ranks: round a ring half each way, round it one way, or all at once (memory B * ranks * D).

    Raises ValueError for wrong shapes, and on all ranks if their B or D differ. All ranks must call it alike and hand backward the same
    gradient.
    """
    _check(image, text, labels, group, chunk_size)
    dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
    with torch.autocast(image.device.type, enabled=False):
        rows = _unit(image, dtype) * _scale(logit_scale, dtype)
        columns = _unit(text, dtype)
        wanted = (rows.requires_grad, columns.requires_grad) if torch.is_grad_enabled() else (False, False)
        value: Tensor = _Pairs.apply(rows, columns, logit_bias.to(dtype).reshape(1), labels, group, chunk_size, exchange, wanted)
    return value


def softmax_contrastive_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, group: Group | None = None, chunk_size: int | None = None
) -> Tensor:
    """Half the cross-entropies of image -> text and text -> image among the pairs of all ranks, averaged over this rank's rows.

    arXiv:2103.00020, figure 3. Arguments, contract between ranks and errors are those of `sigmoid_contrastive_loss`; all embeddings are
    gathered on every rank.
    """
    _check(image, text, None, group, chunk_size)
    dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
    with torch.autocast(image.device.type, enabled=False):
        value: Tensor = _Softmax.apply(_unit(image, dtype) * _scale(logit_scale, dtype), _unit(text, dtype), group, chunk_size)
    return value


def _unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    return normalize(x.to(dtype), dim=1, eps=1e-6)


def _scale(logit_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return logit_scale.to(dtype).reshape(1).clamp(max=math.log(LARGEST_SCALE)).exp()


def _check(image: Tensor, text: Tensor, labels: Tensor | None, group: Group | None, chunk_size: int | None) -> None:
    ranks = 1 if group is None else group.size
    wrong = ""
    if image.ndim != 2 or image.shape != text.shape or not len(image):
        wrong = f"image and text must both be [B, D] with B > 0, got {tuple(image.shape)} and {tuple(text.shape)}"
    elif labels is not None and labels.shape != (len(image), len(image) * ranks):
        wrong = f"labels must be [{len(image)}, {len(image) * ranks}] (this rank's rows, all columns), got {tuple(labels.shape)}"
    elif chunk_size is not None and chunk_size < 1:
        wrong = f"chunk_size must be at least 1, got {chunk_size}"
    if group is not None and ranks > 1:  # agreed on before anything of a size is exchanged: a rank that gave up would hang the others
        shapes = group.gather(torch.tensor([[image.shape[0], image.shape[-1], int(bool(wrong))]])).tolist()
        if not wrong and any(shape[2] for shape in shapes):
            wrong = "another rank was given wrong shapes"
        if not wrong and any(shape != shapes[0] for shape in shapes):
            sizes = ", ".join(f"[{rows}, {width}]" for rows, width, _ in shapes)
            wrong = f"all ranks must have as many pairs of one width, got {sizes}; drop the last batch or fill it up with labels 0"
    if wrong:
        raise ValueError(wrong)


class _Pairs(torch.autograd.Function):
    """sum_ij softplus(-y_ij l_ij) / B with l = rows columns^T + bias; rows stay, columns travel and bring their gradient home."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, bias: Tensor, labels: Tensor | None,
        group: Group | None, chunk_size: int | None, exchange: Exchange, wanted: tuple[bool, bool],
    ) -> Tensor:  # fmt: skip
        sums = _Sums(rows, bias, wanted, chunk_size)
        if group is None or group.size == 1:
            home = sums.add(columns, labels, 0)
        elif exchange == "gather":
            home = _gathered(sums, columns, labels, group)
        else:
            home = _circulated(sums, columns, labels, group, two_way=exchange == "two_way_ring")
        ctx.save_for_backward(sums.rows, home, sums.bias)
        ctx.count = len(rows)
        return sums.value / len(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        share = gradient / ctx.count
        of = [None if saved is None else share * saved for saved in ctx.saved_tensors]
        return *of, None, None, None, None, None


class _Sums:
    """The loss of this rank's rows against blocks of columns, and its gradients, none of them divided by anything."""

    def __init__(self, rows: Tensor, bias: Tensor, wanted: tuple[bool, bool], chunk_size: int | None):
        self._rows, self._bias, self._columns_learn, self._chunk_size = rows, bias, wanted[1], chunk_size
        self.value = rows.new_zeros(())
        self.rows = torch.zeros_like(rows) if wanted[0] else None
        self.bias = torch.zeros_like(bias)

    def add(self, columns: Tensor, labels: Tensor | None, own: int | None) -> Tensor | None:
        """Adds a block [n, D]; returns the gradient of its columns, if they learn. labels [B, n], or None: row i matches column own + i."""
        gradient = torch.zeros_like(columns) if self._columns_learn else None
        step = self._chunk_size or max(1, _CHUNK // len(columns))
        for start in range(0, len(self._rows), step):
            rows = self._rows[start : start + step]
            logits = torch.addmm(self._bias, rows, columns.T)
            if labels is None:
                slope = self._unlabelled(logits, None if own is None else own + start)
            else:
                slope = self._labelled(logits, labels[start : start + step])
            self.bias += slope.sum()
            if self.rows is not None:
                self.rows[start : start + step].addmm_(slope, columns)
            if gradient is not None:
                gradient.addmm_(slope.T, rows)
        return gradient

    def _unlabelled(self, logits: Tensor, own: int | None) -> Tensor:
        """The loss's derivative by the logits, in their place."""
        self.value += softplus(logits, threshold=_EXACT).sum()
        if own is None:
            return logits.sigmoid_()
        self.value -= logits.diagonal(own).sum()  # softplus(-l) = softplus(l) - l
        slope = logits.sigmoid_()
        slope.diagonal(own).sub_(1)
        return slope

    def _labelled(self, logits: Tensor, labels: Tensor) -> Tensor:
        sign = labels.to(logits.dtype)
        against = logits.mul_(-sign)
        self.value += (softplus(against, threshold=_EXACT) * sign.abs()).sum()
        return against.sigmoid_().mul_(-sign)


def _gathered(sums: _Sums, columns: Tensor, labels: Tensor | None, group: Group) -> Tensor | None:
    first = group.rank * len(columns)
    gradient = sums.add(group.gather(columns), labels, first)
    return None if gradient is None else _own_part(gradient, group)


def _own_part(gradient: Tensor, group: Group) -> Tensor:
    """The sum over the ranks of what each has for this rank's columns; gradient [B * ranks, D]."""
    count = len(gradient) // group.size
    return group.mean(gradient)[group.rank * count :][:count] * group.size


def _circulated(sums: _Sums, columns: Tensor, labels: Tensor | None, group: Group, two_way: bool) -> Tensor | None:
    count, others = len(columns), group.size - 1
    routes = [(1, (others + 1) // 2), (-1, others // 2)] if two_way else [(1, others)]
    streams = [_Stream(group, columns, step, visits) for step, visits in routes if visits]

    def block(rank: int) -> Tensor | None:
        return None if labels is None else labels[:, rank * count : (rank + 1) * count]

    home = sums.add(columns, block(group.rank), 0)
    for visit in range(1, streams[0].visits + 1):
        moving = [stream for stream in streams if visit <= stream.visits]
        for stream in moving:  # both ways at once, and while the logits are computed
            stream.forward(visit)
        for stream in moving:
            owner = (group.rank - stream.step * visit) % group.size
            stream.keep(visit, sums.add(stream.held, block(owner), None))
    if home is not None:
        for returned in [stream.go_home() for stream in streams]:
            home += returned()
    return home


class _Stream:
    """Columns on their way round the ring in steps of 1 or -1, each block with its gradient one visit behind it in one message.

    At visit k a rank holds the block of the rank k steps before it. It passes the block on while it computes, together with the gradient
    that the previous block now has; so the gradient of the block it holds arrives meanwhile.
    """

    def __init__(self, group: Group, columns: Tensor, step: int, visits: int):
        self.step, self.visits, self._group = step, visits, group
        self.held = columns
        self._gradient: Tensor | None = None  # of the block held at the visit before
        self._arriving: Callable[[], Tensor] | None = group.shift(columns, step)

    def forward(self, visit: int) -> None:
        if visit == 1 and self._arriving is not None:
            self.held = self._arriving()
        parts = [self.held] if visit < self.visits else []
        if self._gradient is not None:
            parts.append(self._gradient)
        self._arriving = self._group.shift(torch.cat(parts), self.step) if parts else None

    def keep(self, visit: int, gradient: Tensor | None) -> None:
        """Adds this rank's part to the gradient of the block it holds, and takes the next block."""
        parts = [] if self._arriving is None else list(self._arriving().split(len(self.held)))
        if self._gradient is not None and gradient is not None:
            gradient += parts.pop()
        self._gradient = gradient
        if visit < self.visits:
            self.held = parts.pop()

    def go_home(self) -> Callable[[], Tensor]:
        assert self._gradient is not None
        return self._group.shift(self._gradient, -self.step * self.visits)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, group: Group | None, chunk_size: int | None) -> Tensor:
        rank = 0 if group is None else group.rank
        both = [image, text] if group is None else [group.gather(image), group.gather(text)]
        far = [torch.zeros_like(all_) for all_ in both]
        near = [torch.zeros_like(image), torch.zeros_like(text)]
        value = image.new_zeros(())
        step = chunk_size or max(1, _CHUNK // len(both[0]))
        for side, rows in enumerate((image, text)):
            columns = both[1 - side]
            for start in range(0, len(rows), step):
                piece = rows[start : start + step]
                logits = piece @ columns.T
                own = rank * len(rows) + start
                value += logits.logsumexp(1).sum() - logits.diagonal(own).sum()
                slope = logits.softmax(1)
                slope.diagonal(own).sub_(1)
                near[side][start : start + step] = slope @ columns
                far[1 - side].addmm_(slope.T, piece)
        if group is not None:
            far = [_own_part(gradient, group) for gradient in far]
        ctx.save_for_backward(*(n.add_(f) for n, f in zip(near, far, strict=True)))
        ctx.count = 2 * len(image)
        return value / ctx.count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        share = gradient / ctx.count
        image, text = ctx.saved_tensors
        return share * image, share * text, None, None
