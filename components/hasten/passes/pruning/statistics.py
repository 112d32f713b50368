"""Batch normalization after pruning: `artefacts.statistics`, which quantization uses as well."""

from hasten.artefacts.statistics import estimate_statistics

__all__ = ["estimate_statistics"]
