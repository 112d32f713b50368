"""Deterministic steps from the columns of a source to the inputs of a model, kept in the deployed artefact."""

from hasten.data.transforms.decode_image import DecodeImage
from hasten.data.transforms.hugging_face_tokens import HuggingFaceTokens
from hasten.data.transforms.log_mel import LogMel
from hasten.data.transforms.rename import Rename
from hasten.data.transforms.reshape import Reshape
from hasten.data.transforms.scale import Scale
from hasten.data.transforms.select import Select
from hasten.data.transforms.stack import Stack
from hasten.data.transforms.standardize import Standardize
from hasten.data.transforms.tokens import Tokens

__all__ = [
    "DecodeImage",
    "HuggingFaceTokens",
    "LogMel",
    "Rename",
    "Reshape",
    "Scale",
    "Select",
    "Stack",
    "Standardize",
    "Tokens",
]
