"""The order of training: which windows make global batch p, as a pure function of (seed, p).

The stream is passes one after the other (with inflation 1 a pass is an epoch); each holds every window once. Batch p
is draws [pB, (p+1)B) of the stream, so a batch may span two passes:

    pass k   | head |    M batches of B     | tail |
    batches  ...   ]|[      ]|[      ]|[      ]|[   ...        head = what the last batch of pass k-1 lacks

Invariants, of batches that span two passes too: no window stands twice in a batch; a series with w of the n windows
of a pass stands at most 1 + ceil(2Bw/n) times in one, and at most once if w <= n/(4B).

How (n >= 2B). The windows are listed series by series, series and windows in random order, and dealt in B rounds to
head, M batches and tail; a round gives each batch one window, the head gets one in h of the B rounds and the tail in
t, evenly spread. Let x = Bw/n. Any q whole rounds in a row hold more than qn/B - 2 windows, so a series touches at
most ceil(x) + 1 rounds, and that many windows of it a batch gets at most: within the bound, but for x <= 1/4, where
the two rounds that a series straddles must be kept from meeting in one batch (_part_straddlers). The head and the
tail before it make one batch: together they get at most ceil(x) + 2, which is within the bound for x > 1/2. Series
below that, and windows that both hold, are cured by exchanging windows of the head with windows of full batches
(_mend_head). A tail is never changed by that, so a pass depends on the one before it only, and nothing chains.

With n < 2B the bounds on series cannot bind. The head is the first windows of a permutation that the tail before does
not hold. That does chain, from the last pass that began with a batch: at most B / gcd(n, B) passes back.

Randomness is raw Philox bits, made distinct and sorted: both are the same for every version of NumPy, which shuffles
are not.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Streams of random bits of one pass.
_SERIES, _WINDOWS, _PHASES, _DEAL, _WITHIN, _ENDS, _MEND, _SMALL = range(8)

_CANDIDATES_AT_ONCE = 4096


class _Deal(NamedTuple):
    head: np.ndarray  # int64 (h,)
    full: np.ndarray  # int64 (M, B)
    tail: np.ndarray  # int64 (t,)


class Order:
    """The stream of windows of one split. Windows are numbered from 0, series after series.

    Not thread-safe; it remembers what it planned last, which changes nothing but the time a call takes.
    """

    def __init__(self, num_windows_per_series: np.ndarray, batch_size: int, seed: int) -> None:
        """num_windows_per_series int (s,). ValueError for fewer windows than a batch holds, or an impossible seed."""
        sizes = np.asarray(num_windows_per_series, np.int64)
        self.num_windows, self.batch_size = int(sizes.sum()), batch_size
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if self.num_windows >= 1 << 31:
            raise ValueError(f"{self.num_windows} windows are more than one set can order (2**31)")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed is {seed}; it must be at least 0 and below 2**64")
        if self.num_windows < batch_size:
            raise ValueError(
                f"the split has {self.num_windows} windows, fewer than the {batch_size} of a batch: a window would "
                "stand twice in it. Lower the batch size or add series"
            )
        self._seed, self._first = seed, np.concatenate([[0], np.cumsum(sizes)])
        self._series = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        small = 4 * batch_size * sizes <= self.num_windows
        self._bound = np.where(small, 1, 1 - (-2 * batch_size * sizes // max(self.num_windows, 1)))
        self._small = small
        self._deals: dict[int, _Deal] = {}
        self._passes: dict[int, np.ndarray] = {}

    def batch(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Global batch `position` >= 0: window numbers int64 (B,), and of which pass each is, int64 (B,)."""
        if position < 0:
            raise ValueError(f"position is {position}; it must be at least 0")
        number, offset = divmod(position * self.batch_size, self.num_windows)
        here = self._pass(number)[offset : offset + self.batch_size]
        rest = self.batch_size - len(here)
        windows = np.concatenate([here, self._pass(number + 1)[:rest]]) if rest else here.copy()
        passes = np.full(self.batch_size, number, np.int64)
        passes[len(here) :] += 1
        return windows, passes

    # --- passes ------------------------------------------------------------------------------------------------

    def _lengths(self, number: int) -> tuple[int, int, int]:
        """Of pass `number`: windows in its head, full batches, windows in its tail."""
        head = -number * self.num_windows % self.batch_size
        tail = (self.num_windows - head) % self.batch_size
        return head, (self.num_windows - head - tail) // self.batch_size, tail

    def _pass(self, number: int) -> np.ndarray:
        """int64 (n,): all windows in the order of pass `number`."""
        if number not in self._passes:
            if self.num_windows < 2 * self.batch_size:
                windows = self._small_pass(number)
            else:
                windows = self._large_pass(number)
            _remember(self._passes, number, windows)
        return self._passes[number]

    def _large_pass(self, number: int) -> np.ndarray:
        deal = self._deal(number)
        if len(deal.head) == 0:
            return np.concatenate([deal.full.reshape(-1), deal.tail])
        head, full = deal.head.copy(), deal.full.reshape(-1).copy()
        self._mend_head(head, full, self._deal(number - 1).tail, number)
        return np.concatenate([head, full, deal.tail])

    def _small_pass(self, number: int) -> np.ndarray:
        start = number
        while start - 1 not in self._passes and self._lengths(start)[0]:
            start -= 1
        tail = self._tail_of(self._passes[start - 1], start - 1) if self._lengths(start)[0] else np.empty(0, np.int64)
        windows = np.empty(0, np.int64)
        for each in range(start, number + 1):
            windows = _shuffled(self._bits(each, _SMALL, self.num_windows))
            free = ~np.isin(windows, tail)
            chosen = np.flatnonzero(free)[: self._lengths(each)[0]]
            windows = np.concatenate([windows[chosen], np.delete(windows, chosen)])
            tail = self._tail_of(windows, each)
        return windows

    def _tail_of(self, windows: np.ndarray, number: int) -> np.ndarray:
        return windows[self.num_windows - self._lengths(number)[2] :]

    # --- dealing -----------------------------------------------------------------------------------------------

    def _deal(self, number: int) -> _Deal:
        if number not in self._deals:
            _remember(self._deals, number, self._new_deal(number))
        return self._deals[number]

    def _new_deal(self, number: int) -> _Deal:
        head, batches, tail = self._lengths(number)
        windows = self._listed(number)
        taking = self._taking(number)
        taker_of = self._takers(number, windows, taking)
        # Sorted by taker: M times B windows, then those of the head, then those of the tail.
        windows = windows[_grouped(taker_of)]
        full = windows[: batches * self.batch_size].reshape(batches, self.batch_size)
        shuffle = _shuffled(self._bits(number, _WITHIN, full.size).reshape(full.shape))
        ends = self._bits(number, _ENDS, head + tail)
        rest = windows[batches * self.batch_size :]
        return _Deal(
            head=rest[:head][_shuffled(ends[:head])],
            full=np.take_along_axis(full, shuffle, axis=1),
            tail=rest[head:][_shuffled(ends[head:])],
        )

    def _listed(self, number: int) -> np.ndarray:
        """All windows, series by series: the series in random order, and the windows of each."""
        num_series = len(self._first) - 1
        rank = np.empty(num_series, np.int64)
        rank[_shuffled(self._bits(number, _SERIES, num_series))] = np.arange(num_series)
        windows = _shuffled(self._bits(number, _WINDOWS, self.num_windows))
        return windows[_grouped(rank[self._series[windows]])]

    def _taking(self, number: int) -> np.ndarray:
        """bool (B, M + 2): who takes a window in each round; the columns are M batches, head, tail."""
        head, batches, tail = self._lengths(number)
        rounds = np.arange(self.batch_size + 1, dtype=np.int64)
        phases = self._bits(number, _PHASES, 2) % np.uint64(self.batch_size)
        taking = np.ones((self.batch_size, batches + 2), bool)
        for column, count, phase in ((batches, head, phases[0]), (batches + 1, tail, phases[1])):
            taking[:, column] = np.diff((rounds * count + int(phase)) // self.batch_size)
        return taking

    def _takers(self, number: int, windows: np.ndarray, taking: np.ndarray) -> np.ndarray:
        """int64 (n,): who gets each window of the list; in each round those who take one, in random order."""
        keys = self._bits(number, _DEAL, taking.size).reshape(taking.shape) >> np.uint64(1)
        keys[~taking] = np.iinfo(np.uint64).max  # above all others: to the end of the round
        takers = _shuffled(keys)
        sizes = taking.sum(axis=1)
        self._part_straddlers(takers, sizes, self._series[windows])
        return takers[np.arange(taking.shape[1]) < sizes[:, None]]

    def _part_straddlers(self, takers: np.ndarray, sizes: np.ndarray, series: np.ndarray) -> None:
        """Where a small series begins in one round and ends in the next, let no batch take from it in both."""
        borders = np.cumsum(sizes)[:-1]
        same = series[borders - 1] == series[borders]
        starts = np.flatnonzero(np.diff(series, prepend=-1))
        for earlier in np.flatnonzero(same & self._small[series[borders]]):
            border = borders[earlier]
            begin = starts[np.searchsorted(starts, border, side="right") - 1]
            before = int(border - begin)
            after = int(self._first[series[border] + 1] - self._first[series[border]]) - before
            taken = takers[earlier, sizes[earlier] - before : sizes[earlier]]
            row = takers[earlier + 1, : sizes[earlier + 1]]
            met = np.isin(row, taken)
            wrong = np.flatnonzero(met[:after])
            # A series this small has at most a quarter as many windows as a round: there is always someone else.
            other = after + np.flatnonzero(~met[after:])[: len(wrong)]
            row[wrong], row[other] = row[other], row[wrong]

    # --- a batch of two passes ---------------------------------------------------------------------------------

    def _mend_head(self, head: np.ndarray, full: np.ndarray, before: np.ndarray, number: int) -> None:
        """Exchange windows of `head` (h,) with windows of `full` (M·B,) until `before` + `head` is a lawful batch.

        Counting shows that an exchange exists: series that are at their bound hold at most n/2 windows, head and tails
        fewer than 2B, and batches in which the leaving window's series is at its bound at most n/4; for n < 8B a series
        of so few windows needs an exchange only where all three of its windows meet.
        """
        held = np.zeros(self.num_windows, bool)
        held[before] = True
        counts = np.bincount(self._series[np.concatenate([before, head])], minlength=len(self._bound))
        suspects = np.flatnonzero(held[head] | (counts > self._bound)[self._series[head]])
        if not len(suspects):
            return
        place = np.full(self.num_windows, -1, np.int64)
        place[full] = np.arange(len(full))
        candidates = _shuffled(self._bits(number, _MEND, len(full)))
        for row in suspects:
            leaving = head[row]
            series = self._series[leaving]
            if not held[leaving] and counts[series] <= self._bound[series]:
                continue  # cured by an earlier exchange
            spot = self._exchange(leaving, full, place, candidates, held, counts)
            head[row], full[spot] = full[spot], leaving
            place[leaving], place[head[row]] = spot, -1
            counts[series] -= 1
            counts[self._series[head[row]]] += 1

    def _exchange(
        self,
        leaving: np.integer,
        full: np.ndarray,
        place: np.ndarray,
        candidates: np.ndarray,
        held: np.ndarray,
        counts: np.ndarray,
    ) -> int:
        """Where in `full` a window stands that may change places with `leaving`: the first of the random candidates."""
        series = self._series[leaving]
        own = place[self._first[series] : self._first[series + 1]]
        in_batch = np.bincount(own[own >= 0] // self.batch_size, minlength=len(full) // self.batch_size)
        has_room = in_batch < self._bound[series]
        for start in range(0, len(candidates), _CANDIDATES_AT_ONCE):
            spots = candidates[start : start + _CANDIDATES_AT_ONCE]
            other = self._series[full[spots]]
            lawful = (counts[other] < self._bound[other]) & has_room[spots // self.batch_size] & (other != series)
            if counts[series] <= self._bound[series]:
                lawful |= other == series
            lawful &= ~held[full[spots]]
            if lawful.any():
                return int(spots[np.argmax(lawful)])
        raise AssertionError(
            f"no lawful exchange for window {leaving} of {self.num_windows}, batch size {self.batch_size}, "
            f"seed {self._seed}: a bug in the order, please report it with the sizes of the series"
        )

    def _bits(self, number: int, stream: int, count: int) -> np.ndarray:
        """uint64 (count,): the random bits of one stream of one pass."""
        key = np.array([self._seed, number << 3 | stream], np.uint64)
        return np.random.Philox(key=key).random_raw(count)


def _shuffled(bits: np.ndarray) -> np.ndarray:
    """uint64 random bits (…, n) -> int64 permutations of 0…n-1 along the last axis.

    The low bits of each key give way to its index: the keys are then distinct, so that any sort gives the same result,
    and sorting values is several times as fast as an argsort.
    """
    count = bits.shape[-1]
    low = np.uint64((1 << max(count - 1, 0).bit_length()) - 1)
    keys = (bits & ~low) | np.arange(count, dtype=np.uint64)
    keys.sort(axis=-1)
    return (keys & low).astype(np.int64)


def _grouped(group: np.ndarray) -> np.ndarray:
    """int64 (n,) of group numbers below 2^31 -> the indices that sort them, in each group in the order they stand."""
    keys = group << 32 | np.arange(len(group))
    keys.sort()
    return keys & 0xFFFF_FFFF


def _remember(plans: dict, number: int, plan: object) -> None:
    """Keep the last two plans: a batch spans at most two passes."""
    plans[number] = plan
    while len(plans) > 2:
        del plans[next(iter(plans))]
