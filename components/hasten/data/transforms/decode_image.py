"""Encoded images to pixels."""

from __future__ import annotations

import io
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from hasten.core.errors import ConfigError
from hasten.core.interfaces import Columns, Transform
from hasten.data.transforms import checks

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = Annotated[int, Ge(1)]
_CHANNELS = {"RGB": 3, "L": 1}


@dataclass(frozen=True, kw_only=True)
class DecodeImage(Transform):
    """Images to pixels (B, channels, height, width) of 0 to 255, uint8.

    Rows are the bytes of a PNG, JPEG, BMP, GIF or WebP file (of several pictures the first), or uint8 arrays
    (height, width) or (height, width, channels) with 1, 3 or 4 channels. Images of another size are stretched to
    `size`; `bilinear` and `bicubic` average over all pixels that a smaller one covers. Transparency and EXIF rotation
    are left out.

    Attributes:
        size: (height, width); None: the commonest size of the training rows, of equally common ones the smallest.
        mode: `RGB` for 3 channels, `L` for 1, grey: 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601).
        resize: the filter.
    """

    column: str
    size: tuple[Pixels, Pixels] | None = None
    mode: Literal["RGB", "L"] = "RGB"
    resize: Literal["nearest", "bilinear", "bicubic"] = "bilinear"

    def fit(self, columns: Columns) -> DecodeImage:
        return self.fit_pieces([columns])

    def fit_pieces(self, pieces: Iterable[Columns]) -> DecodeImage:
        if self.size is not None:
            return self
        counts = Counter[tuple[int, int]]()
        first = 0
        for columns in pieces:
            images = self._rows(columns)
            with checks.numbered_from(first):
                opened = map(self._opened, images, range(len(images)))
                counts.update((image.height, image.width) for image in opened)
            first += len(images)
        return replace(self, size=min(counts, key=lambda size: (-counts[size], size)))

    def __call__(self, columns: Columns) -> Columns:
        if self.size is None:
            raise ConfigError("DecodeImage.size is null and was not learned from training rows (data.transforms)")
        rows, channels = self._rows(columns), _CHANNELS[self.mode]
        decoded_BHWC = np.empty((len(rows), *self.size, channels), dtype=np.uint8)
        if rows.dtype == np.uint8 and rows.shape == decoded_BHWC.shape:
            decoded_BHWC = rows
        else:
            for row, value in enumerate(rows):
                decoded_BHWC[row] = self._decoded(value, row)
        pixels_BCHW = np.ascontiguousarray(decoded_BHWC.transpose(0, 3, 1, 2))
        return checks.replaced(columns, [self.column], {self.column: pixels_BCHW}, self)

    def _rows(self, columns: Columns) -> NDArray[Any]:
        rows = checks.column(columns, self.column, self)
        if not (rows.dtype == object and rows.ndim == 1) and not (rows.dtype == np.uint8 and rows.ndim in (3, 4)):
            raise ConfigError(
                f"DecodeImage wants bytes of image files or uint8 arrays (rows, height, width, channels) in the column "
                f"{self.column}, got {checks.told(rows)}"
            )
        return rows

    def _decoded(self, value: Any, row: int) -> NDArray[np.uint8]:
        """(height, width, channels) of one image."""
        from PIL import Image

        image = self._opened(value, row)
        if image.mode.startswith(("I", "F")):
            raise self._refusal(row, f"pixels of more than 8 bits (mode {image.mode}): convert it to 8 bits a channel")
        height, width = self.size or (image.height, image.width)
        try:
            # A palette with transparent colours has to go through RGBA, or Pillow warns.
            whole = image.convert("RGBA") if "transparency" in image.info else image
            whole.load()
            sized = whole if whole.mode == self.mode else whole.convert(self.mode)
        except _BROKEN as error:
            raise self._refusal(row, f"a broken image: {error}") from error
        if sized.size != (width, height):
            sized = sized.resize((width, height), Image.Resampling[self.resize.upper()])
        return np.asarray(sized).reshape(height, width, -1)

    def _opened(self, value: Any, row: int) -> Image:
        """An image whose size is known and whose pixels may not be decoded yet."""
        from PIL import Image, UnidentifiedImageError

        if isinstance(value, np.ndarray):
            return self._of_array(value, row)
        if not isinstance(value, bytes):
            raise self._refusal(row, f"a {type(value).__name__} instead of bytes or an uint8 array")
        try:
            return Image.open(io.BytesIO(value))
        except UnidentifiedImageError as error:
            raise self._refusal(row, f"{len(value)} bytes that are no image") from error
        except (Image.DecompressionBombError, *_BROKEN) as error:
            raise self._refusal(row, f"a broken image: {error}") from error

    def _of_array(self, value: NDArray[Any], row: int) -> Image:
        from PIL import Image

        channels = value.shape[2] if value.ndim == 3 else 1
        if value.dtype != np.uint8 or value.ndim not in (2, 3) or channels not in (1, 3, 4) or not value.size:
            raise self._refusal(
                row, f"{checks.told(value)} instead of uint8 (height, width) or (height, width, 1, 3 or 4 channels)"
            )
        return Image.fromarray(np.ascontiguousarray(value[..., 0] if value.ndim == 3 and channels == 1 else value))

    def _refusal(self, row: int, got: str) -> ConfigError:
        return ConfigError(
            f"DecodeImage wants an image in the column {self.column}, row {checks.row_number(row)}, got {got}"
        )


_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, OverflowError)
"""What Pillow raises for files that begin like an image and go on like something else."""
