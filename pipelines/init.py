"""`hasten init`: writes a small project of the user's own, which runs as it is."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from hasten.core.errors import ConfigError
from hasten.core.recipe import Composer
from hasten.session import Session

SECTIONS = ("pipeline", "init", "hydra")
DIGITS = "digits.parquet"

MODEL = '''"""The network that is to become fast: any torch.nn.Module will do. conf/model/mine.yaml names it."""

from torch import Tensor, nn


class SmallNet(nn.Module):
    """Two convolutions and a linear layer.

    `input_shape` (of one row) and `num_outputs` (one a class) are filled in from the data, since the constructor asks
    for them; `channels` is set in conf/model/mine.yaml.
    """

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int, channels: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(input_shape[0], channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, kernel_size=3, padding=1, stride=2),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(),
        )
        self.classify = nn.Linear(2 * channels, num_outputs)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.features(images).mean(dim=(2, 3)))  # (rows, classes), before any softmax
'''

MODEL_YAML = """\
# My network: my_model.SmallNet
defaults:
  - custom                # conf/model/custom.yaml of hasten: every other knob, such as checkpoint and training
  - _self_

arch:
  _target_: my_model.SmallNet   # module and class; the module lies in the folder in which you call hasten
  channels: 32                  # an argument of the class; on the command line model.arch.channels=16
"""

DATA_YAML = f"""\
# My rows: {DIGITS}
defaults:
  - parquet               # conf/data/parquet.yaml of hasten: every other knob, such as split and normalize
  - _self_

path: {DIGITS}      # from the folder in which you call hasten
inputs: [image]           # columns that the network gets
targets: label            # the column that it is to tell
"""

EXPERIMENT_YAML = """\
# @package _global_
# My network on my rows (hasten --config-dir conf experiment=mine)
defaults:
  - override /data: mine
  - override /model: mine

name: mine                # of the experiment in MLflow

trainer:
  epochs: 20              # passes over the training rows

objective:
  max_drop: 0.03          # largest tolerated loss of accuracy: 3 points

planner:
  max_trials: 8           # candidates that are tried
"""

README = f"""\
# My project

What `hasten init` wrote: a network (`my_model.py`), its rows (`{DIGITS}`: 1797 handwritten digits of scikit-learn) and
three config files that bring them together (`conf/`). Put your own in their place. Call everything from this folder.

1. What would be done, stage by stage:

   ```
   hasten --config-dir conf experiment=mine dry_run=true
   ```

2. Make the network fast, and prove it. It leaves `outputs/<date>/<time>/` with `report.html` and `model/`:

   ```
   hasten --config-dir conf experiment=mine
   ```

3. Use what came out of it, with the folder that the second command named:

   ```python
   import hasten
   import numpy as np
   import pandas as pd

   model = hasten.load("outputs/<date>/<time>/model", trust=["my_model"])
   rows = pd.read_parquet("{DIGITS}").head(5)
   images = np.array([np.stack([np.stack(line) for line in image]) for image in rows["image"]], np.float32)
   print(model(images).argmax(axis=1), rows["label"].tolist())
   ```

`hasten --help` lists everything that can be chosen, `hasten doctor` says what works on this machine.
"""

FILES: Mapping[str, str] = {
    "README.md": README,
    "my_model.py": MODEL,
    "conf/data/mine.yaml": DATA_YAML,
    "conf/model/mine.yaml": MODEL_YAML,
    "conf/experiment/mine.yaml": EXPERIMENT_YAML,
}


def session(overrides: Sequence[str], folder: Path, config_folders: Sequence[Path]) -> Session:
    """The request without its recipe, which has nothing to do with what is written."""
    mine = [text for text in overrides if text.lstrip("+~").partition("=")[0].partition(".")[0] in SECTIONS]
    composer = Composer.of(mine)
    return Session(composer=composer, recipe=composer.compose(), folder=folder)


def main(session: Session) -> int:
    """The command; its exit code."""
    folder = Path(session.recipe.config["init"]["folder"])
    init(folder)
    there = "" if folder == Path() else f"  cd {shlex.quote(str(folder))}\n"
    print(f"{folder.absolute()} is ready; go on with\n{there}  hasten --config-dir conf experiment=mine dry_run=true")
    return 0


def init(folder: Path) -> None:
    """Writes the project: all of it or nothing.

    Raises:
        ConfigError: a file of the project is there already, or the folder can't be written to.
    """
    names = [*FILES, DIGITS]
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"init.folder={folder} is no folder")
    if there := [name for name in names if os.path.lexists(folder / name)]:
        raise ConfigError(
            f"init.folder={folder} has {', '.join(there)} already: nothing is overwritten, choose another"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".init-", dir=folder) as aside:
            for name, text in FILES.items():
                place = Path(aside, name)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(text, encoding="utf-8")
            _write_digits(Path(aside, DIGITS))
            _move(names, Path(aside), folder)
    except OSError as error:
        raise ConfigError(f"init.folder={folder} can't be written: {error.strerror or error}") from error


def _move(names: Sequence[str], aside: Path, folder: Path) -> None:
    """Moves every file to its place; takes all back where one fails."""
    moved: list[Path] = []
    try:
        for name in names:
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(aside / name, place)
            moved.append(place)
    except OSError:
        for place in moved:
            place.unlink()
        raise


def _write_digits(file: Path) -> None:
    """8x8 grey images (1, 8, 8) with values from 0 to 16, and what they show."""
    import pyarrow as pa
    from pyarrow import parquet
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = digits.images.astype("uint8")[:, None].tolist()
    columns = {
        "image": pa.array(images, pa.list_(pa.list_(pa.list_(pa.uint8())))),
        "label": pa.array(digits.target, pa.int64()),
    }
    parquet.write_table(pa.table(columns), file)
