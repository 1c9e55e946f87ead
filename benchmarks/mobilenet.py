"""Turn the plain arrays of a MobileNetV2 into a folder that transformers' AutoModel and AutoProcessor open.

    python benchmarks/mobilenet.py --weights mobilenet_v2_dequant_fp16.npz --output models/mobilenet-v2

The arrays are a TensorFlow network of width 1.0 with its batch norms folded in: weights ``w0`` to ``w52`` in torch's
layout and biases ``b0`` to ``b52``, the last pair the classifier over 1,001 ImageNet classes, which is left out. Any
MobileNetV2 of the Hub (google/mobilenet_v2_1.0_224) takes its place where there is a network.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoProcessor, MobileNetV2Config, MobileNetV2Model

from polyrep.errors import InputError
from polyrep.files import staged_folder, write_json


def convert(weights: Path) -> MobileNetV2Model:
    """The network, with each folded bias in the place of a batch norm that does nothing else.

    Raises:
        InputError: The file lacks an array, or one has another shape than this architecture's.
    """
    model = MobileNetV2Model(MobileNetV2Config(tf_padding=True)).eval()
    convolutions = [module for module in model.modules() if type(module).__name__ == "MobileNetV2ConvLayer"]
    with np.load(weights, allow_pickle=False) as arrays, torch.no_grad():
        for number, layer in enumerate(convolutions):
            for name, target in ((f"w{number}", layer.convolution.weight), (f"b{number}", layer.normalization.bias)):
                found = arrays[name].shape if name in arrays else None
                if found != tuple(target.shape):
                    raise InputError(
                        f"{weights}: {name} has shape {found}, but layer {number} of {len(convolutions)} of a "
                        f"MobileNetV2 of width 1.0 has {tuple(target.shape)}, so these are another network's."
                    )
                target.copy_(torch.from_numpy(arrays[name].astype(np.float32)))
            norm = layer.normalization
            norm.running_mean.zero_()
            norm.running_var.fill_(1.0)
            norm.weight.fill_((1.0 + norm.eps) ** 0.5)
    return model


def main() -> None:
    """Convert and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    with staged_folder(args.output) as staged:
        convert(args.weights).save_pretrained(staged)
        # The whole image, squeezed into a square: what a caption speaks of may lie at its edge.
        square = {"height": 224, "width": 224}
        plain = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_center_crop": False, "size": square}
        write_json(staged / "preprocessor_config.json", {"image_processor_type": "MobileNetV2ImageProcessor"} | plain)
        AutoProcessor.from_pretrained(staged).save_pretrained(staged)
    print(f"{args.output}: width {MobileNetV2Model.from_pretrained(args.output).conv_1x1.convolution.out_channels}")


if __name__ == "__main__":
    main()
