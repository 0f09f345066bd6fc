"""Classify images with an exported .onnx by numpy, onnxruntime and Pillow alone; other packages are refused.

    python tests/classify_alone.py FILE.onnx IMAGE...

prints the names of the classes, and the probabilities of each image, as JSON.
"""

import sys

REFUSED = {"torch", "torchvision", "timm", "fastai", "dms_fastai", "onnx", "onnxscript", "scipy", "sklearn"}


class Refuse:
    """Finds none of the packages that the machine of a user need not have."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"{name} is not for this machine", name=name)


sys.meta_path.insert(0, Refuse)

import json  # noqa: E402

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402


def main(file, *images):
    session = onnxruntime.InferenceSession(file)
    [pixels] = session.get_inputs()
    size = tuple(pixels.shape[:1:-1])
    fitted = [ImageOps.fit(Image.open(image).convert("RGB"), size, Image.Resampling.BILINEAR) for image in images]
    batch = np.stack([np.asarray(image).transpose(2, 0, 1) for image in fitted])
    [probabilities] = session.run(["probabilities"], {"pixels": batch})
    classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
    assert not REFUSED & sys.modules.keys()
    print(json.dumps([classes, probabilities.tolist()]))


if __name__ == "__main__":
    main(*sys.argv[1:])
