"""Weights of timm's models on the hub, and in its cache on this machine."""

import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

TIMEOUT = 3  # seconds to ask whether the hub is there
WEIGHTS = "model.safetensors"


def cached_weights(timm: Any, name: str) -> Path | None:
    """Return the file of a model's weights in the hub's cache; None where it is not there."""
    cfg = timm.models.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        return None
    from huggingface_hub import try_to_load_from_cache  # comes with timm

    tagged = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else str(cfg.architecture)
    repo = f"{cfg.hf_hub_id}{tagged}" if cfg.hf_hub_id.endswith("/") else cfg.hf_hub_id
    found = try_to_load_from_cache(repo, WEIGHTS)
    return Path(found) if isinstance(found, str) else None


def has_hub() -> bool:
    """Return whether the hub of models answers, within three seconds; it may be switched off."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    place = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(place, timeout=TIMEOUT):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
