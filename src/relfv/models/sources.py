"""Location and identity of a model, and the names of dtypes and quantisations: all without opening it.

Neither torch nor transformers is imported, so that what a user asks for can be checked in milliseconds.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from relfv.errors import InputError, first_line
from relfv.models.adapters import Adapter, adapter_in

DEMO = "demo"
"""The name of the model inside this package."""
DTYPE_NAMES = ("float32", "bfloat16", "float16")
"""Names of dtypes, as torch has them."""
DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
QUANTS = ("none", "8bit", "4bit")

_HASHED_SUFFIXES = (".safetensors", ".bin", ".json", ".model", ".txt", ".tiktoken", ".jinja")
_HASHED_WHOLE_UP_TO = 16 << 20
_BLOCK_BYTES = 64 << 10
_N_BLOCKS = 64


def dtype_name(dtype: str) -> str:
    """``auto`` or torch's name of a dtype, from that name or its short form. Raises InputError."""
    name = DTYPE_ALIASES.get(dtype, dtype)
    if name != "auto" and name not in DTYPE_NAMES:
        raise InputError(f"--dtype {dtype!r}: expected one of auto, {', '.join([*DTYPE_NAMES, *DTYPE_ALIASES])}")
    return name


def model_source(name: str) -> str:
    """Location of the model: a folder, a GGUF file or a hub id. Raises InputError for a path that is missing."""
    if name == DEMO:
        return str(Path(__file__).parents[1] / "demo" / "weights")
    path = Path(name)
    try:
        path = path.expanduser()
        path.stat()
    except FileNotFoundError:
        pass
    # A name that is too long or holds a NUL, a folder that may not be read, a user that is not known.
    except (OSError, ValueError, RuntimeError) as problem:
        why = problem.strerror if isinstance(problem, OSError) else problem
        raise InputError(
            f"--model {name[:200]!r}: cannot be opened ({why}); expected a model folder, a hub id or 'demo'"
        ) from None
    if not name:
        raise InputError("--model '': is empty; expected a model folder, a hub id or 'demo'")
    if path.is_dir():
        if not any((path / known).is_file() for known in ("config.json", "adapter_config.json")):
            raise InputError(f"--model {name!r}: the folder has no config.json; expected a Hugging Face model folder")
        return str(path)
    if path.is_file() and path.suffix == ".gguf":
        return str(path)
    if path.exists():
        raise InputError(f"--model {name!r}: is a file; expected a Hugging Face model folder, a .gguf file or a hub id")
    if path.is_symlink():
        raise InputError(
            f"--model {name!r}: is a link to {path.readlink()}, which is not there; expected a model folder, a hub "
            "id or 'demo'"
        )
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    in_a_folder_here = path.parent != Path() and path.parent.is_dir()
    if looks_like_path or not _is_hub_id(name) or (in_a_folder_here and _cached_commit(name) is None):
        raise InputError(f"--model {name!r}: no such folder; expected a model folder, a hub id or 'demo'")
    return name


def weights_source(name: str, revision: str = "") -> tuple[str, str | None]:
    """Location of a model's weights, those of its base model for an adapter, and the revision asked for.

    Raises InputError for a model that is not there, and for a revision of a folder.
    """
    source = model_source(name)
    if revision and Path(source).exists():
        kind = "folder" if Path(source).is_dir() else "file"
        raise InputError(
            f"--revision {revision!r}: {name!r} is a {kind}, and only models on the hub have revisions; leave it out, "
            "or name a hub id"
        )
    adapter = adapter_in(source)
    return (base_source(adapter), adapter.revision) if adapter else (source, revision or None)


def location(source: str, revision: str | None) -> tuple[str, dict[str, str]]:
    """Arguments of ``from_pretrained`` that open what is at ``source``: a folder or hub id, and the commit or the name
    of the GGUF file."""
    path = Path(source)
    if path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    return source, {} if path.is_dir() else {"revision": hub_commit(source, revision)}


def base_source(adapter: Adapter) -> str:
    """Location of the base model of an adapter. Raises InputError if it is not there."""
    try:
        source = model_source(adapter.base)
        location(source, adapter.revision)
    except InputError as problem:
        raise InputError(
            f"--model {str(adapter.folder)!r}: is an adapter for {adapter.base!r}, which cannot be opened "
            f"({problem}); write the base model's folder into base_model_name_or_path of its adapter_config.json"
        ) from None
    return source


def model_identity(name: str, revision: str = "") -> str:
    """Identity of the model in the fingerprint: a content hash of its folder or file, or hub id and commit.

    Raises InputError if the model is not on this machine nor, where there is a network, on the hub.
    """
    source, weights = model_source(name), weights_source(name, revision)
    of_adapter = f"{_identity(source)}+" if adapter_in(source) else ""
    return of_adapter + _identity(*weights)


def files_state(name: str, revision: str = "") -> dict[str, tuple[int, ...]]:
    """State in the file system of each file that a model is read from: device, inode, size and times. An edit that the
    sampled hash of ``model_identity`` misses shows here."""
    source = model_source(name)
    places = [snapshot(*weights_source(name, revision)), *([Path(source)] if adapter_in(source) else [])]
    paths = [path for place in places for path in (place.iterdir() if place.is_dir() else [place])]
    stats = {str(path.absolute()): path.stat() for path in paths if path.is_file()}
    return {path: (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in stats.items()}


def _identity(source: str, revision: str | None = None) -> str:
    if Path(source).is_dir():
        return f"folder-sha256:{_folder_hash(Path(source))}"
    if Path(source).is_file():
        return f"file-sha256:{_sampled_hash(Path(source)).hex()}"
    return f"hub:{source}@{hub_commit(source, revision)}"


def _folder_hash(folder: Path) -> str:
    """sha256 over the names and sampled contents of the files that make up a model; its path does not count.

    Small files (config, tokenizer, a demo model) are hashed whole, of a large weight file its size and blocks spread
    evenly from its start to its end. That takes milliseconds for 16 GB and tells checkpoints, fine-tunes and truncated
    copies apart; an edit of a few megabytes within a large file may be missed.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in _HASHED_SUFFIXES:
            digest.update(path.name.encode() + b"\0" + _sampled_hash(path) + b"\0")
    return digest.hexdigest()


def _sampled_hash(path: Path) -> bytes:
    size = path.stat().st_size
    if size <= _HASHED_WHOLE_UP_TO:
        return hashlib.sha256(path.read_bytes()).digest()
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(_N_BLOCKS):
            file.seek((size - _BLOCK_BYTES) * i // (_N_BLOCKS - 1))
            digest.update(file.read(_BLOCK_BYTES))
    return digest.digest()


def hub_commit(repo_id: str, revision: str | None = None) -> str:
    """The commit of a hub model that is used: the one in the local cache, else the newest, which is then cached.

    Tokenizer and weights are loaded at this commit, so that a later push to the hub does not change a run half-way.
    Raises InputError if its config is not in the cache and cannot be fetched.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    cached = _cached_commit(repo_id, revision)
    if cached is None:
        what = f"config at revision {revision!r}" if revision else "config"
        try:  # one request: without a network a download would try five times, for half a minute
            HfApi().model_info(repo_id, revision=revision, timeout=10)
        except HfHubHTTPError:  # the hub can be reached, and tells below why the file cannot be had
            pass
        except Exception as problem:  # of whichever library makes the request
            why = f"it is not in the local cache, and the hub cannot be reached ({problem})"
            raise unreadable(repo_id, what, ConnectionError(why)) from problem
        try:
            hf_hub_download(repo_id, "config.json", revision=revision)
        except Exception as problem:  # no such repo, no access: many kinds, all mean it cannot be had
            raise unreadable(repo_id, what, problem) from problem
        cached = _cached_commit(repo_id, revision)
    if cached is None:
        raise InputError(f"--model {repo_id!r}: its config was fetched but is not in the Hugging Face cache")
    return cached


def hub_file(repo_id: str, name: str, revision: str | None = None) -> Path:
    """A file of a hub model in the local cache, at the commit that is used. Raises InputError if it is not there."""
    from huggingface_hub import hf_hub_download

    commit = hub_commit(repo_id, revision)
    try:
        return Path(hf_hub_download(repo_id, name, revision=commit))
    except Exception as problem:  # as in hub_commit
        raise unreadable(repo_id, name, problem) from problem


def snapshot(source: str, revision: str | None = None) -> Path:
    """The folder or file ``source``, or a hub model's folder in the local cache, where weights may be yet to come."""
    return Path(source) if Path(source).exists() else hub_file(source, "config.json", revision).parent


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _cached_commit(repo_id: str, revision: str | None = None) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else None


def _is_gated(problem: BaseException | None) -> bool:
    """Whether the hub asks for a login, said by huggingface_hub itself or through an error of transformers."""
    from huggingface_hub.errors import GatedRepoError

    while problem is not None:
        if isinstance(problem, GatedRepoError):
            return True
        problem = problem.__cause__ or problem.__context__
    return False


def unreadable(name: str, what: str, problem: Exception) -> InputError:
    """The error for a model whose ``what`` (config, tokenizer, model) cannot be opened, with the first line of why."""
    if "Weights only load failed" in first_line(problem):  # PyTorch goes on to recommend what must not be done
        return InputError(
            f"--model {name!r}: its weights are a damaged pickle, or one that holds more than tensors, and no code in "
            "weights is ever run; expected safetensors, or a .bin file of tensors"
        )
    if _is_gated(problem):
        return InputError(
            f"--model {name!r}: is a gated model, and no token that may read it was found; accept its terms at "
            f"https://huggingface.co/{name}, then log in ('hf auth login', or set HF_TOKEN)"
        )
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") and not Path(name).exists() else ""
    here = "" if Path(name).exists() else "no such folder or file is here, and relfv "
    return InputError(
        f"--model {name!r}: {here}cannot open its {what}{offline}: {first_line(problem)}; "
        "expected a Hugging Face model folder, a GGUF file, a model in the local cache or on the hub, or 'demo'"
    )
