"""An exported folder on a hub of models."""

from pathlib import Path
from typing import Any

from fastlt.errors import MissingExtra, UserError


def check_push(to: Path) -> Any:
    """Return huggingface_hub. UserError, before anything is written, where it cannot be used."""
    if to.suffix:
        raise UserError(f"--push is for folders, and {to} is a file: name one without an ending")
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingExtra(
            "--push needs huggingface_hub, which comes with timm: pip install 'fastlt[timm]'"
        ) from error
    return huggingface_hub


def push_folder(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder to a repository, made where there is none yet; return where it is.

    The hub's address and the token are those of huggingface_hub (HF_ENDPOINT, HF_TOKEN). Raises
    UserError where the hub refuses or cannot be reached; the folder stays.
    """
    hub = check_push(folder)
    api = hub.HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Model by fastlt")
    except Exception as error:  # of httpx, of huggingface_hub, or ValueError for a bad name
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"could not push to {repo} ({reason}): {folder} is whole; set HF_TOKEN or log in, and "
            "export again with --force"
        ) from error
    return f"pushed to {repo}: timm.create_model('hf-hub:{repo}', pretrained=True)"
