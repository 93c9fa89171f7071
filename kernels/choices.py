"""The values that options of several modules take. Nothing is imported, so that ``doctor`` has them on any machine."""

from typing import Literal

Resample = Literal["cv2-linear", "pillow-bilinear"]
DaliDType = Literal["float32", "float16", "uint8"]  # of frames that DALI passes on: it has no bfloat16
DType = Literal[DaliDType, "bfloat16"]  # of the Loader's frames
MaskDType = Literal["uint8", "int64", "float32"]
GRIDS = (1, 2, 3)  # cells a side; from 2 on they are mosaics
