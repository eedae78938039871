"""The order of training: which windows make batch p of a set, as a pure function of (seed, p).

The stream is passes one after the other; each holds every window once. Batch p is the draws between two cuts (with
one set every B draws), so a batch may span two passes:

    pass k   | head |    M batches    | tail |
    batches  ...   ]|[      ]|[      ]|[   ...        head = what the last batch of pass k-1 lacks

Invariants, of batches that span two passes too, for a global batch of B: no window stands twice in a batch; a series
with w of the n windows of a pass stands at most 1 + ceil(2Bw/n) times in one, and at most once if w <= n/(4B).

How (n >= 2c, c the longest batch). The windows are listed series by series, series and windows in random order, and
dealt in c rounds to M batches, head and tail: a round gives each of them one window, but the head takes part in h of
the c rounds and the tail in t, evenly spread, and a batch that is one short of c not in the last one. Let x = cw/n.
Any q rounds in a row before the last hold more than qn/c - 2 windows, so a series touches at most ceil(x) + 1 rounds,
and that many windows of it a batch gets at most: within the bound, but for x <= 1/4, where the two rounds that a
series straddles must not meet in one batch. So of each two takers that follow each other one is of class A and one of
class B, and in every round the first places go to class A and the last to class B: who takes at the end of a round
never takes at the beginning of the next. (Of a pair of which one is short, the other is A: so it is in the last round.)
The head and the tail before it make one batch: windows that both hold, and series beyond their bound there, are cured
by exchanging windows of the head with windows of whole batches (_mend). A tail is never changed by that, so a pass
depends on the one before it only, and nothing chains.

Runs (run_length K > 1). The windows of a series are then listed in their own order, from a random one on and round its
end, and a round gives K places of the list that follow each other, a run, to batches that do: so that a reader who
decodes the K + depth - 1 slices of a run once has windows for K batches. The takers of a class are parted into zones,
a run's windows go to different takers of one zone, and a zone takes several runs, from anywhere. Zones begin at other
batches in every round, so that a batch meets as many new runs as any other. The rows of a batch are its rounds,
shuffled once a pass: the windows of a run, all of one round, stand in one row of their batches: one rank has the run.

With n < 2c the bounds on series cannot bind. The head is the first windows of a permutation that the tail before does
not hold. That does chain, from the last pass that began with a batch.

Nothing is laid out: the list, the deal and the exchanges are evaluated for the batches that are asked for, so that a
billion windows start as fast as a thousand. Randomness is `permuted` and raw Philox bits: both are the same for every
version of NumPy, which shuffles are not.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dinox_io.cuts import Cuts, EvenCuts
from dinox_io.deal import Deal, Dealt, Layout
from dinox_io.permutation import mixed, permuted
from dinox_io.philox import philox_bits, shuffled

# Streams of random bits of one pass, beside those of its deal.
_WITHIN, _ENDS, _MEND, _SMALL = range(12, 16)

_BLOCK_DRAWS = 4096
"""Draws that are planned at once: enough that Python's share of the time does not matter."""
MAX_WINDOWS = 1 << 48


class Draw(NamedTuple):
    """The rows of a batch, int64 (b,) each."""

    window: np.ndarray
    number: np.ndarray
    """Of which pass the window is."""
    run: np.ndarray
    """A number for `Order.windows_of_runs`; -1: the window is of no run."""
    last_batch: np.ndarray
    """No window of that run is drawn after this batch, but those that were exchanged with a head; -1 without a run."""


class Order:
    """The stream of windows of one side of a set. Windows are numbered from 0, series after series.

    Not thread-safe; it remembers what it planned last, which changes nothing but the time a call takes.
    """

    def __init__(
        self,
        num_windows_per_series: np.ndarray,
        batch_size: int,
        seed: int,
        cuts: Cuts | None = None,
        run_length: int = 1,
    ) -> None:
        """
        Args:
            num_windows_per_series: int (s,). batch_size: of the global batch. seed: 0 <= seed < 2**64.
            cuts: which draws make batch p; every batch_size of them if None.
            run_length: windows of a run; 1: each on its own.

        Raises:
            ValueError: fewer windows than a batch takes, or an impossible seed, batch size or run length.
        """
        sizes = np.asarray(num_windows_per_series, np.int64)
        if batch_size < 1 or run_length < 1:
            raise ValueError(f"batch_size is {batch_size} and run_length {run_length}; they must be at least 1")
        self.num_windows, self.cuts = int(sizes.sum()), cuts or EvenCuts(batch_size)
        if self.num_windows >= MAX_WINDOWS:
            raise ValueError(f"{self.num_windows} windows are more than one set can order")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed is {seed}; it must be at least 0 and below 2**64")
        if self.num_windows < self.cuts.longest:
            raise ValueError(
                f"the split has {self.num_windows} windows, fewer than the {self.cuts.longest} of a batch: a window "
                "would stand twice in it. Lower the batch size or add series"
            )
        self._seed, self._sizes, self._run_length = seed, sizes, run_length
        self._first = np.concatenate([[0], np.cumsum(sizes)])
        small = 4 * batch_size * sizes <= self.num_windows
        self._bound = np.where(small, 1, 1 - (-2 * batch_size * sizes // max(self.num_windows, 1)))
        self._deals: dict[int, Deal] = {}
        self._mended: dict[int, _Mended] = {}
        self._small_passes: dict[int, np.ndarray] = {}
        self._blocks: dict[tuple[int, int], np.ndarray] = {}

    def batch(self, position: int) -> Draw:
        """Batch `position` >= 0."""
        if position < 0:
            raise ValueError(f"position is {position}; it must be at least 0")
        begin, end = (int(cut) for cut in self.cuts.starts(position, 1))
        number, offset = divmod(begin, self.num_windows)
        run = last_batch = np.full(end - begin, -1, np.int64)
        if self.num_windows < 2 * self.cuts.longest:
            here = self._small_pass(number)[offset : offset + end - begin]
            rest = self._small_pass(number + 1)[: end - begin - len(here)] if end - begin > len(here) else here[:0]
        elif (batch := position - self._deal(number).layout.first) < self._deal(number).layout.batches:
            per_block = max(_BLOCK_DRAWS // self.cuts.longest, 1)
            here, run, last_batch = self._block(number, batch // per_block)[:, batch % per_block, : end - begin]
            rest = here[:0]
        else:
            here = self._end(number, is_tail=True)
            rest = self._mended_pass(number + 1).head if end - begin > len(here) else here[:0]
        passes = np.full(end - begin, number, np.int64)
        passes[len(here) :] += 1
        return Draw(window=np.concatenate([here, rest]), number=passes, run=run, last_batch=last_batch)

    def windows_of_runs(self, number: int, run: np.ndarray) -> np.ndarray:
        """int64 (m, run_length): the windows of runs (m,) of a pass; -1 where one has fewer. See `Draw.run`."""
        return self._deal(number).windows_of_runs(run)

    # --- passes ------------------------------------------------------------------------------------------------

    def _layout(self, number: int) -> Layout:
        begin, end = number * self.num_windows, (number + 1) * self.num_windows
        first, last = self.cuts.batch_at(begin), self.cuts.batch_at(end)
        last -= int(self.cuts.starts(last, 0)[0]) > end
        head, tail = int(self.cuts.starts(first, 0)[0]) - begin, end - int(self.cuts.starts(last, 0)[0])
        return Layout(first=first, batches=last - first, head=head, tail=tail)

    def _deal(self, number: int) -> Deal:
        if number not in self._deals:
            layout, run_length = self._layout(number), self._run_length
            deal = Deal(self._sizes, self.cuts, layout, seed=self._seed, number=number, run_length=run_length)
            _remember(self._deals, number, deal, 3)
        return self._deals[number]

    def _small_pass(self, number: int) -> np.ndarray:
        """int64 (n,): all windows in the order of pass `number`, where a pass is less than two batches."""
        if number in self._small_passes:
            return self._small_passes[number]
        start = number
        while start - 1 not in self._small_passes and self._layout(start).head:
            start -= 1
        before = self._small_passes[start - 1] if self._layout(start).head else np.empty(0, np.int64)
        tail = before[len(before) - self._layout(start - 1).tail :] if len(before) else before
        for each in range(start, number + 1):
            windows = shuffled(self._bits(each, _SMALL, self.num_windows))
            chosen = np.flatnonzero(~np.isin(windows, tail))[: self._layout(each).head]
            windows = np.concatenate([windows[chosen], np.delete(windows, chosen)])
            tail = windows[self.num_windows - self._layout(each).tail :]
            _remember(self._small_passes, each, windows, 2)
        return self._small_passes[number]

    def _dealt(self, number: int, batch: int, count: int, swaps: _Swaps) -> tuple[np.ndarray, Dealt]:
        """int64 (count, c): windows of some whole batches, round by round, exchanges made; -1 where one is short."""
        deal, longest = self._deal(number), self.cuts.longest
        dealt = deal.dealt(1 + batch + np.arange(count)[:, None], np.arange(longest))
        windows = deal.windows(dealt.place)
        for (swapped, turn), window in swaps.items():
            if 0 <= swapped - batch < count:
                windows[swapped - batch, turn] = window
        return windows, dealt

    def _block(self, number: int, block: int) -> np.ndarray:
        """int64 (3, m, c): windows of some batches (-1 at the end of a short one), their runs, and last batches."""
        if (number, block) not in self._blocks:
            longest, swaps = self.cuts.longest, self._mended_pass(number).swaps
            per_block = max(_BLOCK_DRAWS // longest, 1)
            begin = block * per_block
            count = min(per_block, self._deal(number).layout.batches - begin)
            windows, dealt = self._dealt(number, begin, count, swaps)
            run = dealt.run.copy()
            for batch, turn in swaps:
                if 0 <= batch - begin < count:
                    run[batch - begin, turn] = -1
            # The same in all batches of a pass: a run's windows, which are of one round, stand in one row of their
            # batches, so that one rank (and one micro-batch) has them all, whatever the number of ranks.
            turns = np.arange(longest, dtype=np.uint64)
            bits = np.tile(mixed(self._bits(number, _WITHIN, 1) + turns) >> np.uint64(1), (count, 1))
            bits[windows < 0] = np.iinfo(np.uint64).max
            rows = np.take_along_axis(np.stack([windows, run, dealt.last_batch]), shuffled(bits)[None], axis=2)
            _remember(self._blocks, (number, block), rows, 2)
        return self._blocks[number, block]

    # --- a batch of two passes ---------------------------------------------------------------------------------

    def _end(self, number: int, *, is_tail: bool) -> np.ndarray:
        """int64: the windows of the tail, or of the head, as they were dealt, shuffled."""
        deal, longest = self._deal(number), self.cuts.longest
        rounds = np.flatnonzero(deal.tail_rounds if is_tail else deal.head_rounds)
        windows = deal.windows(deal.places(np.array([deal.takers - 1 if is_tail else 0]), rounds))
        bits = self._bits(number, _ENDS, 2 * longest)[is_tail * longest :][: len(rounds)]
        return windows[shuffled(bits)]

    def _mended_pass(self, number: int) -> _Mended:
        if number not in self._mended:
            head = self._end(number, is_tail=False)
            swaps: _Swaps = {}
            if len(head):
                self._mend(number, head, self._end(number - 1, is_tail=True), swaps)
            _remember(self._mended, number, _Mended(head, swaps), 3)
        return self._mended[number]

    def _mend(self, number: int, head: np.ndarray, before: np.ndarray, swaps: _Swaps) -> None:
        """Exchange windows of `head` (h,) with windows of whole batches until `before` + `head` is a lawful batch."""
        counts = np.bincount(self._series_of(np.concatenate([before, head])), minlength=len(self._bound))
        for row in range(len(head)):
            leaving, series = int(head[row]), int(self._series_of(head[row]))
            if leaving not in before and counts[series] <= self._bound[series]:
                continue
            batch, turn, window = self._exchange(number, series, before, counts, swaps)
            head[row], swaps[batch, turn] = window, leaving
            counts[series] -= 1
            counts[self._series_of(head[row])] += 1

    def _exchange(
        self, number: int, series: int, before: np.ndarray, counts: np.ndarray, swaps: _Swaps
    ) -> tuple[int, int, int]:
        """(batch, round, window): where a window of `series` may change places with one that suits the head.

        Counting shows that there is one: series that are at their bound hold at most n/2 windows, head and tails fewer
        than 2c, and batches in which `series` is at its bound at most n/4.
        """
        batches, key = self._deal(number).layout.batches, int(self._bits(number, _MEND, 1)[0]) >> 1
        for attempt in range(batches):
            batch = int(permuted(attempt, batches, key + len(swaps)))
            windows = self._dealt(number, batch, 1, swaps)[0][0]
            other = self._series_of(windows)
            lawful = (counts[other] < self._bound[other]) & (other != series)
            lawful &= np.count_nonzero((other == series) & (windows >= 0)) < self._bound[series]
            if counts[series] <= self._bound[series]:
                lawful |= other == series
            lawful &= ~np.isin(windows, before) & (windows >= 0)
            if lawful.any():
                turns = np.flatnonzero(lawful)
                turn = int(turns[int(permuted(0, len(turns), key + attempt))])
                return batch, turn, int(windows[turn])
        raise AssertionError(
            f"no lawful exchange for series {series} in pass {number} of {self.num_windows} windows, seed "
            f"{self._seed}: a bug in the order, please report it with the sizes of the series"
        )

    def _series_of(self, windows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._first, windows, side="right") - 1

    def _bits(self, number: int, stream: int, count: int) -> np.ndarray:
        return philox_bits(self._seed, number, stream, count)


_Swaps = dict[tuple[int, int], int]
"""(batch of the pass, round) -> the window that came there from the head."""


class _Mended(NamedTuple):
    head: np.ndarray
    swaps: _Swaps


def _remember(plans: dict, key: object, plan: object, count: int) -> None:
    """Keep the last `count` plans."""
    plans[key] = plan
    while len(plans) > count:
        del plans[next(iter(plans))]
