"""The digits of scikit-learn: 1,797 images of 8x8 that need no network."""

import io

import datasets
import numpy as np
from PIL import Image

from hf_diffusion.data.source import Source


def digits() -> Source:
    """All digits with their classes; ImportError, in words, without scikit-learn."""
    try:
        # Here, since scikit-learn is needed for nothing else.
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the data set 'digits' comes with scikit-learn; run `pip install scikit-learn`") from error
    digits = load_digits()
    encoded = []
    for levels in np.rint(digits.images * 255 / 16).astype(np.uint8):
        Image.fromarray(levels).save(buffer := io.BytesIO(), "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    names = [str(digit) for digit in digits.target_names]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    dataset = datasets.Dataset.from_dict({"image": encoded, "label": digits.target.tolist()}, features=features)
    remark = "grey levels 0..16 of scikit-learn's digits are scaled to round(level * 255 / 16)"
    return Source(dataset, "digits", given=[remark], splits={"train": len(dataset)})
