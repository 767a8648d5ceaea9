"""One number from the user, the rest worked out: how a global batch is split over ranks and micro-batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True, slots=True)
class BatchPlan:
    """Any global batch on any number of ranks, exactly: ranks may hold unequal counts, and short ones run idle
    micro-batches so that every rank makes the same number of calls.
    """

    global_batch: int
    """Samples that one optimizer step sees over all ranks."""
    micro_batch: int
    """The most samples that one forward sees on one rank."""
    size: int
    """Data-parallel ranks."""

    @property
    def accumulate(self) -> int:
        """Micro-batches per optimizer step on each rank."""
        return -(-self.count(0) // self.micro_batch)

    @property
    def busy(self) -> float:
        """Share of the ranks' time that has samples; 1.0 where every rank holds the same number."""
        return self.global_batch / (self.count(0) * self.size)

    def count(self, rank: int) -> int:
        """Samples of one global batch on this rank; the first ranks take what is left over."""
        share, rest = divmod(self.global_batch, self.size)
        return share + (rank < rest)

    def start(self, rank: int) -> int:
        """Place of this rank's first sample within the global batch."""
        share, rest = divmod(self.global_batch, self.size)
        return rank * share + min(rank, rest)

    def micros(self, rank: int) -> Iterator[range]:
        """Places within the global batch that each micro-batch of this rank takes: `accumulate` ranges, some empty.

        A rank's samples are spread evenly over its micro-batches, so that none is much smaller than the rest.
        """
        share, rest = divmod(self.count(rank), self.accumulate)
        place = self.start(rank)
        for i in range(self.accumulate):
            num = share + (i < rest)
            yield range(place, place + num)
            place += num

    def describe(self) -> str:
        text = f"global {self.global_batch} = "
        if self.size == 1:
            text += f"{self.global_batch} on 1 rank"
        elif self.busy == 1.0:
            text += f"{self.count(0)} x {self.size} ranks"
        elif self.size <= 8:
            text += "+".join(str(self.count(rank)) for rank in range(self.size)) + f" over {self.size} ranks"
        else:
            long = self.global_batch % self.size
            text += f"{long} ranks x {self.count(0)} + {self.size - long} ranks x {self.count(self.size - 1)}"
        text += f", {self.accumulate} micro-batch{'es' if self.accumulate > 1 else ''} of up to {self.micro_batch}"
        if self.busy < 1.0:
            low, high = self.global_batch // self.size * self.size, self.count(0) * self.size
            better = " or ".join(str(n) for n in (low, high) if n > 0)
            text += f", {self.busy:.0%} busy; {better} would be 100 %"
        return text
