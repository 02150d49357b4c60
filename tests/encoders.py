"""Tiny random models of every type in `encoder.FAMILIES`, saved with a preprocessor's file."""

import json

import torch

from encoder import FAMILIES

ONE = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 64,
    "patch_size": 16,
}
MAP = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
PREDICTOR = {
    "pred_hidden_size": 24,
    "pred_num_attention_heads": 2,
    "pred_num_hidden_layers": 1,
}
CONFIGS = {  # type: (name of the model's class in transformers, without "Model"; configuration)
    "vjepa2": ("VJEPA2", ONE | PREDICTOR | {"crop_size": 64, "frames_per_clip": 8}),
    "videomae": ("VideoMAE", ONE | {"num_frames": 8}),
    "timesformer": ("Timesformer", ONE | {"num_frames": 8}),
    "vivit": ("Vivit", ONE | {"num_frames": 8, "tubelet_size": [2, 16, 16]}),
    "videoprism_vision_model": (
        "VideoPrismVision",
        ONE | {"num_frames": 8, "tubelet_size": [1, 16, 16]},
    ),
    "siglip_vision_model": ("SiglipVision", ONE),
    "clip_vision_model": ("CLIPVision", ONE),
    "dinov2": ("Dinov2", ONE),
    "dinov2_with_registers": ("Dinov2WithRegisters", ONE),
    "dinov3_vit": ("DINOv3ViT", ONE | {"num_register_tokens": 2}),
    "mobilenet_v2": ("MobileNetV2", {"image_size": 64, "depth_multiplier": 0.25}),
    "resnet": ("ResNet", MAP | {"embedding_size": 8}),
    "convnext": ("ConvNext", MAP),
    "convnextv2": ("ConvNextV2", MAP),
}
PREPROCESSOR = {
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.45, 0.45, 0.45],
    "image_std": [0.225, 0.225, 0.225],
    "size": {"height": 64, "width": 64},
}


def save(kind, folder, preprocessor=PREPROCESSOR, size=None):
    """Save a tiny model of a type and return it. size: pixels of a model with a feature map."""
    import transformers

    name, values = CONFIGS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**values)
    model = getattr(transformers, f"{name}Model")(config).eval()
    for module in model.modules():
        # the initial weights of MobileNetV2 are so small that it returns 0
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    model.save_pretrained(folder)
    if preprocessor and FAMILIES[kind].feature_map:
        # 256 pixels are larger than the receptive field
        preprocessor = preprocessor | {"size": {"shortest_edge": size or 256}}
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return model
