"""Models of the library transformers, from a folder on this machine."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from hasten.models.sizes import Size

_log = logging.getLogger(__name__)

_NOT_PORTABLE = frozenset(
    {
        "_name_or_path",  # a path of this machine
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "auto_map",  # code beside the weights, which is never run
        "dtype",
        "torch_dtype",  # the weights are float32
        "id2label",
        "label2id",  # `num_outputs` says how many
        "transformers_version",
    }
)
"""Keys of a config that say where and how a model was stored, not what it computes."""


class HuggingFace(nn.Module):
    """A text encoder of transformers: token ids and mask in, class scores or a sentence's vector out.

    Nothing is downloaded and no code of the folder is run: the architecture has to be one of transformers' own. A head
    that the folder has no weights for starts at random and has to be trained. Weights are float32.

    Args:
        folder: `config.json` and `model.safetensors`, as `save_pretrained` writes them.
        config: what `config.json` holds, instead of a folder: the architecture with random weights.
        head: `classification` gives the logits, `embedding` the mean of the last layer's vectors over the tokens of the
            mask.
        num_outputs: classes; null: as the folder or config says. An embedding is as wide as the model.

    Raises:
        ValueError: transformers is not installed, the folder is incomplete or holds something else, or `num_outputs`
            does not fit.
    """

    def __init__(
        self,
        *,
        folder: str | None = None,
        config: Mapping[str, Any] | None = None,
        head: Literal["classification", "embedding"] = "classification",
        num_outputs: Size | None = None,
    ) -> None:
        super().__init__()
        if (folder is None) == (config is None):
            raise ValueError("HuggingFace needs either folder or config")
        if head not in ("classification", "embedding"):
            raise ValueError(f"HuggingFace: head must be classification or embedding, got {head!r}")
        self.head = head
        with _quiet():
            settings = _settings(folder, config, num_outputs if head == "classification" else None)
            if head == "embedding" and num_outputs not in (None, settings.hidden_size):
                raise ValueError(
                    f"HuggingFace: an embedding has the model's {settings.hidden_size} outputs, got "
                    f"num_outputs={num_outputs}"
                )
            model: Any = _random(settings, head) if folder is None else _trained(Path(folder), settings, head)
        if head == "embedding" and getattr(model, "pooler", None) is not None:
            model.pooler = None  # of the first token's vector, which the mean does without
        self.model: Any = model.float()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (B, num_outputs) or vectors (B, hidden_size).

        Args:
            input_ids: of tokens, (B, L) int64.
            attention_mask: 1 for tokens, 0 for padding, (B, L) int64.
        """
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask)
        if self.head == "classification":
            logits_BK: Tensor = outputs.logits
            return logits_BK
        vectors_BLH: Tensor = outputs.last_hidden_state
        mask_BL = attention_mask.to(vectors_BLH.dtype)
        return (vectors_BLH * mask_BL[:, :, None]).sum(1) / mask_BL.sum(1, keepdim=True).clamp(min=1)

    def portable_arguments(self) -> dict[str, Any]:
        """Arguments, as JSON-able data, that construct the same architecture without the folder."""
        settings = json.loads(json.dumps(self.model.config.to_dict()))
        return {
            "folder": None,
            "config": {name: value for name, value in settings.items() if name not in _NOT_PORTABLE},
            "head": self.head,
            "num_outputs": self.model.config.num_labels if self.head == "classification" else None,
        }


def _settings(folder: str | None, config: Mapping[str, Any] | None, num_outputs: int | None) -> Any:
    from transformers import CONFIG_MAPPING

    if config is None:
        file = Path(folder or "") / "config.json"
        if not file.is_file():
            raise ValueError(f"HuggingFace: folder={folder} has no config.json")
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"HuggingFace: {file} is no JSON: {error}") from error
    if not isinstance(config, Mapping) or "model_type" not in config:
        raise ValueError("HuggingFace: the config has no model_type, such as bert or distilbert")
    if config["model_type"] not in CONFIG_MAPPING:
        raise ValueError(f"HuggingFace: transformers has no model_type {config['model_type']!r}")
    known = {name: value for name, value in config.items() if name not in _NOT_PORTABLE - {"id2label", "label2id"}}
    known.pop("model_type")
    try:
        settings = CONFIG_MAPPING[config["model_type"]](**known)
    except Exception as error:  # its checks raise errors of their own
        raise ValueError(f"HuggingFace: the config is refused by transformers: {_line(error)}") from error
    if num_outputs is not None and num_outputs != settings.num_labels:
        settings.num_labels = num_outputs
    return settings


def _auto(head: str) -> Any:
    from transformers import AutoModel, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if head == "classification" else AutoModel


def _random(settings: Any, head: str) -> nn.Module:
    try:
        module: nn.Module = _auto(head).from_config(settings)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"HuggingFace: transformers has no {head} model of type {settings.model_type}: {_line(error)}"
        ) from error
    return module


def _trained(folder: Path, settings: Any, head: str) -> nn.Module:
    if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise ValueError(f"HuggingFace: folder={folder} has no model.safetensors; pickled weights are not read")
    try:
        module, found = _auto(head).from_pretrained(
            folder,
            config=settings,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that they can be told here
            output_loading_info=True,
        )
    except Exception as error:  # transformers and safetensors raise errors of their own
        raise ValueError(f"HuggingFace: folder={folder} can't be loaded: {_line(error)}") from error
    misshaped = [f"{name} {tuple(has)} instead of {tuple(wants)}" for name, has, wants in found["mismatched_keys"]]
    if misshaped:
        raise ValueError(
            f"HuggingFace: folder={folder} does not fit config.json and num_outputs={settings.num_labels}: "
            f"{_some(sorted(misshaped))}"
        )
    prefix = f"{module.base_model_prefix}."
    inner = prefix if head == "classification" else ""
    missing = sorted(found["missing_keys"])
    lost = [name for name in missing if name.startswith(inner) and "pooler" not in name.split(".")]
    if lost:
        raise ValueError(f"HuggingFace: folder={folder} has no weights for {_some(lost)} of a {settings.model_type}")
    fresh = [name for name in missing if not (head == "embedding" and "pooler" in name.split("."))]
    if fresh:
        _log.warning("%s has no weights for %s, which start at random: train them", folder, _some(fresh))
    assert isinstance(module, nn.Module)
    return module


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the bars and reports with which transformers tells of what is told here in one line."""
    try:
        from transformers.utils import logging as chatter
    except ImportError as error:
        raise ValueError("transformers is not installed: pip install 'hasten[transformers]'") from error
    verbosity, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    try:
        yield
    finally:
        chatter.set_verbosity(verbosity)
        if bars:
            chatter.enable_progress_bar()
