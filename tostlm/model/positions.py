"""Where the tokens of a forward pass are: in the context, and in the documents packed into it.

Shapes: B sequences, T tokens of this rank, S tokens of all ranks that share the context.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from tostlm.parallel import all_gather
from tostlm.shapes import Bool, Float, Int


class Spans(NamedTuple):
    """Runs of tokens of one document, sequence by sequence, that attention goes through one by one.

    Of the B S queries that follow one another, and the B end keys, each span has those between two bounds; a query
    reads the keys of its span up to its own token's, of which it is as far from the last. Keys that no query reads, as
    their documents have ended, are spans without queries.
    """

    queries: Tensor  # [N + 1] int32, bounds
    keys: Tensor  # [N + 1] int32

    @classmethod
    def build(cls, past: int, end: int, document_start: Tensor) -> Spans:
        """Build the spans of tokens `past` to `end`, whose documents start at tokens [B, end - past] or [B, 1]."""
        first = document_start.expand(-1, end - past)  # [B, S]
        opens = F.pad(first[:, 1:] != first[:, :-1], (1, 0), value=True)
        sequence, query = opens.nonzero(as_tuple=True)
        queries, keys = sequence * (end - past) + query, sequence * end + first[sequence, query]
        if past:  # and before the first of each sequence those that it does not read
            ended = torch.arange(first.shape[0], device=first.device)
            order = torch.cat([sequence * 2 + 1, ended * 2]).argsort(stable=True)
            queries = torch.cat([queries, ended * (end - past)])[order]
            keys = torch.cat([keys, ended * end])[order]
        totals = first.shape[0] * (end - past), first.shape[0] * end
        return cls(*(F.pad(x, (0, 1), value=n).int() for x, n in zip((queries, keys), totals, strict=True)))


class SequencePositions(NamedTuple):
    """Positions of one call's tokens, which are numbered from 0 at the start of the context.

    A document reaches from one True of `document_start_mask` to the next. Nothing before its first token influences it.
    """

    start: int  # number of this rank's first token
    end: int  # tokens of the context up to and including this call's, of all ranks
    document_start_mask: Tensor | None  # [B, T] bool, True at the first token of a document
    document_start: Tensor | None  # [B, T] or [B, 1], number of the first token of each token's document; None is 0
    last_document_start: Tensor | None  # [B, 1], the same for the document that the context ends in
    positions: Tensor  # [T] or [B, T], of each token in its document
    spans: Spans | None  # of the S tokens and their keys; None where attention is plainly causal
    step_mask: Tensor | None  # [B, 1, 1, end], which keys a single token reads; None where it reads all
    group: dist.ProcessGroup | None  # the ranks that hold T consecutive tokens each, where they share the context

    @classmethod
    def build(
        cls,
        tokens: Int[Tensor, "B T"],
        past: int,
        document_start: Int[Tensor, "B 1"] | None,
        document_start_mask: Bool[Tensor, "B T"] | None,
        with_spans: bool,
        group: dist.ProcessGroup | None = None,
    ) -> SequencePositions:
        """Build the positions of this rank's tokens after `past` tokens of the context. All ranks of a group must call.

        Args:
            document_start: [B, 1], number of the first token of the document each sequence is in after `past` tokens;
                None where no document has started since token 0.
            with_spans: whether some mixer needs `spans` and `step_mask`.
        """
        T, device = tokens.shape[1], tokens.device
        rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
        start, end = past + rank * T, past + ranks * T
        numbers = torch.arange(start, start + T, device=device)
        own = last = starts_of_all_ranks = document_start
        if document_start_mask is not None:
            before = 0 if document_start is None else document_start
            own = starts_of_all_ranks = numbers.where(document_start_mask, before).cummax(1).values
            last = own[:, -1:].clone()  # a view would keep all T alive
            if group is not None:
                lasts = all_gather(last, group).cummax(0).values
                last = lasts[-1]
                own = starts_of_all_ranks = own.maximum(lasts[rank - 1]) if rank else own
                if with_spans:
                    starts_of_all_ranks = all_gather(own, group).movedim(0, 1).flatten(1)  # [B, S]
        positions = numbers if own is None else numbers - own
        spans = step_mask = None
        starts = starts_of_all_ranks
        if with_spans and end - past == 1:
            step_mask = None if starts is None else (torch.arange(end, device=device) >= starts)[:, None, None]
        elif with_spans and (past or starts is not None):
            spans = Spans.build(past, end, tokens.new_zeros(tokens.shape[0], 1) if starts is None else starts)
        return cls(start, end, document_start_mask, own, last, positions, spans, step_mask, group)

    def lookup(self, table: Float[Tensor, "P K"]) -> Float[Tensor, "*positions K"]:
        """Return the rows of a position table [P, K] at the tokens' positions: [T, K], or [B, T, K] with documents.

        Tokens beyond the table have its last row.
        """
        if self.document_start is None and self.end <= len(table):
            return table[self.start : self.start + self.positions.shape[-1]]
        return F.embedding(self.within(len(table)), table)

    def within(self, limit: int) -> Int[Tensor, "*positions"]:
        """Return the tokens' positions, of those from `limit` on the last one before."""
        return self.positions.clamp(max=limit - 1)

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document in this call so far, or of the context where no document ever started."""
        if self.document_start is None:
            return self.end
        position = self.positions.max()
        return int(position if self.group is None else all_gather(position, self.group).max()) + 1
