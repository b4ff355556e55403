"""How many bytes of device memory a fused call moves: does the second sweep find the row in the last-level cache?

A program reads a row forwards (statistics), then backwards (gradient), writing as it goes. R programs run, each with a
row of B bytes. Let C be the part of the cache that rows can have: ``USABLE`` of it, since lines being written back
take the rest (the share that ``launch.py`` plans with).

The model takes the programs to be in step, each with its whole row live when the second sweep begins, which is the
worst case: programs that drift apart have half a row live on average. A least-recently-used cache then holds the last
min(1, C / (R B)) of each row, and the second sweep, walking backwards, starts with exactly that part: it hits, and the
rest misses. (Walking forwards it would evict what it is about to read, and hit nothing as soon as R B > C.)

What the model leaves out: that a cache of several partitions (A100, H100, B200) may keep a line twice, in which case C
is half as large; associativity and hashing; and other kernels' lines. ``no_reuse`` gives the other extreme.
"""

from __future__ import annotations

from dataclasses import dataclass

USABLE = 0.85


@dataclass(frozen=True)
class Traffic:
    """Bytes of device memory moved per row, in each sweep.

    Attributes:
        first_read: by the statistics sweep.
        second_read: by the gradient sweep: what missed the cache.
        written: by the gradient sweep.
        hit: share of the second read that the cache served; 1 where there is no second read.
    """

    first_read: float
    second_read: float
    written: float
    hit: float

    @property
    def total(self) -> float:
        return self.first_read + self.second_read + self.written


def row_traffic(
    V: int, itemsize: int, rows_in_flight: int, cache_bytes: float, *, gradient: bool = True, no_reuse: bool = False
) -> Traffic:
    """Traffic of a row of ``V`` elements of ``itemsize`` bytes, ``rows_in_flight`` of them being worked on at a time.

    ``gradient``: a second sweep follows, which reads the row again and writes as much. ``no_reuse``: nothing hits.

    >>> row_traffic(151936, 2, 132, 50 * 2**20).total / (2 * 151936)  # H100, Qwen: one read, one write
    2.0
    >>> round(row_traffic(262144, 2, 132, 50 * 2**20).hit, 2)  # Gemma: 69 MB of rows in flight, 45 MB of cache
    0.64
    """
    row_bytes = float(V * itemsize)
    if not gradient:
        return Traffic(row_bytes, 0.0, 0.0, 1.0)
    hit = 0.0 if no_reuse else min(1.0, USABLE * cache_bytes / (rows_in_flight * row_bytes))
    return Traffic(row_bytes, (1.0 - hit) * row_bytes, row_bytes, hit)
