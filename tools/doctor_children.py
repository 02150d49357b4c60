"""The checks of doctor.py that run in child processes, which import nothing else of the project."""

import av
import torch


def gpu_properties():
    """Compute something on the first GPU and return its properties."""
    facts = {"built_for": torch.version.cuda, "name": None}
    if torch.cuda.is_available():
        torch.ones(1, device="cuda").sum().item()  # fails if torch has no kernels for this GPU
        gpu = torch.cuda.get_device_properties(0)
        facts |= {"name": gpu.name, "bytes": gpu.total_memory, "count": torch.cuda.device_count()}
        facts["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
    return facts


def missing_decoders():
    """Return the formats that this build of PyAV cannot decode."""

    def is_available(decoder):
        try:
            return bool(av.codec.Codec(decoder, "r"))
        except av.codec.codec.UnknownCodecError:
            return False

    # not FFmpeg's native "av1" decoder, which needs a GPU
    decoders = {"VP9": ["vp9"], "H.264": ["h264"], "AV1": ["libdav1d", "libaom-av1"]}
    return [name for name, any_of in decoders.items() if not any(map(is_available, any_of))]
