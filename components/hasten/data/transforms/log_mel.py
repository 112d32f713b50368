"""Sound to log mel spectrograms."""

from __future__ import annotations

import io
import wave
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import ceil, gcd
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt
from numpy.typing import NDArray

from hasten.core.errors import ConfigError
from hasten.core.interfaces import Columns, Transform
from hasten.data.transforms import checks

Floats = NDArray[np.float64]
_ROWS_AT_ONCE = 256
"""Sounds whose spectra are held in memory at once: 50 MB for one second at 8 kHz."""


@dataclass(frozen=True, kw_only=True)
class LogMel(Transform):
    """Sound to (B, 1, mels, frames) float32: the natural logarithm of the power in bands that are even to the ear.

    Rows are the bytes of WAV files (PCM of 8, 16, 24 or 32 bits; several channels are averaged; another sample rate is
    resampled), or float arrays of samples in [-1, 1] at `sample_rate`. A sound is cut or padded with silence to
    `seconds`, divided into frames that lie whole within it, and each frame is multiplied by a periodic Hann window.
    Its power spectrum |FFT|^2 (zero-padded to the next power of two) goes through triangular filters whose corners are
    even from 0 to half the sample rate on the scale mel(f) = 2595 log10(1 + f / 700) of O'Shaughnessy (1987), Speech
    Communication, as in the HTK Book, section 5.4; the triangles rise and fall linearly in hertz, to 1.

    Attributes:
        sample_rate: in hertz.
        frame_ms: length of the window.
        hop_ms: from the start of one frame to the next.
        mels: how many bands.
        seconds: of sound that a row holds.
        floor: least power of a band; what is below it counts as this much, so that silence has a logarithm.
    """

    column: str
    sample_rate: Annotated[int, Ge(1)] = 8000
    frame_ms: Annotated[float, Gt(0)] = 25.0
    hop_ms: Annotated[float, Gt(0)] = 10.0
    mels: Annotated[int, Ge(1)] = 40
    seconds: Annotated[float, Gt(0)] = 1.0
    floor: Annotated[float, Gt(0)] = 1e-5

    def __post_init__(self) -> None:
        if self._window < 2 or self._hop < 1 or self._samples < self._window:
            raise ConfigError(
                f"frame_ms must be at least 2 samples and at most seconds, hop_ms at least 1 sample, got frame_ms="
                f"{self.frame_ms:g}, hop_ms={self.hop_ms:g}, seconds={self.seconds:g} at {self.sample_rate} Hz (LogMel)"
            )
        if not self._filters.any(axis=0).all():
            raise ConfigError(
                f"mels must leave each band a frequency of the spectrum, got {self.mels} with frame_ms="
                f"{self.frame_ms:g} at {self.sample_rate} Hz: lower LogMel.mels or raise LogMel.frame_ms"
            )

    def __call__(self, columns: Columns) -> Columns:
        samples_BS = self._sounds(checks.column(columns, self.column, self))
        parts = [
            self._spectrogram(samples_BS[start : start + _ROWS_AT_ONCE])
            for start in range(0, len(samples_BS), _ROWS_AT_ONCE)
        ]
        return checks.replaced(columns, [self.column], {self.column: np.concatenate(parts)[:, None]}, self)

    @property
    def _window(self) -> int:
        return round(self.sample_rate * self.frame_ms / 1000)

    @property
    def _hop(self) -> int:
        return round(self.sample_rate * self.hop_ms / 1000)

    @property
    def _samples(self) -> int:
        return round(self.sample_rate * self.seconds)

    @cached_property
    def _filters(self) -> Floats:
        """Weight of each frequency in each band, (frequencies, mels)."""
        highest = 2595 * np.log10(1 + self.sample_rate / 2 / 700)
        corners = 700 * (10 ** (np.linspace(0, highest, self.mels + 2) / 2595) - 1)
        points = 2 ** (self._window - 1).bit_length()
        frequencies_F1 = np.fft.rfftfreq(points, 1 / self.sample_rate)[:, None]
        low, middle, high = corners[:-2], corners[1:-1], corners[2:]
        rising, falling = (frequencies_F1 - low) / (middle - low), (high - frequencies_F1) / (high - middle)
        return np.maximum(0.0, np.minimum(rising, falling))

    def _spectrogram(self, samples_BS: Floats) -> NDArray[np.float32]:
        """(B, mels, frames)."""
        window_W = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(self._window) / self._window)
        frames_BTW = np.lib.stride_tricks.sliding_window_view(samples_BS, self._window, axis=1)[:, :: self._hop]
        points = 2 * (len(self._filters) - 1)
        spectrum_BTF = np.fft.rfft(frames_BTW * window_W, points)
        bands_BTM = (spectrum_BTF.real**2 + spectrum_BTF.imag**2) @ self._filters
        return np.log(np.maximum(bands_BTM, self.floor)).transpose(0, 2, 1).astype(np.float32)

    def _sounds(self, rows: NDArray[Any]) -> Floats:
        """Samples of each row, (B, samples), cut or padded."""
        sounds: Iterable[NDArray[Any]]
        if rows.dtype.kind == "f" and rows.ndim == 2:
            sounds = rows
        elif rows.dtype == object and rows.ndim == 1:
            sounds = [self._sound(value, row) for row, value in enumerate(rows)]
        else:
            raise ConfigError(
                f"LogMel wants bytes of WAV files or float arrays (rows, samples) in the column {self.column}, got "
                f"{checks.told(rows)}"
            )
        samples_BS = np.zeros((len(rows), self._samples))
        for row, sound in enumerate(sounds):
            samples_BS[row, : len(sound)] = sound[: self._samples]
        broken = np.flatnonzero(~np.isfinite(samples_BS).all(axis=1))
        if len(broken):
            raise self._refusal(int(broken[0]), "samples that are NaN or infinite")
        return samples_BS

    def _sound(self, value: Any, row: int) -> Floats:
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim == 1:
            return value.astype(np.float64)
        if not isinstance(value, bytes):
            got = checks.told(value) if isinstance(value, np.ndarray) else type(value).__name__
            raise self._refusal(row, f"{got} instead of bytes of a WAV file or a float array of samples")
        try:
            with wave.open(io.BytesIO(value)) as file:
                rate, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
                data = file.readframes(file.getnframes())
        except (wave.Error, EOFError, RuntimeError) as error:
            raise self._refusal(
                row, f"bytes that are no WAV file of PCM samples: {str(error) or 'they end early'}"
            ) from error
        if width not in _FULL_SCALE or not 1 <= rate <= _HIGHEST_RATE:
            raise self._refusal(row, f"a WAV file of {8 * width} bits at {rate} Hz")
        whole = data[: len(data) // (width * channels) * width * channels]
        mono = _integers(whole, width).reshape(-1, channels).mean(axis=1) / _FULL_SCALE[width]
        return mono if rate == self.sample_rate else self._resampled(mono, rate)

    def _resampled(self, samples: Floats, rate: int) -> Floats:
        from scipy.signal import resample_poly

        common = gcd(rate, self.sample_rate)
        up, down = self.sample_rate // common, rate // common
        # A long recording costs no more than what is kept of it; the filter reaches 10 * max(up, down) / up samples.
        kept = samples[: ceil(self.seconds * rate) + 20 * ceil(max(up, down) / up)]
        resampled: Floats = resample_poly(kept, up, down) if len(kept) else kept
        return resampled

    def _refusal(self, row: int, got: str) -> ConfigError:
        return ConfigError(f"LogMel wants sound in the column {self.column}, row {checks.row_number(row)}, got {got}")


_HIGHEST_RATE = 200_000
"""Hertz; higher ones are broken headers, for which a filter to resample would not fit into memory."""

_FULL_SCALE = {width: float(2 ** (8 * width - 1)) for width in (1, 2, 3, 4)}
"""Bytes of a sample -> the integer that stands for the amplitude 1."""


def _integers(data: bytes, width: int) -> NDArray[Any]:
    """Samples of WAV data: little-endian, signed but for those of 8 bits, whose silence is 128."""
    if width == 1:
        return np.frombuffer(data, np.uint8).astype(np.int16) - 128
    if width == 3:
        # Into the upper bytes of 32 bits and down again, which keeps the sign.
        padded = np.zeros((len(data) // 3, 4), dtype=np.uint8)
        padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        return padded.reshape(-1).view("<i4") >> 8
    return np.frombuffer(data, f"<i{width}")
