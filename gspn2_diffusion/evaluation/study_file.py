"""The result file of a study, ``benchmarks/results/<study>.json``, written whenever more is known."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gspn2_diffusion.evaluation.comparison import count_parameters, read_run
from gspn2_diffusion.evaluation.report import write_json


def _origin(environment: Mapping[str, Any]) -> dict[str, Any]:
    return {key: environment.get(key) for key in ("date", "commit", "gpu")}


def _with_origin(facts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Variants of a file, each with where it was made, which older files say for all of them together."""
    return {name: {"made": _origin(facts["environment"]), **v} for name, v in facts["variants"].items()}


class StudyFile:
    """Variants by name, of one study and one set of settings; several threads may add to it.

    Variants of an earlier file with the same settings stay until they are added again; those of other
    settings are dropped when the file is first written.

    Args:
        path: the JSON file, which need not exist.
        study: name of the study.
        settings: what all variants have in common.
        environment: machine, versions, date and commit.
        order: names of the variants as they should follow one another.
    """

    def __init__(
        self,
        path: Path,
        study: str,
        settings: Mapping[str, Any],
        environment: Mapping[str, Any],
        order: Sequence[str],
    ) -> None:
        self.path = path
        self._lock, self._order = threading.Lock(), list(order)
        self._head: dict[str, Any] = {"study": study, "settings": dict(settings)}
        self._head["environment"] = dict(environment)
        self.variants: dict[str, dict[str, Any]] = {}
        if path.is_file():
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["settings"] == self._head["settings"]:
                self.variants = _with_origin(known)
            else:
                print(f"{path} was made with other settings, {known['settings']}: it is replaced")

    def add_run(self, name: str, config: Mapping[str, Any], folder: Path) -> None:
        """Add what a run that ended well measured.

        Raises:
            FileNotFoundError: the run has no metrics.
        """
        measured = read_run(folder)
        if self._head["settings"].get("timed_alone"):  # speeds beside other runs say nothing
            measured |= {"step_milliseconds": None, "pictures_per_second": None}
        facts = {"config": dict(config), "parameters": count_parameters(config), **measured}
        with self._lock:
            self.variants[name] = {**facts, "evaluation": None, "made": _origin(self._head["environment"])}
            self._write([])

    def take(self, path: Path) -> list[str]:
        """Add what another file of the study knows: its variants, and what is missing about the same runs.

        Returns:
            Names of the variants that something was learnt about.

        Raises:
            ValueError: that file is of another study or other settings.
        """
        other = json.loads(path.read_text(encoding="utf-8"))
        for key in ("study", "settings"):
            if other[key] != self._head[key]:
                raise ValueError(f"{path} has {key} {other[key]!r}; allowed: {self._head[key]!r}")
        found: dict[str, dict[str, Any]] = {}
        for name, facts in _with_origin(other).items():
            mine = self.variants.get(name)
            if mine is None:
                found[name] = facts
            elif mine["validation"] == facts["validation"]:  # the same run
                found[name] = {k: v for k, v in facts.items() if v is not None and mine.get(k) is None}
        with self._lock:
            for name, facts in found.items():
                self.variants[name] = {**self.variants.get(name, {}), **facts}
            self._write([])
        return [name for name, facts in found.items() if facts]

    def add(self, found: Mapping[str, Mapping[str, Any]]) -> None:
        """Add facts to variants that are in the file, by name."""
        with self._lock:
            for name, facts in found.items():
                self.variants[name] |= facts
            self._write([])

    def finish(self, failed: list[str]) -> None:
        """Say which runs failed."""
        with self._lock:
            self._write(failed)

    def _write(self, failed: list[str]) -> None:
        known = sorted(self.variants, key=lambda name: [*self._order, name].index(name))
        variants = {name: self.variants[name] for name in known}
        write_json({**self._head, "variants": variants, "failed": failed}, self.path)
