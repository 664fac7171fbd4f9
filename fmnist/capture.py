"""Training steps in chunks over static memory: each chunk is recorded once, then replayed.

On a CUDA device a recording is a CUDA graph. Operations of a model this small end sooner than the
host can launch the next one; a graph launches a hundred steps at once. All that differs from chunk
to chunk is copied into tensors that stay where they are.

Shapes: S steps, K models, B batch, C = 10 classes, N numbers that an update needs.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LENGTHS = (100, 50, 20, 10, 5, 2, 1)
"""Steps that a recording may have: seven recordings do for segments of any length."""
MOST_IMAGES = 4_000_000
"""Images, at most, in the chunks' static memory: 0.4 GB of targets, logits and rows."""


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, without waiting for what the device is doing."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


Replay = Callable[[], None]
Recorder = Callable[[Callable[[], None]], Replay]
"""Records the operations of a function, which it calls; returns what does them again."""


class CaptureError(RuntimeError):
    """An operation that can't be recorded."""


class Steps(NamedTuple):
    """The tensors of some steps: their inputs and their logits; entry s of each is of step s."""

    rows: Tensor
    """[S, K, B] int64: the images of each batch; those past a short batch's size are padding."""
    targets: Tensor
    """[S, K, B, C]: one-hot labels."""
    coefficients: Tensor
    """[S, N, K, 1]: see optim.Update.coefficients."""
    logits: Tensor
    """[S, K, B, C]; only those of a batch's own images are written."""

    def part(self, start: int, count: int) -> "Steps":
        """Select `count` steps from `start` on: views, not copies."""
        return Steps(*(tensor[start : start + count] for tensor in self))


Run = Callable[[Steps, Sequence[int]], None]
"""Does steps, one after the other, given the size of each one's batch."""


class Chunk(NamedTuple):
    """Consecutive steps whose batches are of one size."""

    start: int
    length: int
    size: int


def divide(sizes: Sequence[int], longest: int = LENGTHS[0]) -> Iterator[Chunk]:
    """Divide steps, given their batches' sizes, into chunks of the LENGTHS up to `longest`."""
    start = 0
    while start < len(sizes):
        alike = 1
        while start + alike < len(sizes) and sizes[start + alike] == sizes[start]:
            alike += 1
        count = next(length for length in LENGTHS if length <= min(alike, longest))
        yield Chunk(start, count, sizes[start])
        start += count


class Chunks:
    """Does steps by replaying recordings of chunks of them.

    `state` are the tensors that a step changes. They are put back after each recording, which may
    do its steps for real.
    """

    def __init__(self, record: Recorder, state: Sequence[Tensor]) -> None:
        self._record = record
        self._state = state
        self._replays: dict[tuple[int, int], Replay] = {}
        self._static: Steps | None = None

    def run(self, run: Run, steps: Steps, sizes: Sequence[int]) -> None:
        """Do these steps. Raises CaptureError before the first if one can't be recorded."""
        static = self._static or self._allocate(steps)
        chunks = list(divide(sizes, len(static.rows)))
        for chunk in chunks:
            if (chunk.length, chunk.size) not in self._replays:
                self._replays[chunk.length, chunk.size] = self._recorded(run, static, chunk)
        for chunk in chunks:
            source, target = steps.part(chunk.start, chunk.length), static.part(0, chunk.length)
            target.rows.copy_(source.rows)
            target.targets.copy_(source.targets)
            target.coefficients.copy_(source.coefficients)
            self._replays[chunk.length, chunk.size]()
            source.logits[:, :, : chunk.size].copy_(target.logits[:, :, : chunk.size])

    def _allocate(self, like: Steps) -> Steps:
        """Make static memory for as long a chunk as may be recorded; row 0 is a valid image."""
        images = like.rows[0].numel()
        longest = next(
            length for length in LENGTHS if length * images <= MOST_IMAGES or length == 1
        )
        self._static = Steps(*(tensor.new_zeros(longest, *tensor.shape[1:]) for tensor in like))
        return self._static

    def _recorded(self, run: Run, static: Steps, chunk: Chunk) -> Replay:
        saved = [tensor.clone() for tensor in self._state]
        part, sizes = static.part(0, chunk.length), [chunk.size] * chunk.length
        try:
            return self._record(lambda: run(part, sizes))
        except RuntimeError as error:
            raise CaptureError(" ".join(str(error).split())) from error
        finally:
            for tensor, before in zip(self._state, saved, strict=True):
                tensor.copy_(before)


class CudaGraphs:
    """A Recorder of CUDA graphs, which share one pool of memory as they never run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Replay:
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            # libraries allocate their work space in their first call, which can't be captured
            work()
        current.wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            # not torch.cuda.graph, which collects garbage first for a tenth of a second
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        current.wait_stream(stream)
        return graph.replay
