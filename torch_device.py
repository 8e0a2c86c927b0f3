"""A device of torch: copies batches to it, runs a model there, copies the vectors back, and scores label sets there."""

from __future__ import annotations

import queue
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from errors import one_line
from machine import memory

GPUS = ("cuda", "mps")  # the kinds of devices that have cores and memory of their own; ROCm shows as "cuda"
# Batches of images that a GPU has at a time: while one is computed, the next is copied and its work is handed over.
BATCHES_IN_FLIGHT = 2
ROWS_SHARE = 10  # the rows of a label set may take a tenth of the free memory of a GPU; batches need the rest
BLOCK_ROWS = 32_768  # float16 rows that are converted to float32 at a time: 100 MB at 768 dimensions
POSITIONS_KEPT = 16  # lists of positions that are kept on the device; see `DeviceRows.positions`


class Stream:
    """A sequence of work on a device: of a CPU or of MPS here, where copies wait for the work before them."""

    def entered(self) -> AbstractContextManager[Any]:
        """A context for work that belongs to the stream."""
        return nullcontext()

    def record(self) -> None:
        """Marks the end of the work of a batch."""

    def wait(self) -> None:
        """Blocks until the device has reached the mark."""


class CudaStream(Stream):
    """A stream of a CUDA device. Work on several of them overlaps, and the host goes on meanwhile."""

    def __init__(self, device: Any, urgent: bool) -> None:
        """`urgent`: its work goes before that of the others."""
        from torch import cuda

        self._cuda, self._stream = cuda, cuda.Stream(device, priority=-1 if urgent else 0)
        self._mark = cuda.Event(blocking=True)  # a thread that waits sleeps; the cores are needed for decoding

    def entered(self) -> Any:
        return self._cuda.stream(self._stream)

    def record(self) -> None:
        self._mark.record(self._stream)

    def wait(self) -> None:
        self._mark.synchronize()


class Device:
    """A CPU or a GPU. Thread-safe. A GPU has streams for its batches of images, one for texts, and one for scoring."""

    def __init__(self, name: str) -> None:
        """`name`: "cpu", "cuda:1" and so on; see `torch_backend.chosen_device`."""
        import torch

        self._torch, self.torch_device = torch, torch.device(name)
        self.kind: str = self.torch_device.type
        self.is_gpu = self.kind in GPUS
        self.batches = BATCHES_IN_FLIGHT if self.is_gpu and self.kind != "mps" else 1  # of images, on a GPU
        self._images, self._texts = queue.SimpleQueue[Stream](), queue.SimpleQueue[Stream]()
        for _ in range(self.batches):
            self._images.put(self._new_stream())
        self._texts.put(self._new_stream(urgent=True))
        self.scoring = self._new_stream()

    def _new_stream(self, urgent: bool = False) -> Stream:
        return CudaStream(self.torch_device, urgent) if self.kind == "cuda" else Stream()

    def stack(self, pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """A batch of uint8 arrays, in memory from which a GPU copies by itself. torch keeps it for later ones."""
        if not self.is_gpu:
            return np.array(pictures)
        shape, pinned = (len(pictures), *pictures[0].shape), self.kind == "cuda"
        batch: NDArray[np.uint8] = self._torch.empty(shape, dtype=self._torch.uint8, pin_memory=pinned).numpy()
        return np.stack(pictures, out=batch)

    def run(self, batch: NDArray[Any], tower: Callable[[Any], Any], urgent: bool = False) -> NDArray[np.float32]:
        """Runs a tower on a batch of this process's memory; -> float32 `[n, dim]`, as the tower returns it.

        On a GPU it waits for one of the streams for images, or for that for texts (`urgent`), and then once for its
        result. Raises MemoryError if the memory of a GPU does not suffice.
        """
        if not self.is_gpu:
            with self.computing():
                return np.asarray(tower(self._torch.from_numpy(batch)).float(), np.float32)
        streams, by_itself = self._texts if urgent else self._images, self.kind == "cuda"
        stream = streams.get()
        try:
            with self.computing(), stream.entered():
                found = tower(self._torch.from_numpy(batch).to(self.torch_device, non_blocking=by_itself)).float()
                result = self._torch.empty(found.shape, pin_memory=by_itself).copy_(found, non_blocking=by_itself)
                stream.record()
            stream.wait()
            return np.asarray(result, np.float32)
        finally:
            streams.put(stream)

    def synchronize(self) -> None:
        """Waits for what was copied to a GPU outside of its streams, such as the weights of a model."""
        if self.kind == "cuda":
            self._torch.cuda.synchronize(self.torch_device)

    def hold(self, rows: NDArray[Any]) -> DeviceRows | None:
        """The rows of a label set in the memory of a GPU. None if they take too much of it, or if this is no GPU.

        None for MPS as well, which has no float64. `rows`: float32 or float16 `[n, dim]`.
        """
        if not self.is_gpu or self.kind == "mps" or rows.nbytes > self.free_memory() // ROWS_SHARE:
            return None
        return DeviceRows(self, rows)

    def free_memory(self) -> int:
        """Bytes."""
        if self.kind == "cuda":
            return int(self._torch.cuda.mem_get_info(self.torch_device)[0])
        return memory()[0]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """A context for the work on a batch. Raises MemoryError on a GPU without memory for it, which keeps nothing."""
        try:
            with self._torch.inference_mode():
                yield
        except self._torch.cuda.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # they hold the activations of the layers that did run
            self.empty_cache()
            raise MemoryError(one_line(error)) from None

    def empty_cache(self) -> None:
        """Gives back the memory that torch keeps for later batches, so that a smaller one finds it in one piece."""
        self._torch.cuda.empty_cache()  # does nothing without CUDA


class DeviceRows:
    """The rows of a label set on a GPU, in the precision in which they are stored; see `labels.Cosines`.

    Products and sums are in float32, as on the CPU: float16 products would change a score by 1.2 %
    (docs/internals.md, "On a GPU"). One thread at a time may use it.
    """

    threads = None

    def __init__(self, device: Device, rows: NDArray[Any]) -> None:
        """`rows`: float32 or float16 `[n, dim]`."""
        import torch

        self.torch, self._device = torch, device
        self._positions: OrderedDict[int, tuple[NDArray[Any], Any]] = OrderedDict()
        with self.scoring():
            kind = torch.float16 if rows.dtype == np.float16 else torch.float32
            self._rows = torch.empty(rows.shape, dtype=kind, device=device.torch_device)
            for at in range(0, len(rows), BLOCK_ROWS):
                self._rows[at : at + BLOCK_ROWS] = torch.from_numpy(np.array(rows[at : at + BLOCK_ROWS]))

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """A context for `rows` and for the use of what it returns."""
        with self._device.computing(), self._device.scoring.entered():
            yield

    def __call__(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 `[b, dim]` unit rows -> their cosines, float32 `[b, n]`."""
        with self.scoring():
            return np.asarray(self._cosines(queries).cpu(), np.float32)

    def rows(self, queries: NDArray[np.float32]) -> list[DeviceRow]:
        """The same, which stays on the device: one row for each query."""
        return [DeviceRow(self, row) for row in self._cosines(queries)]

    def _cosines(self, queries: NDArray[np.float32]) -> Any:
        columns = self.torch.from_numpy(queries).to(self._rows.device).T
        found = self.torch.empty((len(queries), len(self._rows)), device=self._rows.device)
        for at in range(0, len(self._rows), BLOCK_ROWS):
            found[:, at : at + BLOCK_ROWS] = (self._rows[at : at + BLOCK_ROWS].float() @ columns).T
        return found

    def positions(self, positions: NDArray[Any]) -> Any:
        """The same positions on the device, int64. The latest ones are kept: `species.Tree` returns the same arrays,
        of up to 7 MB, again and again. They must not be changed."""
        key = id(positions)
        if key not in self._positions:
            self._positions[key] = positions, self.copied(positions)  # with the array, so that no other has its id
        self._positions.move_to_end(key)
        while len(self._positions) > POSITIONS_KEPT:
            self._positions.popitem(last=False)
        return self._positions[key][1]

    def copied(self, positions: NDArray[Any]) -> Any:
        return self.torch.from_numpy(np.array(positions, np.int64)).to(self._rows.device)


class DeviceRow:
    """The float32 values of one query on a GPU: cosines, probabilities, or sums of them; see `labels.HostRow`."""

    def __init__(self, owner: DeviceRows, values: Any) -> None:
        """`values`: float32 tensor `[n]`."""
        self._owner, self._values = owner, values

    def __len__(self) -> int:
        return len(self._values)

    def probabilities(
        self, logit_scale: np.float32, inside: NDArray[Any] | None = None, bias: float | None = None
    ) -> DeviceRow:
        values = self._values if inside is None else self._values[self._owner.positions(inside)]
        logits = values * float(logit_scale)
        return DeviceRow(self._owner, logits.softmax(0) if bias is None else (logits + bias).sigmoid())

    def sums(self, starts: NDArray[Any]) -> DeviceRow:
        # float64, because the sum of a few rows is the difference of two sums of many. The first row starts a taxon.
        totals = self._values.double().cumsum(0)
        before = totals[self._owner.positions(starts)[1:] - 1]
        upto = self._owner.torch.cat([before, totals[-1:]])
        upto[1:] -= before
        return DeviceRow(self._owner, upto.float())

    def best(self, count: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        found = self._values.topk(min(count, len(self._values)))
        positions, values = found.indices.cpu().numpy(), found.values.cpu().numpy()
        order = np.lexsort((positions, -values))
        return positions[order], values[order]

    def at(self, positions: NDArray[Any]) -> NDArray[np.float32]:
        return np.asarray(self._values[self._owner.copied(positions)].cpu(), np.float32)
