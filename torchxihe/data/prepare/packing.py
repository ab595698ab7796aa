"""Packing documents into rows of a fixed length: two pure functions.

Documents come as (start, length) in a split's tokens, int64 [n, 2]. Rows go out as pieces, each a document or a part
of one: `starts` int64 [rows + 1] are the rows' places in `pieces` int64 [m, 2], again (start, length). Every token of
every document is in exactly one piece.
"""

import numpy as np

AT_ONCE = 2**20
"""Documents that are packed together; bounds the memory."""

Packed = tuple[np.ndarray, np.ndarray]


def concat(documents: np.ndarray, width: int) -> Packed:
    """Rows are consecutive windows of `width` tokens over the documents laid end to end; the last may be shorter."""
    ends = np.cumsum(documents[:, 1])
    begins = ends - documents[:, 1]
    total = int(documents[:, 1].sum())
    windows = np.arange(0, total, width)
    places = np.union1d(begins, windows)  # a piece begins where a document or a window does
    document = np.searchsorted(ends, places, side="right")
    offsets = documents[document, 0] + places - begins[document]
    lengths = np.diff(places, append=total)
    starts = np.append(np.searchsorted(places, windows), len(places))
    return starts, np.stack([offsets, lengths], 1)


def best_fit(documents: np.ndarray, width: int) -> Packed:
    """Best-fit-decreasing: the longest piece first, each into the fullest row that still holds it.

    Documents longer than `width` are cut into pieces of `width` and a rest. Pieces of one length are placed together,
    which is the same as one by one: the fullest row that holds one of them stays the fullest until it holds no more.
    """
    pieces = _fragments(documents, width)
    order = np.argsort(-pieces[:, 1], kind="stable")
    pieces = pieces[order]
    row_of = np.empty(len(pieces), np.int64)
    rows = 0
    room: list[list[np.ndarray]] = [[] for _ in range(width + 1)]  # open rows by the room that is left in them
    count = np.zeros(width + 1, np.int64)
    lengths, firsts, amounts = np.unique(-pieces[:, 1], return_index=True, return_counts=True)
    for length, at, amount in zip((-lengths).tolist(), firsts.tolist(), amounts.tolist(), strict=True):
        while amount:
            held = np.flatnonzero(count[length:])
            space = length + int(held[0]) if len(held) else width
            if not len(held):
                fresh = -(-amount // (width // length))
                room[width], count[width] = [np.arange(rows, rows + fresh)], fresh
                rows += fresh
            each = min(space // length, amount)
            bins = np.concatenate(room[space])
            use = min(len(bins), amount // each)
            room[space], count[space] = [bins[use:]], len(bins) - use
            placed = use * each
            row_of[at : at + placed] = np.repeat(bins[:use], each)
            left = space - each * length
            if left:
                room[left].append(bins[:use])
                count[left] += use
            at, amount = at + placed, amount - placed
    by_row = np.argsort(row_of, kind="stable")
    starts = np.searchsorted(row_of[by_row], np.arange(rows + 1))
    return starts.astype(np.int64), pieces[by_row]


def _fragments(documents: np.ndarray, width: int) -> np.ndarray:
    """The documents, cut so that none is longer than `width`."""
    parts = -(-documents[:, 1] // width)
    document = np.repeat(np.arange(len(documents)), parts)
    part = np.arange(len(document)) - np.repeat(np.cumsum(parts) - parts, parts)
    starts = documents[document, 0] + part * width
    lengths = np.minimum(width, documents[document, 1] - part * width)
    return np.stack([starts, lengths], 1)
