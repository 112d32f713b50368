"""The launchers: how the jobs of a sweep are run, and what has to be installed for it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from hasten.core.errors import ConfigError
from hasten.core.processor import num_cores

if TYPE_CHECKING:
    from omegaconf import DictConfig


class Plugin(NamedTuple):
    """Of Hydra: the module that it installs, its package, and the extra of hasten that brings it."""

    module: str
    package: str
    extra: str


_SUBMITIT = Plugin("hydra_plugins.hydra_submitit_launcher", "hydra-submitit-launcher", "slurm")
PLUGINS = {
    "joblib": Plugin("hydra_plugins.hydra_joblib_launcher", "hydra-joblib-launcher", "sweeps"),
    "submitit_local": _SUBMITIT,
    "submitit_slurm": _SUBMITIT,
    "ray": Plugin("hydra_plugins.hydra_ray_launcher", "hydra-ray-launcher", "ray"),
}
"""Option of hydra/launcher -> what it needs."""


def register() -> None:
    """Lets hasten's own files of launchers stand for those that plugins register under the same names."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    Plugins.instance()  # has all plugins imported, which register themselves
    known: dict[str, Any] = ConfigStore.instance().repo["hydra"].get("launcher", {})
    for option in PLUGINS:
        known.pop(f"{option}.yaml", None)


def check(option: str) -> None:
    """
    Raises:
        ConfigError: the plugin of a launcher is not installed.
    """
    if option not in PLUGINS:
        return
    plugin = PLUGINS[option]
    try:
        found = find_spec(plugin.module) is not None
    except ModuleNotFoundError:  # no plugin at all is installed
        found = False
    if not found:
        raise ConfigError(f"hydra/launcher={option} needs {plugin.package}: pip install 'hasten[{plugin.extra}]'")


def settle(config: DictConfig, option: str) -> None:
    """Sets what a launcher's file leaves open: how many jobs this machine has cores for, or cores of a job."""
    launcher = config.hydra.launcher
    serving = config.target.get("threads") if config.target else None
    training = config.trainer.get("threads") if config.trainer else None
    busy = max(serving or 1, training or 1)
    if option == "joblib" and launcher.get("n_jobs") is None:
        launcher.n_jobs = max(1, num_cores() // (serving or 1))
    elif option == "submitit_slurm" and launcher.get("cpus_per_task") is None:
        launcher.cpus_per_task = busy
    elif option == "ray" and launcher.ray.remote.get("num_cpus") is None:
        launcher.ray.remote.num_cpus = min(busy, num_cores()) if launcher.ray.init.get("address") is None else busy
