"""A device of torch: copies batches to it, runs a model there, and copies the vectors back.

Everything that depends on the kind of a device is in this file. `torch_backend.py` knows models, and no device.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from errors import one_line

GPUS = ("cuda", "mps")  # the kinds of devices that have cores and memory of their own; ROCm shows as "cuda"


class Device:
    """A CPU or a GPU. Thread-safe."""

    def __init__(self, name: str) -> None:
        """`name`: "cpu", "cuda:1" and so on; see `torch_backend.chosen_device`."""
        import torch

        self._torch, self.torch_device = torch, torch.device(name)
        self.kind: str = self.torch_device.type
        self.is_gpu = self.kind in GPUS

    def run(self, batch: NDArray[Any], tower: Callable[[Any], Any]) -> NDArray[np.float32]:
        """Runs a tower on a batch of this process's memory; -> float32 `[n, dim]`, as the tower returns it.

        Raises MemoryError if the memory of a GPU does not suffice.
        """
        with self._computing():
            found = tower(self._torch.from_numpy(batch).to(self.torch_device))
            vectors: NDArray[np.float32] = found.float().cpu().numpy()
            return vectors

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """A context for the work on a batch. A GPU without memory for it keeps nothing of it."""
        try:
            with self._torch.inference_mode():
                yield
        except self._torch.cuda.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # they hold the activations of the layers that did run
            text = one_line(error)
            self.empty_cache()
            raise MemoryError(text) from None

    def empty_cache(self) -> None:
        """Gives back the memory that torch keeps for later batches, so that a smaller one finds it in one piece."""
        if self.kind == "cuda":
            self._torch.cuda.empty_cache()
