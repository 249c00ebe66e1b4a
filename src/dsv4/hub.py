"""Fetching a checkpoint from a Hugging Face hub, and proving that it arrived whole."""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import os
from pathlib import Path

from .checkpoint import Checkpoint, Progress, check_space, is_weights
from .config import V4Config
from .errors import CheckpointError, DSV4Error

_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.md", "LICENSE*", "encoding/*")


def pull(
    repo: str,
    to: str | Path | None = None,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Fetch a checkpoint from a Hugging Face hub into ``to`` (default: its name), and verify it.

    Config, tokenizer, encoding and safetensors files, never code. The config is read before any
    weight is fetched. A dropped connection continues where it broke; after a kill, finished files
    are kept. Every file is compared with the hub's size and SHA-256, a damaged one is deleted so
    that the next call fetches it again, and the checkpoint is opened and checked. ``progress``
    counts verified bytes. The environment variable HF_ENDPOINT names another hub, HF_TOKEN logs
    in. Raises CheckpointError when the repo, network, disk or content is not as it must be.
    """
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    folder = Path(to) if to is not None else Path(repo.rsplit("/", 1)[-1])
    what = f"{repo}{'@' + revision if revision else ''} at {api.endpoint}"
    try:
        info = api.model_info(repo, revision=revision, files_metadata=True)
        files = {
            f.rfilename: f
            for f in info.siblings or []
            if any(fnmatch.fnmatchcase(f.rfilename, pattern) for pattern in _WANTED)
        }
        if "config.json" not in files or not any(is_weights(name) for name in files):
            raise CheckpointError(
                f"{what} is not a checkpoint",
                expected="config.json and safetensors files",
                got=", ".join(list(files)[:5]) or "neither",
            )
        folder.mkdir(parents=True, exist_ok=True)
        missing = {n: f.size or 0 for n, f in files.items() if not (folder / n).is_file()}
        check_space(folder, sum(missing.values()))
        api.hf_hub_download(repo, "config.json", revision=info.sha, local_dir=folder)
        V4Config.from_json(folder)
        api.snapshot_download(
            repo, revision=info.sha, local_dir=folder, allow_patterns=list(files), max_workers=4
        )
    except DSV4Error:
        raise
    except hub.GatedRepoError as e:
        raise CheckpointError(
            what, expected="access", got="a gated repo", hint="accept its terms and set HF_TOKEN"
        ) from e
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError) as e:
        missing_revision = isinstance(e, hub.RevisionNotFoundError)
        raise CheckpointError(
            f"{what} does not exist",
            expected="an existing revision" if missing_revision else "OWNER/NAME of a model repo",
            got=str(e).splitlines()[0],
            hint="check the spelling; private repos need HF_TOKEN",
        ) from e
    except Exception as e:  # the client raises whatever its HTTP library does
        full = isinstance(e, OSError) and e.errno == errno.ENOSPC
        hint = "free some space" if full else "check the network (HF_ENDPOINT, proxies), run again"
        raise CheckpointError(
            f"cannot fetch {what}",
            expected="a reachable hub and a writable disk",
            got=f"{type(e).__name__}: {e}",
            hint=hint,
        ) from e
    for name, remote in files.items():
        sha256 = remote.lfs.sha256 if remote.lfs else None
        _verify(folder / name, remote.size, sha256, remote.blob_id, progress)
    return Checkpoint.open(folder, check_values=True)


def _verify(
    file: Path,
    size: int | None,
    sha256: str | None,
    blob: str | None,
    progress: Progress | None,
) -> None:
    """Compare a file with the hub's metadata: SHA-256 for large files, the git id for others."""
    actual = file.stat().st_size if file.is_file() else -1
    got, expected = f"{actual:,} bytes", f"{size:,} bytes" if size is not None else "the file"
    good = actual >= 0 and size in (None, actual)
    if good and (sha256 or blob):
        digest = hashlib.sha256() if sha256 else hashlib.sha1(f"blob {actual}\0".encode())
        with file.open("rb") as f:
            while chunk := f.read(2**22):
                digest.update(chunk)
                if progress:
                    progress(len(chunk))
        got, expected = digest.hexdigest(), str(sha256 or blob)
        good = got == expected
    if not good:
        file.unlink(missing_ok=True)
        raise CheckpointError(
            f"{file.name} is not what the hub has; the damaged copy was deleted",
            expected=expected,
            got=got,
            hint="run the same command again: only this file is fetched anew",
        )
