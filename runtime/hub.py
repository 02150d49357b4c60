"""Find a pretrained model (a local folder, the Hub's cache, the Hub) and name its exact weights."""

import hashlib
import json
import os
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers.utils import logging

from runtime.errors import UserError, out_of_memory
from runtime.files import read_json

WANTED = ["*.json", "*.safetensors", "*.txt", "*.model"]  # of a Hub repository


def is_id(name):
    """True for a Hub id, owner/name, that cannot be meant as a path.

    A checkpoint file ends in .pt, and a mistyped path begins with a folder that is there.
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
    """True for a Hub id whose config.json lies in the Hub's cache: a model that was found on the Hub."""
    return is_id(name) and isinstance(try_to_load_from_cache(name, "config.json"), str)


def find_model(name, flag):
    """Return the local folder that holds model `name`, a folder or a Hub id.

    The Hub's cache is tried first, then the Hub, once. Raises UserError naming `flag` when the
    model is nowhere, or incomplete.
    """
    folder, missing = look_here(name, flag)
    if folder and not missing:
        return folder
    if folder == Path(name):
        raise UserError(f"{flag} {name}: the folder has no {missing}")
    try:
        HfApi().model_info(name, timeout=10)  # one request, no retries: is there a Hub at all?
        return Path(snapshot_download(name, allow_patterns=WANTED))
    except HfHubHTTPError as error:
        why = f"the Hub answered: {str(error).splitlines()[0]}"
    except Exception as error:  # httpx, requests, ssl, socket: whatever the network throws
        why = f"the Hub cannot be reached ({type(error).__name__})"
    raise UserError(
        f"{flag} {name} is not in the local cache and {why}."
        f" Download the model elsewhere and pass its folder: {flag} /path/to/{name.split('/')[1]}"
    )


def look_here(name, flag):
    """Look for a model without the network: (its folder or None, the first file missing there or None).

    Raises UserError naming `flag` where `name` is neither a folder nor a Hub id.
    """
    if len(str(name)) < 1000 and os.path.isdir(name):
        return Path(name), _missing_files(Path(name))
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise UserError(f"{flag} {name}: neither a folder nor a Hub id such as facebook/vjepa2-…")
    try:
        cached = Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None, None
    except HFValidationError:
        raise UserError(f"{flag} {name}: neither a folder nor a Hub id") from None
    return cached, _missing_files(cached)


def _missing_files(folder):
    """The first file that a complete model folder would have and this one lacks, or None."""
    if not (folder / "config.json").is_file():
        return "config.json"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(read_json(index, "index of weights")["weight_map"].values()))
        except (KeyError, TypeError, AttributeError):
            return "usable model.safetensors.index.json"
        return next((s for s in shards if not (folder / s).is_file()), None)
    return None if (folder / "model.safetensors").is_file() else "model.safetensors"


def fingerprint(folder):
    """sha256 over config.json, the tokenizer and each weight file's name, size, first and last MiB.

    It depends on the content alone, so the Hub's copy of a model and a folder downloaded from it
    agree, and a fine-tuned one does not.
    """
    folder, digest, mib = Path(folder), hashlib.sha256(), 1 << 20
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    if (folder / "tokenizer.json").is_file():
        digest.update((folder / "tokenizer.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(mib))
            file.seek(max(0, size - mib))
            digest.update(file.read(mib))
    return digest.hexdigest()[:16]


def is_quantised(folder):
    """True if the model's configuration says that its weights are quantised."""
    config = read_json(Path(folder) / "config.json", "configuration")
    return isinstance(config, dict) and bool(config.get("quantization_config"))


def load_model(auto_class, folder, flag, **kwargs):
    """`load` for a model. Raises UserError if a weight is missing or has the wrong shape.

    transformers initialises such weights at random and only logs it. The same command would then write
    different captions each time, with the same fingerprint.
    """
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = load(auto_class, folder, flag, **kwargs)
    missing = sorted(info["missing_keys"])
    mismatched = sorted(name for name, *_ in info["mismatched_keys"])
    if missing or mismatched:
        keys, what = (missing, "are missing") if missing else (mismatched, "have the wrong shape")
        unexpected = sorted(map(str, info["unexpected_keys"])) if missing else []
        there = f"; the files have unexpected weights, e.g. {unexpected[0]}" if unexpected else ""
        raise UserError(
            f"{flag} {folder}: weights of {type(model).__name__} {what} ({len(keys)}, e.g. {keys[0]})"
            f"{there}. Save the model again with save_pretrained."
        )
    return model


def load(auto_class, folder, flag, **kwargs):
    """`auto_class.from_pretrained(folder)` without the network; failures become a UserError."""
    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it logs a table of keys, which `load_model` checks
    try:
        # a model may bring code of its own, which is never run; nor asked about on the terminal
        return auto_class.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **kwargs
        )
    except (
        *(OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError),
        *(ImportError, AttributeError, AssertionError, StrictDataclassError),
    ) as error:
        if out_of_memory(error):
            raise
        lines = (str(error).strip() or type(error).__name__).splitlines()
        why = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
        raise UserError(f"{flag} {folder} cannot be loaded: {why}") from None
    finally:
        logging.set_verbosity(level)
