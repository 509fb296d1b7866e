"""The values that an option of `embed` may have, as types; `typing.get_args` lists them."""

import os
from typing import Literal

StrPath = str | os.PathLike[str]

Content = Literal["images", "texts", "pairs"]  # of a source; a pair is an image with its caption
Side = Literal["text", "image"]  # of the result
Precision = Literal["fp32", "bf16"]  # of the model
RowDtype = Literal["float16", "float32"]  # of the rows on disk
Mode = Literal["incremental", "overwrite"]
