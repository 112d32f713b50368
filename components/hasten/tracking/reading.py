"""Runs as MLflow has them, found by what people know of them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.core.credentials import without_credentials
from hasten.core.errors import ConfigError, HastenError
from hasten.tracking import connection

PAGE = 1000
SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """One run of hasten's in the store.

    Attributes:
        run: id.
        parent: id of the run that it belongs to; empty for a whole optimisation.
        status: `FINISHED`, `FAILED`, `KILLED` or `RUNNING`.
    """

    run: str
    name: str
    parent: str
    status: str
    tags: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Records:
    """All runs of a store, read only."""

    client: Any
    shown: str

    @classmethod
    def of(cls, uri: str) -> Records:
        """
        Raises:
            HastenError: the store is away, or there is none.
        """
        shown = without_credentials(uri)
        if reason := connection.away(uri):
            raise HastenError(f"{shown} does not answer: {reason} (tracking.uri)")
        database = Path(connection.absolute(uri).removeprefix(connection.SQLITE))
        if uri.startswith(connection.SQLITE) and not database.is_file():
            raise ConfigError(f"{database} is not there yet: no run has been recorded (tracking.uri)")
        with connection.one_at_a_time(uri):
            return cls(client=connection.connect(uri), shown=shown)

    def find(self, wanted: str, key: str) -> Recorded:
        """The run with this id, or the only one whose id or name begins so.

        Args:
            key: where the user typed it.

        Raises:
            ConfigError: there is none, or there are several.
        """
        known = list(self._all())
        exact = [it for it in known if it.run == wanted] or [it for it in known if it.name == wanted]
        begins = [it for it in known if it.run.startswith(wanted) or it.name.startswith(wanted)]
        # A name that an optimisation has is no beginning of what its iterations are called.
        found = exact or [it for it in begins if not it.parent] or begins
        if not found:
            raise ConfigError(f"{key}={wanted} is no run in {self.shown}, neither by id nor by name")
        if len(found) > 1:
            some = ", ".join(f"{it.run[:8]} ({it.name})" for it in found[:SHOWN])
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            raise ConfigError(f"{key}={wanted} may be {some}{more}: give more of the id")
        return found[0]

    def get(self, run: str) -> Recorded:
        return _recorded(self.client.get_run(run))

    def children(self, run: str) -> list[Recorded]:
        """Its iterations, in their order."""
        return sorted((it for it in self._all() if it.parent == run), key=lambda it: it.name)

    def json(self, run: str, file: str) -> Any:
        """An artefact; None where the run has none of that name."""
        text = self.text(run, file)
        return None if text is None else json.loads(text)

    def text(self, run: str, file: str) -> str | None:
        """The same as it is."""
        if file not in [each.path for each in self.client.list_artifacts(run)]:
            return None
        with tempfile.TemporaryDirectory() as scratch:
            return Path(self.client.download_artifacts(run, file, scratch)).read_text(encoding="utf-8")

    def _all(self) -> Iterator[Recorded]:
        experiments = [each.experiment_id for each in self.client.search_experiments()]
        token = None
        while experiments:
            page = self.client.search_runs(experiments, max_results=PAGE, page_token=token)
            yield from map(_recorded, page)
            if (token := page.token) is None or not page.token:
                return


def _recorded(run: Any) -> Recorded:
    tags = dict(run.data.tags)
    return Recorded(
        run=run.info.run_id,
        name=run.info.run_name or "",
        parent=tags.get("mlflow.parentRunId", ""),
        status=run.info.status,
        tags=tags,
    )


def trials_of(records: Records, run: str) -> Sequence[Mapping[str, Any]]:
    """What was written of every iteration of an optimisation, in their order."""
    written = (records.json(child.run, "trial.json") for child in records.children(run))
    return sorted((each for each in written if each is not None), key=lambda each: each["number"])
