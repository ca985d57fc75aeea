"""Draws jobs: in batches, halved where memory ends, saved and recorded beside the drawing of the next."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gspn2_diffusion.batch import manifest
from gspn2_diffusion.batch.manifest import Record
from gspn2_diffusion.batch.plan import Job
from gspn2_diffusion.png_metadata import GenerationSettings, MetadataError, read_settings, save_picture

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

logger = logging.getLogger(__name__)

Draw = Callable[[Sequence[GenerationSettings]], "np.ndarray"]
ToImage = Callable[["np.ndarray"], "Image | None"]
AUTO_START = 32
"""The most pictures that ``auto`` draws at once on a GPU; less where memory ends earlier."""


@dataclass
class Runner:
    """Draws jobs into a folder.

    Attributes:
        folder: where pictures and the manifest go.
        draw: B settings of one group to pictures ``(B, H, W, 3)``.
        to_image: one picture as an image, or None if it is damaged.
        batch_size: the most pictures drawn at once.
        report: called in this thread with the record of each picture when it is on the disk.
        stop: asked before each batch; True ends the run after what is in hand.
    """

    folder: Path
    draw: Draw
    to_image: ToImage
    batch_size: int
    report: Callable[[Record], None]
    stop: Callable[[], bool]
    _limits: dict[tuple[int, int], int] = field(default_factory=dict)

    def run(self, jobs: Sequence[Job]) -> None:
        """Draws ``jobs``, group by group.

        Raises:
            OSError: a picture or the manifest cannot be written; what was written before stays.
        """
        with ThreadPoolExecutor(1) as writer:
            pending: list[Future[list[Record]]] = []
            for done, seconds, pixels in self._batches(jobs):
                pending.append(writer.submit(self._save, done, pixels, seconds))
                if len(pending) > 2:  # the disk sets the pace rather than the memory filling up
                    self._collect(pending.pop(0))
            for future in pending:
                self._collect(future)

    def _collect(self, future: Future[list[Record]]) -> None:
        for record in future.result():
            self.report(record)

    def _batches(self, jobs: Sequence[Job]) -> Iterator[tuple[list[Job], float, np.ndarray]]:
        for _, members in itertools.groupby(jobs, key=lambda job: job.group):
            rest = list(members)
            while rest:
                if self.stop():
                    return
                size = self._limits.get(rest[0].group[:2], self.batch_size)
                batch, rest = rest[:size], rest[size:]
                yield from self._draw(batch)

    def _draw(self, batch: list[Job]) -> Iterator[tuple[list[Job], float, np.ndarray]]:
        """One batch, in halves where memory ends, one by one where a picture fails for another reason."""
        start = time.perf_counter()
        try:
            pixels = self.draw([job.settings for job in batch])
        except Exception as error:  # one picture's failure must not end the others
            reason = error
        else:
            yield batch, time.perf_counter() - start, pixels
            return
        height, width = batch[0].group[:2]
        if len(batch) == 1:
            self._fail(batch[0], reason, time.perf_counter() - start)
            return
        step = 1
        if is_out_of_memory(reason):
            step = len(batch) // 2
            self._limits[height, width] = step
            logger.warning("not enough memory for %d pictures at once; going on with %d", len(batch), step)
        del reason  # its traceback holds the tensors of the failed call
        empty_cache()
        for first in range(0, len(batch), step):
            if first and self.stop():
                return
            yield from self._draw(batch[first : first + step])

    def _fail(self, job: Job, error: BaseException, seconds: float) -> None:
        empty_cache()
        self._record_failure(job, describe(job, error), seconds)

    def _record_failure(self, job: Job, reason: str, seconds: float) -> None:
        record = {**base_record(job, "failed", seconds), "error": reason}
        manifest.append(self.folder, [record])
        self.report(record)

    def reject(self, job: Job, reason: str) -> None:
        """Records a picture that cannot be drawn at all."""
        self._record_failure(job, reason, 0.0)

    def _save(self, batch: list[Job], pixels: np.ndarray, seconds: float) -> list[Record]:
        records = []
        for job, array in zip(batch, pixels, strict=True):
            image = self.to_image(array)
            if image is None:
                reason = f"values that are not numbers in {job.settings.dtype}"
                records.append({**base_record(job, "failed", seconds / len(batch)), "error": reason})
                continue
            path = self.folder / job.file
            path.parent.mkdir(parents=True, exist_ok=True)
            save_picture(image, path, job.settings)
            records.append(done_record(self.folder, job, seconds / len(batch)))
        manifest.append(self.folder, records)
        return records


def describe(job: Job, error: BaseException) -> str:
    """Why a picture was not drawn, in one line."""
    if is_out_of_memory(error):
        return f"not enough memory for {job.settings.width}x{job.settings.height} pixels"
    return " ".join(f"{type(error).__name__}: {error}".split())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a call failed for want of memory, on a GPU or on the CPU."""
    import torch

    allocation = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return allocation or isinstance(error, torch.OutOfMemoryError | MemoryError)


def empty_cache() -> None:
    """Gives memory of a failed call back."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def base_record(job: Job, status: str, seconds: float) -> Record:
    """What every line of the manifest has: identity, place in the list, time, all settings."""
    record: Record = {
        "status": status,
        "key": job.key,
        "index": job.picture.index,
        "seconds": round(seconds, 4),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if job.picture.template != job.picture.prompt:
        record["template"] = job.picture.template
    return {**record, **asdict(job.settings)}


def done_record(folder: Path, job: Job, seconds: float) -> Record:
    """The line of a picture that is on the disk."""
    content = (folder / job.file).read_bytes()
    found = {"file": job.file, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    return {**base_record(job, "done", seconds), **found}


def open_jobs(folder: Path, jobs: Sequence[Job]) -> tuple[list[Job], list[Record]]:
    """The jobs that are left to draw, and records of pictures that were saved but not yet recorded.

    A process killed between the two leaves such a picture. A name taken by a picture with other settings, or
    by a file of someone else, is left alone: the job gets its key appended to its name.
    """
    records = manifest.read(folder)
    left, adopted = [], []
    for job in jobs:
        record = records.get(job.key)
        if manifest.is_finished(folder, record, Path(job.file).suffix):
            continue
        recorded = record.get("file") if record else None
        for candidate in (job, replace(job, file=_with_key(job))):
            path = folder / candidate.file
            # A damaged picture of our own is drawn over.
            free = not path.exists() or candidate.file == recorded
            if free or not _drew_something_else(path, candidate):
                break
        if path.exists() and _is_whole(path):
            adopted.append(done_record(folder, candidate, 0.0))
        else:
            left.append(candidate)
    _remove_leftovers(folder, left)
    return left, adopted


def _with_key(job: Job) -> str:
    path = Path(job.file)
    return path.with_name(f"{path.stem}-{job.key[:16]}{path.suffix}").as_posix()


def _drew_something_else(path: Path, job: Job) -> bool:
    from gspn2_diffusion.batch.plan import picture_key

    try:
        return picture_key(read_settings(path)) != job.key
    except (MetadataError, OSError):
        return True


def _is_whole(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError):
        return False
    return True


def _remove_leftovers(folder: Path, jobs: Sequence[Job]) -> None:
    """Temporary files that a killed process left of these pictures."""
    names = {Path(job.file).name[:80] for job in jobs}
    for parent in {(folder / job.file).parent for job in jobs}:
        for item in parent.glob(".*.tmp"):
            if item.name[1:].rsplit(".", 2)[0] in names:
                item.unlink(missing_ok=True)
