"""Samples as other libraries compute them: OpenCV, Pillow, pycocotools."""

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco


def by_hand(dataset, row, size, resample):
    """One sample from its plan row with cv2, Pillow and pycocotools alone: image [3, S, S] and mask, uint8."""
    grid, center = int(row["grid"]), row["center"]
    lines = [[size * j // grid for j in range(grid + 1)] for _ in range(2)]
    if grid == 2:
        lines = [[0, int(center[axis]), size] for axis in range(2)]
    image, mask = np.zeros((size, size, 3), np.uint8), np.zeros((size, size), np.uint8)
    for cell in range(grid * grid):
        (x0, x1), (y0, y1) = lines[0][cell % grid :][:2], lines[1][cell // grid :][:2]
        if x0 == x1 or y0 == y1:
            continue
        photo = row["images"][cell]
        pixels = np.asarray(Image.open(dataset.photo_path(photo)).convert("RGB"))
        runs = {"size": pixels.shape[:2], "counts": [pixels.shape[0] * pixels.shape[1]]}
        if cell == row["cell"]:
            begin, count = dataset.refs.rle_begin[row["ref"]], dataset.refs.rle_count[row["ref"]]
            runs["counts"] = dataset.rle_counts[begin : begin + count].tolist()
        dense = coco.decode(coco.frPyObjects(runs, *pixels.shape[:2]))
        shape = (x1 - x0, y1 - y0)
        if resample == "cv2-linear":
            image[y0:y1, x0:x1] = cv2.resize(pixels, shape, interpolation=cv2.INTER_LINEAR)
            mask[y0:y1, x0:x1] = cv2.resize(dense, shape, interpolation=cv2.INTER_NEAREST)
        else:
            image[y0:y1, x0:x1] = Image.fromarray(pixels).resize(shape, Image.Resampling.BILINEAR)
            mask[y0:y1, x0:x1] = Image.fromarray(dense).resize(shape, Image.Resampling.NEAREST)
    return image.transpose(2, 0, 1), mask


def letterbox_matrix(height, width, size):
    """CRIS's affine transform of a photo into a frame, float64 [2, 3]."""
    scale = min(size / height, size / width)
    right, bottom = width * scale, height * scale
    x, y = (size - right) / 2, (size - bottom) / 2
    photo = np.array([[0, 0], [width, 0], [0, height]], np.float32)
    frame = np.array([[x, y], [right + x, y], [x, bottom + y]], np.float32)
    return cv2.getAffineTransform(photo, frame)
