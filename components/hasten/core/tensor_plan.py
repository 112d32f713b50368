"""How the layers of a model are divided among processes: `model.tensor_plan`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hasten.core.recipe import nearest

WORDS: Mapping[str, str] = MappingProxyType(
    {
        "column": "a linear layer whose outputs are divided, for a row layer to take",
        "column_gathered": "a linear layer whose outputs are divided and put together again",
        "row": "a linear layer whose inputs are divided, as a column layer leaves them; what they give is summed",
        "embedding": "a table of vectors whose rows are divided",
        "shared": "a module whose first argument goes to column layers alone, which sum its gradient only once",
        "sequence": "a layer that treats each place of a sequence alike, and gets a part of the sequence",
        "sequence_scattered": "such a layer that gets the whole sequence and gives a part of it",
        "sequence_gathered": "such a layer that gets a part of the sequence and gives the whole",
    }
)
"""Word of a plan -> what a module is that it stands for. Those with `sequence` count with
`distributed.sequence_parallel=true` alone; then a sequence is in parts from the scattered layer to the gathered one,
and so is what column layers are given and what row layers give, but for gathered ones."""

SEQUENCE = tuple(word for word in WORDS if word.startswith("sequence"))


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """Patterns of module names, and what is to become of the modules that each of them fits.

    Attributes:
        layers: pattern -> one of `WORDS`; in a config null, too, for what stays whole. A pattern has as many parts
            between its dots as the name, and in each part `*` stands for anything; a name that several fit is the
            first's.
        key: of the config, where it is spelt.
    """

    layers: Mapping[str, str]
    key: str = "model.tensor_plan"

    @classmethod
    def of(cls, config: Mapping[str, Any], section: str) -> TensorPlan:
        """Of the model that a section of a config trains: its own, else that of the model which goes on (`student`)."""
        node = _at(config, section)
        if "arch" not in node:
            section = "student" if config["student"].get("arch") else "model"
            node = config[section]
        plan: Any = node.get("tensor_plan") or {}
        if isinstance(plan, Mapping):
            plan = {pattern: word for pattern, word in plan.items() if word is not None}
        return cls(layers=plan, key=f"{section}.tensor_plan")

    def problems(self, *, tensor: int, sequence_parallel: bool) -> Iterator[str]:
        """Why it divides nothing among so many processes, whatever the model.

        Args:
            sequence_parallel: as of `core.sections.Distributed`.
        """
        if not isinstance(self.layers, Mapping):
            yield f"{self.key} must be a mapping of names of modules to {', '.join(WORDS)}, got {self.layers!r}"
            return
        wrong = {name: word for name, word in self.layers.items() if word not in WORDS}
        for name, word in wrong.items():
            hint = nearest(str(word), list(WORDS))
            yield f"{self.key}: {name} must be one of {', '.join(WORDS)}, got {word!r}{hint}"
        if wrong or tensor == 1:
            return
        if not any(word not in SEQUENCE for word in self.layers.values()):
            remedy = "name them, or let distributed=fsdp divide whatever there is"
            yield f"distributed.tensor={tensor} divides the layers that {self.key} names, and it names none: {remedy}"
        elif sequence_parallel and not any(word in SEQUENCE for word in self.layers.values()):
            yield (
                f"distributed.sequence_parallel=true divides along the sequence what {self.key} calls "
                f"{', '.join(SEQUENCE)}, and it calls nothing so"
            )


WHOLE = TensorPlan(layers=MappingProxyType({}))
"""The plan that divides nothing."""


def _at(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    node: Any = config
    for part in key.split("."):
        node = node[part]
    return dict(node)
