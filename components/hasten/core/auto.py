"""A target and the machine at hand: what of it the machine is to say (`target=auto`), and what the machine lacks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hasten.core.construct import construct
from hasten.core.cuda import cuda_problem, gpus
from hasten.core.errors import ConfigError
from hasten.core.interfaces import Engine, Target
from hasten.core.processor import float_formats, num_cores
from hasten.core.sections import Accelerator, Step
from hasten.core.tpu import tpu_problem

LEFT_OPEN = ("device", "reference", "threads", "precisions", "engines")
"""Keys of a target that are null where the machine is to say them. Every other null has a meaning of its own."""


def left_open(target: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys that the machine is to say."""
    return tuple(key for key in LEFT_OPEN if key in target and target[key] is None)


def from_the_machine(target: Mapping[str, Any]) -> dict[str, Any]:
    """Key -> value of what a target leaves open; engines, which need the rest, by `working_engines`.

    Args:
        target: section of the config. What it says is kept: of `device: cpu` the precisions are the processor's.
    """
    device = target["device"] or ("cpu" if cuda_problem() else "gpu")
    values = {
        "device": device,
        "reference": "cuda" if device == "gpu" else "cpu",
        "threads": num_cores(),
        "precisions": [*_float_formats(device), "int8"],
    }
    return {key: values[key] for key in left_open(target) if key in values}


def _float_formats(device: str) -> tuple[str, ...]:
    return gpus()[0].float_formats if device == "gpu" and gpus() else float_formats()


def working_engines(nodes: Iterable[tuple[str, Mapping[str, Any]]], target: Mapping[str, Any]) -> list[str]:
    """The options of the group `engine` that are installed and run on the target, eager PyTorch first.

    Args:
        nodes: option and resolved node of each.
        target: section of the config, complete but for its engines.
    """
    filled = Target.of({**target, "engines": ()})
    found = [option for option, node in nodes if _works(node, filled)]
    return sorted(found, key=lambda option: (option != "eager", option))


def _works(node: Mapping[str, Any], target: Target) -> bool:
    try:
        engine = construct(node, "engine")
    except ConfigError:  # it does not fit this target, and says why where the user names it
        return False
    return isinstance(engine, Engine) and engine.supports(False, target) is None


def absent(target: Target) -> str | None:
    """Why the machine at hand is not the target: it can't be measured then. None where it may be.

    Whether there is a TPU or an FPGA only its engines can tell; they calculate what it would, and say so.
    """
    keys = {"target.device=gpu": target.device == "gpu", "target.reference=cuda": target.reference == "cuda"}
    named = next((key for key, asked in keys.items() if asked), None)
    reason = cuda_problem() if named else None
    return f"{named} can't be served: {reason}; target=auto takes what is here" if reason else None


def untrainable(accelerator: Accelerator) -> str | None:
    """Why nothing can be trained on the accelerator here; None where it may be."""
    if accelerator == "cpu":
        return None
    needs = {"cuda": "a GPU that PyTorch can use", "tpu": "torch_xla and a TPU"}[accelerator]
    reason = cuda_problem() if accelerator == "cuda" else tpu_problem()
    remedy = "trainer.accelerator=cpu trains on the processor"
    return f"trainer.accelerator={accelerator} needs {needs}: {reason}; {remedy}" if reason else None


def uncalculable(step: Step, accelerator: Accelerator) -> Iterator[str]:
    """Why steps can't be calculated like this on the accelerator here, one line for each reason."""
    if accelerator == "tpu":
        if step.precision == "float16":
            yield "trainer.precision=float16 is none of a TPU's: trainer.precision=bfloat16 needs no loss scaling"
        if step.compile != "none":
            yield f"trainer.compile={step.compile} is not for a TPU, for which torch_xla compiles: trainer.compile=none"
    elif step.compile != "none" and (missing := _missing_compiler(accelerator)):
        yield (
            f"trainer.compile={step.compile} needs a compiler, and there is no {missing}: install it, or name another "
            f"one in the environment variable {'CXX' if accelerator == 'cpu' else 'CC'}"
        )


def _missing_compiler(accelerator: Accelerator) -> str | None:
    """What torch.compile builds its kernels with, where it is not here: of C++ for the processor, of C for a GPU."""
    variable, usual = ("CXX", ("g++",)) if accelerator == "cpu" else ("CC", ("gcc", "clang"))
    wanted = (os.environ[variable],) if os.environ.get(variable) else usual
    return None if any(map(shutil.which, wanted)) else " or ".join(wanted)
