"""Draws jobs: in batches, halved where memory ends, encoded and recorded beside the drawing of the next."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gspn2_diffusion.batch import manifest
from gspn2_diffusion.batch.manifest import Record
from gspn2_diffusion.batch.plan import Job
from gspn2_diffusion.batch.sizes import BatchSizes
from gspn2_diffusion.png_metadata import GenerationSettings, MetadataError, read_settings, save_picture

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

PENDING = 2  # batches drawn but not yet saved; with more the disk sets the pace, else memory would fill up


class Pictures(Protocol):
    """What was drawn, possibly still being computed; see :class:`gspn2_diffusion.cli.rendering.Drawn`."""

    def images(self) -> list[Image | None]:
        """Waits; None for pictures with values that are not numbers."""

    def seconds(self) -> float:
        """How long drawing took."""


Draw = Callable[[Sequence[GenerationSettings]], Pictures]


@dataclass
class Runner:
    """Draws jobs into a folder.

    Attributes:
        folder: where pictures and the manifest go.
        draw: B settings of one group to as many pictures; may return before they are computed.
        sizes: how many are drawn at once.
        report: called in this thread with the record of each picture when it is on the disk.
        drawn: called after ``draw`` with height, width and number of its pictures.
        stop: asked before each batch; True ends the run after what is in hand.
        writers: threads that encode pictures.
    """

    folder: Path
    draw: Draw
    sizes: BatchSizes
    report: Callable[[Record], None]
    stop: Callable[[], bool]
    drawn: Callable[[int, int, int], None] = lambda height, width, count: None
    writers: int = 1

    def run(self, jobs: Sequence[Job]) -> None:
        """Draws ``jobs``, group by group.

        Raises:
            OSError: a picture or the manifest cannot be written; what was written before stays.
        """
        with ThreadPoolExecutor(self.writers) as encoders, ThreadPoolExecutor(1) as recorder:
            pending: list[Future[list[Record]]] = []
            for done, pictures in self._batches(jobs):
                pending.append(recorder.submit(self._save, done, pictures, encoders))
                del pictures
                while pending and (len(pending) > PENDING or pending[0].done()):
                    self._collect(pending.pop(0))
            for future in pending:
                self._collect(future)

    def _collect(self, future: Future[list[Record]]) -> None:
        for record in future.result():
            self.report(record)

    def _batches(self, jobs: Sequence[Job]) -> Iterator[tuple[list[Job], Pictures]]:
        for _, members in itertools.groupby(jobs, key=lambda job: job.group):
            rest = list(members)
            while rest:
                if self.stop():
                    return
                size = self.sizes.choose(*rest[0].group[:2], len(rest))
                batch, rest = rest[:size], rest[size:]
                yield from self._draw(batch)

    def _draw(self, batch: list[Job]) -> Iterator[tuple[list[Job], Pictures]]:
        """One batch, in halves where memory ends, one by one where a picture fails for another reason."""
        start = time.perf_counter()
        height, width = batch[0].group[:2]
        try:
            with self.sizes.observe(height, width, len(batch)):
                pictures = self.draw([job.settings for job in batch])
        except Exception as error:  # one picture's failure must not end the others
            reason = error
        else:
            self.drawn(height, width, len(batch))
            yield batch, pictures
            return
        if len(batch) == 1:
            self._fail(batch[0], reason, time.perf_counter() - start)
            return
        step = 1
        if is_out_of_memory(reason):
            step = self.sizes.shrink(height, width, len(batch))
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

    def _save(self, batch: list[Job], pictures: Pictures, encoders: ThreadPoolExecutor) -> list[Record]:
        """Runs in the recording thread, for one batch after the other."""
        images, each = pictures.images(), pictures.seconds() / len(batch)
        jobs = zip(batch, images, itertools.repeat(each), strict=False)
        records = list(encoders.map(lambda item: self._save_one(*item), jobs))
        manifest.append(self.folder, records)
        return records

    def _save_one(self, job: Job, image: Image | None, seconds: float) -> Record:
        if image is None:
            reason = f"values that are not numbers in {job.settings.dtype}"
            return {**base_record(job, "failed", seconds), "error": reason}
        path = self.folder / job.file
        path.parent.mkdir(parents=True, exist_ok=True)
        save_picture(image, path, job.settings)
        return done_record(self.folder, job, seconds)


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
