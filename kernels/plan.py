"""How a kernel is spread over a GPU: tile, warps and programs, chosen from the tensor's shape by arithmetic alone.

The arithmetic, for a GPU of the H100's kind (132 multiprocessors, 3.35 TB/s, about 700 ns from the second-level cache's
miss to the data): by Little's law 3.35e12 * 700e-9 = 2.3 MB must be under way at any time, 18 KB a multiprocessor.

- A thread holds one 16-byte load of each tensor, 8 elements of 2 bytes or 4 of 4, and with them in channels_last 8 or 4
  channels of each vector: at 8 that is 32 registers for the four vectors of a backward pass, and 16 for the two float32
  accumulators of a reduction. So 64 registers suffice (the launch holds the compiler to it), and 1024 threads, half of
  what a multiprocessor of 2048 threads holds, are resident. An element-wise pass over two
  tensors then has 32 KB under way. The reductions unroll their loop, four times over one tensor and twice over two:
  64 KB at best.
- A pass that computes a smooth activation's input anew, or that reads a gradient in two parts, has up to six vectors
  and four tensors. At 8 channels a thread the compiler spills (16 to 184 bytes), at 4, as float32 has them, it does
  not. So at 2 bytes an element a thread of such a pass holds 8 bytes of each tensor, and with three of them 24 KB are
  under way.
- In channels_last a tile is one 128-byte line of channels wide (64 of 2 bytes, 32 of 4), or all channels where there
  are fewer. In NCHW it is as many positions of one image as fill a line or more.
- The grid is one wave of resident programs, or a few, each walking over many tiles: the vectors of one value a channel
  are then loaded once a program, and the reductions have few partial sums to combine.
- What a program reads and writes beside its tiles must stay small. A reduction costs 16 bytes a channel and program
  (two partial sums written and read again); at most 2.5 % of one T are 16 / (0.025 * itemsize) = 640 / itemsize
  positions a program. The element-wise passes load 16 to 20 bytes a channel and program, against at least 2 T that they
  move themselves: 384 / itemsize positions keep that under 2.6 %, at 2 bytes an element.
"""

from __future__ import annotations

import dataclasses
import functools

LINE_BYTES = 128
BYTES_A_THREAD = 16
CROWDED_BYTES_A_THREAD = 8
INDEX_32_LIMIT = 2**31
REDUCE_POSITIONS_BYTES = 640
APPLY_POSITIONS_BYTES = 384
MANY_ROUNDS = 24
WAVES = 4


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What a plan depends on: the shape of an activation as its memory is walked.

    Attributes:
        channels_last: rows of C (channels_last) or of H * W (NCHW).
        positions: M = N * H * W.
        channels: C.
        image: H * W.
        itemsize: bytes an element.
    """

    channels_last: bool
    positions: int
    channels: int
    image: int
    itemsize: int

    @property
    def images(self) -> int:
        return self.positions // self.image


@dataclasses.dataclass(frozen=True)
class Device:
    """What a plan needs to know of a GPU.

    Attributes:
        multiprocessors: how many it has.
        threads: that a multiprocessor can hold.
        warp: threads of a warp (64 on AMD's CDNA).
        registers: what the compiler may give a thread.
    """

    multiprocessors: int
    threads: int = 2048
    warp: int = 32
    registers: int = 64

    @property
    def resident(self) -> int:
        """Threads a multiprocessor is to hold: half of what it can."""
        return self.threads // 2


def register_limit(threads: int, capability: tuple[int, int]) -> int:
    """Registers that the compiler may give a thread so that half of a multiprocessor's threads are resident.

    1024 threads can have 64 and 768 can have 80; but given 80 the compiler for 8.6 and 8.9 moves loads ahead until it
    has to spill, and with 72 it does not. `python -m benchmarks.compiled.triton_table` shows what became of
    every kernel.

    Args:
        threads: that a multiprocessor can hold.
        capability: NVIDIA's compute capability; of no meaning elsewhere.
    """
    if threads >= 2048:
        return 64
    return 80 if capability >= (12, 0) else 72


@dataclasses.dataclass(frozen=True)
class Plan:
    """One launch: its grid is (splits, channel_blocks, ...), a program takes every splits-th of `tiles` tiles.

    Attributes:
        block_s, block_c: positions and channels of a tile.
        block_p: rows of partial sums that a program combines at a time: two values a thread.
        num_warps: warps of a program.
        registers: what the compiler may use for a thread.
        index_64: whether offsets need 64 bits.
        even_s, even_c: whether tiles fill positions and channels without a remainder, so that no load needs a mask.
    """

    block_s: int
    block_c: int
    block_p: int
    num_warps: int
    registers: int
    tiles: int
    splits: int
    channel_blocks: int
    index_64: bool
    even_s: bool
    even_c: bool


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def _tile(geometry: Geometry, threads: int, crowded: bool) -> tuple[int, int]:
    """(block_s, block_c) of a tile that gives each of `threads` threads its bytes.

    Both are at least 8, so that a byte of the bit mask never belongs to two programs.
    """
    bytes_a_thread = CROWDED_BYTES_A_THREAD if crowded and geometry.itemsize == 2 else BYTES_A_THREAD
    elements = threads * bytes_a_thread // geometry.itemsize
    line = LINE_BYTES // geometry.itemsize
    if geometry.channels_last:
        block_c = max(8, min(line, _power_of_two(geometry.channels)))
        return max(8, elements // block_c), block_c
    # Half the tile along the image where that is long enough, so that a program still owns several channels.
    block_s = max(8, min(elements // 8, _power_of_two(geometry.image)))
    return block_s, max(8, min(elements // block_s, _power_of_two(geometry.channels)))


def _plan(
    geometry: Geometry, device: Device, threads: int, positions_bytes: int, crowded: bool, waves: int = 1
) -> Plan:
    block_s, block_c = _tile(geometry, threads, crowded)
    if geometry.channels_last:
        tiles = -(-geometry.positions // block_s)
        even_s = geometry.positions % block_s == 0
        positions_a_tile = block_s
    else:
        tiles = geometry.images * -(-geometry.image // block_s)
        even_s = geometry.image % block_s == 0
        positions_a_tile = min(block_s, geometry.image)
    channel_blocks = -(-geometry.channels // block_c)
    least = -(-positions_bytes // (geometry.itemsize * positions_a_tile))
    resident = device.multiprocessors * max(1, device.resident // threads) * waves
    splits = max(1, min(resident // channel_blocks, tiles // least))
    # The same number of tiles for every program, but for the last ones.
    splits = -(-tiles // -(-tiles // splits))
    return Plan(
        block_s=block_s,
        block_c=block_c,
        block_p=threads * 2 // block_c,
        num_warps=threads // device.warp,
        registers=device.registers,
        tiles=tiles,
        splits=splits,
        channel_blocks=channel_blocks,
        # Masked lanes of the last tile count as well: their offsets must not wrap around to valid ones.
        index_64=(geometry.positions + block_s) * geometry.channels + block_c * geometry.image >= INDEX_32_LIMIT,
        even_s=even_s,
        even_c=geometry.channels % block_c == 0,
    )


def _rounds(geometry: Geometry, device: Device) -> int:
    """Tiles that a thread has part in, where all resident threads share them."""
    bytes_a_round = device.multiprocessors * device.resident * BYTES_A_THREAD
    return geometry.positions * geometry.channels * geometry.itemsize // bytes_a_round


@functools.lru_cache(maxsize=1024)
def reduce_plan(geometry: Geometry, device: Device, threads: int | None = None, crowded: bool = False) -> Plan:
    """For the passes that sum over positions: large programs, since each costs a row of partial sums.

    Smaller ones where a program has few tiles: then most of its time goes to what comes after them, which takes the
    longer the more threads have to agree. On an H100 256 threads took 14, 23, 35 and 58 us for the sums of a backward
    pass at 4, 8, 16 and 32 rounds, 512 threads 19, 25, 35 and 57.

    Args:
        crowded: whether 8 elements of each tensor and vector are more than a thread has registers for.
    """
    if threads is None:
        threads = 512 if _rounds(geometry, device) >= MANY_ROUNDS and device.resident % 512 == 0 else 256
    return _plan(geometry, device, threads, REDUCE_POSITIONS_BYTES, crowded)


@functools.lru_cache(maxsize=1024)
def apply_plan(geometry: Geometry, device: Device, threads: int = 256, crowded: bool = False) -> Plan:
    """For the element-wise passes: four waves where there is enough for them, so that no multiprocessor ends late."""
    waves = WAVES if _rounds(geometry, device) >= MANY_ROUNDS else 1
    return _plan(geometry, device, threads, APPLY_POSITIONS_BYTES, crowded, waves)
