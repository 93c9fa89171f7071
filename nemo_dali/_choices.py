"""The values that options take. Nothing heavy is imported, so that commands get them fast and on any machine."""

from typing import Literal

Resample = Literal["cv2-linear", "pillow-bilinear"]
DaliDType = Literal["float32", "float16", "uint8"]  # of frames that DALI passes on: it has no bfloat16
DType = Literal[DaliDType, "bfloat16"]  # of the Loader's frames
PeerDType = Literal["float32", "uint8"]  # of the frames that `bench peers` compares
MaskDType = Literal["uint8", "int64", "float32"]
GRIDS = (1, 2, 3)  # cells a side; from 2 on they are mosaics
Placement = Literal["host", "pinned", "device"]  # of resident tiles
BoxFormat = Literal["xywh", "xyxy", "rel_xywh", "rel_xyxy"]  # of boxes in JSON lines
# Photos that EXIF turns are shown as stored, shown as viewers show them, or refused.
Exif = Literal["ignore", "apply", "refuse"]
LayoutName = Literal["refcoco", "refclef", "grefcoco", "ref-zom"]  # of generated data sets
