"""The trunk of the config: what every experiment has, with types that are checked when it is composed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class StoreSection:
    folder: str = MISSING
    action: str = MISSING
    days: float | None = None


@dataclass
class InitSection:
    folder: str = MISSING


@dataclass
class UiSection:
    host: str = MISSING
    port: int = MISSING


@dataclass
class SweepSection:
    again: str | None = None


@dataclass
class Schema:
    name: str | None = None
    seed: int = MISSING
    dry_run: bool = MISSING
    store: StoreSection = field(default_factory=StoreSection)
    init: InitSection = field(default_factory=InitSection)
    sweep: SweepSection = field(default_factory=SweepSection)
    launch: Any = None
    run: str | None = None
    runs: list[str] = field(default_factory=list)
    ui: UiSection = field(default_factory=UiSection)
    pipeline: Any = None
    data: Any = None
    task: Any = None
    model: Any = None
    student: Any = None
    distillation: Any = None
    pruning: Any = None
    quantization: Any = None
    engine: Any = None
    target: Any = None
    loader: Any = None
    trainer: Any = None
    distributed: Any = None
    callbacks: Any = None
    objective: Any = None
    planner: Any = None
    strategy: Any = None
    strategies: Any = None
    space: Any = None
    hparams_search: Any = None
    tracking: Any = None
    experiment: Any = None
    debug: Any = None


def register() -> None:
    """Makes the trunk known to Hydra under the name that `config.yaml` begins with."""
    ConfigStore.instance().store(name="schema", node=Schema, provider="hasten")
