"""Find a pretrained model (local folder, Hub cache or Hub), load it and compute its fingerprint."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from runtime import cli
from runtime.errors import UserError, out_of_memory, refuse_file
from runtime.files import read_json
from runtime.names import list_files

DOWNLOADED = ["*.json", "*.safetensors", "*.txt", "*.model"]  # files of a Hub repository


def is_id(name):
    """Return True if `name` is a Hub id, owner/name, rather than a path.

    Names that end in .pt and names whose first part is an existing folder count as mistyped paths.
    """
    name = str(name)
    if (
        name.count("/") != 1
        or name.endswith(".pt")
        or not (name.isascii() and name.isprintable())
        or os.path.exists(name)
        or os.path.isdir(name.split("/")[0])
    ):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_cached(name):
    """Return True if `name` is a Hub id whose config.json is in the Hub cache, so the model is known."""
    return is_id(name) and isinstance(try_to_load_from_cache(name, "config.json"), str)


def record(key, name):
    """Return how a checkpoint or manifest names a model, as a dict with the entry `key`.

    A folder is named by its absolute path, so that it is found from every working directory. A Hub id is
    marked with "hub", because a relative folder, as older versions recorded it, may look the same.
    """
    if os.path.isdir(name):
        return {key: os.path.abspath(name)}
    return {key: str(name), "hub": True}


def recorded(key, entry, flag):
    """Return the model that `entry`, the result of `record`, names, as an argument for `find_model`.

    Raises UserError naming `flag` if the model is or may be a folder that is not there. The Hub is not
    asked for such a name, because it may have an unrelated model of that name.
    """
    name = entry[key]
    on_hub = entry.get("hub") is True or name in (cli.ENCODER, cli.LM)
    if on_hub or os.path.isdir(name) or (is_id(name) and is_complete(name)):
        return name
    download = f", or {flag} {name} if that is a model of the Hub" if is_id(name) else ""
    raise UserError(
        f"the checkpoint was trained with a model in the folder {name}, which does not exist here. If you"
        f" have it elsewhere, pass {flag} FOLDER{download}."
    )


def locate(key, entry, expected, checkpoint):
    """Find the folder in the result of `record` if it does not exist, among the folders around a checkpoint.

    A run and its models may have moved together, so the end of the recorded path is looked for. Older
    versions recorded paths relative to the working directory, which usually is one of these folders.
    expected: the fingerprint of the model; folders with another one are passed over.
    """
    name = entry[key]
    if entry.get("hub") or os.path.isdir(name):
        return
    parts = Path(name).parts
    ends = [Path(*parts[n:]) for n in range(1, len(parts))] if os.path.isabs(name) else [name]
    folders = (parent / end for end in ends for parent in Path(checkpoint).absolute().parents)
    entry[key] = next((str(f) for f in folders if _has_fingerprint(f, expected)), name)


def _has_fingerprint(folder, expected):
    with suppress(UserError, OSError):
        return os.path.isdir(folder) and fingerprint(folder) == expected
    return False


def is_complete(name):
    """Return True if all files of the Hub id `name` are in the Hub cache, so that the Hub is not asked."""
    folder, missing = look_here(name, "model")
    return bool(folder) and not missing


def find_model(name, flag):
    """Return the local folder of the model `name`, which is a folder or a Hub id.

    A Hub id is looked up in the Hub cache first and otherwise downloaded, without retries. Raises
    UserError naming `flag` if the model is not found or incomplete.
    """
    folder, missing = look_here(name, flag)
    if folder and not missing:
        return folder
    if folder == Path(name):
        raise UserError(f"{flag} {name}: the folder has no {missing}")
    try:
        HfApi().model_info(name, timeout=10)  # fails quickly if the Hub is unreachable
        return Path(snapshot_download(name, allow_patterns=DOWNLOADED))
    except HfHubHTTPError as error:
        why = f"the Hub answered: {str(error).splitlines()[0]}"
    except Exception as error:  # network errors of httpx, requests, ssl, socket, …
        why = f"the Hub cannot be reached ({type(error).__name__})"
    raise UserError(
        f"{flag} {name} is not a folder, is not in the local cache of the Hub, and {why}."
        f" Download the model elsewhere and pass its folder: {flag} /path/to/{name.split('/')[1]}"
    )


def look_here(name, flag):
    """Look for a model without using the network.

    Returns (its folder or None, the first file that is missing there or None). Raises UserError naming
    `flag` if `name` is neither a folder nor a Hub id.
    """
    refuse_file(name, flag)
    if os.path.isdir(name):
        return Path(name), _missing_files(Path(name))
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise UserError(f"{flag} {name}: neither a folder nor a Hub id such as owner/name")
    try:
        cached = Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None, None
    except HFValidationError:
        raise UserError(f"{flag} {name}: neither a folder nor a Hub id") from None
    return cached, _missing_files(cached)


def _missing_files(folder):
    """Return the first file that is missing in this model folder, or None if it is complete."""
    if not (folder / "config.json").is_file():
        return "config.json"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(read_json(index, "index of weights")["weight_map"].values()))
            return next((s for s in shards if not (folder / s).is_file()), None)
        except (KeyError, TypeError, AttributeError, OSError):  # OSError: a name that is too long
            return "usable model.safetensors.index.json"
    return None if (folder / "model.safetensors").is_file() else "model.safetensors"


def fingerprint(folder):
    """Hash config.json, tokenizer.json and the name, size, first and last MiB of each weight file.

    Returns the first 16 hex digits of the sha256. They do not depend on the location: the Hub cache and
    a folder downloaded from the Hub have the same fingerprint. A copy that differs only in the middle of
    its weight files has it, too.
    """
    folder, digest = Path(folder), hashlib.sha256()
    config = read_config(folder)
    config.pop("_name_or_path", None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    if (folder / "tokenizer.json").is_file():
        digest.update((folder / "tokenizer.json").read_bytes())
    for path in list_files(folder, ".safetensors"):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        hash_ends(digest, path, size, 1 << 20)
    return digest.hexdigest()[:16]


def hash_ends(digest, path, size, count):
    """Update a digest with the first and last `count` bytes of a file of `size` bytes."""
    with open(path, "rb") as file:
        digest.update(file.read(count))
        file.seek(max(0, size - count))
        digest.update(file.read(count))


def is_quantised(folder):
    """Return True if the model's configuration has a quantization_config."""
    return bool(read_config(folder).get("quantization_config"))


def read_config(folder):
    """Read the config.json of a model folder. Raises UserError if it is not a JSON object."""
    path = Path(folder) / "config.json"
    config = read_json(path, "configuration")
    if not isinstance(config, dict):
        raise UserError(f"configuration {path} must contain a JSON object")
    return config


def load_model(auto_class, folder, flag, unused=(), **kwargs):
    """Load a model like `load`. Raises UserError if a weight is missing or has the wrong shape.

    unused: prefixes of the weights that may be missing, because the result does not depend on them.
    transformers only logs this and initialises such weights at random, so each run of the same command
    would write different captions.
    """
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = load(auto_class, folder, flag, **kwargs)
    missing = sorted(k for k in info["missing_keys"] if not k.startswith(tuple(unused)))
    mismatched = sorted(name for name, *_ in info["mismatched_keys"])
    if missing or mismatched:
        keys, what = (missing, "are missing") if missing else (mismatched, "have the wrong shape")
        unexpected = sorted(map(str, info["unexpected_keys"])) if missing else []
        extra = f"; unexpected weights are present, e.g. {unexpected[0]}" if unexpected else ""
        raise UserError(
            f"{flag} {folder}: weights of {type(model).__name__} {what} ({len(keys)}, e.g. {keys[0]})"
            f"{extra}. Save the model again with save_pretrained."
        )
    return model


def load(auto_class, folder, flag, **kwargs):
    """Return `auto_class.from_pretrained(folder)`, loaded offline. Raises UserError if that fails."""
    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # hides the table of missing keys, which `load_model` checks
    try:
        # trust_remote_code=False: never run code from the model's folder, and do not prompt for it
        return auto_class.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **kwargs
        )
    except Exception as error:  # a damaged file can raise almost anything in transformers
        if out_of_memory(error):
            raise
        lines = (str(error).strip() or type(error).__name__).splitlines()
        why = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
        if "Unrecognized configuration class" in why:  # followed by a list of all classes
            why = f"it is a model of type {read_config(folder).get('model_type')!r}"
        raise UserError(f"{flag} {folder} cannot be loaded: {why}") from None
    finally:
        logging.set_verbosity(level)
